"""Forecasts along a curve in C by averaging over the laws that a small table cannot tell apart.

A ladder has three to six budgets of compute, from which a floor E is hardly identified. The laws
here are ln L = ln(E + a c^-b) for floors from 0 to almost the smallest loss, and a few concave
parabolas in ln c, as of a law that breaks upwards. Each is fitted to the means of the budgets, and
weighted by its prior and by its marginal likelihood (Hoeting et al. 1999).
"""

from dataclasses import dataclass

import numpy as np

# Floors as shares of the smallest loss, and the exponents of their Beta prior: a broad one, because
# E is 0.5 to 0.9 of the smallest loss in the bundled tables and other tables show no floor.
SHARES = (np.arange(40) + 0.5) / 40 * 0.995
PRIOR = (1.0, 1.3)
# Second coefficients of the parabolas (ln L per squared nat of C), and their prior probability.
CONCAVE = -np.array([0.003, 0.006, 0.01, 0.015, 0.02])
CONCAVE_PRIOR = 0.1
# Scatter of a budget's mean about the law, in ln L: assumed before residuals are seen, with the
# weight of so many of them. A single seed does not show its own scatter.
USUAL_SCATTER, USUAL_SCATTER_OF_ONE, USUAL_DEGREES = 0.002, 0.005, 2
# Growth of the error of every law per nat of C beyond the table, with the weight of one cut.
USUAL_GROWTH, NEAR = 0.003, 0.1
# Budgets whose ln c differ by less are one.
SAME_BUDGET = 0.02


@dataclass(frozen=True)
class Mixture:
    """A distribution of ln L of one run: Student's t distributions with probabilities.

    Attributes:
        share: floor of each law as a share of the smallest loss [M]; NaN for a parabola.
        probability, centre, scale: of each law [M].
        degrees: degrees of freedom of all.
        scatter: standard deviation of one run about the law, averaged over the laws.
    """

    share: np.ndarray
    probability: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    degrees: float
    scatter: float

    @property
    def mean(self) -> float:
        return float(self.probability @ self.centre)

    @property
    def variance(self) -> float:
        """Returns the second moment about the mean of centres and scales."""
        return float(self.probability @ ((self.centre - self.mean) ** 2 + self.scale**2))

    def widened(self, sd: float) -> "Mixture":
        """Adds an independent error of standard deviation `sd` to every law."""
        scale = np.sqrt(self.scale**2 + sd**2)
        return Mixture(self.share, self.probability, self.centre, scale, self.degrees, self.scatter)

    def quantiles(self, levels) -> np.ndarray:
        """Computes quantiles of ln L by interpolation in the distribution function."""
        from scipy.stats import t

        x_G = self.mean + np.sqrt(self.variance) * np.linspace(-10, 10, 1001)
        z_GxM = (x_G[:, None] - self.centre) / self.scale
        return np.interp(levels, t.cdf(z_GxM, self.degrees) @ self.probability, x_G)


@dataclass(frozen=True)
class Budgets:
    """Means of the runs of each budget: ln c [K], ln L [K], weights [K]; K at least 2.

    `within` is the variance of ln L within budgets, None if each has one run; `runs` the mean
    number of runs of a budget.
    """

    log_c: np.ndarray
    log_loss: np.ndarray
    weight: np.ndarray
    within: float | None
    runs: float

    def first(self, count: int) -> "Budgets":
        """Selects the cheapest budgets."""
        return Budgets(
            self.log_c[:count], self.log_loss[:count], self.weight[:count], self.within, self.runs
        )


def average_budgets(log_c_R, log_loss_R, weight_R) -> Budgets:
    """Averages the runs of each budget; runs share a budget if their ln c differ by under 2 %."""
    order = np.argsort(log_c_R, kind="stable")
    x, y, w = (np.asarray(a, float)[order] for a in (log_c_R, log_loss_R, weight_R))
    cell = np.concatenate([[0], np.cumsum(np.diff(x) > SAME_BUDGET)])
    total = np.bincount(cell, w)
    mean_x, mean_y = np.bincount(cell, w * x) / total, np.bincount(cell, w * y) / total
    spare = len(x) - len(total)
    within = float(((y - mean_y[cell]) ** 2).sum() / spare) if spare else None
    return Budgets(mean_x, mean_y, total / total.mean(), within, len(x) / len(total))


def forecast_curve(budgets: Budgets, log_c: float) -> Mixture:
    """Predicts ln L of one run at `log_c` from the budgets, averaged over the laws."""
    runs = max(budgets.runs, 1.0)
    if budgets.within is None:
        usual, seeds = USUAL_SCATTER_OF_ONE**2, 0.0
    else:
        usual = max(USUAL_SCATTER**2, budgets.within / runs)
        # A mean hides this part of the scatter of one run.
        seeds = budgets.within * (1 - 1 / runs)
    with_floor, parabolas = _fit_above_floors(budgets, log_c), _fit_parabolas(budgets, log_c)
    centre, leverage, squares = (np.concatenate(p) for p in zip(with_floor, parabolas, strict=True))
    degrees = len(budgets.log_c) - 2 + USUAL_DEGREES
    variance = (squares + USUAL_DEGREES * usual) / degrees
    prior = SHARES ** (PRIOR[0] - 1) * (1 - SHARES) ** (PRIOR[1] - 1)
    prior = (1 - CONCAVE_PRIOR) * prior / prior.sum()
    prior = np.append(prior, np.full(len(CONCAVE), CONCAVE_PRIOR / len(CONCAVE)))
    # With flat priors of the local level and slope the likelihood is that of the residuals alone.
    log_weight = np.log(prior) - degrees / 2 * np.log(variance)
    probability = np.exp(log_weight - log_weight.max())
    probability /= probability.sum()
    scale = np.sqrt(variance * (1 + leverage) + seeds)
    share = np.concatenate([SHARES, np.full(len(CONCAVE), np.nan)])
    scatter = float(np.sqrt(probability @ variance + seeds))
    return Mixture(share, probability, centre, scale, float(degrees), scatter)


def _fit_above_floors(budgets: Budgets, log_c: float):
    """Fits a c^-b above each floor: centre [M], leverage [M] and squared residuals [M] in ln L.

    ln(L - E) is linear in ln c; a small error of ln L is multiplied by L / (L - E) there, so that
    the weights are (1 - E / L)^2.
    """
    loss_K = np.exp(budgets.log_loss)
    E_Mx1 = (SHARES * loss_K.min())[:, None]
    above_MxK = 1 - E_Mx1 / loss_K
    z_MxK = np.log(loss_K - E_Mx1)
    weight_MxK = budgets.weight * above_MxK**2
    mean_z, slope, mean_x, sum_w, sum_xx = _weighted_line(budgets.log_c, z_MxK, weight_MxK)
    line_MxK = mean_z[:, None] + slope[:, None] * (budgets.log_c - mean_x[:, None])
    squares = (weight_MxK * (z_MxK - line_MxK) ** 2).sum(axis=1)
    reducible = np.exp(mean_z + slope * (log_c - mean_x))
    loss = E_Mx1[:, 0] + reducible
    leverage = (reducible / loss) ** 2 * (1 / sum_w + (log_c - mean_x) ** 2 / sum_xx)
    return np.log(loss), leverage, squares


def _fit_parabolas(budgets: Budgets, log_c: float):
    """Fits level and slope about each second coefficient; returns what `_fit_above_floors` does."""
    x = budgets.log_c - budgets.log_c.mean()
    at = log_c - budgets.log_c.mean()
    y_MxK = budgets.log_loss - CONCAVE[:, None] * x**2
    weight_MxK = np.broadcast_to(budgets.weight, y_MxK.shape)
    mean_y, slope, mean_x, sum_w, sum_xx = _weighted_line(x, y_MxK, weight_MxK)
    line_MxK = mean_y[:, None] + slope[:, None] * (x - mean_x[:, None])
    squares = (weight_MxK * (y_MxK - line_MxK) ** 2).sum(axis=1)
    centre = mean_y + slope * (at - mean_x) + CONCAVE * at**2
    return centre, 1 / sum_w + (at - mean_x) ** 2 / sum_xx, squares


def _weighted_line(x_K, y_MxK, weight_MxK):
    """Fits lines by weighted least squares: mean of y, slope, mean of x, sums of w and w dx^2."""
    sum_w = weight_MxK.sum(axis=1)
    mean_x = weight_MxK @ x_K / sum_w
    mean_y = (weight_MxK * y_MxK).sum(axis=1) / sum_w
    dx_MxK = x_K - mean_x[:, None]
    sum_xx = (weight_MxK * dx_MxK**2).sum(axis=1)
    return mean_y, (weight_MxK * dx_MxK * y_MxK).sum(axis=1) / sum_xx, mean_x, sum_w, sum_xx


def growth_of_error(budgets: Budgets) -> tuple[float, int]:
    """Estimates how fast forecasts of this table go wrong: (per nat of C, number of cuts).

    The cheapest 2, 3, ... budgets forecast the next one; what their errors exceed the forecasts'
    own variance by, over (h + 0.1)^2 with h the distance in ln c, is averaged with USUAL_GROWTH^2.
    """
    excess = [USUAL_GROWTH**2]
    for count in range(2, len(budgets.log_c)):
        train, log_c = budgets.first(count), budgets.log_c[count]
        mixture = forecast_curve(train, log_c)
        error = budgets.log_loss[count] - mixture.mean
        h = log_c - train.log_c[-1]
        excess.append(max(error**2 - mixture.variance, 0.0) / (h + NEAR) ** 2)
    return float(np.sqrt(np.mean(excess))), len(excess) - 1
