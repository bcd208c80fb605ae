"""Gates of attention: what a head computes, multiplied by a number between 0 and 1.

Qiu et al. 2025 (arXiv 2505.06708) gate the output of scaled dot-product attention by a sigmoid of
the block's normalised input, for each head or for each channel; other places are here to compare.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.layers import Call

# What a place gates: its named axes.
QUERY_HEADS, KEY_HEADS = ("heads", "n_heads"), ("kv_heads", "n_kv_heads")
PLACES = {
    "sdpa": QUERY_HEADS,
    "query": QUERY_HEADS,
    "key": KEY_HEADS,
    "value": KEY_HEADS,
    "output": None,
}
ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    # At least a half, so that nothing can be shut off.
    "ns_sigmoid": lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
}
# Of the positions that a gate with a shuffled input reads.
_STREAM = 0x67617465


class Gate(nnx.Module):
    """act(x W + b) for each head or channel of a place; "const": a free parameter for each channel.

    W reads all channels of x: with an output for each head it is a readout, whose product is
    multiplied by 1 / width ratio; with one for each channel it is a matrix like any other.
    """

    def __init__(self, model):
        self.kind, self.activation = model.attn_gate, ACTIVATIONS[model.gate_activation]
        self.shift = model.gate_bias_init
        self.shuffled = model.gate_input == "earlier"
        place = PLACES[model.gate_place]
        if place is None:
            axes, self.shape = {"channels": model.d_model}, (model.d_model,)
        else:
            heads = {place[0]: model[place[1]]}
            axes = heads if self.kind == "headwise" else heads | {"head_dim": model.head_dim}
            self.shape = (model[place[1]], 1 if self.kind == "headwise" else model.head_dim)
        if self.kind == "const":
            self.free = param.vector("zeros", **axes)
            return
        role = "output" if self.kind == "headwise" else "hidden"
        self.weight = param.weight({"embed": model.d_model}, axes, role)
        if model.gate_bias:
            self.bias = param.vector("zeros", **axes)

    def __call__(self, y: jax.Array, x_NxD: jax.Array, call: Call) -> jax.Array:
        """y times its gate; y is [B, T, heads, head_dim], or [N, D] at the block's output."""
        gate = self._gate(x_NxD, call)
        call.note("gate", lambda: gate)
        if y.ndim == 4 and gate.ndim == 3:
            gate = call.rows(gate)
        return y * gate.astype(y.dtype)

    def _gate(self, x_NxD: jax.Array, call: Call) -> jax.Array:
        """[N, heads, head_dim or 1] or [N, D] float32; without a leading axis where it is free."""
        if self.kind == "const":
            return self.activation(self.free[...] + self.shift)
        if self.shuffled:
            x_NxD = earlier(x_NxD, call)
        z_NxG = call.place.dense(call.ops.dense, x_NxD, self.weight[...], self.weight.spec)
        z_NxG = z_NxG.astype(jnp.float32)
        if self.kind == "headwise":
            z_NxG = z_NxG * call.gate_scale
        if hasattr(self, "bias"):
            z_NxG = z_NxG + self.bias[...].reshape(-1)
        return self.activation(z_NxG + self.shift).reshape(-1, *self.shape)


def earlier(x_NxD: jax.Array, call: Call) -> jax.Array:
    """Each position's input replaced by that of a position drawn from those up to it, always the
    same one: what a gate without its own token can do, and still causal."""
    draws_T = np.random.default_rng(_STREAM).random(call.length)
    index_T = np.floor(draws_T * np.arange(1, call.length + 1)).astype(np.int32)
    return call.place.flat(jnp.take(call.rows(x_NxD), index_T, axis=1))


def described(model, specs: dict) -> dict[str, str]:
    """What a gate costs, by name, for people to read; {} without one."""
    if model.attn_gate == "none":
        return {}
    own = param.named(specs["blocks"]["attention"]["gate"])
    cost = sum(spec.size for spec in own.values())
    whole = sum(spec.size for spec in param.named(specs["blocks"]).values())
    return {
        "gate": f"{model.attn_gate}, {model.gate_activation} at {model.gate_place}: {cost:,} "
        f"parameters, {cost / (whole - cost):+.2%} of the blocks; a ladder's rungs.match takes "
        f"them from d_ff"
    }
