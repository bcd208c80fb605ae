"""Causal self-attention: projections, rotary positions, and the kernels that can serve it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmscale_jax.model import ops
from lmscale_jax.model.gates import Gate
from lmscale_jax.model.layers import Call, Dense


class Attention(nnx.Module):
    """Multi-head attention; with fewer key and value heads, grouped-query attention."""

    def __init__(self, model, kernel: str):
        width, size = {"embed": model.d_model}, model.head_dim
        self.heads, self.kv_heads, self.size = model.n_heads, model.n_kv_heads, size
        self.kernel = KERNELS[kernel]
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

    def __call__(self, x_NxD: jax.Array, call: Call) -> jax.Array:
        B, T = call.batch, call.length
        q_BxTxHxd = self.query(x_NxD, call).reshape(B, T, self.heads, self.size)
        k_BxTxKxd = self.key(x_NxD, call).reshape(B, T, self.kv_heads, self.size)
        v_BxTxKxd = self.value(x_NxD, call).reshape(B, T, self.kv_heads, self.size)
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
        return self.pass_gate("output", self.out(o_BxTxHxd.reshape(B * T, -1), call), x_NxD, call)

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


def rope_tables(length: int, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [length, size / 2] float32 (Su et al. 2021, arXiv 2104.09864)."""
    frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxd: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel i with channel i + d/2 (the half-split pairing of GPT-NeoX and Llama)."""
    cos, sin = (t[None, :, None, :] for t in rope)
    a, b = jnp.split(x_BxTxHxd.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BxTxHxd.dtype)


def _head_major(kernel):
    """Adapts a kernel on [B*H, T, d] with as many key and value heads as query heads."""

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
        B, T, H, d = q_BxTxHxd.shape

        def flat(x):
            x = jnp.repeat(x, H // x.shape[2], axis=2) if x.shape[2] != H else x
            return x.transpose(0, 2, 1, 3).reshape(B * H, T, d)

        o = kernel(call, flat(q_BxTxHxd), flat(k_BxTxKxd), flat(v_BxTxKxd))
        return o.reshape(B, H, T, d).transpose(0, 2, 1, 3)

    return run


def _plain(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    rate = call.dropout if call.key is not None else 0.0
    key = jax.random.fold_in(call.key, 3) if rate else None
    return ops.plain.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale,
        segments_BxT=call.segments_BxT, dropout=rate, key=key,
    )  # fmt: skip


def _saved(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    return ops.cpu.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale, segments_BxT=call.segments_BxT
    )


def _xla(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
    mask = None
    if call.segments_BxT is not None:
        s = call.segments_BxT
        mask = (s[:, :, None] == s[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, mask=mask, scale=call.attention_scale, is_causal=True
    )


KERNELS = {"plain": _head_major(_plain), "saved": _head_major(_saved), "xla": _xla}


def choose(model, platform: str) -> tuple[str, str]:
    """The kernel that model.attention names, or for "auto" the best here, and why.

    Raises InputError (in config.validate) where a named kernel cannot serve.
    """
    if model.attention != "auto":
        return model.attention, "asked for"
    if model.dropout:
        return "plain", "only it drops attention probabilities"
    if platform == "cpu":
        return "saved", "its own backward rule is faster on CPU (docs/performance.md)"
    return "xla", f"jax.nn.dot_product_attention on {platform}"
