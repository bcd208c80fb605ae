"""Gates of attention: what a head computes, multiplied by a number between 0 and 1.

Qiu et al. 2025 (arXiv 2505.06708) gate the output of scaled dot-product attention by a sigmoid of
the block's normalised input, for each head or for each channel; other places are here to compare.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.modes import Modes

# Of the positions that a gate with a shuffled input reads.
_STREAM = 0x67617465


class GatedHeads(NamedTuple):
    """The heads that a gate is for: their named axis, and the model's key for how many."""

    axis: str
    count: str

    def shape(self, model) -> dict[str, int]:
        return {self.axis: model[self.count], "head_dim": model.head_dim}


class GatedChannels(NamedTuple):
    """The channels of the stream that a gate is for; they have no heads."""

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
        # At least a half, so that nothing can be shut off.
        "ns_sigmoid": Activation(lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x), 0.5, 1.0),
    },
)


def earlier(x_NxD: jax.Array, context: ForwardContext) -> jax.Array:
    """Returns each position's input replaced by that of a position drawn from those up to it,
    always the same: what a gate without its own token can do, and still causal."""
    draws_T = np.random.default_rng(_STREAM).random(context.length)
    index_T = np.floor(draws_T * np.arange(1, context.length + 1)).astype(np.int32)
    return context.sharding.flatten(jnp.take(context.unflatten(x_NxD), index_T, axis=1))


INPUTS = Modes("model.gate_input", {"own": lambda x_NxD, context: x_NxD, "earlier": earlier})


class ElementwiseGate(nnx.Module):
    """act(x W + b) for each channel of a place; W is a matrix like any other."""

    role = "hidden"

    def __init__(self, model):
        self.activation = ACTIVATIONS[model.gate_activation].apply
        self.shift, self.input = model.gate_bias_init, INPUTS[model.gate_input]
        axes, self.shape = self.layout(PLACES[model.gate_place].shape(model))
        self.declare(model, axes)

    def layout(self, place: dict[str, int]) -> tuple[dict[str, int], tuple[int, ...]]:
        """Returns (sizes of the gates by named axis, the shape in which they multiply)."""
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
        x_NxD, weight = self.input(x_NxD, context), self.weight
        z_NxG = context.sharding.dense(context.ops.dense, x_NxD, weight[...], weight.spec)
        z_NxG = self.scaled(z_NxG.astype(jnp.float32), context)
        if hasattr(self, "bias"):
            z_NxG = z_NxG + self.bias[...].reshape(-1)
        return self.activation(z_NxG + self.shift).reshape(-1, *self.shape)

    def scaled(self, z_NxG: jax.Array, context: ForwardContext) -> jax.Array:
        return z_NxG


class HeadwiseGate(ElementwiseGate):
    """act(x W + b) for each head: a readout, whose product is multiplied by 1 / width ratio."""

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


def described(model, specs: dict) -> dict[str, str]:
    """Returns what a gate costs, by name, for people to read; {} without a gate."""
    if "gate" not in specs["blocks"]["attention"]:
        return {}
    cost = sum(spec.size for spec in param.named(specs["blocks"]["attention"]["gate"]).values())
    whole = sum(spec.size for spec in param.named(specs["blocks"]).values())
    return {
        "gate": f"{model.attn_gate}, {model.gate_activation} at {model.gate_place}: {cost:,} "
        f"parameters, {cost / (whole - cost):+.2%} of the blocks; a ladder's rungs.match takes "
        f"them from d_ff"
    }
