"""The three modules of the decoder: embedding, one block (repeated by `stack`), and readout."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from lmscale_jax.config.key import Modes
from lmscale_jax.model import param
from lmscale_jax.model.attention import Attention
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.layers import MLPS, NORMS, no_norm, unit_rms
from lmscale_jax.model.skip_connections import POSITIONS, SKIPS, X0_MIXES

# (embedding, epsilon) -> normed embedding.
EMBED_NORMS = Modes("model.embed_norm", {"none": no_norm, "rmsnorm": unit_rms})


class Embed(nnx.Module):
    """Token embedding, with optional learned positions and value tables."""

    def __init__(self, model):
        vocab = {"vocab": model.vocab_size}
        self.tokens = param.weight(vocab, {"embed": model.d_model}, "input")
        if declare := POSITIONS[model.positions].table:
            self.positions = declare(model)
        if model.value_embeddings:
            heads = {"kv_heads": model.n_kv_heads, "head_dim": model.head_dim}
            tables = {"tables": model.value_embeddings} | vocab
            self.values = param.weight(tables, heads, "input", in_branch=True)
        self.norm, self.eps = EMBED_NORMS[model.embed_norm], model.norm_eps

    def __call__(self, tokens_BxT: jax.Array, context: ForwardContext) -> jax.Array:
        sharding = context.sharding
        h_BxTxD = sharding.lookup(self.tokens[...], tokens_BxT, self.tokens.spec)
        if hasattr(self, "positions"):
            table_PxD = self.positions[...]
            h_BxTxD = sharding.add_positions(h_BxTxD, table_PxD, self.positions.spec)
        return sharding.flatten(self.norm(h_BxTxD, self.eps) * context.scales.embed)

    def value_rows(self, tokens_BxT: jax.Array, context: ForwardContext) -> jax.Array:
        """Looks up each token in the value tables, [tables, B, T, kv_heads, head_dim]."""
        rows = context.sharding.lookup(self.values[...], tokens_BxT, self.values.spec)
        return rows * context.scales.embed


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config, kernel: str):
        model = config.model
        norm = NORMS[model.norm]
        self.attention_norm, self.attention = norm(model), Attention(model, kernel)
        self.mlp_norm, self.mlp = norm(model), MLPS[model.mlp](config)
        for factor in SKIPS[model.skips].factors:
            self.skip = param.scalar(factor, in_branch=False)
        if mix := X0_MIXES[model.x0_mix]:
            self.stream_share = param.scalar(mix.stream, in_branch=False)
            self.origin_share = param.scalar(mix.origin, in_branch=False)

    def attend(self, context: ForwardContext, h_NxD: jax.Array) -> jax.Array:
        """Adds the skip, the embedding (x0 mix) and attention to the residual stream."""
        dtype = h_NxD.dtype
        if context.skip_NxD is not None:
            h_NxD = h_NxD + self.skip[...] * context.skip_NxD
        if context.origin_NxD is not None:
            h_NxD = self.stream_share[...] * h_NxD
            h_NxD = h_NxD + self.origin_share[...] * context.origin_NxD
        h_NxD = h_NxD.astype(dtype)
        a_NxD = self.attention(self.attention_norm(h_NxD, context), context)
        context.tap("attention", lambda: a_NxD)
        return h_NxD + context.scales.branch * context.dropout(a_NxD, 1).astype(h_NxD.dtype)

    def feed(self, context: ForwardContext, h_NxD: jax.Array) -> jax.Array:
        """Adds the MLP to the residual stream."""
        m_NxD = self.mlp(self.mlp_norm(h_NxD, context), context)
        context.tap("mlp", lambda: m_NxD)
        h_NxD = h_NxD + context.scales.branch * context.dropout(m_NxD, 2).astype(h_NxD.dtype)
        context.tap("residual", lambda: h_NxD)
        return h_NxD


class Head(NamedTuple):
    """One choice of model.head.

    Attributes:
      path: path of the readout's matrix in the tree of parameters.
      vocab_axis: axis of the vocabulary in that matrix.
      table: model -> that parameter, declared by the readout; None if the embedding has it.
    """

    path: tuple[str, str]
    vocab_axis: int
    table: Callable | None

    def of(self, tree: dict):
        """Returns the readout's entry of a tree of parameters, or of a tree of the same paths."""
        return tree[self.path[0]][self.path[1]]


def _untied_table(model):
    return param.weight({"embed": model.d_model}, {"vocab": model.vocab_size}, "output")


HEADS = Modes(
    "model.head",
    {
        "tied": Head(("embed", "tokens"), vocab_axis=0, table=None),
        "untied": Head(("readout", "weight"), vocab_axis=-1, table=_untied_table),
    },
)


class Readout(nnx.Module):
    """Final norm, and the matrix over the vocabulary unless it is tied to the embedding."""

    def __init__(self, model):
        self.norm = NORMS[model.norm](model)
        if declare := HEADS[model.head].table:
            self.weight = declare(model)
