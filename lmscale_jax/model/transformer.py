"""The three modules of the decoder: embedding, one block (repeated by `stack`), and readout."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode
from lmscale_jax.errors import InputError
from lmscale_jax.model import param
from lmscale_jax.model.attention import ATTENTIONS
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.layers import MLPS, NORMS, Part, module_flops, no_norm, unit_rms
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


class BlockParts(NamedTuple):
    """Declares the parts of a block by a config; each call declares parameters of their own."""

    norm: Callable[[], nnx.Module]
    attention: Callable[[], nnx.Module]
    mlp: Callable[[], nnx.Module]


class MLPBlock(nnx.Module):
    """A block without attention: a pre-norm MLP, added to the residual stream."""

    def __init__(self, model, parts: BlockParts):
        self.mlp_norm, self.mlp = parts.norm(), parts.mlp()
        for factor in SKIPS[model.skips].factors:
            self.skip = param.scalar(factor, in_branch=False)
        if mix := X0_MIXES[model.x0_mix]:
            self.stream_share = param.scalar(mix.stream, in_branch=False)
            self.origin_share = param.scalar(mix.origin, in_branch=False)

    def attend(self, h_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Adds the skip and the embedding (x0 mix) to the residual stream."""
        dtype = h_NxD.dtype
        if context.skip_NxD is not None:
            h_NxD = h_NxD + self.skip[...] * context.skip_NxD
        if context.origin_NxD is not None:
            h_NxD = self.stream_share[...] * h_NxD
            h_NxD = h_NxD + self.origin_share[...] * context.origin_NxD
        return h_NxD.astype(dtype)

    def feed(self, h_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Adds the MLP to the residual stream."""
        m_NxD = self.mlp(self.mlp_norm(h_NxD, context), context)
        _check_shape("mlp", h_NxD, m_NxD)
        context.tap("mlp", lambda: m_NxD)
        h_NxD = h_NxD + context.scales.branch * context.dropout(m_NxD, 2).astype(h_NxD.dtype)
        context.tap("residual", lambda: h_NxD)
        return h_NxD


class Block(MLPBlock):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, model, parts: BlockParts):
        super().__init__(model, parts)
        self.attention_norm, self.attention = parts.norm(), parts.attention()

    def attend(self, h_NxD: jax.Array, context: ForwardContext) -> jax.Array:
        """Adds the skip, the embedding (x0 mix) and attention to the residual stream."""
        h_NxD = super().attend(h_NxD, context)
        a_NxD = self.attention(self.attention_norm(h_NxD, context), context)
        _check_shape("attention_module", h_NxD, a_NxD)
        context.tap("attention", lambda: a_NxD)
        return h_NxD + context.scales.branch * context.dropout(a_NxD, 1).astype(h_NxD.dtype)


def _check_shape(key: str, h_NxD: jax.Array, y_NxD: jax.Array) -> None:
    """Raises InputError where a branch cannot be added to the stream; it would be broadcast."""
    if y_NxD.shape != h_NxD.shape:
        raise InputError(
            f"config.model.{key}: its result has the shape {y_NxD.shape}, and not {h_NxD.shape}, "
            f"the shape [tokens, d_model] of its input"
        )


def declare_block(config, kernel: str) -> nnx.Module:
    """Declares one block of a resolved config; `kernel` names its attention kernel."""
    return BLOCKS[config.model.block].declare(config, _block_parts(config, kernel))


def declare_mlp_block(config, kernel: str) -> nnx.Module:
    """Declares one of the blocks without attention."""
    return MLPBlock(config.model, _block_parts(config, kernel))


def _block_parts(config, kernel: str) -> BlockParts:
    model = config.model
    return BlockParts(
        norm=lambda: NORMS[model.norm].declare(config),
        attention=lambda: ATTENTIONS[model.attention_module].declare(config, kernel),
        mlp=lambda: MLPS[model.mlp].declare(config),
    )


def block_flops(config, visible: float) -> float:
    """Returns the FLOPs of a token in all blocks besides products with weights.

    `visible` are the keys that a query attends to.
    """
    model, attending = config.model, len(attention_blocks(config.model))
    mlp_block = sum(part.flops(config, visible) for part in (MLPS[model.mlp], NORMS[model.norm]))
    attention = attending * BLOCKS[model.block].flops(config, visible)
    return attention + (model.n_layers - attending) * mlp_block


def _prenorm_flops(config, visible: float) -> float:
    model = config.model
    parts = (ATTENTIONS[model.attention_module], MLPS[model.mlp], *2 * (NORMS[model.norm],))
    return sum(part.flops(config, visible) for part in parts)


def _own_block(code: OwnCode) -> Part:
    fits = all(hasattr(code.entry, name) for name in ("attend", "feed"))
    code.require("a class of modules with attend and feed", fits)

    def declare(config, parts):
        return code.entry(config.model, code.settings(config), parts)

    def flops(config, visible: float) -> float:
        return module_flops(declare_block(config, "plain"), config, visible)

    return Part(declare, flops)


# Declared from a config and `BlockParts`.
BLOCKS = Modes(
    "model.block",
    {"prenorm": Part(lambda config, parts: Block(config.model, parts), _prenorm_flops)},
    _own_block,
)


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

    def __init__(self, config):
        model = config.model
        self.norm = NORMS[model.norm].declare(config)
        if declare := HEADS[model.head].table:
            self.weight = declare(model)
