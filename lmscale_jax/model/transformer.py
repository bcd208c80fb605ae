"""The decoder in three parts: embedding, one block (stacked by `build`), and readout."""

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.model import param
from lmscale_jax.model.attention import Attention
from lmscale_jax.model.layers import MLP, Call, Norm


class Embed(nnx.Module):
    """Token embedding and, if learned, positions."""

    def __init__(self, model):
        self.tokens = param.weight({"vocab": model.vocab_size}, {"embed": model.d_model}, "input")
        if model.positions == "learned":
            self.positions = param.weight(
                {"position": model.max_seq_len}, {"embed": model.d_model}, "input"
            )

    def __call__(self, tokens_BxT: jax.Array, scale: float) -> jax.Array:
        h_BxTxD = jnp.take(self.tokens[...], tokens_BxT, axis=0)
        if hasattr(self, "positions"):
            h_BxTxD = h_BxTxD + self.positions[...][: tokens_BxT.shape[1]]
        return (h_BxTxD * scale).reshape(tokens_BxT.size, -1)


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the float32 residual stream."""

    def __init__(self, model, kernel: str):
        self.attention_norm, self.attention = Norm(model), Attention(model, kernel)
        self.mlp_norm, self.mlp = Norm(model), MLP(model)

    def __call__(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        h_NxD = self.feed(self.attend(h_NxD, call), call)
        call.note("residual", lambda: h_NxD)
        return h_NxD

    def attend(self, h_NxD: jax.Array, call: Call) -> jax.Array:
        """The residual stream with what attention adds to it."""
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

    def logits(self, x_NxD: jax.Array, tokens_VxD: jax.Array, call: Call) -> jax.Array:
        w_DxV = self.weight[...] if hasattr(self, "weight") else tokens_VxD.T
        return call.ops.dense(x_NxD, w_DxV)
