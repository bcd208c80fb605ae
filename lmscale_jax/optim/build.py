"""Builds the optimizer as one `optax` transformation, with factors for each parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmscale_jax.config.key import Modes
from lmscale_jax.config.keys import is_used
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import map_named
from lmscale_jax.optim import layerwise, schedules
from lmscale_jax.optim.layerwise import average_weights
from lmscale_jax.optim.optimizers import DECAY_MODES, OPTIMIZERS
from lmscale_jax.optim.rules import UpdateRule, update_rules

# (shrinkage, direction, parameter) -> shrinkage by weight decay. "cautious": only of the entries
# that the direction moves towards 0 (Chen et al. 2025, arXiv 2510.12402).
SHRINKING = Modes(
    "optim.decay_where",
    {
        "everywhere": lambda shrink, u, p: shrink,
        "cautious": lambda shrink, u, p: jnp.where(u * p >= 0, shrink, 0.0),
    },
)


def build_optimizer(
    config, param_rules: dict, mesh=None, platform: str = "cpu"
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a resolved config: clip, direction, rate and decay, freezing.

    `update` takes two keywords. `step` is the number of batches consumed, so the schedule also
    advances when a step is skipped. `block_factors` [layers] multiplies the update of each block,
    and not its decay.
    Each parameter belongs to the group of its rule's `optimizer`. `platform` decides the type of
    Muon's products; `mesh` distributes its matrices, None keeps them on one device. Learning rates
    and weight decay may be traced.
    """
    optim, rules = config.optim, update_rules(param_rules, config)
    groups = {
        name: _direction(name, config, rules, mesh, platform)
        for name in sorted({rule.optimizer for rule in rules.values()})
    }
    if len(groups) == 1:
        (inner,) = groups.values()
    else:
        inner = optax.partition(
            groups, lambda tree: map_named(lambda path, _: rules[path].optimizer, tree)
        )
    clip = [clip_by_global_norm(optim.clip)] if optim.clip else []
    parts = [inner, scale_and_decay(config, rules)]
    if around := OPTIMIZERS[optim.name].around:
        _check_block_factors(config)
        parts = [around(optax.chain(*parts), config)]
    parts = [*clip, *parts]
    unfreeze_step_L = layerwise.unfreeze_steps(config)
    if unfreeze_step_L is not None:
        parts = [layerwise.hold_frozen(optax.chain(*parts), unfreeze_step_L)]
    parts.append(layerwise.drop_frozen(unfreeze_step_L))
    if optim.ema_decay:
        parts.append(average_weights(optim.ema_decay))
    return optax.chain(*parts)


def _check_block_factors(config) -> None:
    """Raises InputError where single blocks are treated apart by an optimizer that averages.

    Its updates are not proportional to factors, and its weights count the steps of all blocks.
    """
    optim, mur = config.optim, config.mur
    for name, value, plain in (
        ("optim.block_lr_decay", optim.block_lr_decay, 1.0),
        ("freeze.mode", config.freeze.mode, "none"),
        ("mur.apply_to", mur.apply_to if is_used(config, "mur.apply_to") else "grads", "grads"),
    ):
        if value != plain:
            raise InputError(
                f"config.{name}={value!r} treats blocks apart, but updates of optim.name="
                f"{optim.name!r} follow from what it averages over all of them; use {plain!r}"
            )


def _direction(name: str, config, rules: dict[str, UpdateRule], mesh, platform: str):
    """Builds one optimizer's direction, before learning rate and decay, for its parameters."""
    optimizer = OPTIMIZERS[name]
    group_rules = {path: rule for path, rule in rules.items() if rule.optimizer == name}
    direction = optimizer.direction(config, group_rules, mesh, platform)
    if optimizer.counts_steps and layerwise.unfreeze_steps(config) is not None:
        # Adam's bias correction of a block counts from that block's first step.
        direction = layerwise.per_block(direction)
    if any(rule.eps_factor != 1.0 for rule in group_rules.values()):
        return optax.chain(divide_by_eps_factor(rules), direction)
    return direction


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients with a norm above `limit` down to it.

    optax's transformation of that name divides each gradient, which XLA stores. The product with
    one number is fused into the loops that read the gradients.
    """

    def scaled(grads, _):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(scaled)


def divide_by_eps_factor(rules: dict[str, UpdateRule]) -> optax.GradientTransformation:
    """Gives each parameter its epsilon: Adam's update of g / f with eps is that of g with f eps."""

    def divided(path, g):
        return g if isinstance(g, optax.MaskedNode) else g / rules[path].eps_factor

    def update(updates, state, params=None):
        return map_named(divided, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_and_decay(config, rules: dict[str, UpdateRule]) -> optax.GradientTransformationExtraArgs:
    """Turns a direction u into the update -(lr(t) f u + decay(t) p) of each parameter p.

    f is the rule's learning-rate factor. "independent": decay(t) = weight_decay * s(t), where s is
    the schedule with peak 1; "coupled": weight_decay * lr(t) * f as in PyTorch, where f is without
    its part of the size. The keyword `block_factors` [layers] multiplies u, and not the decay;
    optim.block_lr_decay is a factor of the learning rate.
    """
    factor = schedules.make_schedule(config)
    optim, lr_factor_L = config.optim, layerwise.block_lr_factors(config)

    # A traced number may be anything, so only a constant 0 leaves the decay out.
    decays = not (isinstance(optim.weight_decay, float) and optim.weight_decay == 0)

    def update(updates, state, params, *, step, block_factors=None, **_):
        s = factor(step)

        def of_block(factor_L, path, x):
            if factor_L is None or not path.startswith("blocks/"):
                return x
            factor_R = factor_L[np.array(rules[path].spec.layers)]
            return layerwise.broadcast_blocks(factor_R, x) * x

        def change_of(path, u):
            rule, p = rules[path], _param_at(params, path)
            peak = optim[OPTIMIZERS[rule.optimizer].peak]
            decay_rate = s * (peak * (rule.lr_factor / rule.lr_factor_of_size))
            change = of_block(lr_factor_L, path, s * (peak * rule.lr_factor) * u)
            change = of_block(block_factors, path, change)
            if rule.decay and decays:
                mode = DECAY_MODES[optim.decay_mode]
                shrink = mode.rate(s, decay_rate) * (optim.weight_decay * rule.decay) * p
                if mode.follows_lr:
                    shrink = of_block(lr_factor_L, path, shrink)
                change = change + SHRINKING[optim.decay_where](shrink, u, p)
            return -change

        return map_named(change_of, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer_choices(config, platform: str) -> dict[str, str]:
    """Describes what the optimizer of a resolved config chose or drew: {name: text}."""
    lines = OPTIMIZERS[config.optim.name].described(config, platform)
    unfreeze_step_L = layerwise.unfreeze_steps(config)
    if unfreeze_step_L is not None:
        begins = ["never" if s == layerwise.NEVER else f"step {s:,}" for s in unfreeze_step_L]
        lines = lines | {"freeze": "blocks learn from: " + ", ".join(begins)}
    return lines


def params_to_evaluate(config, params: dict, opt_state) -> dict:
    """Returns the parameters that stand for a run: those that are evaluated, sampled and exported.

    They are the trained ones but for an optimizer that evaluates another point, as schedule-free
    ones do. Whatever reads a trained model asks here, most by `train.run.Run.trained_params`.
    """
    evaluated = OPTIMIZERS[config.optim.name].evaluated
    return params if evaluated is None else evaluated(params, opt_state)


def _param_at(tree: dict, path: str) -> jax.Array:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def apply_updates(params, updates):
    """Adds updates to params, in the params' types."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), params, updates)
