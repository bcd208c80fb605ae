"""Causal self-attention: projections, rotary positions, windows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.gates import Gate
from lmscale_jax.model.kernels import KERNELS, placed
from lmscale_jax.model.layers import Call, Dense, unit_rms


class Attention(nnx.Module):
    """Multi-head attention; with fewer key and value heads, grouped-query attention."""

    def __init__(self, model, kernel: str):
        width, size = {"embed": model.d_model}, model.head_dim
        self.heads, self.kv_heads, self.size = model.n_heads, model.n_kv_heads, size
        self.kernel = placed(KERNELS[kernel])
        kv_heads = {"kv_heads": model.n_kv_heads, "head_dim": size}
        self.query = Dense(width, {"heads": model.n_heads, "head_dim": size}, model.bias)
        self.key = Dense(width, kv_heads, model.bias)
        self.value = Dense(width, kv_heads, model.bias)
        self.out = Dense(
            {"heads": model.n_heads, "head_dim": size}, width, model.bias, residual=True
        )
        self.gated = model.gate_place if model.attn_gate != "none" else ""
        if self.gated:
            self.gate = Gate(model)
        self.unit_eps = model.norm_eps if model.qk_norm == "rmsnorm" else None
        if model.value_embeddings:
            self.value_share, self.row_share = param.scalar(0.5), param.scalar(0.5)

    def __call__(self, x_NxD: jax.Array, call: Call) -> jax.Array:
        N = len(x_NxD)
        q_BxTxHxd = call.rows(self.query(x_NxD, call).reshape(N, self.heads, self.size))
        k_BxTxKxd = call.rows(self.key(x_NxD, call).reshape(N, self.kv_heads, self.size))
        v_BxTxKxd = call.rows(self.value(x_NxD, call).reshape(N, self.kv_heads, self.size))
        v_BxTxKxd = self.mixed(v_BxTxKxd, call)
        if self.unit_eps is not None:
            q_BxTxHxd = unit_rms(q_BxTxHxd, self.unit_eps)
            k_BxTxKxd = unit_rms(k_BxTxKxd, self.unit_eps)
        q_BxTxHxd = self.pass_gate("query", q_BxTxHxd, x_NxD, call)
        k_BxTxKxd = self.pass_gate("key", k_BxTxKxd, x_NxD, call)
        v_BxTxKxd = self.pass_gate("value", v_BxTxKxd, x_NxD, call)
        if call.rope is not None:
            q_BxTxHxd, k_BxTxKxd = rotate(q_BxTxHxd, call.rope), rotate(k_BxTxKxd, call.rope)
        call.note("query", lambda: q_BxTxHxd)
        call.note("key", lambda: k_BxTxKxd)
        call.note("value", lambda: v_BxTxKxd)
        call.note("scores", lambda: visible_scores(q_BxTxHxd, k_BxTxKxd, call.attention_scale))
        o_BxTxHxd = self.kernel(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call)
        o_BxTxHxd = self.pass_gate("sdpa", o_BxTxHxd, x_NxD, call)
        o_NxC = call.place.flat(o_BxTxHxd).reshape(N, -1)
        return self.pass_gate("output", self.out(o_NxC, call), x_NxD, call)

    def mixed(self, v_BxTxKxd: jax.Array, call: Call) -> jax.Array:
        """The values, with rows of a table where this block has one (modded-nanogpt's)."""
        if not hasattr(self, "value_share"):
            return v_BxTxKxd
        v = self.value_share[...].astype(v_BxTxKxd.dtype) * v_BxTxKxd
        if call.values_BxTxKxd is None:
            return v
        return v + (self.row_share[...] * call.values_BxTxKxd).astype(v.dtype)

    def pass_gate(self, place: str, y: jax.Array, x_NxD: jax.Array, call: Call) -> jax.Array:
        """y, gated if this is the place of the gate; x is what the block's attention reads."""
        return self.gate(y, x_NxD, call) if self.gated == place else y


def visible_scores(q_BxTxHxd, k_BxTxKxd, scale: float) -> jax.Array:
    """The scores before softmax that a causal mask leaves, [B, H, T (T + 1) / 2] float32."""
    T, H = q_BxTxHxd.shape[1:3]
    k_BxTxHxd = jnp.repeat(k_BxTxKxd, H // k_BxTxKxd.shape[2], axis=2)
    q, k = q_BxTxHxd.astype(jnp.float32), k_BxTxHxd.astype(jnp.float32)
    scores_BxHxTxT = scale * jnp.einsum("bthd,bshd->bhts", q, k)
    return scores_BxHxTxT[:, :, *np.tril_indices(T)]


def rope_tables(
    length: int, size: int, theta: float, channels: str = "all"
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each [length, size / 2] float32 (Su et al. 2021, arXiv 2104.09864).

    channels="half" turns half of the channels, from 1 to 1 / theta radians a token, both included,
    and leaves the others alone (modded-nanogpt).
    """
    theta = np.float32(theta)
    if channels == "half":
        turned = theta ** -np.linspace(0, 1, size // 4, dtype=np.float32)
        frequency = np.concatenate([turned, np.zeros(size // 2 - size // 4, np.float32)])
    else:
        frequency = theta ** (-np.arange(0, size, 2, dtype=np.float32) / size)
    # Arrays of numpy, which are constants of the program: XLA would take the sines of an expression
    # anew for every head, layer and pass, as part of the loops that turn the channels.
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def rotate(x_BxTxHxd: jax.Array, rope: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotates channel i with channel i + d/2 (the half-split pairing of GPT-NeoX and Llama)."""
    cos, sin = (t[None, :, None, :] for t in rope)
    a, b = jnp.split(x_BxTxHxd.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BxTxHxd.dtype)
