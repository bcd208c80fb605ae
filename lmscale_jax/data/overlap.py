"""How much of the validation text also stands in the training text, by exact runs of tokens.

Exact repetitions of whole documents are dropped before; this finds pages that quote each other,
boilerplate, and copies with small changes. Runs are compared by 64-bit hashes: of n tokens
t_0 ... t_n-1 the sum of t_i b^i modulo 2^64, then mixed (splitmix64's last step).
"""

import numpy as np

from lmscale_jax.data.shards import Shards

_CHUNK = 1 << 22
_BASE = 0x9E3779B97F4A7C15


def measure(train: Shards, val: Shards, length: int, boundary: int | None) -> dict:
    """Compares every run of `length` tokens; those across a document mark do not count.

    Returns:
        {"length", "runs": of the validation side, "shared": share of them that training has too,
        "tokens": share of validation tokens that lie in a shared run}.
    """
    hashes, counted = _all(val, length, boundary)
    distinct = np.unique(hashes[counted])
    seen = np.zeros(len(distinct), bool)
    for start in range(0, max(0, train.n_tokens - length + 1), _CHUNK):
        more = min(_CHUNK + length - 1, train.n_tokens - start)
        found, _ = _runs(train.read(start, more), length, boundary)
        at = np.searchsorted(distinct, found)
        at[at == len(distinct)] = 0
        if len(distinct):
            seen[at[distinct[at] == found]] = True
    at = np.searchsorted(distinct, hashes[counted])
    shared = np.zeros(len(hashes), bool)
    shared[counted] = seen[at]
    # A token is covered by the runs that begin up to length - 1 tokens before it.
    steps = np.zeros(val.n_tokens + 1, np.int64)
    starts = np.flatnonzero(shared)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + length, -1)
    covered = np.cumsum(steps[:-1]) > 0
    runs = int(counted.sum())
    return {
        "length": length,
        "runs": runs,
        "shared": float(shared.sum() / runs) if runs else 0.0,
        "tokens": float(covered.mean()) if val.n_tokens else 0.0,
    }


def _all(shards: Shards, length: int, boundary: int | None) -> tuple[np.ndarray, np.ndarray]:
    return _runs(shards.read(0, shards.n_tokens), length, boundary)


def _runs(tokens: np.ndarray, length: int, boundary: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(hash of the run that begins at each token, whether it lies within one document)."""
    n = max(0, len(tokens) - length + 1)
    total, power = np.zeros(n, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for i in range(length):
            total += (tokens[i : i + n].astype(np.uint64) + np.uint64(1)) * power
            power *= np.uint64(_BASE)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            total = (total ^ (total >> np.uint64(shift))) * np.uint64(factor)
    inside = np.ones(n, bool)
    if boundary is not None and n:
        marks = np.concatenate([[0], np.cumsum(tokens == boundary)])
        inside = marks[length : length + n] == marks[:n]
    return total ^ (total >> np.uint64(31)), inside
