"""The optimizer as one `optax` transformation, its per-parameter factors from the rules' table."""

import jax
import jax.numpy as jnp
import optax

from lmscale_jax.model.param import map_named
from lmscale_jax.optim import schedules


def build(config, rows: dict) -> optax.GradientTransformationExtraArgs:
    """AdamW of a resolved config: clip, moments, then learning rate and decay.

    `update` takes the keyword `step`, the number of batches consumed: the schedule follows the
    data, also when a step was skipped. Its keyword `lr` takes the place of config.optim.lr, so that
    one program can train a population with a learning rate for each member.

    Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    optim = config.optim
    parts = [optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)]
    if any(row.eps_factor != 1.0 for row in rows.values()):
        parts.insert(0, divide_by_eps_factor(rows))
    if optim.clip:
        parts.insert(0, optax.clip_by_global_norm(optim.clip))
    parts.append(scale_and_decay(config, rows))
    return optax.chain(*parts)


def divide_by_eps_factor(rows: dict) -> optax.GradientTransformation:
    """An epsilon for each parameter: Adam's update of g / f with eps is that of g with f eps."""

    def update(updates, state, params=None):
        return map_named(lambda path, g: g / rows[path].eps_factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_and_decay(config, rows: dict) -> optax.GradientTransformationExtraArgs:
    """Turns a direction u into the update -(lr(t) f u + decay(t) p) of each parameter p.

    f is the row's learning-rate factor. "independent": decay(t) = weight_decay * s(t), where s is
    the schedule with peak 1; "coupled": weight_decay * lr(t) * f, as in PyTorch.
    """
    factor = schedules.make(config)
    optim = config.optim

    def update(updates, state, params, *, step, lr=optim.lr, **_):
        s = factor(step)

        def one(path, u):
            row, p = rows[path], _at(params, path)
            rate = s * (lr * row.lr_factor)
            decay = s if optim.decay_mode == "independent" else rate
            change = rate * u
            if row.decay and optim.weight_decay:
                change = change + decay * (optim.weight_decay * row.decay) * p
            return -change

        return map_named(one, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _at(tree: dict, path: str) -> jax.Array:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def apply(params, updates):
    """params + updates, in the parameters' own type."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), params, updates)
