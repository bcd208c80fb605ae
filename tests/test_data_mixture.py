"""Mixtures of prepared directories: exact shares, orders of their own, one tokenizer."""

import json

import numpy as np
import pytest

from lmscale_jax.configs import base
from lmscale_jax.data import prepare
from lmscale_jax.data.batches import TrainBatches
from lmscale_jax.data.order import MixturePattern, WindowOrder
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


@pytest.mark.parametrize("weights", [[1.0], [3, 1], [0.2, 0.5, 0.3], [1, 1, 1]])
def test_shares_are_exact_and_rows_of_a_part_are_counted(weights):
    mixture = MixturePattern(weights, seed=5)
    part, row = (
        np.concatenate(x) for x in zip(*(mixture.rows(t, 7) for t in range(500)), strict=True)
    )
    for start in range(0, 3000, 1000):
        counts = np.bincount(part[start : start + 1000], minlength=len(weights))
        np.testing.assert_allclose(counts, 1000 * np.array(weights) / sum(weights), atol=1)
    for index in range(len(weights)):
        # Each row of a part comes once, and in its order.
        assert np.array_equal(
            np.sort(row[part == index])[:500], np.arange(500)[: (part == index).sum()]
        )
    assert len(weights) > 1 or np.array_equal(row, np.arange(3500))


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
@pytest.mark.usefixtures("quick_compiler")
def test_a_run_trains_from_it(folders, small, tmp_path):
    path = f"{folders / 'low'}=2,{folders / 'high'}=1"
    gone = {"data__tokenizer": "bpe", "data__val_fraction": 0.05}
    config = small(data__source="mixture", data__path=path, train__steps=4, **gone)
    loop.train(config, tmp_path / "run", say=lambda line: None)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
