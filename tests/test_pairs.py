"""Arms of a ladder are paired: equal initial values and data order, and a test that uses them."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from synthetic import two_arms

from benchmarks import calibration_tables as made
from benchmarks.calibration_tables import NOISES, TRUTHS
from lmscale_jax.config.resolve import resolve
from lmscale_jax.data.batches import TrainBatches
from lmscale_jax.data.prepare import prepare_data
from lmscale_jax.ladders.plan import make_plan
from lmscale_jax.model.mesh import one_device_mesh
from lmscale_jax.scaling import as_table, compare_arms, pairs, shift
from lmscale_jax.train.setup import build_setup


def test_arms_share_initial_values_and_data_order_to_the_bit(ladder):
    config = ladder(rungs__sizes=(1e5, 2e5), rungs__held_out=0.0, seeds=2)
    config.switch = ("model.mlp", "model.norm", "optim.name")
    other = {"model": {"norm": "layernorm"}, "optim": {"name": "muon"}}
    config.arms = {"gelu": {}, "swiglu": {"model": {"mlp": "swiglu"}}, "other": other}
    plan = make_plan(config, print)
    data = prepare_data(config.run.data, config.run.model.vocab_size)
    drawn, batches = {}, {}
    for cell in plan.cells:
        if cell.size > 1e5:
            continue
        resolved = resolve(plan.config(cell, Path()), plan.vocab_size)
        begun = build_setup(resolved, data.boundary, one_device_mesh()).initial(resolved.seed)
        paths = jax.tree_util.tree_flatten_with_path(begun.params)[0]
        drawn[cell.arm, cell.seed] = {jax.tree_util.keystr(k): np.asarray(v) for k, v in paths}
        settings = resolved.data.seq_len, resolved.train.batch_size, resolved.data.seed
        batches[cell.arm, cell.seed] = [TrainBatches(data, *settings).at(t) for t in (0, 7)]
    for arm in ("swiglu", "other"):
        for seed in (0, 1):
            ours, theirs = drawn[arm, seed], drawn["gelu", seed]
            common = [k for k in ours if k in theirs and ours[k].shape == theirs[k].shape]
            # All but what the arm changes: the MLP's matrices, or the norms' biases.
            assert len(common) >= len(theirs) - 3 and any("embed" in k for k in common)
            for k in common:
                np.testing.assert_array_equal(ours[k], theirs[k], err_msg=f"{arm} {k}")
            jax.tree.map(np.testing.assert_array_equal, batches[arm, seed], batches["gelu", seed])
    assert not np.array_equal(batches["gelu", 0][0].tokens_BxT, batches["gelu", 1][0].tokens_BxT)


def simulated(seed: int, correlation: float, sizes=4, seeds=2, shifted=0.0, noise="0.2 %"):
    truth, runs = TRUTHS["floor"], made.ladder(sizes, seeds)
    rng = np.random.default_rng([seed, sizes, seeds])
    columns = made.both_arms(runs, truth, NOISES[noise], rng, truth, 0.0, shifted, correlation)
    return shift.two_arms(as_table(columns), "A", "B")


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_equal_arms_are_claimed_to_differ_in_one_case_of_twenty(correlation):
    fits = [shift.estimate_shift("quadratic", simulated(i, correlation)) for i in range(200)]
    claims = np.mean([fit.p_both < 0.05 for fit in fits])
    used = np.mean([fit.paired for fit in fits])
    assert claims <= 0.095
    assert {0.0: used < 0.3, 0.5: 0.2 < used < 0.8, 0.9: used > 0.85}[correlation], used


def test_correlated_pairs_tell_more():
    """With errors of .5 % and a correlation of .9, as from a fifth of the runs."""
    powers = {
        correlation: np.mean([
            shift.estimate_shift("quadratic", simulated(i, correlation, 5, 2, 0.05, "0.5 %")).p_both
            < 0.05
            for i in range(60)
        ])
        for correlation in (0.0, 0.9)
    }  # fmt: skip
    assert powers[0.0] < 0.6 and powers[0.9] > 0.9, powers


def test_the_correlation_is_that_of_the_runs():
    data = simulated(0, 0.7, sizes=8, seeds=40)
    assert data.pairs.correlation == pytest.approx(0.7, abs=0.08)
    assert data.pairs.degrees == 8 * 39
    first, second = data.pairs.members()
    np.testing.assert_allclose(data.x[first], data.x[second])
    assert (data.z[first] != data.z[second]).all()


def test_only_equal_cells_with_equal_seeds_are_pairs():
    table = two_arms(0.1, sizes=5, seeds=2)
    comparison = compare_arms(table, "A", "B", bootstrap=0)
    assert comparison["pairing"]["pairs"] == 5
    rows = list(zip(table["variant"], table["n"], table["seed"], strict=True))
    renamed = table | {"seed": [f"{variant}{seed}" for variant, _, seed in rows]}
    larger = table | {"n": [1.2 * n if variant == "B" else n for variant, n, _ in rows]}
    missing = {k: v[:-5] for k, v in table.items()}
    assert shift.two_arms(as_table(missing), "A", "B").pairs is not None
    for other in (renamed, table | {"seed": [""] * 20}, larger):
        comparison = compare_arms(other, "A", "B", bootstrap=0)
        assert comparison["pairing"] is None and comparison["shift"]["unit"] == "cells"
    data = shift.two_arms(as_table(table), "A", "B")
    assert len(data.take(data.x > data.x.min()).pairs.label) == 8
    assert data.take(np.arange(1, 10)).pairs is None


def test_pairs_are_used_where_they_pay():
    label = np.repeat(np.arange(6), 2)

    def pay(correlation, degrees, cells=12):
        return pairs.Pairs(label[:cells], correlation, degrees).pay(5)

    assert pay(0.9, 6) and not pay(0.0, 6) and not pay(0.9, 6, cells=4)
    # Four sizes have two degrees of freedom in pairs and three in cells.
    assert pay(0.9, 4, cells=8) and not pay(0.4, 4, cells=8)
    # Without repeated seeds it takes many sizes.
    assert not pay(None, 0) and pairs.Pairs(np.repeat(np.arange(7), 2), None, 0).pay(5)


def test_the_documented_verdict_is_the_present_one():
    path = ROOT / "docs/ladders/recompute.py"
    spec = importlib.util.spec_from_file_location("recompute", path)
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    judgement, present = recompute.judge()
    documented = json.loads((path.parent / "verdict.json").read_text())
    text = (ROOT / "docs/ladders.md").read_text().replace("\n> ", " ")
    assert judgement["answer"] == documented["answer"] and judgement["answer"] in text
    (ours,), (theirs,) = judgement["comparisons"], documented["comparisons"]
    for part, names in {"shift": ("s", "se", "p", "p_both"), "pairing": ours["pairing"]}.items():
        assert [ours[part][k] for k in names] == pytest.approx(
            [theirs[part][k] for k in names], rel=1e-3
        )
    for arm, law in present["arms"].items():
        low, high = (round(law[k], 4) for k in ("low", "high"))
        assert f"| {arm} |" in text and f"{law['loss']:.4f} | {low:.4f} to {high:.4f}" in text
