"""Attention in plain XLA by blocks of queries, each with the band of keys that its mask allows.

Scores exist for one block at a time, and for the backward pass only their log-sum-exp is stored, as
in FlashAttention (Dao et al. 2022, arXiv 2205.14135); its kernel does the same in fast memory.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

FLOAT = jnp.float32
# Queries of a block at most. Wider blocks have wider bands, narrower ones more kernels.
BLOCK = 256
# Without a window a row is cut into so many stages, each with the keys up to its end.
STAGES = 4
# The arrays that the backward pass stores, besides its inputs.
SAVED = ("banded_output", "banded_log_sum_exp")


class Stage(NamedTuple):
    """Consecutive blocks of queries with bands of one width.

    Attributes:
      first, count: they are the blocks first..first+count-1.
      keys: they see none of the keys from this one on.
      band: keys that each block is multiplied with.
    """

    first: int
    count: int
    keys: int
    band: int


def band_pieces(length: int, block: int, reach: int | None, unit: int) -> int:
    """Returns how many blocks of keys a block of queries sees some of: its own and ones before.

    `reach` is the most keys that a query sees, None for all before it; windows begin at multiples
    of `unit` tokens, as with model.window_block.
    """
    if reach is None:
        return length // block
    # A window of whole units ends at most so many keys before a block that begins with a unit.
    before = reach - (unit if block % unit == 0 else 1)
    return min(1 + -(-before // block), length // block)


def band_stages(queries: int, keys: int, block: int, band: int) -> list[Stage]:
    """Divides a row's blocks of queries, of which each sees at most `band` keys.

    Fewer queries than keys are a part of a row, at any position.
    """
    count = queries // block
    if band < keys or queries < keys or count < STAGES:
        return [Stage(0, count, keys, band)]
    bounds = [count * i // STAGES for i in range(STAGES + 1)]
    return [
        Stage(start, stop - start, stop * block, stop * block)
        for start, stop in itertools.pairwise(bounds)
    ]


def block_length(queries: int) -> int:
    """Returns the largest divisor of `queries` up to BLOCK; all where that is under a quarter."""
    block = max(n for n in range(1, min(queries, BLOCK) + 1) if queries % n == 0)
    return block if 4 * block >= BLOCK else queries


def banded_attention(
    q_BxTxHxd: jax.Array,
    k_BxSxKxd: jax.Array,
    v_BxSxKxd: jax.Array,
    *,
    scale: float,
    first_key_BxT: jax.Array | None = None,
    last_key_1xT: jax.Array | None = None,
    reach: int | None = None,
    unit: int = 1,
) -> jax.Array:
    """Computes `primitives.attention` as [B, T, H, d], with fewer key and value heads or as many.

    First and last keys must not decrease along a row. `reach` and `unit` are as for `band_pieces`.
    """
    (B, T, H, d), (S, K) = q_BxTxHxd.shape, k_BxSxKxd.shape[1:3]
    block = block_length(T)
    pieces = band_pieces(S, block, reach, unit)
    position_1xT = jnp.arange(T, dtype=jnp.int32)[None]
    last = position_1xT if last_key_1xT is None else last_key_1xT
    first = jnp.zeros_like(last) if first_key_BxT is None else first_key_BxT
    # Heads that share keys are rows of one product.
    q = q_BxTxHxd.reshape(B, T, K, H // K, d)
    if last_key_1xT is None and pieces * block < S:
        o = _by_rows(q, k_BxSxKxd, v_BxSxKxd, first, float(scale), block, pieces)
    else:
        o = _by_blocks(q, k_BxSxKxd, v_BxSxKxd, (first, last), float(scale), block, pieces * block)
    return o.reshape(B, T, H, d)


def _by_rows(q, k, v, first, scale: float, block: int, pieces: int):
    """Computes all blocks of a row at once, each with a copy of its band, and row after row."""
    (B, T), before = q.shape[:2], (pieces - 1) * block
    begin_n = np.arange(0, T, block, dtype=np.int32) - before
    last = jnp.asarray(before + np.arange(block, dtype=np.int32))[None, None]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
    def attend_row(_, inputs):
        q, k, v, first = inputs
        k, v = (chunk_bands(x[None], block, pieces).swapaxes(1, 2) for x in (k, v))
        q = q.reshape(-1, block, *q.shape[1:]).transpose(0, 2, 3, 1, 4)
        bounds = ((first.reshape(-1, block) - begin_n[:, None])[None], last)
        return None, _attend_bands(q[None], k, v, bounds, scale, k.shape[2])[0]

    _, o = lax.scan(attend_row, None, (q, k, v, jnp.broadcast_to(first, (B, T))))
    return o.transpose(0, 1, 4, 2, 3, 5)


def chunk_bands(x_BxTxKxd: jax.Array, chunk: int, pieces: int) -> jax.Array:
    """Returns for each chunk of positions its own and the `pieces` - 1 chunks before it.

    [B T/chunk, pieces chunk, K, d]; zeros where the row has not begun.
    """
    B, T, *inner = x_BxTxKxd.shape
    n, zeros = T // chunk, [(0, 0) for _ in inner]
    padded = jnp.pad(x_BxTxKxd, [(0, 0), ((pieces - 1) * chunk, 0), *zeros])
    chunks = padded.reshape(B, n + pieces - 1, chunk, *inner)
    bands = jnp.concatenate([chunks[:, i : i + n] for i in range(pieces)], axis=2)
    return bands.reshape(B * n, pieces * chunk, *inner)


def _by_blocks(q, k, v, bounds, scale: float, block: int, band: int):
    """Computes one block of all rows after the other, each with a slice of the keys."""
    B, T = q.shape[:2]
    q = q.reshape(B, -1, block, *q.shape[2:]).transpose(1, 0, 3, 4, 2, 5)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    first, last = (x.reshape(len(x), -1, block).swapaxes(0, 1) for x in bounds)
    outputs = []
    for stage in band_stages(T, k.shape[2], block, band):
        at, keys = slice(stage.first, stage.first + stage.count), slice(stage.keys)
        inputs = (q[at], k[:, :, keys], v[:, :, keys], (first[at], last[at]))
        outputs.append(_attend_bands(*inputs, scale, stage.band))
    o = jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]
    return o.transpose(1, 0, 4, 2, 3, 5)


def _scores(q, k, first, last, begin, scale: float):
    """Scores of a block with its band, [B, K, H/K, block, band] float32; -inf outside the mask."""
    key = begin + lax.broadcasted_iota(jnp.int32, (q.shape[-2], k.shape[-2]), 1)
    mask = (key >= first[:, :, None]) & (key <= last[:, :, None])
    scores = scale * jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=FLOAT)
    return jnp.where(mask[:, None, None], scores, -jnp.inf)


def _band_of(last, keys: int, band: int):
    """The first key of a block's band, which ends with the last key that the block sees."""
    return jnp.clip(last[0, -1] + 1 - band, 0, keys - band)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_bands(q, k, v, bounds, scale: float, band: int):
    return _bands_forward(q, k, v, bounds, scale, band)[0]


def _bands_forward(q, k, v, bounds, scale, band):
    def attend_block(_, inputs):
        q, first, last = inputs
        begin = _band_of(last, k.shape[2], band)
        k_band, v_band = (lax.dynamic_slice_in_dim(x, begin, band, axis=2) for x in (k, v))
        scores = _scores(q, k_band, first, last, begin, scale)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        o = jnp.einsum(
            "bkgqs,bksd->bkgqd", weights.astype(v.dtype), v_band, preferred_element_type=FLOAT
        )
        return None, ((o / total).astype(q.dtype), most + jnp.log(total))

    _, results = lax.scan(attend_block, None, (q, *bounds))
    o, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED, strict=True))
    return o, (q, k, v, bounds, o, lse)


def _bands_backward(scale, band, saved, do):
    """Computes FlashAttention's backward formulas (appendix B.2), block by block."""
    q, k, v, bounds, o, lse = saved
    delta = (do.astype(FLOAT) * o.astype(FLOAT)).sum(axis=-1, keepdims=True)

    def differentiate_block(sums, inputs):
        q, (first, last), do, lse, delta = inputs
        begin = _band_of(last, k.shape[2], band)
        k_band, v_band = (lax.dynamic_slice_in_dim(x, begin, band, axis=2) for x in (k, v))
        p = jnp.exp(_scores(q, k_band, first, last, begin, scale) - lse)
        dp = jnp.einsum("bkgqd,bksd->bkgqs", do, v_band, preferred_element_type=FLOAT)
        ds = (scale * p * (dp - delta)).astype(q.dtype)
        dq = jnp.einsum("bkgqs,bksd->bkgqd", ds, k_band, preferred_element_type=FLOAT)
        terms = ((ds, q), (p.astype(do.dtype), do))
        sums = tuple(
            _add_band(total, begin, *pair) for total, pair in zip(sums, terms, strict=True)
        )
        return sums, dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, FLOAT), jnp.zeros(v.shape, FLOAT))
    (dk, dv), dq = lax.scan(differentiate_block, zeros, (q, bounds, do, lse, delta))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


def _add_band(total, begin, weights, rows):
    """Adds weights^T rows to the keys of a band."""
    term = jnp.einsum("bkgqs,bkgqd->bksd", weights, rows, preferred_element_type=FLOAT)
    term = term + lax.dynamic_slice_in_dim(total, begin, term.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, term, begin, axis=2)


_attend_bands.defvjp(_bands_forward, _bands_backward)
