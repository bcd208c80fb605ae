"""Batches: training windows in pseudorandom order, validation windows in a fixed one, read ahead.

Everything here is a function of the step, so stopping and resuming needs no saved position.
"""

import collections
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lmscale_jax.data.order import Mixture, Order
from lmscale_jax.data.prepared import Prepared
from lmscale_jax.errors import InputError

NO_LABEL = -1


class Batch(NamedTuple):
    """Token ids and the ids that follow them, both int32 [B, T]; target -1: no label there."""

    tokens_BxT: np.ndarray
    targets_BxT: np.ndarray


class TrainBatches:
    """The training batches of one host.

    Window i covers tokens i*T .. i*T + T: T inputs, and their labels one further on. Windows share
    one token, so every token but the first is a label exactly once in an epoch.

    Args:
        prepared: the data.
        seq_len: T, tokens.
        batch_size: sequences in a batch, over all hosts.
        seed: of the order.
        rows: the rows of the batch that this host reads.

    Raises:
        InputError: the training split is shorter than one window.
    """

    def __init__(
        self,
        prepared: Prepared,
        seq_len: int,
        batch_size: int,
        seed: int,
        rows: slice = slice(None),
    ):
        parts = prepared.mixture or ((prepared.train, 1.0),)
        for shards, _ in parts:
            if shards.n_tokens < seq_len + 1:
                raise InputError(
                    f"data.seq_len={seq_len}: a window needs {seq_len + 1} tokens and the training "
                    f"split has {shards.n_tokens}; set data.seq_len={max(1, shards.n_tokens - 1)} "
                    f"or give more text"
                )
        self.seq_len, self.batch_size, self.rows = seq_len, batch_size, rows
        self._shards = [shards for shards, _ in parts]
        self._sizes = [(shards.n_tokens - 1) // seq_len for shards in self._shards]
        self.n_windows = sum(self._sizes)
        # Each part has an order of its own; alone it is that of the seed.
        self._orders = [Order(n, seed + 7919 * i) for i, n in enumerate(self._sizes)]
        self._mixture = Mixture([weight for _, weight in parts], seed)

    def at(self, step: int) -> Batch:
        """This host's rows of the batch of `step` (0, 1, ...)."""
        part_B, row_B = self._mixture.rows(step, self.batch_size)
        part_B, row_B = part_B[self.rows], row_B[self.rows]
        tokens_BxT1 = np.empty((len(part_B), self.seq_len + 1), np.int32)
        for part in np.unique(part_B):
            here = part_B == part
            start_B = self._orders[part].windows(row_B[here]) * self.seq_len
            tokens_BxT1[here] = self._shards[part].gather(start_B, self.seq_len + 1)
        return _shifted(tokens_BxT1)

    def epochs(self, step: int) -> float:
        """How often the training split has been seen after `step` steps; of a mixture, the part
        that was seen most often."""
        rows = step * self.batch_size * self._mixture.counts / self._mixture.PERIOD
        return float(np.max(rows / np.array(self._sizes)))


def val_batches(
    prepared: Prepared, seq_len: int, batch_size: int, n_tokens: int, rows: slice = slice(None)
) -> Iterator[Batch]:
    """The first `n_tokens` labels of the validation split, in stream order; 0, or too many: all.

    The labels are the same ones for every batch_size and seq_len. What the last window and the last
    batch have too much is filled with token 0 and target -1.

    Args:
        prepared: the data.
        seq_len: T, tokens.
        batch_size: sequences in a batch, over all hosts.
        n_tokens: labels in all batches together.
        rows: the rows of each batch that this host reads.

    Yields:
        Batches of [batch_size, T], cut to `rows`.

    Raises:
        InputError: the validation split has fewer than two tokens.
    """
    shards = prepared.val
    if shards.n_tokens < 2:
        raise InputError(
            f"data.val_fraction: the validation split has {shards.n_tokens} tokens and needs at "
            f"least 2; hold out more, for example data.val_fraction=0.1"
        )
    n_labels = min(n_tokens or shards.n_tokens, shards.n_tokens - 1)
    n_batches = math.ceil(n_labels / (seq_len * batch_size))

    def batch(index: int) -> Batch:
        start_B = (index * batch_size + np.arange(batch_size)) * seq_len
        labels_B = np.clip(n_labels - start_B, 0, seq_len)
        tokens_BxT1 = np.zeros((batch_size, seq_len + 1), np.int32)
        for row, start, labels in zip(tokens_BxT1, start_B, labels_B, strict=True):
            if labels:
                row[: labels + 1] = shards.read(start, labels + 1)
        whole = _shifted(tokens_BxT1)
        whole.targets_BxT[np.arange(seq_len) >= labels_B[:, None]] = NO_LABEL
        return Batch(*(array_BxT[rows] for array_BxT in whole))

    return map(batch, range(n_batches))


def val_bytes(prepared: Prepared, n_tokens: int) -> int | None:
    """UTF-8 bytes of the labels of `val_batches`, whoever reads them; None where ids say none."""
    if prepared.token_bytes is None:
        return None
    labels = min(n_tokens or prepared.val.n_tokens, prepared.val.n_tokens - 1)
    return int(prepared.token_bytes[prepared.val.read(1, labels)].sum(dtype=np.int64))


def prefetch(
    at: Callable[[int], Batch], start: int, stop: int, depth: int = 2, workers: int = 0
) -> Iterator[Batch]:
    """Yields at(start), ..., at(stop - 1), reading ahead so that the step need not wait.

    An exception in `at` reaches the consumer at the step it belongs to. Closing the iterator, or
    dropping it, stops the reading.

    Args:
        at: pure function of the step; with `workers` it must be picklable, as `TrainBatches.at` is.
        start: first step.
        stop: step after the last.
        depth: batches ready ahead of the consumer (of each worker, where there are some).
        workers: processes that read; 0: one thread, which is faster for memory-mapped shards.
    """
    if workers:
        return _read_with_processes(at, start, stop, depth, workers)
    return _read_with_thread(at, start, stop, depth)


def _read_with_thread(at, start: int, stop: int, depth: int) -> Iterator[Batch]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = collections.deque()
        for step in range(start, stop):
            while len(ahead) <= depth and step + len(ahead) < stop:
                ahead.append(thread.submit(at, step + len(ahead)))
            yield ahead.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _read_with_processes(at, start: int, stop: int, depth: int, workers: int) -> Iterator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers want flags, which only commands parse
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=depth)
    steps = grain.MapDataset.range(start, stop).map(at)
    for batch in steps.to_iter_dataset(grain.ReadOptions(num_threads=1)).mp_prefetch(options):
        # Copied, since grain takes back the shared memory that its arrays live in.
        yield Batch(*(np.array(array_BxT) for array_BxT in batch))


def _shifted(tokens_BxT1: np.ndarray) -> Batch:
    """Inputs and labels as two contiguous arrays: made here, off the step's thread."""
    return Batch(
        np.ascontiguousarray(tokens_BxT1[:, :-1]), np.ascontiguousarray(tokens_BxT1[:, 1:])
    )
