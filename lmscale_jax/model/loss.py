"""Next-token cross-entropy, over pieces of the sequence where the logits would be large."""

import functools

import jax
import jax.numpy as jnp

LOGIT_BYTES = 256 * 2**20


def chunk_length(model, shape_BxT: tuple[int, int], shards: int) -> int:
    """Positions per chunk, a divisor of T, so that the float32 logits of one chunk fit.

    `model.loss_chunk` counts tokens on one of the `shards` parts of the batch; 0 means as many as
    256 MiB of logits hold.
    """
    B, T = shape_BxT
    tokens = model.loss_chunk or max(1, LOGIT_BYTES // (4 * model.vocab_size))
    wanted = max(1, tokens * shards // B)
    return max(t for t in range(1, T + 1) if T % t == 0 and (t <= wanted or t == 1))


def next_token_losses(read, x_NxD, targets_BxT, length: int, cross_entropy) -> jax.Array:
    """Losses in nats, [B, T] float32; 0 where the target is -1.

    `read` maps [n, D] to logits [n, V]. Chunks run along the sequence, so that each holds a part of
    every device's batch; their logits are recomputed in the backward pass instead of kept.
    """
    B, T = targets_BxT.shape
    if length == T:
        return cross_entropy(read(x_NxD), targets_BxT.reshape(-1)).reshape(B, T)
    chunks = T // length

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(_, chunk):
        x_BxtxD, targets_Bxt = chunk
        nll = cross_entropy(read(x_BxtxD.reshape(B * length, -1)), targets_Bxt.reshape(-1))
        return None, nll.reshape(B, length)

    x_CxBxtxD = jnp.moveaxis(x_NxD.reshape(B, chunks, length, -1), 1, 0)
    targets_CxBxt = jnp.moveaxis(targets_BxT.reshape(B, chunks, length), 1, 0)
    _, nll_CxBxt = jax.lax.scan(one, None, (x_CxBxtxD, targets_CxBxt))
    return jnp.moveaxis(nll_CxBxt, 0, 1).reshape(B, T)
