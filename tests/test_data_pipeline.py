"""Batches: every label once an epoch, hosts that add up, fixed validation, reading ahead."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lmscale_jax.data.batches import NO_LABEL, Batch, TrainBatches, prefetch, val_batches
from lmscale_jax.data.shards import Shards, ShardWriter
from lmscale_jax.errors import InputError


@pytest.fixture
def data(tmp_path):
    """Tokens that are their own positions: 1003 to train on, 101 held out, in odd shards."""

    def shards(prefix, n_tokens):
        writer = ShardWriter(tmp_path, prefix, 2000, shard_tokens=97)
        writer.add(np.arange(n_tokens))
        writer.close()
        return Shards(sorted(tmp_path.glob(f"{prefix}*")), 2000)

    return SimpleNamespace(train=shards("train", 1003), val=shards("val", 101), mixture=())


@pytest.mark.parametrize("seq_len, batch_size", [(1, 3), (8, 5), (100, 2), (1002, 1)])
def test_an_epoch_has_every_label_once(data, seq_len, batch_size):
    batches = TrainBatches(data, seq_len, batch_size, seed=3)
    assert batches.n_windows == 1002 // seq_len
    n_steps = batches.n_windows  # so batch_size epochs
    labels = []
    for step in range(n_steps):
        tokens_BxT, targets_BxT = batches.at(step)
        assert tokens_BxT.shape == targets_BxT.shape == (batch_size, seq_len)
        assert tokens_BxT.dtype == targets_BxT.dtype == np.int32
        assert tokens_BxT.flags.c_contiguous and targets_BxT.flags.c_contiguous
        assert (targets_BxT == tokens_BxT + 1).all()
        assert (tokens_BxT[:, 0] % seq_len == 0).all()
        labels.append(targets_BxT.ravel())
    counts = np.bincount(np.concatenate(labels), minlength=1003)
    covered = batches.n_windows * seq_len
    assert (counts[1 : covered + 1] == batch_size).all()
    assert batches.epochs(n_steps) == batch_size


def test_batches_depend_on_seed_and_step_alone(data):
    a, b = (TrainBatches(data, 8, 16, seed=1) for _ in range(2))
    assert (a.at(5).tokens_BxT == b.at(5).tokens_BxT).all()
    assert (a.at(5).tokens_BxT != a.at(6).tokens_BxT).any()
    assert (a.at(0).tokens_BxT != TrainBatches(data, 8, 16, seed=2).at(0).tokens_BxT).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_add_up_to_the_whole(data, hosts):
    all_rows = TrainBatches(data, 8, 16, seed=0).at(9)
    cuts = [slice(h * 16 // hosts, (h + 1) * 16 // hosts) for h in range(hosts)]
    parts = [TrainBatches(data, 8, 16, 0, rows).at(9) for rows in cuts]
    assert (np.concatenate([part.tokens_BxT for part in parts]) == all_rows.tokens_BxT).all()
    all_rows = list(val_batches(data, 8, 16, 0))
    parts = [list(val_batches(data, 8, 16, 0, rows)) for rows in cuts]
    for step, batch in enumerate(all_rows):
        joined = np.concatenate([part[step].targets_BxT for part in parts])
        assert (joined == batch.targets_BxT).all()


def test_too_few_tokens_name_a_length_that_works(data):
    with pytest.raises(InputError, match=r"data.seq_len=1003: .* has 1003; set data.seq_len=1002"):
        TrainBatches(data, 1003, 1, 0)
    assert TrainBatches(data, 1002, 1, 0).n_windows == 1


@pytest.mark.parametrize("seq_len, batch_size", [(1, 1), (7, 3), (10, 10), (100, 1), (64, 4)])
@pytest.mark.parametrize("n_tokens, expected", [(0, 100), (1, 1), (50, 50), (100, 100), (999, 100)])
def test_validation_labels_are_the_same_for_every_shape(
    data, seq_len, batch_size, n_tokens, expected
):
    labels = []
    for tokens_BxT, targets_BxT in val_batches(data, seq_len, batch_size, n_tokens):
        assert tokens_BxT.shape == targets_BxT.shape == (batch_size, seq_len)
        labelled = targets_BxT != NO_LABEL
        assert labelled.any()
        assert (targets_BxT[labelled] == tokens_BxT[labelled] + 1).all()
        labels.append(targets_BxT[labelled])
    assert np.concatenate(labels).tolist() == list(range(1, expected + 1))


def test_validation_needs_two_tokens(data):
    with pytest.raises(InputError, match="validation split has 1 tokens"):
        val_batches(SimpleNamespace(val=SimpleNamespace(n_tokens=1, paths=("val.bin",))), 8, 4, 0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_is_in_order_and_reads_no_further_than_depth(depth):
    steps_read = []
    ahead = prefetch(lambda step: steps_read.append(step) or step, 3, 20, depth)
    assert [next(ahead) for _ in range(4)] == [3, 4, 5, 6]
    time.sleep(0.05)
    assert steps_read == list(range(3, 7 + depth))
    assert list(ahead) == list(range(7, 20))
    assert list(prefetch(lambda step: step, 5, 5)) == []


def test_prefetch_raises_where_the_reader_failed():
    def read_batch(step):
        if step == 4:
            raise OSError("disk is gone")
        return step

    ahead = prefetch(read_batch, 2, 10)
    assert [next(ahead), next(ahead)] == [2, 3]
    with pytest.raises(OSError, match="disk is gone"):
        next(ahead)


def test_closing_stops_the_thread():
    def readers():
        return [t for t in threading.enumerate() if t.name.startswith("prefetch")]

    ahead = prefetch(lambda step: step, 0, 10**9)
    next(ahead)
    assert len(readers()) == 1
    ahead.close()
    assert readers() == []


def test_worker_processes_read_the_same_batches(data):
    batches = TrainBatches(data, 8, 4, seed=0)
    by_thread = list(prefetch(batches.at, 3, 15))
    by_processes = list(prefetch(batches.at, 3, 15, workers=2))
    assert len(by_processes) == 12
    for ours, theirs in zip(by_thread, by_processes, strict=True):
        assert type(theirs) is Batch and type(theirs.tokens_BxT) is np.ndarray
        assert (theirs.tokens_BxT == ours.tokens_BxT).all()
        assert (theirs.targets_BxT == ours.targets_BxT).all()


def test_worker_processes_pass_on_exceptions():
    ahead = prefetch(_fail_at_4, 0, 10, workers=1)
    assert [next(ahead).tokens_BxT.item() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(Exception, match="disk is gone"):
        next(ahead)


def _fail_at_4(step):
    if step == 4:
        raise OSError("disk is gone")
    return Batch(np.array([step]), np.array([step + 1]))
