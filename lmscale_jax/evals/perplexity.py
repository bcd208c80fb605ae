"""Evaluates the loss on fixed held-out tokens, with a standard error.

Unigram and bigram models of the same tokens are baselines that a model must beat.
"""

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from lmscale_jax.model.build import Model
from lmscale_jax.model.mesh import put_batch


def make_loss_sums(model: Model, mesh) -> Callable:
    """Returns the jitted (params, batch) -> (sum of losses [B], number of targets [B])."""

    def sums(params, batch):
        nll_BxT = model.losses(params, batch.tokens_BxT, batch.targets_BxT)
        return nll_BxT.sum(axis=1), (batch.targets_BxT >= 0).sum(axis=1)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(sums, out_shardings=replicated)


def evaluate_loss(sums: Callable, params, batches: Iterable, mesh, n_bytes: int | None) -> dict:
    """Evaluates `params` on host batches.

    Returns val_loss (nats per token), val_loss_sem, val_tokens, perplexity and bits_per_byte. The
    last divides all bits, including those of document marks, by `n_bytes`, the UTF-8 bytes of the
    predicted tokens; it is None where `n_bytes` is. The standard error treats windows as the
    independent draws (a ratio estimator), because tokens of one window are correlated.
    """
    pending = [sums(params, put_batch(batch, mesh)) for batch in batches]
    nll_W, count_W = (
        np.concatenate([np.asarray(part[i], np.float64) for part in pending]) for i in (0, 1)
    )
    keep = count_W > 0
    return loss_summary(nll_W[keep], count_W[keep], n_bytes)


def loss_summary(nll_W: np.ndarray, count_W: np.ndarray, n_bytes: int | None) -> dict:
    """Computes the fields of `evaluate_loss` from each window's sum of losses and targets."""
    n_windows, n_tokens = len(nll_W), count_W.sum()
    loss = nll_W.sum() / n_tokens
    residual = nll_W - count_W * loss
    spread = n_windows / (n_windows - 1) * np.square(residual).sum() if n_windows > 1 else math.nan
    return {
        "val_loss": float(loss),
        "val_loss_sem": float(np.sqrt(spread) / n_tokens),
        "val_tokens": int(n_tokens),
        "perplexity": float(np.exp(min(loss, 700.0))),
        "bits_per_byte": float(nll_W.sum() / math.log(2) / n_bytes) if n_bytes else None,
    }


def loss_text(scores: dict) -> str:
    """Puts the fields of `evaluate_loss` in words, with the error where there are windows for one.

    One window of tokens says nothing of how windows differ.
    """
    error = scores["val_loss_sem"]
    has_error = error is not None and math.isfinite(error)
    spread = f" ± {error:.4f}" if has_error else ""
    tokens = f"{scores['val_tokens']:,} tokens"
    reason = "" if has_error else ", one window: too few for an error; hold out more"
    return f"{scores['val_loss']:.4f}{spread} nats/token, held out ({tokens}{reason})"


BASELINE_TOKENS = 50_000_000


def baseline_losses(train, val, vocab_size: int, val_tokens: int) -> dict[str, float]:
    """Computes held-out losses of baselines in nats per token: {"unigram", "bigram"}.

    `train` and `val` are token streams with `n_tokens` and `read(start, length)`; the counts come
    from at most the first 50M training tokens. The unigram adds one to every count. The bigram
    interpolates with it by Witten and Bell's weight n(a) / (n(a) + t(a)), where n(a) counts the
    occurrences of a and t(a) its distinct successors (1991, IEEE Trans. Inf. Theory 37).
    """
    trained = np.asarray(train.read(0, min(train.n_tokens, BASELINE_TOKENS)), np.int64)
    held_out = np.asarray(val.read(0, min(val.n_tokens, val_tokens + 1 or val.n_tokens)), np.int64)
    unigram_V = (np.bincount(trained, minlength=vocab_size) + 1.0) / (len(trained) + vocab_size)
    pairs, counts = np.unique(trained[:-1] * vocab_size + trained[1:], return_counts=True)
    first = pairs // vocab_size
    follow_V = np.bincount(first, weights=counts, minlength=vocab_size)
    kinds_V = np.bincount(first, minlength=vocab_size)
    held_out_pairs = held_out[:-1] * vocab_size + held_out[1:]
    index = np.minimum(np.searchsorted(pairs, held_out_pairs), len(pairs) - 1)
    count = np.where(pairs[index] == held_out_pairs, counts[index], 0)
    a, b = held_out[:-1], held_out[1:]
    # An unseen a has n = t = 0: only the unigram counts.
    bigram = (count + kinds_V[a] * unigram_V[b]) / np.maximum(1, follow_V[a] + kinds_V[a])
    bigram = np.where(follow_V[a] > 0, bigram, unigram_V[b])
    return {
        "unigram": float(-np.log(unigram_V[b]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }
