"""The order of the training windows, as a pure function of (seed, step).

Position p of the run's endless stream of windows belongs to epoch p // n and is the window at place
p % n of that epoch's pseudorandom permutation of 0..n-1. The permutation is computed, not stored: a
Feistel network keyed by seed and epoch permutes the cells of a near-square grid that has at
least n of them. A number is a row and a column, and each round shifts one of them by a hash of the
other, which is invertible. A result of n or more is permuted again until it is below n ("cycle
walking"), which is still a permutation.

So there is no iterator state to save: a run that resumes at any step, on any number of hosts, reads
the same batches as without interruption, and a batch costs the same in epoch 1000 as in epoch 0.
"""

import math

import numpy as np

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


class WindowOrder:
    """The pseudorandom order of the windows, epoch after epoch.

    Args:
        n_windows: windows in an epoch, at least 1.
        seed: any integer.

    Raises:
        ValueError: n_windows is below 1.
    """

    def __init__(self, n_windows: int, seed: int):
        if n_windows < 1:
            raise ValueError(f"n_windows={n_windows}: at least 1 is needed")
        self.n_windows = n_windows
        self.seed = np.uint64(seed & _MASK_64)
        n_rows = math.isqrt(n_windows - 1) + 1
        self._grid = np.uint64(n_rows), np.uint64(-(-n_windows // n_rows))

    def indices(self, step: int, batch_size: int) -> np.ndarray:
        """Returns the windows of the batch of `step`: int64 [batch_size], in 0..n_windows-1.

        Batches follow each other without gaps, so a batch may span two epochs.
        """
        return self.windows(step * batch_size + np.arange(batch_size, dtype=np.int64))

    def windows(self, position_B: np.ndarray) -> np.ndarray:
        """Returns the windows at these positions of the stream: int64 [B]."""
        position_B = position_B.astype(np.uint64)
        epoch_B, place_B = np.divmod(position_B, np.uint64(self.n_windows))
        epoch_key_B = _mix(_mix(self.seed[None]) ^ epoch_B)
        keys_RxB = _mix(epoch_key_B + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
        window_B = self._permute(place_B, keys_RxB)
        while len(outside := np.flatnonzero(window_B >= self.n_windows)):
            window_B[outside] = self._permute(window_B[outside], keys_RxB[:, outside])
        return window_B.astype(np.int64)

    def _permute(self, value_B: np.ndarray, keys_RxB: np.ndarray) -> np.ndarray:
        """Permutes cells of the grid: uint64 [B], each by its own column of keys [rounds, B]."""
        n_rows, n_columns = self._grid
        row_B, column_B = np.divmod(value_B, n_columns)
        for row_key_B, column_key_B in zip(keys_RxB[::2], keys_RxB[1::2], strict=True):
            row_B = (row_B + _mix(row_key_B ^ column_B) % n_rows) % n_rows
            column_B = (column_B + _mix(column_key_B ^ row_B) % n_columns) % n_columns
        return row_B * n_columns + column_B


def _mix(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 arrays by SplitMix64, where every input bit flips half of the output bits.

    Arrays wrap around silently, as intended; numpy warns for scalars.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
