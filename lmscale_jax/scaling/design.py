"""Predicts, before anything is trained, what a ladder of given budgets and seeds can tell."""

import itertools
from dataclasses import dataclass

import numpy as np

from lmscale_jax.scaling import curve_average

# Standard deviation of ln L between seeds, and -d ln L / d ln C: those of the ladder of 50 to 400
# thousand parameters whose runs are in docs/ladders/results.csv.
USUAL_SCATTER, USUAL_SLOPE = 0.009, 0.1
# E as a share of the smallest loss in the simulated tables.
FLOOR_SHARE = 0.5
LEVEL, POWER, DRAWS = 0.05, 0.9, 60


@dataclass(frozen=True)
class Precision:
    """What one design can tell.

    Attributes:
        width: median width of the 90 % forecast interval over the loss; None for one budget.
        offset: smallest constant saving of compute, as a share, found with 90 % power at 5 %.
        shift: smallest relative shift of the exponent found so; None with two budgets.
        flops: of all anchors of one arm.
    """

    width: float | None
    offset: float | None
    shift: float | None
    flops: float


def predict_precision(
    log_c_K,
    seeds: int,
    target_log_c: float,
    scatter: float,
    slope: float = USUAL_SLOPE,
    correlation: float = 0.0,
) -> Precision:
    """Predicts the precision of anchors at K budgets with `seeds` runs each, for both arms alike.

    Two arms' lines in ln C have 2 K means of `seeds` runs; offset and shift are their differences
    in level and in slope, over the slope. Their smallest effects are (t_0.975 + t_0.9) standard
    errors (Cohen 1988, section 2.4), of K differences of pairs with that correlation where these
    tell more. The width is the median over simulated tables.
    """
    x_K = np.sort(np.asarray(log_c_K, float))
    offset = shift = None
    if len(x_K) > 2:
        sd = np.sqrt(2 * scatter**2 / seeds)
        error = min(
            _detected(2 * len(x_K) - 4) * sd,
            _detected(len(x_K) - 2) * sd * np.sqrt(1 - correlation),
        )
        offset = float(np.expm1(error / np.sqrt(len(x_K)) / slope))
        shift = float(error / np.sqrt(((x_K - x_K.mean()) ** 2).sum()) / slope)
    width = forecast_width(x_K, seeds, target_log_c, scatter, slope) if len(x_K) > 1 else None
    return Precision(width, offset, shift, float(seeds * np.exp(x_K).sum()))


def _detected(degrees: int) -> float:
    """Computes how many standard errors an effect has that is detected with POWER at LEVEL."""
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, degrees) + t.ppf(POWER, degrees))


def forecast_width(x_K, seeds: int, target: float, scatter: float, slope: float) -> float:
    """Computes the median width of the 90 % interval over tables of a law with a floor."""
    rng = np.random.Generator(np.random.PCG64(0))
    x_R = np.repeat(x_K, seeds)
    # ln(E + a c^-b) with this share of E and this slope at the largest budget.
    exponent = slope / (1 - FLOOR_SHARE)
    law_R = np.log(FLOOR_SHARE + (1 - FLOOR_SHARE) * np.exp(-exponent * (x_R - x_K.max())))
    widths = []
    for _ in range(DRAWS):
        y_R = law_R + scatter * rng.standard_normal(len(x_R))
        budgets = curve_average.average_budgets(x_R, y_R, np.ones(len(x_R)))
        growth, _ = curve_average.growth_of_error(budgets)
        stretch = max(target - x_K.max(), 0.0) + curve_average.NEAR
        mixture = curve_average.forecast_curve(budgets, target).widened(growth * stretch)
        low, high = mixture.quantiles([0.05, 0.95])
        widths.append(high - low)
    return float(np.median(widths))


@dataclass(frozen=True)
class SeedNoise:
    """What seeds do to ln L.

    Attributes:
        scatter: pooled standard deviation within cells, with `degrees` degrees of freedom.
        correlation: of these deviations between arms, at equal size and seed; None without pairs.
    """

    scatter: float
    degrees: int
    correlation: float | None


def seed_noise(log_loss, arms, places, seeds) -> SeedNoise:
    """Measures the noise of runs [R] with these arms, places (size and tokens) and seeds."""
    y = np.asarray(log_loss, float)
    cells = [f"{arm} {place}" for arm, place in zip(arms, places, strict=True)]
    _, cell = np.unique(cells, return_inverse=True)
    means = np.bincount(cell, y) / np.bincount(cell)
    deviation, spare = y - means[cell], len(y) - len(means)
    by_run: dict = {}
    for arm, place, seed, value in zip(arms, places, seeds, deviation, strict=True):
        by_run.setdefault((place, seed), {})[arm] = value
    couples = [
        (a, b) for run in by_run.values() for a, b in itertools.combinations(run.values(), 2)
    ]
    squares = sum(a * a + b * b for a, b in couples)
    return SeedNoise(
        float(np.sqrt((deviation**2).sum() / spare)) if spare else np.nan,
        spare,
        float(2 * sum(a * b for a, b in couples) / squares) if squares else None,
    )
