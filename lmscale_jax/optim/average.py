"""A running mean of the weights, to be evaluated beside them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Average(NamedTuple):
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
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        t = state.count.astype(jnp.float32)
        share = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda a, p, u: a + share * (p + u - a), state.params, params, updates)
        return updates, Average(state.count + 1, mean)

    return optax.GradientTransformation(init, update)


def averaged(opt_state) -> dict | None:
    """The mean of the weights within an optimizer's state; None where none is kept."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Average))
    return next((part.params for part in parts if isinstance(part, Average)), None)
