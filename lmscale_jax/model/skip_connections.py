"""Inputs of each block other than the residual stream: windows, skips, x0 mix, value tables.

Windows, U-net skips, the mix with the embedding and value tables are those of modded-nanogpt
(Jordan et al. 2024), as functions of the number of blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmscale_jax.config.key import Modes
from lmscale_jax.model import param
from lmscale_jax.model.attention import rope_tables
from lmscale_jax.model.context import ForwardContext


class Positions(NamedTuple):
    """One choice of model.positions; None where it has no such part.

    Attributes:
      table: model -> the parameter with a row for each position, added to the embedding.
      rope: (model, length) -> cosines and sines.
    """

    table: Callable | None = None
    rope: Callable | None = None


def _position_table(model):
    return param.weight({"position": model.max_seq_len}, {"embed": model.d_model}, "input")


def _rope(model, length: int):
    return rope_tables(length, model.head_dim, model.rope_theta, model.rope_channels)


POSITIONS = Modes(
    "model.positions",
    {
        "learned": Positions(table=_position_table),
        "rope": Positions(rope=_rope),
        "none": Positions(),
    },
)


class Skips(NamedTuple):
    """One choice of model.skips.

    Attributes:
      half: number of blocks -> n: the outputs of the first n blocks enter the last n ones, in
        reverse order.
      factors: initial value of each block's factor of its skip; () without skips.
    """

    half: Callable[[int], int]
    factors: tuple[float, ...] = ()


SKIPS = Modes(
    "model.skips", {"none": Skips(lambda n: 0), "unet": Skips(lambda n: n // 2, factors=(1.0,))}
)


class OriginMix(NamedTuple):
    """Initial weights of the stream and of the embedding in a block's input."""

    stream: float
    origin: float


# None: a block's input is the stream.
X0_MIXES = Modes("model.x0_mix", {"none": None, "learned": OriginMix(stream=1.0, origin=0.0)})


def _document_starts(tokens_BxT: jax.Array, bos_id: int):
    position_1xT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]
    return lax.cummax(jnp.where(tokens_BxT == bos_id, position_1xT, 0), axis=1)


# (tokens_BxT, bos_id) -> where each token's document begins; None: the causal mask alone.
MASKS = Modes("model.mask", {"causal": None, "document": _document_starts})


def begin_pass(config, embed, h_NxD, tokens_BxT, context: ForwardContext, step) -> ForwardContext:
    """Adds the inputs of a pass over these tokens to its context; h is their embedding."""
    model, length = config.model, tokens_BxT.shape[1]
    rope, mix = POSITIONS[model.positions].rope, X0_MIXES[model.x0_mix]
    return context.replace(
        rope=rope and rope(model, length),
        value_rows_SxBxTxKxd=embed.value_rows(tokens_BxT, context)
        if model.value_embeddings
        else None,
        origin_NxD=h_NxD if mix else None,
        windows=attention_windows(config, step),
    )


def layer_inputs(model, context: ForwardContext, index) -> ForwardContext:
    """Returns the context of one block; its index may be traced."""
    L, key, skip_NxD, values_BxTxKxd = model.n_layers, None, None, None
    if context.key is not None:
        key = jax.random.fold_in(context.key, index + 1)
    first_key_BxT, reach = _visible_keys(model, context, index)
    if context.skips_SxNxD is not None:
        skip_NxD = context.skips_SxNxD[L - 1 - index]
    if context.value_rows_SxBxTxKxd is not None:
        values_BxTxKxd = _value_rows(model, context.value_rows_SxBxTxKxd, index)
    return context.replace(
        key=key, first_key_BxT=first_key_BxT, reach=reach, skip_NxD=skip_NxD,
        values_BxTxKxd=values_BxTxKxd,
    )  # fmt: skip


def _visible_keys(model, context: ForwardContext, index) -> tuple[jax.Array | None, int | None]:
    """Returns (first_key_BxT, reach) of a block, as in `ForwardContext`."""
    documents_BxT, unit = context.document_starts_BxT, model.window_block
    if context.windows is None:
        return documents_BxT, None
    window = _of_block(model, context.windows, index)
    final = final_windows(model)
    reach = _of_block(model, final, index) if isinstance(index, int) else max(final)
    position_1xT = jnp.arange(context.length, dtype=jnp.int32)[None]
    first_1xT = jnp.maximum(0, (position_1xT // unit - window + 1) * unit)
    if documents_BxT is None:
        return first_1xT, reach * unit
    return jnp.maximum(first_1xT, documents_BxT), reach * unit


def _of_block(model, windows: tuple, index):
    """Chooses a block's window from the (full, half) ones."""
    full, half = windows
    is_full_L = np.isin(np.arange(model.n_layers), full_window_blocks(model))
    if isinstance(index, int):
        return full if is_full_L[index] else half
    return jnp.where(jnp.asarray(is_full_L)[index], full, half)


def _value_rows(model, values_SxBxTxKxd, index):
    table_L = value_tables(model)
    if isinstance(index, int):
        return values_SxBxTxKxd[table_L[index]] if table_L[index] >= 0 else None
    table = jnp.asarray(table_L)[index]
    return jnp.where(table >= 0, values_SxBxTxKxd[jnp.maximum(table, 0)], 0)


def value_tables(model) -> list[int]:
    """Returns [L]: the value table of each block, -1 for none.

    The first and the last n blocks read the same n tables, in the same order.
    """
    n, L = model.value_embeddings, model.n_layers
    return [i if i < n else i - (L - n) if i >= L - n else -1 for i in range(L)]


# Number of blocks -> the blocks with all of model.window; None: there are no windows.
FULL_WINDOWS = Modes(
    "model.window_layers",
    {
        "none": lambda n: None,
        "all": lambda n: list(range(n)),
        "ends": lambda n: sorted({0, round(n / 3), n - 1}),
        "fourth": lambda n: sorted({*range(3, n, 4), n - 1}),
    },
)


def full_window_blocks(model) -> list[int] | None:
    """Returns the blocks with all of model.window; None: there are no windows."""
    return FULL_WINDOWS[model.window_layers](model.n_layers)


def attention_windows(config, step=None) -> tuple | None:
    """Returns the (full, half) windows at an optimizer step, in units; None: the final ones.

    A unit is model.window_block tokens. A growing full window is model.window times the fraction of
    model.window_growth that is done, rounded up to units; the half one is half of that in units,
    rounded down. Both are at least one unit. Returns None if there are no windows. `step` may be an
    array of NumPy's too, in float32.
    """
    model = config.model
    if full_window_blocks(model) is None:
        return None
    growth, (full, half), block = model.window_growth, final_windows(model), model.window_block
    if step is None or not growth:
        return full, half
    xp = np if isinstance(step, np.ndarray) else jnp
    tokens = xp.minimum(1.0, step / growth) * model.window
    grown = xp.clip(xp.ceil(tokens / block), 1, full).astype(np.int32)
    return grown, xp.maximum(1, grown // 2)


def final_windows(model) -> tuple[int, int]:
    """Returns the (full, half) windows after any growth, in units."""
    full = -(-model.window // model.window_block)
    return full, max(1, full // 2)


def describe_skips(config) -> dict[str, str]:
    """Describes the per-block inputs in words, by name; {} without any."""
    model, lines = config.model, {}
    if full_window_blocks(model) is not None:
        full, half = attention_windows(config)
        blocks = "" if model.window_block == 1 else f" blocks of {model.window_block}"
        grow, full_blocks = model.window_growth, full_window_blocks(model)
        lines["windows"] = (
            f"{full}{blocks or ' tokens'} in block {', '.join(map(str, full_blocks))}, else {half}"
            + (f"; growing over {grow} steps" if grow else "")
        )
    if model.attention_skip:
        lines["MLP alone"] = f"block {', '.join(model.attention_skip.split(','))}"
    if SKIPS[model.skips].factors:
        L = model.n_layers
        pairs = ((i, L - 1 - i) for i in range(SKIPS[model.skips].half(L)))
        lines["skips"] = ", ".join(f"{i} to {j}" for i, j in pairs)
    if model.value_embeddings:
        tables = {i: t for i, t in enumerate(value_tables(model)) if t >= 0}
        lines["value tables"] = ", ".join(f"{t} in block {i}" for i, t in tables.items())
    return lines
