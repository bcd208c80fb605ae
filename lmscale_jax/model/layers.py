"""Norms, dense products and the MLP of a block, on flat activations [tokens, width].

Flat activations make every product two-dimensional.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmscale_jax.config.key import Modes
from lmscale_jax.config.mlp_forms import MLP_FORMS
from lmscale_jax.config.own_code import OwnCode
from lmscale_jax.model import param
from lmscale_jax.model.context import ForwardContext

# Name of the results that model.remat="dots" stores.
PRODUCT = "product"
# Width -> the parameter with a factor for each channel of a norm, or None.
NORM_GAINS = Modes(
    "model.norm_gain",
    {
        "learned": lambda width: param.vector("ones", embed=width),
        "none": lambda width: None,
    },
)


class RMSNorm(nnx.Module):
    """RMSNorm over the residual stream."""

    def __init__(self, model):
        self.eps, self.scale = model.norm_eps, NORM_GAINS[model.norm_gain](model.d_model)

    def __call__(self, h_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        return context.ops.rms_norm(h_NxD, self.gain(h_NxD), self.eps).astype(context.dtype)

    def gain(self, h_NxD: jax.Array) -> jax.Array:
        if self.scale is None:
            return jnp.ones(h_NxD.shape[-1], jnp.float32)
        return self.scale[...]


class LayerNorm(RMSNorm):
    """LayerNorm over the residual stream."""

    def __init__(self, model):
        super().__init__(model)
        self.bias = param.vector("zeros", embed=model.d_model) if model.bias else None

    def __call__(self, h_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        scale_D, bias_D = self.gain(h_NxD), None if self.bias is None else self.bias[...]
        return context.ops.layer_norm(h_NxD, scale_D, bias_D, self.eps).astype(context.dtype)


class Part(NamedTuple):
    """One choice of a part of the model.

    Attributes:
      declare: (config, ...) -> its module.
      flops: (config, visible) -> the FLOPs of one token's forward products that no parameter
        declares, in one block; `visible` is the mean number of keys that a query sees.
    """

    declare: Callable
    flops: Callable = lambda config, visible: 0.0


def own_module(code: OwnCode) -> Part:
    """Returns the part that a user's class is, constructed from (model, settings)."""
    fits = isinstance(code.entry, type) and issubclass(code.entry, nnx.Module)
    code.require("a class of modules (nnx.Module)", fits)

    def declare(config, *_):
        return code.entry(config.model, code.settings(config))

    return Part(declare, lambda config, visible: module_flops(declare(config), config, visible))


def module_flops(module: nnx.Module, config, visible: float) -> float:
    """Adds up `flops(seq_len, visible)` of a module and those in it that have this method."""
    parts = (part for _, part in nnx.iter_modules(module) if hasattr(part, "flops"))
    return sum(part.flops(config.data.seq_len, visible) for part in parts)


NORMS = Modes(
    "model.norm",
    {
        "layernorm": Part(lambda config: LayerNorm(config.model)),
        "rmsnorm": Part(lambda config: RMSNorm(config.model)),
    },
    own_module,
)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """Computes x / sqrt(mean(x^2) + eps) over the last axis, in float32, of x's type."""
    x_float = x.astype(jnp.float32)
    mean = jnp.square(x_float).mean(axis=-1, keepdims=True)
    return (x_float * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


def no_norm(x: jax.Array, eps: float) -> jax.Array:
    """Returns x unchanged."""
    return x


class Dense(nnx.Module):
    """A product over named axes: [N, prod(fan_in)] to [N, prod(fan_out)]."""

    def __init__(self, fan_in: dict, fan_out: dict, bias: bool, residual: bool = False):
        self.weight = param.weight(fan_in, fan_out, "hidden", residual=residual)
        if bias:
            self.bias = param.vector("zeros", **fan_out)

    def __call__(self, x_NxI: jax.Array, context: ForwardContext) -> jax.Array:
        product, w = context.sharding.bind(context.product, self.weight[...], self.weight.spec)
        y_NxO = checkpoint_name(product(x_NxI, w), PRODUCT)
        if hasattr(self, "bias"):
            y_NxO = y_NxO + self.bias[...].reshape(-1).astype(y_NxO.dtype)
        return y_NxO


def pointwise(f):
    """Wraps an elementwise f, [N, F] to [N, F]: computed in float32, rounded once to x's type.

    Only the inputs are stored for the backward pass, in their type.
    """

    def rounded(*inputs_NxF):
        return f(*(x.astype(jnp.float32) for x in inputs_NxF)).astype(inputs_NxF[0].dtype)

    return jax.checkpoint(rounded)


GELUS = Modes(
    "model.gelu",
    {
        "tanh": functools.partial(jax.nn.gelu, approximate=True),
        "erf": functools.partial(jax.nn.gelu, approximate=False),
    },
)


class MLP(nnx.Module):
    """Two products around an activation, or three with a gate.

    `activation`: (form of GELU, results of the input matrices, the gate's first) -> hidden values.
    """

    def __init__(self, model, activation: Callable):
        width, hidden = {"embed": model.d_model}, {"mlp": model.d_ff}
        self.activation = pointwise(functools.partial(activation, GELUS[model.gelu]))
        if MLP_FORMS[model.mlp].input_matrices == 2:
            self.gate = Dense(width, hidden, model.bias)
        self.up = Dense(width, hidden, model.bias)
        self.down = Dense(hidden, width, model.bias, residual=True)

    def __call__(self, x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        up_NxF = self.up(x_NxD, context)
        gates = [self.gate(x_NxD, context)] if hasattr(self, "gate") else []
        hidden_NxF = self.activation(*gates, up_NxF)
        context.tap("mlp_hidden", lambda: hidden_NxF)
        return self.down(hidden_NxF, context)


def _mlp(activation: Callable) -> Part:
    return Part(lambda config: MLP(config.model, activation))


MLPS = Modes(
    "model.mlp",
    {
        "gelu": _mlp(lambda gelu, up: gelu(up)),
        "geglu": _mlp(lambda gelu, gate, up: gelu(gate) * up),
        "relu2": _mlp(lambda gelu, up: jnp.square(jax.nn.relu(up))),
        "swiglu": _mlp(lambda gelu, gate, up: jax.nn.silu(gate) * up),
    },
    own_module,
)
