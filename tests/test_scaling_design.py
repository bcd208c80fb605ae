"""What a design is said to tell, against simulated ladders."""

import csv

import numpy as np
import pytest
from conftest import ROOT

from lmscale_jax.scaling import design

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
    scatter, _ = design.seed_scatter(y, [f"{row['variant']} {row['size']}" for row in rows])
    assert pytest.approx(scatter, rel=0.05) == design.USUAL_SCATTER
    assert pytest.approx(-np.polyfit(x, y, 1)[0], rel=0.05) == design.USUAL_SLOPE


def test_the_scatter_of_seeds_is_pooled_within_cells():
    rng = np.random.default_rng(0)
    cells = np.repeat(np.arange(500), 3)
    y = 0.3 * cells + 0.004 * rng.standard_normal(1500)
    scatter, spare = design.seed_scatter(y, cells)
    assert spare == 1000 and scatter == pytest.approx(0.004, rel=0.05)
