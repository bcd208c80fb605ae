"""Intervals of a fit: a cluster bootstrap over runs, and the profile of the floor E.

Runs are resampled, not the rows of their curves: rows of one curve share their errors, and
resampling them gives intervals more than ten times too narrow.
"""

from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import laws, solve
from lmscale_jax.scaling.laws import Problem
from lmscale_jax.scaling.table import Table

MIN_CLUSTERS = 8
UNITS = ("run", "size", "row")


@dataclass(frozen=True)
class Draws:
    """Coordinates [B, P] of B refits of resampled data.

    `unit` is the resampled unit and `clusters` their number. `kind` is "pairs" (clusters drawn with
    replacement) or "wild" (the signs of each cluster's residuals drawn at random).
    """

    theta: np.ndarray
    unit: str
    clusters: int
    kind: str


def cluster_labels(table: Table, unit: str) -> np.ndarray:
    """Numbers the cluster of each row [R]: by run, by size (equal n, or c without n) or by row.

    Raises:
        InputError: the unit is unknown.
    """
    if unit not in UNITS:
        raise InputError(f"--cluster={unit} is unknown; use {', '.join(UNITS)}")
    if unit == "row":
        return np.arange(len(table))
    if unit == "run":
        return np.unique(table.run_id.astype(str), return_inverse=True)[1]
    size = table.n if table.n is not None else table.c
    return np.unique(np.round(np.log(size), 3), return_inverse=True)[1]


def bootstrap(
    problem: Problem,
    theta_P: np.ndarray,
    delta: float,
    table: Table,
    count: int = 2000,
    unit: str = "run",
    seed: int = 0,
) -> Draws:
    """Refits `count` resamples, starting each at the full fit.

    Fewer than 8 clusters drawn with replacement leave too few distinct ones for a fit. The signs of
    the residuals are then drawn by cluster (wild bootstrap, Cameron et al. 2008).
    """
    cluster = cluster_labels(table, unit)
    clusters = int(cluster.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    if clusters >= max(MIN_CLUSTERS, problem.size + 2):
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), count)
        weights = drawn[:, cluster] * problem.weight
        # A draw with fewer distinct clusters than coordinates does not determine a fit.
        weights = weights[(drawn > 0).sum(axis=1) >= problem.size]
        return Draws(refit_draws(problem, theta_P, delta, weight=weights), unit, clusters, "pairs")
    f_R = solve.predict_log_loss(problem, theta_P)[0]
    spare = len(f_R) / max(len(f_R) - problem.size, 1)
    signs = rng.choice([-1.0, 1.0], (count, clusters))[:, cluster]
    y_BxR = f_R + (problem.y - f_R) * np.sqrt(spare) * signs
    return Draws(refit_draws(problem, theta_P, delta, y=y_BxR), unit, clusters, "wild")


def refit_draws(problem: Problem, theta_P, delta: float, weight=None, y=None) -> np.ndarray:
    """Finds the minima [B, P] for B weightings or B vectors of y, starting at theta."""
    count = len(weight if weight is not None else y)
    start = np.broadcast_to(theta_P, (count, problem.size))
    return solve.minimise(problem, start, delta, weight=weight, y=y)[0]


def percentiles(values: np.ndarray, level: float) -> list[float] | None:
    """Computes the central interval [low, high] of finite draws; None if fewer than half are."""
    finite = np.asarray(values)[np.isfinite(values)]
    if len(finite) < max(len(values) / 2, 2):
        return None
    tail = 100 * (1 - level) / 2
    return [float(q) for q in np.percentile(finite, [tail, 100 - tail])]


@dataclass(frozen=True)
class FloorProfile:
    """The best fit at each pinned floor: E [G], F [G], theta without the floor [G, P - 1].

    `low` and `high` bound the floors that the data do not reject at the level; `low` is 0 if a law
    without a floor is not rejected either.
    """

    E: np.ndarray
    objective: np.ndarray
    theta: np.ndarray
    low: float
    high: float


def profile_floor(
    problem: Problem, theta_P, delta: float, level: float, points: int = 40
) -> FloorProfile:
    """Fits the law at pinned floors from nearly 0 to the smallest loss, as one batch.

    The threshold on F is that of a likelihood ratio with the scale of Huber's psi (Hampel et al.
    1986, section 7.2): 2 (F - F_min) mean(psi') / var(psi) follows chi-squared with 1 degree.
    """
    from scipy.stats import chi2

    top = float(np.exp(problem.y.min()))
    best = float(np.exp(theta_P[0]))
    floors = np.linspace(0.02 * top, 0.995 * top, points)
    floors = np.sort(np.append(floors, np.clip(best, 1e-3 * top, 0.999 * top)))
    pinned = problem.pin(np.log(floors)[:, None])
    start = np.broadcast_to(theta_P[1:], (len(floors), problem.size - 1))
    theta, F = solve.minimise(pinned, start, delta)
    # A second pass starts at both neighbours, so that no point stays in a worse local minimum.
    for offset in (1, -1):
        retried, F_retried = solve.minimise(pinned, np.roll(theta, offset, axis=0), delta)
        better = F_retried < F
        theta[better], F[better] = retried[better], F_retried[better]
    r = solve.predict_log_loss(problem, theta_P)[0] - problem.y
    psi = np.clip(r, -delta, delta)
    spare = max(len(r) - problem.size, 1)
    variance = (problem.weight * psi**2).sum() / spare
    curvature = max(np.average(np.abs(r) <= delta, weights=problem.weight), 1 / len(r))
    limit = F.min() + chi2.ppf(level, 1) / 2 * variance / curvature
    return FloorProfile(floors, F, theta, *_crossings(floors, F, limit))


def _crossings(E: np.ndarray, F: np.ndarray, limit: float) -> tuple[float, float]:
    """Finds where F crosses the limit on each side of its minimum, by linear interpolation."""
    i = int(F.argmin())
    low, high = 0.0, float(E[-1])
    for j in range(i, 0, -1):
        if F[j - 1] > limit:
            low = float(np.interp(limit, [F[j], F[j - 1]], [E[j], E[j - 1]]))
            break
    for j in range(i, len(E) - 1):
        if F[j + 1] > limit:
            high = float(np.interp(limit, [F[j], F[j + 1]], [E[j], E[j + 1]]))
            break
    return low, high


def prediction_band(drawn_BxG: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Computes pointwise percentiles (low [G], high [G]) of drawn predictions, or NaN."""
    pairs = [percentiles(drawn_BxG[:, i], level) for i in range(drawn_BxG.shape[1])]
    bounds_Gx2 = np.array([[np.nan, np.nan] if p is None else p for p in pairs])
    return bounds_Gx2[:, 0], bounds_Gx2[:, 1]


def intervals_of_draws(problem: Problem, draws: Draws, floor: float | None, level: float) -> dict:
    """Computes the interval of each natural and compound parameter."""
    params = laws.natural_parameters(problem.law, problem.centre, draws.theta, floor)
    params |= laws.compound_exponents(params)
    names = [k for k in params if not (k == "E" and problem.law.floor == "pinned")]
    return {k: percentiles(params[k], level) for k in names}
