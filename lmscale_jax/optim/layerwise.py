"""Transformations of single blocks (factors of updates, freezing) and the mean of the weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmscale_jax.config.blocks import block_numbers
from lmscale_jax.config.key import Modes

NEVER = np.iinfo(np.int32).max

# (number of blocks, generator) -> the blocks in the order in which they are unfrozen.
ORDERS = Modes(
    "freeze.order",
    {
        "input": lambda n, rng: np.arange(n),
        "output": lambda n, rng: np.arange(n)[::-1],
        "random": lambda n, rng: rng.permutation(n),
    },
)


def unfreeze_steps(config) -> np.ndarray | None:
    """Returns the step from which each block learns, [layers] int32; None: all from step 0."""
    rng = np.random.default_rng(config.freeze.seed)
    return FREEZING[config.freeze.mode](config, rng)


def _freeze_blocks(config, frozen) -> np.ndarray:
    step_L = np.zeros(config.model.n_layers, np.int32)
    step_L[list(frozen)] = NEVER
    return step_L


def _freeze_named(config, rng) -> np.ndarray:
    return _freeze_blocks(config, block_numbers(config.freeze.blocks))


def _freeze_random(config, rng) -> np.ndarray:
    n = config.model.n_layers
    return _freeze_blocks(config, rng.choice(n, config.freeze.count, replace=False))


def _freeze_near_input(config, rng) -> np.ndarray:
    near = _blocks_near_input(config)
    return _freeze_blocks(config, rng.choice(near, config.freeze.count, replace=False))


def _unfreeze_in_order(config, rng) -> np.ndarray:
    freeze, n = config.freeze, config.model.n_layers
    step_L = np.zeros(n, np.int32)
    step_L[ORDERS[freeze.order](n, rng)] = np.arange(n) * freeze.every
    return step_L


def _blocks_near_input(config) -> int:
    return max(1, round(config.model.n_layers * config.freeze.near_input))


# (config, generator) -> [layers] int32, the step from which each block learns, or NEVER; None: all
# learn from the first step.
FREEZING = Modes(
    "freeze.mode",
    {
        "none": lambda config, rng: None,
        "fixed": _freeze_named,
        "random": _freeze_random,
        "random_near_input": _freeze_near_input,
        "unfreeze": _unfreeze_in_order,
    },
)


def block_lr_factors(config) -> np.ndarray | None:
    """Returns each block's factor of the learning rate, [layers]; None: all are 1."""
    decay, n = config.optim.block_lr_decay, config.model.n_layers
    return None if decay == 1 else (decay ** np.arange(n - 1.0, -1.0, -1.0)).astype(np.float32)


def drop_frozen(unfreeze_step_L: np.ndarray | None) -> optax.GradientTransformationExtraArgs:
    """Drops the updates of frozen blocks, which so keep their parameters to the bit."""

    def update(updates, state, params=None, *, step, **_):
        if unfreeze_step_L is None:
            return updates, state

        def kept(u):
            # p + -0 is p, also for p = -0.
            return jnp.where(broadcast_blocks(step >= unfreeze_step_L, u), u, -0.0)

        return updates | {"blocks": jax.tree.map(kept, updates["blocks"])}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def hold_frozen(inner, unfreeze_step_L: np.ndarray) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that frozen blocks have no gradients and their state does not change.

    So a block that is unfrozen late begins with the state of a first step, and frozen blocks do
    not count in the norm that gradients are clipped by.
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, *, step, **options):
        learning_L = step >= unfreeze_step_L

        def keep(new, old):
            return jnp.where(broadcast_blocks(learning_L, new), new, old)

        blocks = jax.tree.map(lambda g: keep(g, jnp.zeros_like(g)), grads["blocks"])
        grads = grads | {"blocks": blocks}
        updates, new_state = inner.update(grads, state, params, step=step, **options)

        def hold(path, new, old):
            return keep(new, old) if jax.tree_util.DictKey("blocks") in path else new

        return updates, jax.tree_util.tree_map_with_path(hold, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def per_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gives `inner` a state per block, counters too: {"blocks": [layers, ...], "rest": ...}."""

    def split_tree(tree):
        return tree["blocks"], {name: node for name, node in tree.items() if name != "blocks"}

    def init(params):
        blocks, others = split_tree(params)
        # Without gains and biases, beside Muon, a block has no parameter of this optimizer.
        block_state = jax.vmap(inner.init)(blocks) if jax.tree.leaves(blocks) else ()
        return {"blocks": block_state, "rest": inner.init(others)}

    def update(updates, state, params=None):
        (blocks, others), block_state = split_tree(updates), state["blocks"]
        if jax.tree.leaves(blocks):
            blocks, block_state = jax.vmap(lambda u, s: inner.update(u, s))(blocks, block_state)
        others, other_state = inner.update(others, state["rest"])
        return {"blocks": blocks, **others}, {"blocks": block_state, "rest": other_state}

    return optax.GradientTransformation(init, update)


def broadcast_blocks(values_L: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [layers] to broadcast against [layers, ...]."""
    return values_L.reshape(-1, *[1] * (x.ndim - 1))


class WeightAverage(NamedTuple):
    """The running mean of the weights.

    Attributes:
      count: updates averaged, int32.
      params: the mean, a tree like the parameters.
    """

    count: jax.Array
    params: dict


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential mean of the parameters; the last of a chain, changes no update.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the initial weights fade
    early in short runs too (as in TensorFlow's ExponentialMovingAverage).
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
    """Returns the mean of the weights in an optimizer's state; None where none is kept."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, WeightAverage))
    return next((part.params for part in parts if isinstance(part, WeightAverage)), None)
