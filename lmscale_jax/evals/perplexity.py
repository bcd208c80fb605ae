"""Loss on the fixed held-out tokens, weighted by token, with a standard error."""

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from lmscale_jax.model.build import Model
from lmscale_jax.run import mesh as meshes


def make(model: Model, mesh) -> Callable:
    """The jitted (params, batch) -> (sum of losses [B], number of targets [B])."""

    def sums(params, batch):
        nll_BxT = model.losses(params, batch.tokens_BxT, batch.targets_BxT)
        return nll_BxT.sum(axis=1), (batch.targets_BxT >= 0).sum(axis=1)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(sums, out_shardings=replicated)


def evaluate(sums: Callable, params, batches: Iterable, mesh, n_bytes: int | None) -> dict:
    """Evaluates `params` on host batches.

    Returns val_loss (nats a token), val_loss_sem, val_tokens, perplexity and bits_per_byte: all
    bits, those of document marks too, over `n_bytes`, the UTF-8 bytes of the predicted tokens; None
    where that is not known. The standard error treats windows, not tokens, as the independent
    draws (a ratio estimator), because tokens of one window are correlated.
    """
    pending = [sums(params, meshes.put_batch(batch, mesh)) for batch in batches]
    nll_W, count_W = (
        np.concatenate([np.asarray(part[i], np.float64) for part in pending]) for i in (0, 1)
    )
    keep = count_W > 0
    return summary(nll_W[keep], count_W[keep], n_bytes)


def summary(nll_W: np.ndarray, count_W: np.ndarray, n_bytes: int | None) -> dict:
    """The numbers of `evaluate` from each window's sum of losses and number of targets."""
    windows, tokens = len(nll_W), count_W.sum()
    loss = nll_W.sum() / tokens
    residual = nll_W - count_W * loss
    spread = windows / (windows - 1) * np.square(residual).sum() if windows > 1 else math.nan
    return {
        "val_loss": float(loss),
        "val_loss_sem": float(np.sqrt(spread) / tokens),
        "val_tokens": int(tokens),
        "perplexity": float(np.exp(min(loss, 700.0))),
        "bits_per_byte": float(nll_W.sum() / math.log(2) / n_bytes) if n_bytes else None,
    }
