"""How sure a fit is: resampling by runs, and the profile of the floor.

The unit that is resampled is a run, never a row of its curve: rows of one curve share their errors,
and resampling them gives intervals more than ten times too narrow.
"""

from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.science import laws, solve
from lmscale_jax.science.laws import Problem
from lmscale_jax.science.table import Table

FEW = 8
UNITS = ("run", "size", "row")


@dataclass(frozen=True)
class Draws:
    """B refits [B, P] of resampled data.

    `unit` is what was resampled, `clusters` how many of them there are, `kind` is "pairs" (clusters
    drawn with replacement) or "wild" (every cluster's residuals kept or turned around).
    """

    theta: np.ndarray
    unit: str
    clusters: int
    kind: str


def labels(table: Table, unit: str) -> np.ndarray:
    """Cluster number [R] of every row: by run, by size (equal n, or c without n), or by row."""
    if unit not in UNITS:
        raise InputError(f"--cluster={unit} is unknown; {', '.join(UNITS)} would work")
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
    """Refits `count` resamples, each begun at the full fit.

    With fewer than 8 clusters drawing with replacement leaves too few distinct ones to fit; then
    the residuals' signs are drawn by cluster instead (wild bootstrap, Cameron et al. 2008).
    """
    which = labels(table, unit)
    clusters = int(which.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    if clusters >= max(FEW, problem.size + 2):
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), count)
        weights = drawn[:, which] * problem.weight
        # A draw of fewer distinct clusters than coordinates determines nothing.
        weights = weights[(drawn > 0).sum(axis=1) >= problem.size]
        return Draws(refit(problem, theta_P, delta, weight=weights), unit, clusters, "pairs")
    f_R = solve.predict(problem, theta_P)[0]
    spare = len(f_R) / max(len(f_R) - problem.size, 1)
    signs = rng.choice([-1.0, 1.0], (count, clusters))[:, which]
    y_BxR = f_R + (problem.y - f_R) * np.sqrt(spare) * signs
    return Draws(refit(problem, theta_P, delta, y=y_BxR), unit, clusters, "wild")


def refit(problem: Problem, theta_P, delta: float, weight=None, y=None) -> np.ndarray:
    """Minima [B, P] for B weightings or B vectors of y, begun at theta."""
    count = len(weight if weight is not None else y)
    start = np.broadcast_to(theta_P, (count, problem.size))
    return solve.minimise(problem, start, delta, weight=weight, y=y)[0]


def percentiles(values: np.ndarray, level: float) -> list[float] | None:
    """The central interval [low, high] of finite draws; None where under half are finite."""
    finite = np.asarray(values)[np.isfinite(values)]
    if len(finite) < max(len(values) / 2, 2):
        return None
    tail = 100 * (1 - level) / 2
    return [float(q) for q in np.percentile(finite, [tail, 100 - tail])]


@dataclass(frozen=True)
class Profile:
    """The best fit at each pinned floor: E [G], F [G], theta without the floor [G, P - 1].

    `low` and `high` bound the floors that the data do not reject at the level; `low` is 0 where no
    floor at all is not rejected.
    """

    E: np.ndarray
    objective: np.ndarray
    theta: np.ndarray
    low: float
    high: float


def profile(problem: Problem, theta_P, delta: float, level: float, points: int = 40) -> Profile:
    """Fits at floors from nearly 0 to the smallest loss, as one batch.

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
    # A second pass from both neighbours: a valley entered from one side only is left.
    for shift in (1, -1):
        again, F2 = solve.minimise(pinned, np.roll(theta, shift, axis=0), delta)
        better = F2 < F
        theta[better], F[better] = again[better], F2[better]
    r = solve.predict(problem, theta_P)[0] - problem.y
    psi = np.clip(r, -delta, delta)
    spare = max(len(r) - problem.size, 1)
    variance = (problem.weight * psi**2).sum() / spare
    bend = max(np.average(np.abs(r) <= delta, weights=problem.weight), 1 / len(r))
    limit = F.min() + chi2.ppf(level, 1) / 2 * variance / bend
    return Profile(floors, F, theta, *_crossings(floors, F, limit))


def _crossings(E: np.ndarray, F: np.ndarray, limit: float) -> tuple[float, float]:
    """Where F crosses the limit on either side of its minimum, by linear interpolation."""
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


def band(drawn_BxG: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise percentiles (low [G], high [G]) of drawn predictions; NaN where there are none."""
    pairs = [percentiles(drawn_BxG[:, i], level) for i in range(drawn_BxG.shape[1])]
    found = np.array([[np.nan, np.nan] if p is None else p for p in pairs])
    return found[:, 0], found[:, 1]


def of_draws(problem: Problem, draws: Draws, floor: float | None, level: float) -> dict:
    """Interval by parameter, natural and compound."""
    found = laws.natural(problem.law, problem.centre, draws.theta, floor)
    found |= laws.compound(found)
    names = [k for k in found if not (k == "E" and problem.law.floor == "pinned")]
    return {k: percentiles(found[k], level) for k in names}
