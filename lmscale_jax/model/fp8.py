"""Dense products in float8, each tensor scaled by its own largest entry (current scaling).

Values and weights are rounded to e4m3 and gradients to e5m2 (Micikevicius et al. 2022, arXiv
2209.05433), by Flax's quantization; sums are float32. Unlike delayed scaling this needs no state,
but one more pass over each tensor.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops
from jax import lax

from lmscale_jax.config.key import Modes

FLOAT = jnp.float32
VALUE, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
# Compute capability of Ada and Hopper, the first with float8 products.
LEAST_CAPABILITY = 8.9


def _quantized(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (x / scale in dtype, scale); the largest entry becomes the type's largest number."""
    x = x.astype(FLOAT)
    largest = jnp.max(jnp.abs(x))
    scale = fp8_ops.compute_scale(largest, jnp.ones((), FLOAT), fp8_ops.get_fp8_max(dtype, FLOAT))
    return fp8_ops.quantize(x, dtype, scale, FLOAT), scale


def _scaled_product(a, b, contract: tuple, wide: bool):
    """Multiplies with float32 sums; `wide` converts float8 operands to float32 first."""
    (a, scale_a), (b, scale_b) = a, b
    if wide:
        a, b = a.astype(FLOAT), b.astype(FLOAT)
    y = lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=FLOAT)
    return y * (scale_a * scale_b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_dense(x_NxI: jax.Array, w_IxO: jax.Array, wide: bool = False) -> jax.Array:
    """Computes x w, [N, O] of x's type, in float8. `wide` is for processors without float8."""
    return _forward(x_NxI, w_IxO, wide)[0]


def _forward(x_NxI, w_IxO, wide):
    x, w = _quantized(x_NxI, VALUE), _quantized(w_IxO, VALUE)
    y_NxO = _scaled_product(x, w, ((1,), (0,)), wide).astype(x_NxI.dtype)
    # Empty arrays carry the types: residuals of a custom_vjp must be arrays.
    return y_NxO, (x, w, jnp.zeros((0,), x_NxI.dtype), jnp.zeros((0,), w_IxO.dtype))


def _backward(wide, saved, dy_NxO):
    x, w, like_x, like_w = saved
    dy = _quantized(dy_NxO, GRADIENT)
    dx_NxI = _scaled_product(dy, w, ((1,), (1,)), wide).astype(like_x.dtype)
    return dx_NxI, _scaled_product(x, dy, ((0,), (0,)), wide).astype(like_w.dtype)


fp8_dense.defvjp(_forward, _backward)


class Matmul(NamedTuple):
    """The product of activations and the weights of blocks.

    Attributes:
      product: (x, w) -> x w; None: the platform's `dense`, in model.dtype.
      description: the type and the reason, for people to read; "" for model.matmul="dtype".
    """

    product: Callable | None
    description: str


def _fp8_if_supported(model, platform: str, device) -> Matmul:
    if platform not in ("gpu", "cuda"):
        return Matmul(None, f"{model.dtype}, not fp8: no float8 products on {platform}")
    capability = str(getattr(device or jax.devices()[0], "compute_capability", "0"))
    if float(capability) < LEAST_CAPABILITY:
        reason = f"compute capability {capability} is below {LEAST_CAPABILITY}"
        return Matmul(None, f"{model.dtype}, not fp8: {reason}")
    return Matmul(fp8_dense, "fp8, current scaling")


# (model, platform, device) -> Matmul.
MATMULS = Modes(
    "model.matmul",
    {"dtype": lambda model, platform, device: Matmul(None, ""), "fp8": _fp8_if_supported},
)


def choose_fp8(model, platform: str, device=None) -> Matmul:
    """Returns the product of model.matmul on a platform's `device`; None: the first one here."""
    return MATMULS[model.matmul](model, platform, device)
