"""Measures how much of the validation text also stands in the training text, by runs of tokens.

Exact repetitions of whole documents are dropped before. What remains are pages that quote each
other, boilerplate, and copies with small changes. Runs are compared by 64-bit hashes: of n tokens
t_0 ... t_n-1 the sum of (t_i + 1) b^i modulo 2^64, then mixed (SplitMix64's last step).
"""

import numpy as np

from lmscale_jax.data.shards import Shards

_CHUNK = 1 << 22
_BASE = 0x9E3779B97F4A7C15


def measure(train: Shards, val: Shards, length: int, boundary: int | None) -> dict:
    """Looks up every run of `length` validation tokens in training; runs across documents are out.

    Returns:
        {"length", "runs": number of validation runs, "shared": share of them that training has too,
        "tokens": share of validation tokens that lie in a shared run}.
    """
    hashes, in_document = _hash_runs(val.read(0, val.n_tokens), length, boundary)
    distinct = np.unique(hashes[in_document])
    in_training = np.zeros(len(distinct), bool)
    for start in range(0, max(0, train.n_tokens - length + 1), _CHUNK):
        n_tokens = min(_CHUNK + length - 1, train.n_tokens - start)
        train_hashes, _ = _hash_runs(train.read(start, n_tokens), length, boundary)
        place = np.searchsorted(distinct, train_hashes)
        place[place == len(distinct)] = 0
        if len(distinct):
            in_training[place[distinct[place] == train_hashes]] = True
    shared = np.zeros(len(hashes), bool)
    shared[in_document] = in_training[np.searchsorted(distinct, hashes[in_document])]
    # A token is covered by the runs that begin up to length - 1 tokens before it.
    steps = np.zeros(val.n_tokens + 1, np.int64)
    starts = np.flatnonzero(shared)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + length, -1)
    covered = np.cumsum(steps[:-1]) > 0
    n_runs = int(in_document.sum())
    return {
        "length": length,
        "runs": n_runs,
        "shared": float(shared.sum() / n_runs) if n_runs else 0.0,
        "tokens": float(covered.mean()) if val.n_tokens else 0.0,
    }


def _hash_runs(
    tokens: np.ndarray, length: int, boundary: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hash of the run that begins at each token, and whether one document holds it."""
    n = max(0, len(tokens) - length + 1)
    total, power = np.zeros(n, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for i in range(length):
            total += (tokens[i : i + n].astype(np.uint64) + np.uint64(1)) * power
            power *= np.uint64(_BASE)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            total = (total ^ (total >> np.uint64(shift))) * np.uint64(factor)
    in_document = np.ones(n, bool)
    if boundary is not None and n:
        n_boundaries = np.concatenate([[0], np.cumsum(tokens == boundary)])
        in_document = n_boundaries[length : length + n] == n_boundaries[:n]
    return total ^ (total >> np.uint64(31)), in_document
