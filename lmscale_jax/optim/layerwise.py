"""What treats the blocks one by one: factors of their updates, and blocks that do not learn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmscale_jax.optim.freezing import thaw_steps


def scale_blocks(factors: Callable | None) -> optax.GradientTransformationExtraArgs:
    """Multiplies each block's update by a factor, after the optimizer, so that none cancels it.

    `factors`: step -> [layers], or None where all are 1. The keyword `block_factors`, [layers],
    multiplies them. A block whose factor is 0 keeps its parameters to the bit.
    """

    def update(updates, state, params=None, *, step, block_factors=None, **_):
        given = [f for f in (factors and factors(step), block_factors) if f is not None]
        if not given:
            return updates, state
        factor_L = given[0] if len(given) == 1 else given[0] * given[1]

        def one(u):
            f = _beside(factor_L, u)
            # p + -0 is p, also for p = -0; and not-a-number times 0 would not be 0.
            return jnp.where(f == 0, -0.0, u * f)

        return updates | {"blocks": jax.tree.map(one, updates["blocks"])}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def factors(config) -> Callable | None:
    """Step -> [layers], from optim.block_lr_decay and the blocks that learn; None: all are 1."""
    n, thaw_L = config.model.n_layers, thaw_steps(config)
    decay_L = (config.optim.block_lr_decay ** np.arange(n - 1.0, -1.0, -1.0)).astype(np.float32)
    if thaw_L is None:
        return None if config.optim.block_lr_decay == 1 else lambda step: jnp.asarray(decay_L)
    return lambda step: jnp.where(step >= thaw_L, decay_L, 0.0)


def hold(inner, thaw_L: np.ndarray) -> optax.GradientTransformationExtraArgs:
    """`inner` without the gradients of frozen blocks; what it remembers of them stays as it is.

    So a block that begins to learn late begins with the state of a first step, and frozen ones have
    no part in the norm that gradients are clipped by.
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, *, step, **more):
        learning_L = step >= thaw_L

        def keep(new, old):
            return jnp.where(_beside(learning_L, new), new, old)

        blocks = jax.tree.map(lambda g: keep(g, jnp.zeros_like(g)), grads["blocks"])
        grads = grads | {"blocks": blocks}
        updates, after = inner.update(grads, state, params, step=step, **more)

        def one(path, new, old):
            return keep(new, old) if jax.tree_util.DictKey("blocks") in path else new

        return updates, jax.tree_util.tree_map_with_path(one, after, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def per_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with a state for each block, counters too: {"blocks": [layers, ...], "rest": ...}."""

    def apart(tree):
        return tree["blocks"], {name: node for name, node in tree.items() if name != "blocks"}

    def init(params):
        blocks, rest = apart(params)
        return {"blocks": jax.vmap(inner.init)(blocks), "rest": inner.init(rest)}

    def update(updates, state, params=None):
        blocks, rest = apart(updates)
        blocks, of_blocks = jax.vmap(lambda u, s: inner.update(u, s))(blocks, state["blocks"])
        rest, of_rest = inner.update(rest, state["rest"])
        return {"blocks": blocks, **rest}, {"blocks": of_blocks, "rest": of_rest}

    return optax.GradientTransformation(init, update)


def _beside(values_L: jax.Array, x: jax.Array) -> jax.Array:
    """[layers] shaped to broadcast against [layers, ...]."""
    return values_L.reshape(-1, *[1] * (x.ndim - 1))
