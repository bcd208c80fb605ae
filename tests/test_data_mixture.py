"""Mixtures of prepared directories: exact shares, orders of their own, one tokenizer."""

import json
from fractions import Fraction

import numpy as np
import pytest

from lmscale_jax.configs import base
from lmscale_jax.data import prepare
from lmscale_jax.data.batches import TrainBatches
from lmscale_jax.data.order import WindowOrder
from lmscale_jax.data.shares import MixturePattern
from lmscale_jax.errors import InputError
from lmscale_jax.train import loop


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared directories whose bytes tell them apart, and one of another tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    for name, letters, tokenizer in (("low", "abc", "bytes"), ("high", "xyz", "bytes"),
                                     ("other", "abc", "char")):  # fmt: skip
        chance = np.random.default_rng(0)
        text = "\n\n".join("".join(chance.choice(list(letters), 90)) + str(i) for i in range(80))
        (root / f"{name}.txt").write_text(text)
        data = base.get_config().data
        data.source, data.path, data.document = "text", str(root / f"{name}.txt"), "paragraph"
        data.tokenizer, data.val_fraction = tokenizer, 0.1
        prepare.prepare_directory(data, root / name, log=lambda line: None)
    return root


def data_of(folders, path: str):
    data = base.get_config().data
    data.source, data.path, data.cache = "mixture", path, str(folders / "cache")
    return data


WEIGHTS = [
    [1], [3, 1], [1, 1, 1], [1, 1, 7], [Fraction("0.2"), Fraction("0.5"), Fraction("0.3")],
    [3000, 1], [500, 300, 120, 50, 29, 1], [90, 3, 2, 2, 1, 1, 1],
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_exact_and_rows_of_a_part_are_counted(weights):
    """Against rows sorted by when they are due, in fractions."""
    mixture = MixturePattern(weights)
    n = min(3 * mixture.period, 4000)
    part, row = (
        np.concatenate(x)[:n]
        for x in zip(*(mixture.rows(t, 7) for t in range(n // 7 + 1)), strict=True)
    )
    shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    due = sorted(
        (Fraction(2 * j + 1, 2) / share, i, j)
        for i, share in enumerate(shares)
        for j in range(int(n * share) + 3)
    )
    assert [(i, j) for _, i, j in due[:n]] == list(zip(part.tolist(), row.tolist(), strict=True))
    read = np.cumsum(part[:, None] == np.arange(len(weights)), axis=0)
    off = np.abs(read - np.arange(1, n + 1)[:, None] * np.array(shares, float))
    most = 0.5 + max(0, len(weights) - 2) * np.array(shares, float) / 2
    assert np.all(off.max(axis=0) <= most + 1e-9)
    # To the row after every period.
    periods = np.arange(mixture.period - 1, n, mixture.period)
    assert np.all(off[periods] < 1e-9)
    for rows in (0, 1, 2, n // 3, n):
        expected = read[rows - 1] if rows else np.zeros(len(weights))
        assert np.array_equal(mixture.counts(rows), expected)


def test_a_small_part_is_read_and_a_run_without_it_is_refused(folders):
    """A part of one window in 2,001: in every 2,001 windows, and refused in a run of fewer."""
    mixed = prepare.prepare_data(
        data_of(folders, f"{folders / 'low'}=2000,{folders / 'high'}=1"), 0
    )
    batches = TrainBatches(mixed, 16, 69, seed=0)
    assert batches.part_windows(29) == [2000, 1] and batches.part_windows(58) == [4000, 2]
    with pytest.raises(InputError, match=r"high has 1 of 2001 .* none of the run's 690 windows"):
        batches.part_windows(10)
    with pytest.raises(InputError, match=r"3333333333.*use weights with fewer digits"):
        prepare.prepare_data(data_of(folders, f"{folders / 'low'}=0.3333333333,{folders}=1"), 0)


def test_one_part_alone_is_the_order_of_the_seed(folders):
    prepared_data = prepare.open_directory(folders / "low", folders)
    batches = TrainBatches(prepared_data, 16, 4, seed=3)
    order = WindowOrder(batches.n_windows, 3)
    for step in (0, 5, 1000):
        starts = order.indices(step, 4) * 16
        assert np.array_equal(
            batches.at(step).tokens_BxT, prepared_data.train.gather(starts, 17)[:, :-1]
        )


def test_windows_come_from_both_by_weight(folders):
    mixed = prepare.prepare_data(data_of(folders, f"{folders / 'low'}=3, {folders / 'high'}=1"), 0)
    batches = TrainBatches(mixed, 16, 10, seed=0)
    high = np.concatenate([(batches.at(t).tokens_BxT >= ord("x")) for t in range(100)])
    high = high & (np.concatenate([batches.at(t).tokens_BxT for t in range(100)]) < 256)
    assert high.any(axis=1).mean() == 0.25
    low, other = (prepare.open_directory(folders / n, folders) for n in ("low", "high"))
    assert mixed.val.n_tokens == low.val.n_tokens + other.val.n_tokens
    windows = (low.train.n_tokens - 1) // 16
    assert batches.epochs(100) == pytest.approx(750 / windows)
    reweighted = prepare.prepare_data(
        data_of(folders, f"{folders / 'low'}=1,{folders / 'high'}=1"), 0
    )
    assert (
        reweighted.fingerprint != mixed.fingerprint
        and reweighted.val_fingerprint == mixed.val_fingerprint
    )
    rows = TrainBatches(mixed, 16, 10, seed=0, rows=slice(2, 5))
    assert np.array_equal(rows.at(7).tokens_BxT, batches.at(7).tokens_BxT[2:5])


def test_what_is_no_mixture_is_refused(folders):
    for path, message in (
        (f"{folders / 'low'}=0,{folders / 'high'}", "no directory with a positive weight"),
        (f"{folders / 'low'}=x,{folders / 'high'}", "no directory with a positive weight"),
        (f"{folders / 'low'}", "two parts or more"),
        (f"{folders / 'low'},{folders / 'other'}", "another tokenizer"),
        (f"{folders / 'low'},{folders / 'nowhere'}", "not a manifest"),
    ):
        with pytest.raises(InputError, match=message):
            prepare.prepare_data(data_of(folders, path), 0)


@pytest.mark.slow
def test_a_run_trains_from_it(folders, small, tmp_path):
    path = f"{folders / 'low'}=2,{folders / 'high'}=1"
    gone = {"data__tokenizer": "bpe", "data__val_fraction": 0.05}
    config = small(data__source="mixture", data__path=path, train__steps=4, **gone)
    loop.train(config, tmp_path / "run", say=lambda line: None)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
