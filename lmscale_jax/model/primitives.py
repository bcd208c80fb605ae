"""The primitives of a training step: a plain definition of each, and faster rules for CPU.

Arrays are flat in tokens, N = B*T and sequence-major, and attention is flat in heads, B*H with B
major, so that every product has one contracting dimension: with [B, T, D] activations XLA's CPU
backend makes a transposed copy of each of them for the weight gradient, at twice the step time.

`plain` is the definition of every primitive and leaves derivatives to JAX, but for the type of a
weight's gradient. `cpu` computes the same
values with its own backward rules where they were measured to pay (docs/performance.md). They do
not keep what can be recomputed in one pass, and they arrange weight gradients for the fast kernels.
Everything is a pure function of arrays and works under jit, vmap, scan, checkpoint and sharding;
the CPU rules have reverse mode only (no jvp).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FLOAT = jnp.float32


class Primitives(NamedTuple):
    """One platform's set of primitives; shapes and types are those of the plain definitions."""

    dense: Callable
    layer_norm: Callable
    rms_norm: Callable
    attention: Callable
    cross_entropy: Callable


# --- Plain definitions --------------------------------------------------------------------------


@jax.custom_vjp
def dense(x_NxI: jax.Array, w_IxO: jax.Array) -> jax.Array:
    """x w, [N, O], computed in x's type from w cast to it; sums are kept in float32.

    The gradient of w is float32 before it gets w's type. JAX would round it to x's type on the way,
    once for each micro-batch that is added up.
    """
    return x_NxI @ w_IxO.astype(x_NxI.dtype)


def _plain_dense_forward(x_NxI, w_IxO):
    return dense(x_NxI, w_IxO), (x_NxI, w_IxO)


def _plain_dense_backward(saved, dy_NxO):
    x_NxI, w_IxO = saved
    dx_NxI = lax.dot_general(dy_NxO, w_IxO.astype(dy_NxO.dtype), (((1,), (1,)), ((), ())))
    return dx_NxI, _cast_product(x_NxI, dy_NxO, ((0,), (0,))).astype(w_IxO.dtype)


dense.defvjp(_plain_dense_forward, _plain_dense_backward)


def layer_norm(x_NxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016, arXiv 1607.06450), [N, D].

    Statistics are float32 over D, with the biased variance; the result has x's type.
    """
    y_NxD = _normalize(x_NxD, eps, centre=True)[0] * scale_D
    return (y_NxD if bias_D is None else y_NxD + bias_D).astype(x_NxD.dtype)


def rms_norm(x_NxD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv 1910.07467), [N, D].

    The mean is float32 over D; the result has x's type.
    """
    return (_normalize(x_NxD, eps, centre=False)[0] * scale_D).astype(x_NxD.dtype)


def attention(
    q_BHxTxd: jax.Array,
    k_BHxTxd: jax.Array,
    v_BHxTxd: jax.Array,
    *,
    scale: float,
    segments_BxT: jax.Array | None = None,
    window: jax.Array | int | None = None,
    window_block: int = 1,
    first: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax(scale q k^T) v (Vaswani et al. 2017, arXiv 1706.03762), [B*H, T, d].

    Scores, probabilities and both sums are float32; the result has q's type.

    Args:
      q_BHxTxd, k_BHxTxd, v_BHxTxd: as many key and value heads as query heads; B is major.
      scale: factor of the scores.
      segments_BxT: int32 document numbers; a query sees only keys of its own document.
      window: blocks of `window_block` tokens that a query sees, its own and those before it.
      first: where there are fewer queries than keys, which position the first of them has.
      dropout: rate at which probabilities are dropped, the others scaled up to the same mean.
      key: random key, needed if `dropout` is not 0.
    """
    q, k, v = (x.astype(FLOAT) for x in (q_BHxTxd, k_BHxTxd, v_BHxTxd))
    scores_BHxTxT = scale * jnp.einsum("btd,bsd->bts", q, k)
    scores_BHxTxT = _hide(scores_BHxTxT, (segments_BxT, window, first), window_block)
    p_BHxTxT = jax.nn.softmax(scores_BHxTxT, axis=-1)
    if dropout:
        keep = jax.random.bernoulli(key, 1 - dropout, p_BHxTxT.shape)
        p_BHxTxT = jnp.where(keep, p_BHxTxT / (1 - dropout), 0)
    return jnp.einsum("bts,bsd->btd", p_BHxTxT, v).astype(q_BHxTxd.dtype)


def cross_entropy(logits_NxV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [N] float32; 0 where the target is -1.

    The log-sum-exp is float32 whatever the type of the logits. Targets are int32.
    """
    logits_NxV = logits_NxV.astype(FLOAT)
    picked_N = jnp.take_along_axis(logits_NxV, jnp.maximum(targets_N, 0)[:, None], axis=1)[:, 0]
    return jnp.where(targets_N < 0, 0, jax.nn.logsumexp(logits_NxV, axis=1) - picked_N)


def _normalize(x_NxD, eps: float, centre: bool):
    """The normalised x and 1 / its scale, both float32: [N, D] and [N, 1]."""
    x_NxD = x_NxD.astype(FLOAT)
    if centre:
        x_NxD = x_NxD - x_NxD.mean(axis=-1, keepdims=True)
    rstd_Nx1 = lax.rsqrt(jnp.square(x_NxD).mean(axis=-1, keepdims=True) + eps)
    return x_NxD * rstd_Nx1, rstd_Nx1


def visible(queries: int, keys: int, segments_BxT, window, window_block: int, first) -> jax.Array:
    """Whether a key is not later than its query, not too far back and in the same document.

    [queries, keys], with `segments_BxT` [B, queries, keys]. The arguments are those of `attention`.
    """
    # Iotas, not an array of T^2 numbers, which would be a constant of the program in every layer.
    query, key = (_iota((queries, keys), axis) for axis in (0, 1))
    if first is not None:
        query = query + first
    seen = query >= key
    if window is not None:
        seen &= query // window_block - key // window_block < window
    if segments_BxT is None:
        return seen
    own = segments_BxT
    if first is not None:
        own = lax.dynamic_slice_in_dim(segments_BxT, first, queries, axis=1)
    return seen & (own[:, :, None] == segments_BxT[:, None, :])


def _hide(scores_BHxTxT, hidden: tuple, window_block: int):
    """Scores with -inf where a query does not see a key; `hidden`: segments, window, first.

    Every query sees itself, so that no row is empty and the softmax has no 0 / 0.
    """
    segments_BxT, window, first = hidden
    seen = visible(*scores_BHxTxT.shape[1:], segments_BxT, window, window_block, first)
    if seen.ndim == 2:
        return jnp.where(seen, scores_BHxTxT, -jnp.inf)
    scores_BxHxTxT = scores_BHxTxT.reshape(len(seen), -1, *scores_BHxTxT.shape[1:])
    return jnp.where(seen[:, None], scores_BxHxTxT, -jnp.inf).reshape(scores_BHxTxT.shape)


def _iota(shape: tuple[int, ...], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _cast_product(a, b, contract: tuple, batch: tuple = ((), ())):
    """A product of operands of one type with float32 sums and result.

    XLA's CPU kernels for bfloat16 are several times faster to a float32 result.
    """
    return lax.dot_general(a, b, (contract, batch), preferred_element_type=FLOAT)


# --- Rules for CPU ------------------------------------------------------------------------------


def _transposed_product(a_BxNxI, b_BxNxO):
    """a^T b for each leading index, [..., I, O] float32: the form of a weight gradient.

    A contraction over the first dimension of both operands is the one form that XLA's fast CPU
    kernels refuse. Over two dimensions it first makes a transposed copy, which costs little, and
    then takes the fast kernel. The barriers keep it from undoing the split, from fusing whatever
    made `a` into the copy, and from turning the product around to suit whoever reads it, for which
    bfloat16 may have no kernel at all ("Unsupported element type for DotThunk", at run time).
    """
    axis = a_BxNxI.ndim - 2
    batch = (tuple(range(axis)),) * 2
    n = a_BxNxI.shape[axis]
    contract = (axis,)
    if n % 2 == 0:
        contract = (axis, axis + 1)
        a_BxNxI, b_BxNxO = (
            x.reshape(*x.shape[:axis], n // 2, 2, x.shape[-1]) for x in (a_BxNxI, b_BxNxO)
        )
    a, b = lax.optimization_barrier((a_BxNxI, b_BxNxO))
    return lax.optimization_barrier(_cast_product(a, b, (contract, contract), batch))


@jax.custom_vjp
def _cpu_dense(x_NxI, w_IxO):
    """As `dense`; the gradient of w in a form that CPU's fast kernels take."""
    w_IxO, contract = w_IxO.astype(x_NxI.dtype), (((1,), (0,)), ((), ()))
    return lax.dot_general(x_NxI, w_IxO, contract, preferred_element_type=FLOAT).astype(x_NxI.dtype)


def _product_forward(x_NxI, w_IxO):
    return _cpu_dense(x_NxI, w_IxO), (x_NxI, w_IxO)


def _product_backward(saved, dy_NxO):
    x_NxI, w_IxO = saved
    dx_NxI = _cast_product(dy_NxO, w_IxO.astype(dy_NxO.dtype), ((1,), (1,))).astype(x_NxI.dtype)
    return dx_NxI, _transposed_product(x_NxI, dy_NxO).astype(w_IxO.dtype)


_cpu_dense.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cpu_layer_norm(x_NxD, scale_D, bias_D, eps):
    return layer_norm(x_NxD, scale_D, bias_D, eps)


def _layer_norm_forward(x_NxD, scale_D, bias_D, eps):
    return layer_norm(x_NxD, scale_D, bias_D, eps), (x_NxD, scale_D, bias_D)


def _layer_norm_backward(eps, saved, dy_NxD):
    x_NxD, scale_D, bias_D = saved
    dx_NxD, dscale_D = _norm_backward(x_NxD, scale_D, dy_NxD, eps, centre=True)
    if bias_D is None:
        return dx_NxD, dscale_D, None
    return dx_NxD, dscale_D, dy_NxD.astype(FLOAT).sum(axis=0).astype(bias_D.dtype)


_cpu_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_rms_norm(x_NxD, scale_D, eps):
    return rms_norm(x_NxD, scale_D, eps)


def _rms_norm_forward(x_NxD, scale_D, eps):
    return rms_norm(x_NxD, scale_D, eps), (x_NxD, scale_D)


def _rms_norm_backward(eps, saved, dy_NxD):
    return _norm_backward(*saved, dy_NxD, eps, centre=False)


_cpu_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _norm_backward(x_NxD, scale_D, dy_NxD, eps, centre: bool):
    """Gradients of x and scale: with y = x_hat * scale and g = dy * scale,

    dx = (g - [mean(g)] - x_hat mean(g x_hat)) / std, the middle term only where x was centred.
    """
    x_hat_NxD, rstd_Nx1 = _normalize(x_NxD, eps, centre)
    dy_NxD = dy_NxD.astype(FLOAT)
    g_NxD = dy_NxD * scale_D
    dx_NxD = g_NxD - x_hat_NxD * (g_NxD * x_hat_NxD).mean(axis=-1, keepdims=True)
    if centre:
        dx_NxD = dx_NxD - g_NxD.mean(axis=-1, keepdims=True)
    dscale_D = (dy_NxD * x_hat_NxD).sum(axis=0)
    return (dx_NxD * rstd_Nx1).astype(x_NxD.dtype), dscale_D.astype(scale_D.dtype)


def _cpu_attention(
    q_BHxTxd, k_BHxTxd, v_BHxTxd, *, scale, segments_BxT=None, window=None, window_block=1,
    first=None, dropout=0.0, key=None,
):  # fmt: skip
    """As `attention`, keeping the probabilities for the backward pass.

    With bfloat16 operands scores, softmax and sums are float32, while the probabilities, the
    gradient of the scores and that of the result are rounded to bfloat16 where they enter a
    product. Dropout takes the plain form.
    """
    if dropout:
        return attention(
            q_BHxTxd, k_BHxTxd, v_BHxTxd,
            scale=scale, segments_BxT=segments_BxT, window=window, window_block=window_block,
            first=first, dropout=dropout, key=key,
        )  # fmt: skip
    hidden = (segments_BxT, window, first)
    return _attend(q_BHxTxd, k_BHxTxd, v_BHxTxd, hidden, float(scale), window_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BHxTxd, k_BHxTxd, v_BHxTxd, hidden, scale, window_block):
    return _attend_forward(q_BHxTxd, k_BHxTxd, v_BHxTxd, hidden, scale, window_block)[0]


_HEADS = ((0,), (0,))


def _attend_forward(q_BHxTxd, k_BHxTxd, v_BHxTxd, hidden, scale, window_block):
    scores_BHxTxT = scale * _cast_product(q_BHxTxd, k_BHxTxd, ((2,), (2,)), _HEADS)
    scores_BHxTxT = _hide(scores_BHxTxT, hidden, window_block)
    p_BHxTxT = jax.nn.softmax(scores_BHxTxT, axis=-1).astype(q_BHxTxd.dtype)
    o_BHxTxd = _cast_product(p_BHxTxT, v_BHxTxd, ((2,), (1,)), _HEADS).astype(q_BHxTxd.dtype)
    return o_BHxTxd, (q_BHxTxd, k_BHxTxd, v_BHxTxd, p_BHxTxT, o_BHxTxd)


def _attend_backward(scale, window_block, saved, do_BHxTxd):
    """FlashAttention's backward formulas (Dao et al. 2022, arXiv 2205.14135, B.2), p in memory."""
    q_BHxTxd, k_BHxTxd, v_BHxTxd, p_BHxTxT, o_BHxTxd = saved
    dtype = q_BHxTxd.dtype
    # sum_s p dp, which the softmax's gradient needs, costs T/d times less from o.
    delta_BHxTx1 = (do_BHxTxd.astype(FLOAT) * o_BHxTxd.astype(FLOAT)).sum(axis=-1, keepdims=True)
    dp_BHxTxT = _cast_product(do_BHxTxd, v_BHxTxd, ((2,), (2,)), _HEADS)
    ds_BHxTxT = (scale * p_BHxTxT.astype(FLOAT) * (dp_BHxTxT - delta_BHxTx1)).astype(dtype)
    dq_BHxTxd = _cast_product(ds_BHxTxT, k_BHxTxd, ((2,), (1,)), _HEADS).astype(dtype)
    dk_BHxTxd = _transposed_product(ds_BHxTxT, q_BHxTxd).astype(dtype)
    dv_BHxTxd = _transposed_product(p_BHxTxT, do_BHxTxd).astype(dtype)
    return dq_BHxTxd, dk_BHxTxd, dv_BHxTxd, None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def _cpu_cross_entropy(logits_NxV, targets_N):
    """As `cross_entropy`, keeping the logits in their own type and N log-sum-exps, no softmax."""
    return cross_entropy(logits_NxV, targets_N)


def _cross_entropy_forward(logits_NxV, targets_N):
    lse_N = jax.nn.logsumexp(logits_NxV.astype(FLOAT), axis=1)
    picked_N = jnp.take_along_axis(logits_NxV, jnp.maximum(targets_N, 0)[:, None], axis=1)[:, 0]
    nll_N = jnp.where(targets_N < 0, 0, lse_N - picked_N.astype(FLOAT))
    return nll_N, (logits_NxV, targets_N, lse_N)


def _cross_entropy_backward(saved, dnll_N):
    logits_NxV, targets_N, lse_N = saved
    p_NxV = jnp.exp(logits_NxV.astype(FLOAT) - lse_N[:, None])
    onehot_NxV = targets_N[:, None] == _iota(p_NxV.shape, 1)
    weight_N = jnp.where(targets_N < 0, 0, dnll_N)
    return ((p_NxV - onehot_NxV) * weight_N[:, None]).astype(logits_NxV.dtype), None


_cpu_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


plain = Primitives(dense, layer_norm, rms_norm, attention, cross_entropy)
cpu = Primitives(_cpu_dense, _cpu_layer_norm, _cpu_rms_norm, _cpu_attention, _cpu_cross_entropy)

SETS = {"plain": plain, "cpu": cpu}
