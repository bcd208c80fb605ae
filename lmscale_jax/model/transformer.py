"""The decoder in three parts: embedding, one block (stacked by `build`), and readout."""

import jax
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.attention import Attention
from lmscale_jax.model.layers import MLP, Call, Norm, unit_rms


class Embed(nnx.Module):
    """Token embedding, learned positions, and rows for the values of some blocks, where asked."""

    def __init__(self, model):
        vocab = {"vocab": model.vocab_size}
        self.tokens = param.weight(vocab, {"embed": model.d_model}, "input")
        if model.positions == "learned":
            self.positions = param.weight(
                {"position": model.max_seq_len}, {"embed": model.d_model}, "input"
            )
        if model.value_embeddings:
            heads = {"kv_heads": model.n_kv_heads, "head_dim": model.head_dim}
            self.values = param.weight({"tables": model.value_embeddings} | vocab, heads, "input")
        self.eps = model.norm_eps if model.embed_norm == "rmsnorm" else None

    def __call__(self, tokens_BxT: jax.Array, call: Call) -> jax.Array:
        place, scale = call.place, call.embed_scale
        h_BxTxD = place.lookup(self.tokens[...], tokens_BxT, self.tokens.spec)
        if hasattr(self, "positions"):
            table_PxD = self.positions[...]
            h_BxTxD = place.add_positions(h_BxTxD, table_PxD, self.positions.spec)
        h_BxTxD = h_BxTxD * scale if self.eps is None else unit_rms(h_BxTxD, self.eps) * scale
        return place.flat(h_BxTxD)

    def value_rows(self, tokens_BxT: jax.Array, call: Call) -> jax.Array:
        """[tables, B, T, kv_heads, head_dim]."""
        rows = call.place.lookup(self.values[...], tokens_BxT, self.values.spec)
        return rows * call.embed_scale


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the float32 residual stream."""

    def __init__(self, model, kernel: str):
        self.attention_norm, self.attention = Norm(model), Attention(model, kernel)
        self.mlp_norm, self.mlp = Norm(model), MLP(model)
        if model.skips == "unet":
            self.skip = param.scalar(1.0)
        if model.x0_mix == "learned":
            self.stream_share, self.origin_share = param.scalar(1.0), param.scalar(0.0)

    def __call__(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        h_NxD = self.feed(self.attend(h_NxD, call), call)
        call.note("residual", lambda: h_NxD)
        return h_NxD

    def attend(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        """The residual stream with what enters from elsewhere and what attention adds to it."""
        if call.skip_NxD is not None:
            h_NxD = h_NxD + self.skip[...] * call.skip_NxD
        if call.origin_NxD is not None:
            h_NxD = self.stream_share[...] * h_NxD + self.origin_share[...] * call.origin_NxD
        a_NxD = self.attention(self.attention_norm(h_NxD, call), call)
        call.note("attention", lambda: a_NxD)
        return h_NxD + call.branch_scale * call.drop(a_NxD, 1).astype(h_NxD.dtype)

    def feed(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        """The residual stream with what the MLP adds to it."""
        m_NxD = self.mlp(self.mlp_norm(h_NxD, call), call)
        call.note("mlp", lambda: m_NxD)
        return h_NxD + call.branch_scale * call.drop(m_NxD, 2).astype(h_NxD.dtype)


class Readout(nnx.Module):
    """Final norm and the product with the vocabulary, the embedding's own matrix if tied."""

    def __init__(self, model):
        self.norm = Norm(model)
        if model.head == "untied":
            self.weight = param.weight(
                {"embed": model.d_model}, {"vocab": model.vocab_size}, "output"
            )
