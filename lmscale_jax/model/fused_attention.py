"""Adapters of attention kernels that others maintain: cuDNN's, JAX's splash for TPU, tokamax."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lmscale_jax.model.banded import band_pieces, chunk_bands
from lmscale_jax.model.context import ForwardContext

# Lanes of a TPU's vector and matrix units: splash needs heads and rows in multiples of them.
LANES = 128
# Largest tiles of splash. Its default, 128, spends most of its time starting them.
SPLASH_TILES = (512, 384, 256, 128)
# Queries that the backward pass of tokamax's kernels takes at a time where windows bound the keys.
CHUNK = 512


def cudnn(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
    """Runs NVIDIA's kernel; windows of single tokens only, and no documents."""
    window = None if context.reach is None else (context.reach - 1, 0)
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, scale=context.scales.attention, is_causal=True,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip


def splash(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext, interpret: bool = False):
    """Runs JAX's Pallas kernel for TPU; `interpret` runs it on any platform, slowly, for tests.

    Queries and keys come without RoPE, of which `context.rope` has the tables: `by_lanes` applies
    it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, d = q_BxTxHxd.shape[1:]
    if context.reach is None:
        mask = masks.CausalMask((T, T))
    else:
        mask = masks.LocalMask((T, T), (context.reach - 1, 0), 0)
    tile = next(tile for tile in SPLASH_TILES if T % tile == 0)
    sizes = kernels.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile,
        block_kv_dq=tile,
    )  # fmt: skip
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * H), block_sizes=sizes, interpret=interpret
    )
    q_BxTxHxd = (q_BxTxHxd * context.scales.attention).astype(q_BxTxHxd.dtype)
    q, k = (
        by_lanes(jnp.repeat(x, H // x.shape[2], axis=2), context.rope)
        for x in (q_BxTxHxd, k_BxTxKxd)
    )
    v = by_lanes(jnp.repeat(v_BxTxKxd, H // v_BxTxKxd.shape[2], axis=2))
    documents = context.document_starts_BxT
    ids = None if documents is None else kernels.SegmentIds(documents, documents)
    with jax.named_scope(f"mean_keys_{mean_keys(context, tile)}"):  # for train.tpu_cycles
        o_BxHxTxd = jax.vmap(kernel)(q, k, v, segment_ids=ids)
    return _exact_product("bhtc,dc->bthd", o_BxHxTxd, _identity(d)).astype(q_BxTxHxd.dtype)


def by_lanes(x_BxTxHxd, rope=None) -> jax.Array:
    """Moves heads before tokens, applies RoPE if its tables are given (`attention.rotate`), and
    fills up heads with zeros to a multiple of LANES, [B, H, T, d'].

    All by products with matrices of zeros and ones, which are exact: on a TPU's vector unit, moving
    channels to other lanes takes longer than attention. The zeros change neither scores nor
    outputs, and the matrix unit would be as idle without them.
    """
    d, dtype = x_BxTxHxd.shape[-1], x_BxTxHxd.dtype
    identity = _identity(d)
    product = functools.partial(_exact_product, "bthd,dc->bhtc", x_BxTxHxd)
    if rope is None:
        return product(identity).astype(dtype)
    # Takes channels (a, b) to (-b, a).
    turn = np.concatenate([identity[d // 2 :], -identity[: d // 2]])
    cos, sin = (
        jnp.pad(jnp.concatenate([table, table], axis=1), ((0, 0), (0, -d % LANES)))
        for table in rope
    )
    return (product(identity) * cos + product(turn) * sin).astype(dtype)


def _identity(d: int) -> np.ndarray:
    """Makes [d, d + channels that fill up a multiple of LANES]."""
    return np.eye(d, d + -d % LANES, dtype=np.float32)


def _exact_product(form: str, x, matrix: np.ndarray) -> jax.Array:
    """Multiplies by a matrix of -1, 0 and 1, in float32 without rounding."""
    return jnp.einsum(
        form, x, jnp.asarray(matrix, x.dtype), preferred_element_type=jnp.float32,
        precision="highest" if x.dtype == jnp.float32 else None,
    )  # fmt: skip


def tokamax_installed() -> bool:
    """Whether tokamax (github.com/openxla/tokamax), the extra of that name, is installed."""
    return importlib.util.find_spec("tokamax") is not None


def tokamax(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext, kernels=None):
    """Runs the first of tokamax's `kernels` that the default device supports; None: its GPU ones.

    They skip the tiles of keys that no query sees, but in the backward pass not those before the
    first key: where windows bound the keys, each chunk of queries gets its own ones there.
    """
    from tokamax._src.ops.attention import api, base

    if not flags.FLAGS.is_parsed():
        # It would parse the arguments of whatever runs here: pytest, a notebook.
        flags.FLAGS.mark_as_parsed()
    first, last = context.first_key_BxT, context.last_key_1xT
    B, T = q_BxTxHxd.shape[:2]
    mask = base.Mask(
        k_start=None if first is None else jnp.broadcast_to(first, (B, T))[:, None],
        k_end=None if last is None else jnp.broadcast_to(last + 1, (B, T))[:, None],
        is_causal=last is None,
    )
    pieces, refusal = backward_pieces(T, context), None
    for kernel in kernels or [api.IMPLEMENTATIONS[name] for name in ("mosaic_gpu", "triton")]:
        if pieces:
            kernel = dataclasses.replace(kernel, vjp=_ChunkedVjp(kernel.vjp, pieces))
        try:
            with jax.named_scope(f"mean_keys_{mean_keys(context)}"):  # for train.roofline
                return kernel(
                    q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, mask=mask,
                    logits_scale=context.scales.attention,
                )  # fmt: skip
        except NotImplementedError as error:
            refusal = error
    raise refusal


def mean_keys(context: ForwardContext, tile: int = 1) -> int:
    """Returns the keys of all tiles that a query's tile sees some of, on average over queries.

    They follow from causality and windows; documents are not counted.
    """
    position = np.arange(context.length)
    first = np.zeros_like(position)
    if context.reach is not None:
        unit = context.window_block
        first = np.maximum(0, (position // unit + 1) * unit - context.reach)
    # Of the first and the last query of each tile.
    first, last = first[::tile] // tile, position[tile - 1 :: tile] // tile
    return round(float(np.mean(last - first + 1)) * tile)


def backward_pieces(length: int, context: ForwardContext) -> int:
    """Returns of how many chunks of keys a chunk of queries sees some; 0: chunks do not pay."""
    if context.reach is None or context.last_key_1xT is not None or length % CHUNK:
        return 0
    pieces = band_pieces(length, CHUNK, context.reach, context.window_block)
    # Without chunks a query meets half of the row on average.
    return pieces if pieces * CHUNK < 0.75 * length / 2 else 0


@dataclasses.dataclass(frozen=True)
class _ChunkedVjp:
    """The backward pass of a kernel of tokamax by chunks of queries, as rows of a batch.

    Attributes:
      vjp: tokamax's own.
      pieces: as `backward_pieces` returns.
    """

    vjp: object
    pieces: int

    def __call__(self, residuals, out, dout, q, k, v, *, mask, **settings):
        from tokamax._src.ops.attention import base

        (B, T), before = q.shape[:2], (self.pieces - 1) * CHUNK

        def rows(x, axis: int):  # [B, ..., T, ...] to [B n, ..., CHUNK, ...]
            head, tail = x.shape[1:axis], x.shape[axis + 1 :]
            x = jnp.moveaxis(x.reshape(B, *head, -1, CHUNK, *tail), axis, 1)
            return x.reshape(-1, *head, CHUNK, *tail)

        bands = functools.partial(chunk_bands, chunk=CHUNK, pieces=self.pieces)
        (k_bands, of_k), (v_bands, of_v) = (jax.vjp(bands, x) for x in (k, v))
        # The position at which each band begins, and those of the queries in it.
        begin = np.tile(np.arange(0, T, CHUNK, dtype=np.int32) - before, B)[:, None, None]
        end = before + np.arange(CHUNK, dtype=np.int32)[None, None] + 1
        chunk_mask = base.Mask(
            k_start=rows(mask.k_start, 2) - begin,
            k_end=jnp.broadcast_to(end, (len(begin), 1, CHUNK)),
        )
        gradients = self.vjp(
            jax.tree.map(lambda x: rows(x, 2), residuals),
            *(rows(x, 1) for x in (out, dout, q)), k_bands, v_bands, mask=chunk_mask, **settings,
        )  # fmt: skip
        of_q, of_k, of_v = gradients["q"], of_k(gradients["k"])[0], of_v(gradients["v"])[0]
        return {"q": of_q.reshape(q.shape), "k": of_k, "v": of_v}
