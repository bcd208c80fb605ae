"""Computes next-token cross-entropy, in chunks of the sequence where the logits are large."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lmscale_jax.model import flops
from lmscale_jax.model.param import Spec
from lmscale_jax.model.sharding import BATCH, TOKENS, ShardingContext, gathered

# Bytes of one chunk's logits, counted as float32: on CPU a few times the caches, elsewhere a share
# of the device's memory. There each chunk reads the whole readout and adds to its whole gradient.
CPU_LOGIT_BYTES, LOGIT_SHARE = 256 * 2**20, 1 / 4


def logit_bytes(platform: str, device_kind: str) -> float:
    """Returns the bytes that one chunk's logits may have on a device, counted as float32."""
    return CPU_LOGIT_BYTES if platform == "cpu" else flops.device_memory(device_kind) * LOGIT_SHARE


def chunk_length(model, shape_BxT: tuple[int, int], vocab_size: int, most_bytes: float) -> int:
    """Returns the positions per chunk: a divisor of T, or where that is less than half of it, the
    length of n nearly equal chunks.

    The shape and the size of the vocabulary are those of one device. `model.loss_chunk` is the
    tokens of a chunk; 0: as many as have `most_bytes` of float32 logits.
    """
    B, T = shape_BxT
    tokens = model.loss_chunk or max(1, int(most_bytes // (4 * vocab_size)))
    most = max(1, tokens // B)
    divisor = max(t for t in range(1, T + 1) if T % t == 0 and (t <= most or t == 1))
    even = -(-T // -(-T // most))
    return divisor if 2 * divisor >= even else even


def token_losses(
    sharding: ShardingContext, read, w, spec: Spec, x_NxD, targets_BxT, cut: Callable,
    cross_entropy, with_logz: bool,
):  # fmt: skip
    """Computes losses in nats, [B, T] float32, 0 where the target is -1; and the log-sum-exps of
    the logits, [B, T] float32, or None.

    `read(w, x_NxD, first)` computes the logits of the tokens of the readout's part `w`, from the
    id `first` on; `cut` is `chunk_length` of the shape and the vocabulary's size on one device.
    On a mesh each device scores its own tokens: the readout is gathered once for all chunks, but
    remains split over the vocabulary.
    """
    parts = sharding.parts(spec) if sharding.mesh else (None,) * len(spec.axes)
    vocab_axis = spec.axes.index("vocab")

    def local(w, x_NxD, targets_BxT):
        w = gathered(w, parts)
        first, compare = 0, cross_entropy
        if axis := parts[vocab_axis]:
            first = lax.axis_index(axis) * w.shape[vocab_axis]
            compare = functools.partial(cross_entropy, first=first, axis=axis)
        if with_logz:
            compare = functools.partial(_losses_and_logz, compare, axis=axis)
        length = cut(targets_BxT.shape, w.shape[vocab_axis])
        return next_token_losses(
            lambda x_nxD: read(w, x_nxD, first), x_NxD, targets_BxT, length, compare
        )

    if sharding.mesh is not None:
        ins = (P(*parts), P(TOKENS, None), BATCH)
        local = sharding.shard(local, ins, (BATCH, BATCH) if with_logz else BATCH)
    losses = local(w, x_NxD, targets_BxT)
    return losses if with_logz else (losses, None)


def _losses_and_logz(compare: Callable, logits_NxV, targets_N, *, axis: str | None):
    """Computes `compare` and the log-sum-exps of logits, whose columns a mesh axis may split."""
    logz_N = jax.nn.logsumexp(logits_NxV.astype(jnp.float32), axis=1)
    if axis:
        logz_N = jax.nn.logsumexp(lax.all_gather(logz_N, axis), axis=0)
    return compare(logits_NxV, targets_N), logz_N


def next_token_losses(read, x_NxD, targets_BxT, length: int, cross_entropy):
    """Computes losses in nats, [B, T] float32; or whatever else `cross_entropy` computes, [N] each.

    `read` maps [n, D] to logits [n, V]. Chunks run along the sequence, so that each has a part of
    every device's batch; the backward pass recomputes their logits.
    """
    B, T = targets_BxT.shape
    if length == T:
        losses = cross_entropy(read(x_NxD), targets_BxT.reshape(-1))
        return jax.tree.map(lambda loss_N: loss_N.reshape(B, T), losses)
    chunks = -(-T // length)
    rest = chunks * length - T

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_losses(_, chunk):
        x_BxtxD, targets_Bxt = chunk
        losses = cross_entropy(read(x_BxtxD.reshape(B * length, -1)), targets_Bxt.reshape(-1))
        return None, jax.tree.map(lambda loss_n: loss_n.reshape(B, length), losses)

    x_BxTxD = x_NxD.reshape(B, T, -1)
    if rest:  # the last chunk is shorter: positions without a target fill it
        x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, rest), (0, 0)))
        targets_BxT = jnp.pad(targets_BxT, ((0, 0), (0, rest)), constant_values=-1)
    x_CxBxtxD = jnp.moveaxis(x_BxTxD.reshape(B, chunks, length, -1), 1, 0)
    targets_CxBxt = jnp.moveaxis(targets_BxT.reshape(B, chunks, length), 1, 0)
    _, losses = jax.lax.scan(chunk_losses, None, (x_CxBxtxD, targets_CxBxt))
    return jax.tree.map(lambda x_CxBxt: jnp.moveaxis(x_CxBxt, 0, 1).reshape(B, -1)[:, :T], losses)
