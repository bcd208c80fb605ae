"""What a design is said to tell, against simulated ladders."""

import csv

import numpy as np
import pytest
from conftest import ROOT

from lmscale_jax.scaling import design, pairs

X = np.arange(4) * np.log(4) + 26.0


def powers(offset: float, shift: float, scatter=0.002, seeds=2, draws=4000) -> tuple[float, float]:
    """Computes how often least squares on both arms finds the offset, and the shift, at 5 %."""
    from scipy.stats import t

    rng = np.random.default_rng(0)
    slope, centre = design.USUAL_SLOPE, X - X.mean()
    gap = slope * (np.log1p(offset) + shift * centre)
    errors = scatter * rng.standard_normal((2, draws, seeds, len(X))).mean(axis=2)
    y_AxBxK = errors + np.stack([np.zeros(4), gap])[:, None] - slope * X
    level_AxB = y_AxBxK.mean(axis=2)
    sum_xx = (centre**2).sum()
    slope_AxB = y_AxBxK @ centre / sum_xx
    left = y_AxBxK - level_AxB[..., None] - slope_AxB[..., None] * centre
    variance_B = (left**2).sum(axis=(0, 2)) / (2 * len(X) - 4)
    limit = t.ppf(0.975, 2 * len(X) - 4)
    by_level = np.diff(level_AxB, axis=0)[0] / np.sqrt(2 * variance_B / len(X))
    by_slope = np.diff(slope_AxB, axis=0)[0] / np.sqrt(2 * variance_B / sum_xx)
    return float((np.abs(by_level) > limit).mean()), float((np.abs(by_slope) > limit).mean())


def test_the_smallest_effects_are_found_with_the_stated_power():
    told = design.predict_precision(X, 2, X[-1] + np.log(4), 0.002)
    assert powers(told.offset, 0.0)[0] == pytest.approx(design.POWER, abs=0.05)
    assert powers(0.0, told.shift)[1] == pytest.approx(design.POWER, abs=0.05)
    assert powers(0.0, 0.0) == pytest.approx((design.LEVEL, design.LEVEL), abs=0.015)


def test_richer_designs_tell_more():
    target = X[-1] + np.log(4)
    planned = design.predict_precision(X[1:], 2, target, 0.002)
    seed = design.predict_precision(X[1:], 3, target, 0.002)
    size = design.predict_precision(X, 2, target, 0.002)
    assert seed.flops == pytest.approx(1.5 * planned.flops) and size.flops < 1.05 * planned.flops
    for richer in (seed, size):
        assert richer.offset < planned.offset and richer.shift < planned.shift
    assert size.width < planned.width
    two = design.predict_precision(X[:2], 2, target, 0.002)
    assert two.offset is None and two.shift is None and two.width > planned.width


def test_what_is_assumed_is_what_the_documented_ladder_shows():
    rows = list(csv.DictReader((ROOT / "docs/ladders/results.csv").read_text().splitlines()))
    y = np.log([float(row["val_loss"]) for row in rows])
    x = np.log([float(row["flops"]) for row in rows])
    columns = ([row[k] for row in rows] for k in ("variant", "size", "seed"))
    noise = design.seed_noise(y, *columns)
    assert pytest.approx(noise.scatter, rel=0.05) == design.USUAL_SCATTER and noise.degrees == 8
    # The seeds of this ladder correlate by more than is assumed where nothing is known.
    assert pairs.USUAL_CORRELATION < noise.correlation < 1
    assert pytest.approx(-np.polyfit(x, y, 1)[0], rel=0.05) == design.USUAL_SLOPE


def test_the_noise_of_seeds_is_pooled_within_cells():
    rng = np.random.default_rng(0)
    place, seed = (x.ravel() for x in np.meshgrid(np.arange(300), np.arange(3), indexing="ij"))
    shared = rng.standard_normal(900)
    losses = [
        0.3 * place + 0.004 * (np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.standard_normal(900))
        for _ in "AB"
    ]
    arms = ["A"] * 900 + ["B"] * 900
    noise = design.seed_noise(np.concatenate(losses), arms, [*place] * 2, [*seed] * 2)
    assert noise.degrees == 1200 and noise.scatter == pytest.approx(0.004, rel=0.05)
    assert noise.correlation == pytest.approx(0.6, abs=0.06)
    assert design.seed_noise(losses[0], ["A"] * 900, place, seed).correlation is None


def test_correlated_arms_need_fewer_runs():
    apart, alike = (
        design.predict_precision(X, 2, X[-1] + np.log(4), 0.002, correlation=r) for r in (0, 0.9)
    )
    assert alike.shift < 0.6 * apart.shift and alike.offset < 0.6 * apart.offset
    assert alike.width == apart.width
