"""Intervals of a fit: a cluster bootstrap over runs, and the profile of the floor E.

Runs are resampled, not the rows of their curves: rows of one curve share their errors, and
resampling them gives intervals more than ten times too narrow.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import laws, solve
from lmscale_jax.scaling.laws import Problem
from lmscale_jax.scaling.table import Table

# Below this number intervals are called rough in a warning; below the other, percentiles of
# clusters drawn with replacement cover too rarely (.86 to .93 of .95, docs/calibration.md).
MIN_CLUSTERS = 8
MIN_PAIRS = 20
# Of studentised intervals: at one degree of freedom a 95 % interval is 12.7 standard errors wide to
# either side, and says nothing.
MIN_DEGREES = 2
# Share of a coordinate's effect on ln L that must vary within clusters to determine it there.
WITHIN = 1e-2
# Clusters up to which these are drawn themselves, beyond by the normal limit of their sums.
MAX_MULTINOMIAL = 2000
UNITS = ("run", "cell", "size", "row")


@dataclass(frozen=True)
class Draws:
    """Coordinates [B, P] of B refits of resampled data.

    `unit` is the resampled unit and `clusters` their number. `kind` is "pairs" (clusters drawn with
    replacement) or "student" (errors drawn with the scale of jackknifed residuals, as uncertain as
    `degrees` degrees of freedom make it). `linear` draws are of large tables: the refits are single
    steps from the estimate.
    """

    theta: np.ndarray
    unit: str
    clusters: int
    kind: str
    degrees: int
    linear: bool = False

    @property
    def too_few(self) -> bool:
        """Tells whether the degrees of freedom do not suffice for an interval."""
        return self.kind == "student" and self.degrees < MIN_DEGREES


def cluster_labels(table: Table, unit: str) -> np.ndarray:
    """Numbers the cluster of each row [R].

    By run, by cell (runs that differ only in the seed), by size (equal n, or c without n) or by
    row.

    Raises:
        InputError: the unit is unknown, or cells are asked for of curves.
    """
    if unit not in UNITS:
        raise InputError(f"--cluster={unit} is unknown; use {', '.join(UNITS)}")
    if unit == "row":
        return np.arange(len(table))
    if unit == "run":
        return np.unique(table.run_id.astype(str), return_inverse=True)[1]
    if unit == "cell":
        if table.points != "final":
            raise InputError("--cluster=cell joins seeds by their final points; use --points=final")
        return table.cells()
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

    Fewer than 20 clusters drawn with replacement vary too little, and fewer than 8 leave too few
    distinct ones for a fit. Errors are then drawn instead: see `student_errors`.
    """
    cluster = cluster_labels(table, unit)
    clusters = int(cluster.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    kind = "pairs" if clusters >= MIN_PAIRS else "student"
    degrees = clusters - 1
    if kind == "student":
        degrees = degrees_of_freedom(problem, theta_P, cluster)
    if len(cluster) > solve.SUBSET:
        drawn = (cluster, max(degrees, 1), count, rng)
        theta = LINEAR_DRAWS[kind](problem, theta_P, delta, *drawn)
        return Draws(theta, unit, clusters, kind, degrees, linear=True)
    if kind == "pairs":
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), count)
        weights = drawn[:, cluster] * problem.weight
        # A draw with fewer distinct clusters than coordinates does not determine a fit.
        weights = weights[(drawn > 0).sum(axis=1) >= problem.size]
        theta = refit_draws(problem, theta_P, delta, weight=weights)
        return Draws(theta, unit, clusters, kind, degrees)
    f_R = solve.predict_log_loss(problem, theta_P)[0]
    y_BxR = f_R + student_errors(problem, theta_P, cluster, max(degrees, 1), count, rng)
    theta = refit_draws(problem, theta_P, delta, y=y_BxR)
    return Draws(theta, unit, clusters, kind, degrees)


def gauss_newton(problem: Problem, theta_P, delta: float):
    """Computes ln L - y [R], its Jacobian [R, P], and the Gauss-Newton Hessian of F [P, P]."""
    r_R = solve.predict_log_loss(problem, theta_P)[0] - problem.y
    J_RxP = solve.log_loss_jacobian(problem, theta_P)
    inside = problem.weight * (np.abs(r_R) <= delta)
    return r_R, J_RxP, (J_RxP * inside[:, None]).T @ J_RxP


def _linear_pairs(problem: Problem, theta_P, delta, cluster, degrees, count, rng) -> np.ndarray:
    """Steps by Newton's method for clusters drawn with replacement [B, P].

    Many clusters are drawn by the normal limit of their sums.
    """
    r_R, J_RxP, H_PxP = gauss_newton(problem, theta_P, delta)
    psi = problem.weight * np.clip(r_R, -delta, delta)
    score_CxP = np.stack([np.bincount(cluster, psi * column) for column in J_RxP.T], axis=1)
    clusters = len(score_CxP)
    if clusters <= MAX_MULTINOMIAL:
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), count) - 1
        sums_BxP = drawn @ score_CxP
    else:
        sums_BxP = rng.standard_normal((count, problem.size)) @ _root(score_CxP.T @ score_CxP).T
    return theta_P - sums_BxP @ np.linalg.pinv(H_PxP, hermitian=True)


def _linear_student(problem: Problem, theta_P, delta, cluster, degrees, count, rng) -> np.ndarray:
    """Steps by Newton's method for the errors of `student_errors` [B, P]."""
    _, J_RxP, H_PxP = gauss_newton(problem, theta_P, np.inf)
    error_R = problem.weight * jackknifed_residuals(problem, theta_P, cluster)
    score_CxP = np.stack([np.bincount(cluster, error_R * column) for column in J_RxP.T], axis=1)
    scale = np.sqrt(degrees / rng.chisquare(degrees, (count, 1)))
    sums_BxP = scale * rng.standard_normal((count, len(score_CxP))) @ score_CxP
    return theta_P + sums_BxP @ np.linalg.pinv(H_PxP, hermitian=True)


LINEAR_DRAWS = {"pairs": _linear_pairs, "student": _linear_student}


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def degrees_of_freedom(problem: Problem, theta_P, cluster: np.ndarray) -> int:
    """Counts the clusters beyond the coordinates that only differences between clusters determine.

    With one row a cluster these are all coordinates. Rows of a curve determine most of them within
    each run; one degree is then lost, as for a mean.
    """
    J_RxP = solve.log_loss_jacobian(problem, theta_P)
    J_RxP = J_RxP / np.maximum(np.linalg.norm(J_RxP, axis=0), 1e-300)
    count = np.bincount(cluster)
    means = np.stack([np.bincount(cluster, column) / count for column in J_RxP.T], axis=1)
    within = np.linalg.matrix_rank(J_RxP - means[cluster], tol=WITHIN)
    between = max(problem.size - int(within), 1)
    return min(len(count) - between, len(cluster) - problem.size)


def student_errors(problem: Problem, theta_P, cluster, degrees: int, count: int, rng):
    """Draws errors [B, R] after which refits are spread as Student's t.

    Each cluster's jackknifed residuals are multiplied by a normal number of the cluster, and all by
    one scale of the draw. For a linear model the refits have the cluster-jackknife covariance (CR3;
    HC3 with one row a cluster; MacKinnon & White 1985) and the tails of t with `degrees` degrees of
    freedom.
    """
    scaled = jackknifed_residuals(problem, theta_P, cluster)
    clusters = int(cluster.max()) + 1
    scale = np.sqrt(degrees / rng.chisquare(degrees, (count, 1)))
    return scaled * scale * rng.standard_normal((count, clusters))[:, cluster]


def jackknifed_residuals(problem: Problem, theta_P, cluster) -> np.ndarray:
    """Divides each cluster's residuals [R] by 1 minus their leverage.

    A row that is its own cluster gets the mean of its jackknifed and of the pooled variance: few
    residuals of a robust fit are often nearly 0.
    """
    r_R = problem.y - solve.predict_log_loss(problem, theta_P)[0]
    root = np.sqrt(problem.weight)
    J_RxP = solve.log_loss_jacobian(problem, theta_P) * root[:, None]
    q_RxP, s, _ = np.linalg.svd(J_RxP, full_matrices=False)
    q_RxP = q_RxP[:, s > 1e-12 * s[0]]
    pooled = np.sqrt((root * r_R) @ (root * r_R) / max(len(r_R) - problem.size, 1))
    scaled = np.zeros_like(r_R)
    order = np.argsort(cluster, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(cluster))[:-1]):
        alone = _without_leverage(q_RxP[rows], (root * r_R)[rows])
        scaled[rows] = alone if len(rows) > 1 else np.hypot(alone, pooled) / np.sqrt(2)
    return scaled / root


def _without_leverage(q_NxP: np.ndarray, r_N: np.ndarray) -> np.ndarray:
    """Solves (I - q q') x = r, by the smaller of q q' and q' q; directions without a rest are 0."""
    if len(r_N) <= q_NxP.shape[1]:
        return np.linalg.pinv(np.eye(len(r_N)) - q_NxP @ q_NxP.T, rcond=1e-6) @ r_N
    # I + q V diag((1 / (1 - v) - 1) / v) V' q', by the eigenvalues v of q' q.
    values, vectors = np.linalg.eigh(q_NxP.T @ q_NxP)
    rest = 1 - values
    factors = np.where(rest > 1e-6, 1 / np.maximum(rest, 1e-6), -1.0)
    return r_N + q_NxP @ (vectors @ (factors * (vectors.T @ (q_NxP.T @ r_N))))


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
    problem: Problem, theta_P, delta: float, level: float, cluster: np.ndarray, points: int = 40
) -> FloorProfile:
    """Fits the law at pinned floors from nearly 0 to the smallest loss, as one batch.

    Args:
        cluster: number of the cluster of each row [R]; rows of one share their errors.

    The threshold on F is that of a likelihood ratio with the scale of Huber's psi (Hampel et al.
    1986, section 7.2): 2 (F - F_min) mean(psi') / var(psi) follows F with 1 degree of freedom and
    those of the residuals.
    """
    from scipy.stats import f as f_distribution

    r = solve.predict_log_loss(problem, theta_P)[0] - problem.y
    psi = np.clip(r, -delta, delta)
    # Per row, from the sums over clusters, in which shared errors do not cancel.
    sums = np.bincount(cluster, np.sqrt(problem.weight) * psi)
    count = np.bincount(cluster)
    spare = max(degrees_of_freedom(problem, theta_P, cluster), 1)
    variance = (sums**2 / count).sum() / spare
    curvature = max(np.average(np.abs(r) <= delta, weights=problem.weight), 1 / len(r))
    rise = f_distribution.ppf(level, 1, spare) / 2 * variance / curvature
    if len(r) > solve.SUBSET:
        floors, theta, F = _near_floors(problem, theta_P, delta, rise)
    else:
        floors, theta, F = _all_floors(problem, theta_P, delta, points)
    limit = F.min() + rise
    low, high = crossings(floors, F, limit)
    return FloorProfile(floors, F, theta, 0.0 if low is None else low,
                        float(floors[-1]) if high is None else high)  # fmt: skip


def _all_floors(problem: Problem, theta_P, delta: float, points: int):
    """Fits the law at floors from nearly 0 to the smallest loss: (E [G], theta, F [G])."""
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
    return floors, theta, F


def _near_floors(problem: Problem, theta_P, delta: float, rise: float):
    """Fits a large table at a few floors around those at which F is expected to rise so far."""
    _, _, H_PxP = gauss_newton(problem, theta_P, delta)
    half = float(np.sqrt(2 * rise * np.linalg.pinv(H_PxP, hermitian=True)[0, 0]))
    top = problem.y.min()
    ln_E = np.clip(theta_P[0] + half * np.linspace(-2, 2, 9), top + np.log(1e-3), top - 1e-3)
    ln_E = np.unique(ln_E)
    slope = np.linalg.lstsq(H_PxP[1:, 1:], -H_PxP[1:, 0], rcond=None)[0]
    start = theta_P[1:] + (ln_E - theta_P[0])[:, None] * slope
    theta, F = solve.minimise(problem.pin(ln_E[:, None]), start, delta, gain=1e-10)
    return np.exp(ln_E), theta, F


def crossings(x: np.ndarray, F: np.ndarray, limit: float) -> tuple[float | None, float | None]:
    """Finds where F(x) crosses a limit on each side of its minimum; None where it does not.

    The root of F - F_min is interpolated, which is about linear in x: F itself is a parabola, and
    between coarse points its linear interpolation puts the crossing far too near the minimum.
    """
    i = int(F.argmin())
    root, target = np.sqrt(F - F[i]), np.sqrt(limit - F[i])

    def first_beyond(indices) -> float | None:
        for j, k in itertools.pairwise(indices):
            if root[k] > target:
                return float(np.interp(target, root[[j, k]], x[[j, k]]))
        return None

    return first_beyond(range(i, -1, -1)), first_beyond(range(i, len(x)))


def prediction_band(drawn_BxG: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Computes pointwise percentiles (low [G], high [G]) of drawn predictions, or NaN."""
    pairs = [percentiles(drawn_BxG[:, i], level) for i in range(drawn_BxG.shape[1])]
    bounds_Gx2 = np.array([[np.nan, np.nan] if p is None else p for p in pairs])
    return bounds_Gx2[:, 0], bounds_Gx2[:, 1]


def intervals_of_draws(
    problem: Problem, theta_P, draws: Draws, floor: float | None, level: float
) -> dict:
    """Computes the interval of each natural and compound parameter.

    An interval includes its estimate: percentiles of few or skewed draws need not. None with too
    few degrees of freedom.
    """
    params, fitted = (
        (p := laws.natural_parameters(problem.law, problem.centre, theta, floor))
        | laws.compound_exponents(p)
        for theta in (draws.theta, theta_P)
    )
    names = [k for k in params if not (k == "E" and problem.law.floor == "pinned")]
    if draws.too_few:
        return dict.fromkeys(names)
    return {k: include(percentiles(params[k], level), float(fitted[k])) for k in names}


def include(span: list[float] | None, value: float) -> list[float] | None:
    """Widens an interval to include a finite value."""
    if span is None or not np.isfinite(value):
        return span
    return [min(span[0], value), max(span[1], value)]
