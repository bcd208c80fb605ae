"""Cross-entropy of the next token: the definition, and one custom backward rule for each platform.

Both rules store the logits in their type and N log-sum-exps, and no softmax. The gradient of the
logits has their type, and the target is found by comparing ids, not by a scatter. They also take
logits whose columns a mesh axis splits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOAT = jnp.float32
# Below any logit, and finite: of two -inf the merge of `_one_pass` would make NaN.
LEAST = -1e30


def cross_entropy(logits_NxV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Computes -log softmax(logits)[target] in nats, [N] float32; 0 where the target is -1.

    The log-sum-exp is float32 for logits of any type. Targets are int32.
    """
    logits_NxV = logits_NxV.astype(FLOAT)
    picked_N = _pick(logits_NxV, targets_N)
    return jnp.where(targets_N < 0, 0, jax.nn.logsumexp(logits_NxV, axis=1) - picked_N)


def _pick(logits_NxV, targets_N):
    """Returns the logits of the targets, [N]; anything where a target is no column."""
    index_N = jnp.clip(targets_N, 0, logits_NxV.shape[1] - 1)
    return jnp.take_along_axis(logits_NxV, index_N[:, None], axis=1)[:, 0]


def _backward_rule(score: Callable) -> Callable:
    """Makes `cross_entropy` with a backward rule.

    `score(logits_NxV, targets_N)` returns the log-sum-exps of the rows and the logits of the
    targets, 0 of those that are no column, [N] float32.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def rule(logits_NxV, targets_N, first=0, axis: str | None = None):
        """Computes `cross_entropy`.

        Where a mesh axis splits the columns, `axis` is its name, inside `ShardingContext.shard`,
        and `first` the id of this device's first column.
        """
        return forward(logits_NxV, targets_N, first, axis)[0]

    def forward(logits_NxV, targets_N, first, axis):
        lse_N, picked_N = score(logits_NxV, targets_N - first)
        if axis:
            lse_N = jax.nn.logsumexp(lax.all_gather(lse_N, axis), axis=0)
            picked_N = lax.psum(picked_N, axis)
        nll_N = jnp.where(targets_N < 0, 0, lse_N - picked_N)
        return nll_N, (logits_NxV, targets_N, first, lse_N)

    def backward(axis, saved, dnll_N):
        logits_NxV, targets_N, first, lse_N = saved
        if axis:
            # JAX hands each device its share of the gradient of what all of them return.
            dnll_N = lax.psum(dnll_N, axis)
        p_NxV = jnp.exp(logits_NxV.astype(FLOAT) - lse_N[:, None])
        weight_N = jnp.where(targets_N < 0, 0, dnll_N)
        dlogits_NxV = (p_NxV - _is_target(targets_N - first, p_NxV.shape)) * weight_N[:, None]
        return dlogits_NxV.astype(logits_NxV.dtype), None, None

    rule.defvjp(forward, backward)
    return rule


def _two_passes(logits_NxV, targets_N):
    lse_N = jax.nn.logsumexp(logits_NxV.astype(FLOAT), axis=1)
    is_column_N = (targets_N >= 0) & (targets_N < logits_NxV.shape[1])
    return lse_N, jnp.where(is_column_N, _pick(logits_NxV, targets_N).astype(FLOAT), 0)


def _one_pass(logits_NxV, targets_N):
    """Reads the logits once.

    One reduction of triples (maximum, sum of exponentials over it, logit of the target) after
    Milakov and Gimelshein 2018 (arXiv 1805.02867). On CPU it would be scalar code.
    """
    x_NxV = jnp.maximum(logits_NxV.astype(FLOAT), LEAST)
    target_NxV = jnp.where(_is_target(targets_N, x_NxV.shape), x_NxV, 0)

    def merge(a, b):
        (top_a, sum_a, target_a), (top_b, sum_b, target_b) = a, b
        low = jnp.exp(-jnp.abs(top_a - top_b))
        total = jnp.where(top_a >= top_b, sum_a + low * sum_b, low * sum_a + sum_b)
        return jnp.maximum(top_a, top_b), total, target_a + target_b

    empty = (np.float32(LEAST), np.float32(0), np.float32(0))
    top_N, sum_N, picked_N = lax.reduce(
        (x_NxV, jnp.ones_like(x_NxV), target_NxV), empty, merge, (1,)
    )
    return top_N + jnp.log(sum_N), picked_N


def _is_target(targets_N, shape: tuple[int, int]):
    return targets_N[:, None] == lax.broadcasted_iota(jnp.int32, shape, 1)


cpu_cross_entropy, accelerator_cross_entropy = map(_backward_rule, (_two_passes, _one_pass))
