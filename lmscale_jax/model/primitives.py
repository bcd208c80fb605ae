"""The primitives of a training step: plain definitions, and custom backward rules.

Tokens are flat, N = B*T, sequence-major; attention is flat in heads, B*H with B major. So every
product has one contracting dimension: with [B, T, D] activations XLA's CPU backend makes transposed
copies for the weight gradients, at twice the step time.

`plain` defines every primitive and leaves derivatives to JAX, except the type of a weight's
gradient. `cpu` and `accelerator` compute the same values, with custom backward rules where
measurements, or the compiled program, favour them (docs/performance.md): they do not store what one
pass recomputes, and on CPU they arrange weight gradients for XLA's fast kernels. All are pure
functions of arrays and work under jit, vmap, scan, checkpoint and sharding; the rules have reverse
mode only (no jvp).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmscale_jax.model.cross_entropy import (
    accelerator_cross_entropy,
    cpu_cross_entropy,
    cross_entropy,
)

FLOAT = jnp.float32


class Primitives(NamedTuple):
    """A set of primitives; shapes and types are those of the plain definitions."""

    dense: Callable
    layer_norm: Callable
    rms_norm: Callable
    attention: Callable
    cross_entropy: Callable


# --- Plain definitions --------------------------------------------------------------------------


@jax.custom_vjp
def dense(x_NxI: jax.Array, w_IxO: jax.Array) -> jax.Array:
    """Computes x w, [N, O], in x's type with w cast to it; sums are float32.

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
    """Computes (x - mean) / sqrt(var + eps) * scale + bias, [N, D].

    Ba et al. 2016, arXiv 1607.06450. Statistics are float32 over D, with the biased variance; the
    result has x's type.
    """
    y_NxD = _normalize(x_NxD, eps, centre=True)[0] * scale_D
    return (y_NxD if bias_D is None else y_NxD + bias_D).astype(x_NxD.dtype)


def rms_norm(x_NxD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Computes x / sqrt(mean(x^2) + eps) * scale, [N, D].

    Zhang and Sennrich 2019, arXiv 1910.07467. The mean is float32 over D; the result has x's type.
    """
    return (_normalize(x_NxD, eps, centre=False)[0] * scale_D).astype(x_NxD.dtype)


def attention(
    q_BHxTxd: jax.Array,
    k_BHxTxd: jax.Array,
    v_BHxTxd: jax.Array,
    *,
    scale: float,
    first_key_BxT: jax.Array | None = None,
    last_key_1xT: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(scale q k^T) v, [B*H, T, d] (Vaswani et al. 2017, arXiv 1706.03762), over
    the keys that a query sees.

    Scores, probabilities and both sums are float32; the result has q's type.

    Args:
      q_BHxTxd, k_BHxTxd, v_BHxTxd: with as many key and value heads as query heads; B is major.
      scale: factor of the scores.
      first_key_BxT, last_key_1xT: the keys that each query sees, int32 [1 or B, T], both included;
        None: from key 0, and up to the query's own position. At least one for every query.
      dropout: dropout rate of the probabilities.
      key: random key; needed if `dropout` is not 0.
    """
    q, k, v = (x.astype(FLOAT) for x in (q_BHxTxd, k_BHxTxd, v_BHxTxd))
    scores_BHxTxT = scale * jnp.einsum("btd,bsd->bts", q, k)
    scores_BHxTxT = _mask_scores(scores_BHxTxT, first_key_BxT, last_key_1xT)
    p_BHxTxT = jax.nn.softmax(scores_BHxTxT, axis=-1)
    if dropout:
        keep = jax.random.bernoulli(key, 1 - dropout, p_BHxTxT.shape)
        p_BHxTxT = jnp.where(keep, p_BHxTxT / (1 - dropout), 0)
    return jnp.einsum("bts,bsd->btd", p_BHxTxT, v).astype(q_BHxTxd.dtype)


def _normalize(x_NxD, eps: float, centre: bool):
    """Returns normalized x and 1 / its scale, both float32: [N, D] and [N, 1]."""
    x_NxD = x_NxD.astype(FLOAT)
    if centre:
        x_NxD = x_NxD - x_NxD.mean(axis=-1, keepdims=True)
    rstd_Nx1 = lax.rsqrt(jnp.square(x_NxD).mean(axis=-1, keepdims=True) + eps)
    return x_NxD * rstd_Nx1, rstd_Nx1


def visible(queries: int, keys: int, first_key_BxT, last_key_1xT) -> jax.Array:
    """Computes the mask of `attention`: bool [queries, keys], or [1 or B, queries, keys] if the
    first or the last keys are given."""
    # Iotas, since an array of T^2 numbers would be a constant of the program in every layer.
    query, key = (_iota((queries, keys), axis) for axis in (0, 1))
    mask = key <= (query if last_key_1xT is None else last_key_1xT[:, :, None])
    return mask if first_key_BxT is None else mask & (key >= first_key_BxT[:, :, None])


def _mask_scores(scores_BHxTxT, first_key_BxT, last_key_1xT):
    """Sets scores to -inf where a query does not see a key.

    Every query sees a key, so that the softmax has no 0 / 0.
    """
    mask = visible(*scores_BHxTxT.shape[1:], first_key_BxT, last_key_1xT)
    if mask.ndim == 2:
        return jnp.where(mask, scores_BHxTxT, -jnp.inf)
    scores_BxHxTxT = scores_BHxTxT.reshape(len(mask), -1, *scores_BHxTxT.shape[1:])
    return jnp.where(mask[:, None], scores_BxHxTxT, -jnp.inf).reshape(scores_BHxTxT.shape)


def _iota(shape: tuple[int, ...], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _cast_product(a, b, contract: tuple, batch: tuple = ((), ())):
    """Multiplies operands of one type, with float32 sums and result.

    XLA's CPU kernels for bfloat16 are several times faster with a float32 result.
    """
    return lax.dot_general(a, b, (contract, batch), preferred_element_type=FLOAT)


# --- Backward rules -------------------------------------------------------------------------------


def _transposed_product(a_BxNxI, b_BxNxO):
    """Computes a^T b for each leading index, [..., I, O] float32, as for a weight gradient.

    XLA's fast CPU kernels do not support a contraction over the first dimension of both operands.
    For one over two dimensions XLA makes a transposed copy, which costs little, and then uses the
    fast kernel. The barriers prevent XLA from undoing the split, from fusing the producer of `a`
    into the copy, and from transposing the product for its consumer, for which bfloat16 may have no
    kernel ("Unsupported element type for DotThunk", at run time).
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
    """Computes `dense`; the gradient of w in a form that the fast CPU kernels take."""
    return _product_forward(x_NxI, w_IxO)[0]


def _product_forward(x_NxI, w_IxO):
    w, contract = w_IxO.astype(x_NxI.dtype), (((1,), (0,)), ((), ()))
    y_NxO = lax.dot_general(x_NxI, w, contract, preferred_element_type=FLOAT).astype(x_NxI.dtype)
    return y_NxO, (x_NxI, w_IxO)


def _product_backward(saved, dy_NxO):
    x_NxI, w_IxO = saved
    dx_NxI = _cast_product(dy_NxO, w_IxO.astype(dy_NxO.dtype), ((1,), (1,))).astype(x_NxI.dtype)
    return dx_NxI, _transposed_product(x_NxI, dy_NxO).astype(w_IxO.dtype)


_cpu_dense.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm_rule(x_NxD, scale_D, bias_D, eps):
    return layer_norm(x_NxD, scale_D, bias_D, eps)


def _layer_norm_forward(x_NxD, scale_D, bias_D, eps):
    return layer_norm(x_NxD, scale_D, bias_D, eps), (x_NxD, scale_D, bias_D)


def _layer_norm_backward(eps, saved, dy_NxD):
    x_NxD, scale_D, bias_D = saved
    dx_NxD, dscale_D = _norm_backward(x_NxD, scale_D, dy_NxD, eps, centre=True)
    if bias_D is None:
        return dx_NxD, dscale_D, None
    return dx_NxD, dscale_D, dy_NxD.astype(FLOAT).sum(axis=0).astype(bias_D.dtype)


_layer_norm_rule.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm_rule(x_NxD, scale_D, eps):
    return rms_norm(x_NxD, scale_D, eps)


def _rms_norm_forward(x_NxD, scale_D, eps):
    return rms_norm(x_NxD, scale_D, eps), (x_NxD, scale_D)


def _rms_norm_backward(eps, saved, dy_NxD):
    return _norm_backward(*saved, dy_NxD, eps, centre=False)


_rms_norm_rule.defvjp(_rms_norm_forward, _rms_norm_backward)


def _norm_backward(x_NxD, scale_D, dy_NxD, eps, centre: bool):
    """Returns the gradients of x and scale. With y = x_hat * scale and g = dy * scale,

    dx = (g - [mean(g)] - x_hat mean(g x_hat)) / std; the middle term is only for centred x.
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
    q_BHxTxd, k_BHxTxd, v_BHxTxd, *, scale, first_key_BxT=None, last_key_1xT=None, dropout=0.0,
    key=None,
):  # fmt: skip
    """Computes `attention`, storing the probabilities for the backward pass.

    With bfloat16 operands scores, softmax and sums are float32; the probabilities, the gradient of
    the scores and that of the result are rounded to bfloat16 as operands of a product. With dropout
    it is the plain `attention`.
    """
    if dropout:
        return attention(
            q_BHxTxd, k_BHxTxd, v_BHxTxd,
            scale=scale, first_key_BxT=first_key_BxT, last_key_1xT=last_key_1xT, dropout=dropout,
            key=key,
        )  # fmt: skip
    mask_inputs = (first_key_BxT, last_key_1xT)
    return _attend(q_BHxTxd, k_BHxTxd, v_BHxTxd, mask_inputs, float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BHxTxd, k_BHxTxd, v_BHxTxd, mask_inputs, scale):
    return _attend_forward(q_BHxTxd, k_BHxTxd, v_BHxTxd, mask_inputs, scale)[0]


_HEADS = ((0,), (0,))


def _attend_forward(q_BHxTxd, k_BHxTxd, v_BHxTxd, mask_inputs, scale):
    scores_BHxTxT = scale * _cast_product(q_BHxTxd, k_BHxTxd, ((2,), (2,)), _HEADS)
    scores_BHxTxT = _mask_scores(scores_BHxTxT, *mask_inputs)
    p_BHxTxT = jax.nn.softmax(scores_BHxTxT, axis=-1).astype(q_BHxTxd.dtype)
    o_BHxTxd = _cast_product(p_BHxTxT, v_BHxTxd, ((2,), (1,)), _HEADS).astype(q_BHxTxd.dtype)
    return o_BHxTxd, (q_BHxTxd, k_BHxTxd, v_BHxTxd, p_BHxTxT, o_BHxTxd)


def _attend_backward(scale, saved, do_BHxTxd):
    """Computes FlashAttention's backward formulas (Dao et al. 2022, arXiv 2205.14135, B.2)."""
    q_BHxTxd, k_BHxTxd, v_BHxTxd, p_BHxTxT, o_BHxTxd = saved
    dtype = q_BHxTxd.dtype
    # sum_s p dp in the softmax's gradient; computing it from o is T/d times cheaper.
    delta_BHxTx1 = (do_BHxTxd.astype(FLOAT) * o_BHxTxd.astype(FLOAT)).sum(axis=-1, keepdims=True)
    dp_BHxTxT = _cast_product(do_BHxTxd, v_BHxTxd, ((2,), (2,)), _HEADS)
    ds_BHxTxT = (scale * p_BHxTxT.astype(FLOAT) * (dp_BHxTxT - delta_BHxTx1)).astype(dtype)
    dq_BHxTxd = _cast_product(ds_BHxTxT, k_BHxTxd, ((2,), (1,)), _HEADS).astype(dtype)
    dk_BHxTxd = _transposed_product(ds_BHxTxT, q_BHxTxd).astype(dtype)
    dv_BHxTxd = _transposed_product(p_BHxTxT, do_BHxTxd).astype(dtype)
    return dq_BHxTxd, dk_BHxTxd, dv_BHxTxd, None


_attend.defvjp(_attend_forward, _attend_backward)


plain = Primitives(dense, layer_norm, rms_norm, attention, cross_entropy)
cpu = Primitives(_cpu_dense, _layer_norm_rule, _rms_norm_rule, _cpu_attention, cpu_cross_entropy)
accelerator = Primitives(
    dense, _layer_norm_rule, _rms_norm_rule, attention, accelerator_cross_entropy
)


def platform_primitives(platform: str) -> Primitives:
    """Returns the primitives of a platform, by JAX's name of it."""
    return cpu if platform == "cpu" else accelerator
