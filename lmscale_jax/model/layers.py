"""The parts of a block. Activations are flat, [tokens, width], so that every product is 2-D."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.ops import Ops
from lmscale_jax.model.placement import Place


class Call(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
      ops: the primitives of this platform.
      product: x w of activations and the weights of blocks.
      place: the mesh, and how arrays lie on it.
      dtype: type that products are computed in.
      batch, length: B and T of the N = B*T flat tokens, in the order of `place.flat`.
      segments_BxT: document numbers within each window, or None for a plain causal mask.
      rope: cosines and sines, each [T, head_dim / 2], or None.
      attention_scale: factor of q·k.
      branch_scale: factor of what each branch adds to the residual stream.
      embed_scale: factor of the embedding.
      gate_scale: factor of the product that makes a gate for each head.
      window: blocks of `window_block` tokens that a query sees, its own and those before it; None:
        everything.
      window_block: in tokens.
      origin_NxD: the embedding, for blocks that mix it in; else None.
      skip_NxD: the stream of an earlier block that enters this one, or None.
      values_BxTxKxd: what is added to this block's values, or None.
      first: position of the first query among the keys, where a kernel sees a piece of the queries;
        else None.
      dropout: rate.
      key: random key of this layer; None turns dropout off.
      keep: what a tap stores of an activation, (name, array) -> array; None measures nothing.
      taps: where this layer's taps are stored by name; the layer's caller returns it.
    """

    ops: Ops
    product: Callable
    place: Place
    dtype: jnp.dtype
    batch: int
    length: int
    segments_BxT: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None
    attention_scale: float
    branch_scale: float
    embed_scale: float
    gate_scale: float
    window: jax.Array | int | None
    window_block: int
    origin_NxD: jax.Array | None
    skip_NxD: jax.Array | None
    values_BxTxKxd: jax.Array | None
    first: jax.Array | None
    dropout: float
    key: jax.Array | None
    keep: Callable | None = None
    taps: dict | None = None

    def note(self, name: str, make: Callable[[], jax.Array]) -> None:
        """Stores what is kept of the activation `make()`, which is not computed otherwise."""
        if self.keep is not None:
            self.taps[name] = self.keep(name, make())

    def drop(self, x_NxD: jax.Array, stream: int) -> jax.Array:
        """Dropout by the random stream of that number within the layer."""
        if self.key is None or not self.dropout:
            return x_NxD
        key, shape = jax.random.fold_in(self.key, stream), (self.batch, self.length, x_NxD.shape[1])
        keep = self.place.flat(jax.random.bernoulli(key, 1 - self.dropout, shape))
        return jnp.where(keep, x_NxD / (1 - self.dropout), jnp.zeros_like(x_NxD))

    def rows(self, x_N: jax.Array) -> jax.Array:
        """Flat activations as [B, T, ...]."""
        return self.place.rows(x_N, self.batch, self.length)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the residual stream."""

    def __init__(self, model):
        self.kind, self.eps = model.norm, model.norm_eps
        self.gained = model.norm_gain == "learned"
        if self.gained:
            self.scale = param.vector("ones", embed=model.d_model)
        if model.norm == "layernorm" and model.bias:
            self.bias = param.vector("zeros", embed=model.d_model)

    def __call__(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        scale_D = self.scale[...] if self.gained else jnp.ones(h_NxD.shape[-1], jnp.float32)
        if self.kind == "rmsnorm":
            x_NxD = call.ops.rms_norm(h_NxD, scale_D, self.eps)
        else:
            bias_D = self.bias[...] if hasattr(self, "bias") else None
            x_NxD = call.ops.layer_norm(h_NxD, scale_D, bias_D, self.eps)
        return x_NxD.astype(call.dtype)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, of x's type."""
    x_float = x.astype(jnp.float32)
    mean = jnp.square(x_float).mean(axis=-1, keepdims=True)
    return (x_float * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


class Dense(nnx.Module):
    """A product over named axes: [N, prod(fan_in)] to [N, prod(fan_out)]."""

    def __init__(self, fan_in: dict, fan_out: dict, bias: bool, residual: bool = False):
        self.weight = param.weight(fan_in, fan_out, "hidden", residual=residual)
        if bias:
            self.bias = param.vector("zeros", **fan_out)

    def __call__(self, x_NxI: jax.Array, call: Call) -> jax.Array:
        y_NxO = call.place.dense(call.product, x_NxI, self.weight[...], self.weight.spec)
        if hasattr(self, "bias"):
            y_NxO = y_NxO + self.bias[...].reshape(-1).astype(y_NxO.dtype)
        return y_NxO


def pointwise(f):
    """A function of each entry, [N, F] to [N, F], in float32 and rounded once, to the input's type.

    The backward pass keeps its inputs alone, of whose type they are.
    """

    def rounded(*inputs_NxF):
        return f(*(x.astype(jnp.float32) for x in inputs_NxF)).astype(inputs_NxF[0].dtype)

    return jax.checkpoint(rounded)


class MLP(nnx.Module):
    """Two products around an activation, or three with a gate."""

    def __init__(self, model):
        width, hidden = {"embed": model.d_model}, {"mlp": model.d_ff}
        gelu = functools.partial(jax.nn.gelu, approximate=model.gelu == "tanh")
        self.activation = pointwise(
            {
                "gelu": gelu,
                "geglu": lambda gate, up: gelu(gate) * up,
                "relu2": lambda up: jnp.square(jax.nn.relu(up)),
                "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
            }[model.mlp]
        )
        if model.mlp in ("swiglu", "geglu"):
            self.gate = Dense(width, hidden, model.bias)
        self.up = Dense(width, hidden, model.bias)
        self.down = Dense(hidden, width, model.bias, residual=True)

    def __call__(self, x_NxD: jax.Array, call: Call) -> jax.Array:
        up_NxF = self.up(x_NxD, call)
        gates = [self.gate(x_NxD, call)] if hasattr(self, "gate") else []
        hidden_NxF = self.activation(*gates, up_NxF)
        call.note("mlp_hidden", lambda: hidden_NxF)
        return self.down(hidden_NxF, call)
