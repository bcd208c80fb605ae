"""Causal self-attention: projections, rotary positions, gates.

A gate multiplies a tensor of attention by numbers between 0 and 1. Qiu et al. 2025 (arXiv
2505.06708) gate the output of scaled dot-product attention by a sigmoid of the block's normalised
input, for each head or for each channel. The other places are for comparison.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmscale_jax.config.key import Modes
from lmscale_jax.model import param
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.kernels import KERNELS, shard_kernel
from lmscale_jax.model.layers import Dense, Part, no_norm, own_module, unit_rms

# (queries or keys, epsilon) -> normed queries or keys, by head.
QK_NORMS = Modes("model.qk_norm", {"none": no_norm, "rmsnorm": unit_rms})


class Attention(nnx.Module):
    """Multi-head attention; with fewer key and value heads, grouped-query attention."""

    def __init__(self, model, kernel: str):
        width, size = {"embed": model.d_model}, model.head_dim
        self.heads, self.kv_heads, self.size = model.n_heads, model.n_kv_heads, size
        self.kernel, self.rotates = shard_kernel(KERNELS[kernel]), KERNELS[kernel].rotates
        kv_heads = {"kv_heads": model.n_kv_heads, "head_dim": size}
        self.query = Dense(width, {"heads": model.n_heads, "head_dim": size}, model.bias)
        self.key = Dense(width, kv_heads, model.bias)
        self.value = Dense(width, kv_heads, model.bias)
        self.out = Dense(
            {"heads": model.n_heads, "head_dim": size}, width, model.bias, residual=True
        )
        self.gate, self.gate_place = GATES[model.attn_gate](model), model.gate_place
        self.norm, self.eps = QK_NORMS[model.qk_norm], model.norm_eps
        if model.value_embeddings:
            self.value_share, self.row_share = param.scalar(0.5), param.scalar(0.5)

    def __call__(self, x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        N, unflatten = len(x_NxD), context.unflatten
        q_BxTxHxd = unflatten(self.query(x_NxD, context).reshape(N, self.heads, self.size))
        k_BxTxKxd = unflatten(self.key(x_NxD, context).reshape(N, self.kv_heads, self.size))
        v_BxTxKxd = unflatten(self.value(x_NxD, context).reshape(N, self.kv_heads, self.size))
        v_BxTxKxd = self.with_table_rows(v_BxTxKxd, context)
        q_BxTxHxd, k_BxTxKxd = self.norm(q_BxTxHxd, self.eps), self.norm(k_BxTxKxd, self.eps)
        q_BxTxHxd = self.gated("query", q_BxTxHxd, x_NxD, context)
        k_BxTxKxd = self.gated("key", k_BxTxKxd, x_NxD, context)
        v_BxTxKxd = self.gated("value", v_BxTxKxd, x_NxD, context)
        turned = q_BxTxHxd, k_BxTxKxd
        if context.rope is not None:
            turned = rotate(q_BxTxHxd, context.rope), rotate(k_BxTxKxd, context.rope)
        context.tap("query", lambda: turned[0])
        context.tap("key", lambda: turned[1])
        context.tap("value", lambda: v_BxTxKxd)
        context.tap("scores", lambda: visible_scores(*turned, context.scales.attention))
        if not self.rotates:
            q_BxTxHxd, k_BxTxKxd = turned
        o_BxTxHxd = self.kernel(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context)
        o_BxTxHxd = self.gated("sdpa", o_BxTxHxd, x_NxD, context)
        o_NxC = context.sharding.flatten(o_BxTxHxd).reshape(N, -1)
        return self.gated("output", self.out(o_NxC, context), x_NxD, context)

    def flops(self, seq_len: int, visible: float) -> float:
        """Counts the FLOPs of one token's scores and weighted sum of values, forward."""
        # Two products of 2 H d for each key that is seen.
        return 4.0 * visible * self.heads * self.size

    def with_table_rows(self, v_BxTxKxd: jax.Array, context: ForwardContext) -> jax.Array:
        """Mixes the values with the rows of the block's value table, if any (modded-nanogpt)."""
        if not hasattr(self, "value_share"):
            return v_BxTxKxd
        v = self.value_share[...].astype(v_BxTxKxd.dtype) * v_BxTxKxd
        if context.values_BxTxKxd is None:
            return v
        return v + (self.row_share[...] * context.values_BxTxKxd).astype(v.dtype)

    def gated(self, place: str, y: jax.Array, x_NxD: jax.Array, context: ForwardContext):
        """Gates y if the gate is at this place; x is the input of attention."""
        if self.gate is None or self.gate_place != place:
            return y
        return self.gate(y, x_NxD, context)


def _softmax_flops(config, visible: float) -> float:
    return 4.0 * visible * config.model.n_heads * config.model.head_dim


def visible_scores(q_BxTxHxd, k_BxTxKxd, scale: float) -> jax.Array:
    """Computes the scores below a causal mask, before softmax, [B, H, T (T + 1) / 2] float32."""
    T, H = q_BxTxHxd.shape[1:3]
    k_BxTxHxd = jnp.repeat(k_BxTxKxd, H // k_BxTxKxd.shape[2], axis=2)
    q, k = q_BxTxHxd.astype(jnp.float32), k_BxTxHxd.astype(jnp.float32)
    scores_BxHxTxT = scale * jnp.einsum("bthd,bshd->bhts", q, k)
    return scores_BxHxTxT[:, :, *np.tril_indices(T)]


def _all_channels(size: int, theta: np.float32) -> np.ndarray:
    return theta ** (-np.arange(0, size, 2, dtype=np.float32) / size)


def _half_of_channels(size: int, theta: np.float32) -> np.ndarray:
    """Rotates half of the channels, by 1 to 1 / theta radians a token, both included, and not the
    others (modded-nanogpt)."""
    frequencies = theta ** -np.linspace(0, 1, size // 4, dtype=np.float32)
    return np.concatenate([frequencies, np.zeros(size // 2 - size // 4, np.float32)])


# (head_dim, rope_theta) -> [head_dim / 2] radians a token.
FREQUENCIES = Modes("model.rope_channels", {"all": _all_channels, "half": _half_of_channels})


def rope_tables(
    length: int, size: int, theta: float, channels: str = "all"
) -> tuple[np.ndarray, np.ndarray]:
    """Computes cosines and sines of RoPE, each [length, size / 2] float32.

    Su et al. 2021, arXiv 2104.09864. `channels` is a choice of model.rope_channels.
    """
    frequency = FREQUENCIES[channels](size, np.float32(theta))
    # NumPy arrays are constants of the program. XLA would fuse a JAX expression into the rotation
    # and compute its sines anew for every head, layer and pass.
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def rotate(x_BxTxHxd: jax.Array, rope: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotates channel i with channel i + d/2 (the half-split pairing of GPT-NeoX and Llama)."""
    cos, sin = (t[None, :, None, :] for t in rope)
    a, b = jnp.split(x_BxTxHxd.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x_BxTxHxd.dtype)


# Seed of the positions that gates read with model.gate_input="earlier".
_EARLIER_SEED = 0x67617465


class GatedHeads(NamedTuple):
    """The gated heads: their named axis, and the model key of their number."""

    axis: str
    count: str

    def shape(self, model) -> dict[str, int]:
        return {self.axis: model[self.count], "head_dim": model.head_dim}


class GatedChannels(NamedTuple):
    """The gated channels of the projected output, which has no heads."""

    axis: str

    def shape(self, model) -> dict[str, int]:
        return {self.axis: model.d_model}


PLACES = Modes(
    "model.gate_place",
    {
        "sdpa": GatedHeads("heads", "n_heads"),
        "query": GatedHeads("heads", "n_heads"),
        "key": GatedHeads("kv_heads", "n_kv_heads"),
        "value": GatedHeads("kv_heads", "n_kv_heads"),
        "output": GatedChannels("channels"),
    },
)


class Activation(NamedTuple):
    """One choice of model.gate_activation.

    Attributes:
      apply: array -> gates.
      low, high: the range of the gates.
    """

    apply: Callable[[jax.Array], jax.Array]
    low: float
    high: float


ACTIVATIONS = Modes(
    "model.gate_activation",
    {
        "sigmoid": Activation(jax.nn.sigmoid, 0.0, 1.0),
        # At least 0.5, so that no channel can be shut off.
        "ns_sigmoid": Activation(lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x), 0.5, 1.0),
    },
)


def earlier_input(x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
    """Replaces each position's input by that of a fixed random position up to it.

    A control: such a gate is causal, but does not see its own token.
    """
    draws_T = np.random.default_rng(_EARLIER_SEED).random(context.length)
    index_T = np.floor(draws_T * np.arange(1, context.length + 1)).astype(np.int32)
    return context.sharding.flatten(jnp.take(context.unflatten(x_NxD), index_T, axis=1))


INPUTS = Modes("model.gate_input", {"own": lambda x_NxD, context: x_NxD, "earlier": earlier_input})


class ElementwiseGate(nnx.Module):
    """act(x W + b) for each channel of a place; W is a hidden matrix."""

    role = "hidden"

    def __init__(self, model):
        self.activation = ACTIVATIONS[model.gate_activation].apply
        self.shift, self.input = model.gate_bias_init, INPUTS[model.gate_input]
        axes, self.shape = self.layout(PLACES[model.gate_place].shape(model))
        self.declare(model, axes)

    def layout(self, place: dict[str, int]) -> tuple[dict[str, int], tuple[int, ...]]:
        """Returns (sizes of the gates by named axis, the shape by which they multiply)."""
        return place, tuple(place.values())

    def declare(self, model, axes: dict[str, int]) -> None:
        """Declares the parameters."""
        self.weight = param.weight({"embed": model.d_model}, axes, self.role)
        if model.gate_bias:
            self.bias = param.vector("zeros", **axes)

    def __call__(self, y: jax.Array, x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Returns y times its gate; y is [B, T, heads, head_dim], or [N, D] at the output."""
        gate = self.gates(x_NxD, context)
        context.tap("gate", lambda: gate)
        if y.ndim == 4 and gate.ndim == 3:
            gate = context.unflatten(gate)
        return y * gate.astype(y.dtype)

    def gates(self, x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Returns [N, heads, head_dim or 1] or [N, D] float32."""
        x_NxD = self.input(x_NxD, context)
        product, w = context.sharding.bind(context.ops.dense, self.weight[...], self.weight.spec)
        z_NxG = self.scaled(product(x_NxD, w).astype(jnp.float32), context)
        if hasattr(self, "bias"):
            z_NxG = z_NxG + self.bias[...].reshape(-1)
        return self.activation(z_NxG + self.shift).reshape(-1, *self.shape)

    def scaled(self, z_NxG: jax.Array, context: ForwardContext) -> jax.Array:
        return z_NxG


class HeadwiseGate(ElementwiseGate):
    """act(x W + b) for each head; W is a readout, with a multiplier of 1 / width ratio."""

    role = "output"

    def layout(self, place: dict[str, int]) -> tuple[dict[str, int], tuple[int, ...]]:
        heads = {axis: size for axis, size in place.items() if axis != "head_dim"}
        return heads, (*heads.values(), 1)

    def scaled(self, z_NxG: jax.Array, context: ForwardContext) -> jax.Array:
        return z_NxG * context.scales.gate


class ConstGate(ElementwiseGate):
    """act(b), a free parameter for each channel of a place."""

    def declare(self, model, axes: dict[str, int]) -> None:
        self.free = param.vector("zeros", **axes)

    def gates(self, x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Returns [heads, head_dim] or [D] float32."""
        return self.activation(self.free[...] + self.shift)


# model -> the module, or None without a gate.
GATES = Modes(
    "model.attn_gate",
    {
        "none": lambda model: None,
        "headwise": HeadwiseGate,
        "elementwise": ElementwiseGate,
        "const": ConstGate,
    },
)


def describe_gate(model, specs: dict) -> dict[str, str]:
    """Describes a gate and its cost in words: {"gate": ...}, or {} without a gate."""
    if "gate" not in specs["blocks"]["attention"]:
        return {}
    cost = sum(spec.size for spec in param.named(specs["blocks"]["attention"]["gate"]).values())
    total = sum(spec.size for spec in param.named(specs["blocks"]).values())
    return {
        "gate": f"{model.attn_gate}, {model.gate_activation} at {model.gate_place}: {cost:,} "
        f"parameters, {cost / (total - cost):+.2%} of the blocks; a ladder's rungs.match "
        f"reduces d_ff by as much"
    }


# Declared from a config and the name of a kernel.
ATTENTIONS = Modes(
    "model.attention_module",
    {
        "softmax": Part(lambda config, kernel: Attention(config.model, kernel), _softmax_flops),
    },
    own_module,
)
