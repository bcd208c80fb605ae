"""Which blocks learn from which step on.

What treats the blocks one by one: factors of their updates, and blocks that do not learn.

A running mean of the weights, to be evaluated beside them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmscale_jax.config.blocks import block_numbers
from lmscale_jax.config.key import Modes

NEVER = np.iinfo(np.int32).max

# (number of blocks, generator) -> the blocks in the order in which they begin to learn.
ORDERS = Modes(
    "freeze.order",
    {
        "input": lambda n, chance: np.arange(n),
        "output": lambda n, chance: np.arange(n)[::-1],
        "random": lambda n, chance: chance.permutation(n),
    },
)


class Freezing(NamedTuple):
    """A rule of what is frozen.

    Attributes:
      thaw_steps: (config, generator) -> [layers] int32, the step from which each block learns,
        NEVER if none; None where all learn from the first.
      draws: the frozen blocks are drawn.
    """

    thaw_steps: Callable
    draws: bool = False


def unfreeze_steps(config) -> np.ndarray | None:
    """[layers] int32, the step from which each block learns, NEVER if none; None: all from 0."""
    chance = np.random.default_rng(config.freeze.seed)
    return FREEZING[config.freeze.mode].thaw_steps(config, chance)


def _without(config, frozen) -> np.ndarray:
    begins = np.zeros(config.model.n_layers, np.int32)
    begins[list(frozen)] = NEVER
    return begins


def _named(config, chance) -> np.ndarray:
    return _without(config, block_numbers(config.freeze.blocks))


def _drawn_of_all(config, chance) -> np.ndarray:
    n = config.model.n_layers
    return _without(config, chance.choice(n, config.freeze.count, replace=False))


def _drawn_near_input(config, chance) -> np.ndarray:
    near = _near_input(config)
    return _without(config, chance.choice(near, config.freeze.count, replace=False))


def _one_by_one(config, chance) -> np.ndarray:
    freeze, n = config.freeze, config.model.n_layers
    begins = np.zeros(n, np.int32)
    begins[ORDERS[freeze.order](n, chance)] = np.arange(n) * freeze.every
    return begins


def _near_input(config) -> int:
    return max(1, round(config.model.n_layers * config.freeze.near_input))


FREEZING = Modes(
    "freeze.mode",
    {
        "none": Freezing(lambda config, chance: None),
        "fixed": Freezing(_named),
        "random": Freezing(_drawn_of_all, draws=True),
        "random_near_input": Freezing(_drawn_near_input, draws=True),
        "unfreeze": Freezing(_one_by_one),
    },
)


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
            f = _beside_blocks(factor_L, u)
            # p + -0 is p, also for p = -0; and not-a-number times 0 would not be 0.
            return jnp.where(f == 0, -0.0, u * f)

        return updates | {"blocks": jax.tree.map(one, updates["blocks"])}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def block_factors(config) -> Callable | None:
    """Step -> [layers], from optim.block_lr_decay and the blocks that learn; None: all are 1."""
    n, thaw_L = config.model.n_layers, unfreeze_steps(config)
    decay_L = (config.optim.block_lr_decay ** np.arange(n - 1.0, -1.0, -1.0)).astype(np.float32)
    if thaw_L is None:
        return None if config.optim.block_lr_decay == 1 else lambda step: jnp.asarray(decay_L)
    return lambda step: jnp.where(step >= thaw_L, decay_L, 0.0)


def hold_frozen(inner, thaw_L: np.ndarray) -> optax.GradientTransformationExtraArgs:
    """`inner` without the gradients of frozen blocks; what it remembers of them stays as it is.

    So a block that begins to learn late begins with the state of a first step, and frozen ones have
    no part in the norm that gradients are clipped by.
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, *, step, **more):
        learning_L = step >= thaw_L

        def keep(new, old):
            return jnp.where(_beside_blocks(learning_L, new), new, old)

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


def _beside_blocks(values_L: jax.Array, x: jax.Array) -> jax.Array:
    """[layers] shaped to broadcast against [layers, ...]."""
    return values_L.reshape(-1, *[1] * (x.ndim - 1))


class WeightAverage(NamedTuple):
    """Attributes:
    count: updates taken in, int32.
    params: the mean.
    """

    count: jax.Array
    params: dict


def average_weights(decay: float) -> optax.GradientTransformation:
    """Remembers an exponential mean of the parameters; the last of a chain, changes no update.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the initial weights are
    forgotten early in a short run too (as in TensorFlow's ExponentialMovingAverage).
    """

    def init(params):
        return WeightAverage(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        t = state.count.astype(jnp.float32)
        share = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda a, p, u: a + share * (p + u - a), state.params, params, updates)
        return updates, WeightAverage(state.count + 1, mean)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state) -> dict | None:
    """The mean of the weights within an optimizer's state; None where none is kept."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, WeightAverage))
    return next((part.params for part in parts if isinstance(part, WeightAverage)), None)
