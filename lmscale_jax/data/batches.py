"""Batches of training windows in pseudorandom order and of validation windows in a fixed one.

Each batch is a function of the step, so resuming needs no saved position.
"""

import collections
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lmscale_jax.data.order import WindowOrder
from lmscale_jax.data.prepare import Prepared
from lmscale_jax.data.shares import MixturePattern
from lmscale_jax.errors import InputError

NO_LABEL = -1


class Batch(NamedTuple):
    """Token ids and the ids that follow them, both int32 [B, T]; target -1: no label."""

    tokens_BxT: np.ndarray
    targets_BxT: np.ndarray


class TrainBatches:
    """The training batches of one host.

    Window i has tokens i*T .. i*T + T: T inputs, and as labels the T tokens one place later.
    Neighbouring windows share one token, so every token but the first is a label once per epoch.

    Args:
        prepared: training and validation tokens.
        seq_len: T, tokens.
        batch_size: sequences in a batch, over all hosts.
        seed: of the order.
        rows: rows of the batch that this host reads.

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
        parts = prepared.mixture or ((prepared.train, 1),)
        for shards, _ in parts:
            if not shards.paths:
                raise InputError(
                    "config.data.source='none' has no tokens to train on; use for example "
                    "data.source='stdlib'"
                )
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
        # Each part has its own order; that of the first part is the one of the seed.
        self._orders = [WindowOrder(n, seed + 7919 * i) for i, n in enumerate(self._sizes)]
        self._mixture = MixturePattern([weight for _, weight in parts])

    def at(self, step: int) -> Batch:
        """Reads this host's rows of the batch of `step` (0, 1, ...)."""
        part_B, index_B = self._mixture.rows(step, self.batch_size)
        part_B, index_B = part_B[self.rows], index_B[self.rows]
        tokens_BxT1 = np.empty((len(part_B), self.seq_len + 1), np.int32)
        for part in np.unique(part_B):
            in_part_B = part_B == part
            start_B = self._orders[part].windows(index_B[in_part_B]) * self.seq_len
            tokens_BxT1[in_part_B] = self._shards[part].gather(start_B, self.seq_len + 1)
        return _shifted(tokens_BxT1)

    def epochs(self, step: int) -> float:
        """Returns the number of epochs in `step` steps; of a mixture, the highest of any part."""
        n_rows = step * self.batch_size * self._mixture.weights / self._mixture.period
        return float(np.max(n_rows / np.array(self._sizes)))

    def part_windows(self, steps: int) -> list[int]:
        """Counts the windows of each part in `steps` steps. Raises InputError if one has none."""
        counts = self._mixture.counts(steps * self.batch_size)
        for part, count in enumerate(counts):
            if not count:
                folder, weights = self._shards[part].paths[0].parent, self._mixture.weights
                raise InputError(
                    f"data.path: {folder} has {weights[part]} of {self._mixture.period} parts of "
                    f"the weight, and none of the run's {counts.sum():,} windows; give it more "
                    f"weight or leave it out"
                )
        return counts.tolist()


def val_batches(
    prepared: Prepared, seq_len: int, batch_size: int, n_tokens: int, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Yields the first `n_tokens` labels of the validation split, in stream order.

    The labels are the same for every batch_size and seq_len. The last window and the last batch are
    padded with token 0 and target -1.

    Args:
        prepared: training and validation tokens.
        seq_len: T, tokens.
        batch_size: sequences in a batch, over all hosts.
        n_tokens: labels in all batches together; 0, or more than there are: all.
        rows: rows of each batch that this host reads.

    Yields:
        Batches of [batch_size, T], cut to `rows`.

    Raises:
        InputError: the validation split has fewer than two tokens.
    """
    shards = prepared.val
    if not shards.paths:
        raise InputError(
            "config.data.source='none' has no held-out tokens; convert the weights again with "
            "--config=C, whose data the model's tokenizer has made or can make"
        )
    if shards.n_tokens < 2:
        raise InputError(
            f"data.val_fraction: the validation split has {shards.n_tokens} tokens and needs at "
            f"least 2; hold out more, for example data.val_fraction=0.1"
        )
    n_labels = min(n_tokens or shards.n_tokens, shards.n_tokens - 1)
    n_batches = math.ceil(n_labels / (seq_len * batch_size))

    def read_batch(index: int) -> Batch:
        start_B = (index * batch_size + np.arange(batch_size)) * seq_len
        labels_B = np.clip(n_labels - start_B, 0, seq_len)
        tokens_BxT1 = np.zeros((batch_size, seq_len + 1), np.int32)
        for row, start, labels in zip(tokens_BxT1, start_B, labels_B, strict=True):
            if labels:
                row[: labels + 1] = shards.read(start, labels + 1)
        batch = _shifted(tokens_BxT1)
        batch.targets_BxT[np.arange(seq_len) >= labels_B[:, None]] = NO_LABEL
        return Batch(*(array_BxT[rows] for array_BxT in batch))

    return map(read_batch, range(n_batches))


def val_bytes(prepared: Prepared, n_tokens: int) -> int | None:
    """Counts the UTF-8 bytes of the labels of `val_batches` on all hosts; None: bytes unknown."""
    if prepared.token_bytes is None:
        return None
    labels = min(n_tokens or prepared.val.n_tokens, prepared.val.n_tokens - 1)
    return int(prepared.token_bytes[prepared.val.read(1, labels)].sum(dtype=np.int64))


def prefetch(
    read_batch: Callable[[int], Batch], start: int, stop: int, depth: int = 2, workers: int = 0
) -> Iterator[Batch]:
    """Yields the batches of steps start .. stop - 1, read ahead so that training need not wait.

    An exception of `read_batch` is raised at its step. Closing or deleting the iterator ends the
    reading.

    Args:
        read_batch: pure function of the step, such as `TrainBatches.at`; with `workers` it must be
            picklable.
        start: first step.
        stop: step after the last.
        depth: batches read ahead, by the thread or by each worker.
        workers: processes that read; 0: one thread, which is faster for memory-mapped shards.
    """
    if workers:
        return _read_with_processes(read_batch, start, stop, depth, workers)
    return _read_with_thread(read_batch, start, stop, depth)


def _read_with_thread(read_batch, start: int, stop: int, depth: int) -> Iterator[Batch]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = collections.deque()
        for step in range(start, stop):
            while len(pending) <= depth and step + len(pending) < stop:
                pending.append(thread.submit(read_batch, step + len(pending)))
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _read_with_processes(
    read_batch, start: int, stop: int, depth: int, workers: int
) -> Iterator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers need parsed flags, which only commands have
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=depth)
    steps = grain.MapDataset.range(start, stop).map(read_batch)
    for batch in steps.to_iter_dataset(grain.ReadOptions(num_threads=1)).mp_prefetch(options):
        # Copied, since grain reuses the shared memory of its arrays.
        yield Batch(*(np.array(array_BxT) for array_BxT in batch))


def _shifted(tokens_BxT1: np.ndarray) -> Batch:
    """Splits [B, T + 1] into contiguous inputs and labels [B, T], outside the step's thread."""
    return Batch(
        np.ascontiguousarray(tokens_BxT1[:, :-1]), np.ascontiguousarray(tokens_BxT1[:, 1:])
    )
