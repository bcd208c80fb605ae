"""Predicts, before anything is trained, what a ladder of given budgets and seeds can tell."""

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
    log_c_K, seeds: int, target_log_c: float, scatter: float, slope: float = USUAL_SLOPE
) -> Precision:
    """Predicts the precision of anchors at K budgets with `seeds` runs each, for both arms alike.

    Two arms' lines in ln C have 2 K means of `seeds` runs; offset and shift are their differences
    in level and in slope, over the slope. Their smallest effects are (t_0.975 + t_0.9) standard
    errors (Cohen 1988, section 2.4). The width is the median over simulated tables.
    """
    x_K = np.sort(np.asarray(log_c_K, float))
    spare = 2 * len(x_K) - 4
    offset = shift = None
    if spare > 0:
        from scipy.stats import t

        quantile = float(t.ppf(1 - LEVEL / 2, spare) + t.ppf(POWER, spare))
        variance = 2 * scatter**2 / seeds
        offset = float(np.expm1(quantile * np.sqrt(variance / len(x_K)) / slope))
        shift = quantile * float(np.sqrt(variance / ((x_K - x_K.mean()) ** 2).sum())) / slope
    width = forecast_width(x_K, seeds, target_log_c, scatter, slope) if len(x_K) > 1 else None
    return Precision(width, offset, shift, float(seeds * np.exp(x_K).sum()))


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


def seed_scatter(log_loss, cells) -> tuple[float, int]:
    """Computes the pooled standard deviation of ln L within cells: (it, degrees of freedom)."""
    _, cell = np.unique(np.asarray(cells, str), return_inverse=True)
    y = np.asarray(log_loss, float)
    means = np.bincount(cell, y) / np.bincount(cell)
    spare = len(y) - len(means)
    return (float(np.sqrt(((y - means[cell]) ** 2).sum() / spare)) if spare else np.nan), spare
