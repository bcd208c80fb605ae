"""What reaches a block beside the residual stream, and which block gets what.

Windows, skips from half to half (a U-net), the embedding mixed in again, and tables added to the
values are those of modded-nanogpt (Jordan et al. 2024), as functions of the number of blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.model.attention import rope_tables


class Shared(NamedTuple):
    """What the blocks of one forward pass share; each field is None where nothing uses it.

    Attributes:
      key: random key of the pass.
      rope: cosines and sines.
      segments_BxT: document numbers.
      origin_NxD: the embedding.
      values_SxBxTxKxd: a row of each table for each token.
      windows: blocks of tokens that are seen where the window is whole and where it is half.
      skips_SxNxD: the streams after the first blocks, for the last ones.
    """

    key: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None
    segments_BxT: jax.Array | None
    origin_NxD: jax.Array | None
    values_SxBxTxKxd: jax.Array | None
    windows: tuple | None
    skips_SxNxD: jax.Array | None = None


def begin(config, embed, h_NxD, tokens_BxT, call, segments_BxT, step) -> Shared:
    """What a pass over these tokens shares; h is their embedding."""
    model, T = config.model, tokens_BxT.shape[1]
    rope = values = None
    if model.positions == "rope":
        rope = rope_tables(T, model.head_dim, model.rope_theta, model.rope_channels)
    if model.value_embeddings:
        values = embed.value_rows(tokens_BxT, call)
    origin_NxD = h_NxD if model.x0_mix == "learned" else None
    return Shared(call.key, rope, segments_BxT, origin_NxD, values, windows(config, step))


def of_layer(model, shared: Shared, index) -> dict:
    """The fields of `layers.Call` of one block; its number may be traced."""
    L, given = model.n_layers, {"rope": shared.rope, "segments_BxT": shared.segments_BxT}
    given |= {"key": None, "origin_NxD": shared.origin_NxD}
    if shared.key is not None:
        given["key"] = jax.random.fold_in(shared.key, index + 1)
    if shared.windows is not None:
        whole, half = shared.windows
        is_whole_L = np.isin(np.arange(L), whole_windows(model))
        if is_whole_L.all():
            given["window"] = whole  # a number, which some kernels want
        elif isinstance(index, int):
            given["window"] = whole if is_whole_L[index] else half
        else:
            given["window"] = jnp.where(jnp.asarray(is_whole_L)[index], whole, half)
    if shared.skips_SxNxD is not None:
        given["skip_NxD"] = shared.skips_SxNxD[L - 1 - index]
    if shared.values_SxBxTxKxd is not None:
        given["values_BxTxKxd"] = _value_rows(model, shared.values_SxBxTxKxd, index)
    return given


def _value_rows(model, values_SxBxTxKxd, index):
    table_L = value_tables(model)
    if isinstance(index, int):
        return values_SxBxTxKxd[table_L[index]] if table_L[index] >= 0 else None
    table = jnp.asarray(table_L)[index]
    return jnp.where(table >= 0, values_SxBxTxKxd[jnp.maximum(table, 0)], 0)


def value_tables(model) -> list[int]:
    """[L]: which table a block reads, -1 for none. The first and the last n blocks read the same n,
    in the same order."""
    n, L = model.value_embeddings, model.n_layers
    return [i if i < n else i - (L - n) if i >= L - n else -1 for i in range(L)]


def whole_windows(model) -> list[int]:
    """The blocks that see the whole of model.window."""
    L = model.n_layers
    if model.window_layers == "all":
        return list(range(L))
    if model.window_layers == "ends":
        return sorted({0, round(L / 3), L - 1})
    return sorted({*range(3, L, 4), L - 1})


def windows(config, step=None) -> tuple | None:
    """(whole, half) windows in blocks of tokens at an optimizer step; without one, at the end.

    While they grow, the whole one is the share of steps done times model.window, rounded up to
    blocks and at least one block; the half one is half of it in blocks, rounded down, at least one.
    """
    model = config.model
    if model.window_layers == "none":
        return None
    block = model.window_block
    full = -(-model.window // block)
    growth = model.window_growth
    if step is None or not growth:
        return full, max(1, full // 2)
    tokens = jnp.minimum(1.0, step / growth) * model.window
    whole = jnp.clip(jnp.ceil(tokens / block), 1, full).astype(jnp.int32)
    return whole, jnp.maximum(1, whole // 2)


def mean_visible(config, length: int) -> float:
    """Keys that a query of a full window of tokens attends to, on average over tokens and blocks;
    half of the window's length where nothing is hidden but the future."""
    model = config.model
    if model.window_layers == "none":
        return length / 2
    whole, half = (min(length, w * model.window_block) for w in windows(config))
    long = len(whole_windows(model))
    seen = {w: w - w * w / (2 * length) for w in (whole, half)}
    return (long * seen[whole] + (model.n_layers - long) * seen[half]) / model.n_layers


def described(config) -> dict[str, str]:
    """For people to read, by name; {} for a plain stack."""
    model, lines = config.model, {}
    if model.window_layers != "none":
        whole, half = windows(config)
        blocks = "" if model.window_block == 1 else f" blocks of {model.window_block}"
        grow = model.window_growth
        lines["windows"] = (
            f"{whole}{blocks or ' tokens'} in block {', '.join(map(str, whole_windows(model)))}, "
            f"else {half}" + (f"; growing over {grow} steps" if grow else "")
        )
    if model.skips == "unet":
        L = model.n_layers
        lines["skips"] = ", ".join(f"{i} to {L - 1 - i}" for i in range(L // 2))
    if model.value_embeddings:
        found = {i: t for i, t in enumerate(value_tables(model)) if t >= 0}
        lines["value tables"] = ", ".join(f"{t} in block {i}" for i, t in found.items())
    return lines
