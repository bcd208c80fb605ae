"""Horizontal shift between two arms: L_B(C) = L_A(k C), ln k = tau + s (ln C - ln C0).

s = 0 is a constant factor of compute at every scale; for power laws 1 + s is the ratio of the arms'
exponents. Unlike a contrast of fitted exponents, the shift depends neither on E nor on the form of
the law, and s does not depend on C0.

Seeds of one cell share whatever error the curve, the tuning or the data order has there, so that
all estimates are from the means of cells. Cells of both arms with equal size, tokens and seeds are
compared as pairs (`pairs`). Shapes: B refits, R cells, M parameters of the baseline curve, P = M +
2.
"""

from dataclasses import dataclass, replace

import numpy as np

from lmscale_jax.scaling import laws, pairs, solve
from lmscale_jax.scaling.pairs import Pairs
from lmscale_jax.scaling.table import Table

TAUS = np.linspace(-4.0, 4.0, 65)
DEGREE = {"power": 1, "quadratic": 2, "cubic": 3}
# Largest spread of ln(d / n) at equal C for which an arm's runs still follow one curve in C.
MAX_RATIO_SPREAD = 0.25


@dataclass(frozen=True)
class TwoArms:
    """Means of two arms' cells, groups of runs that differ only in the seed.

    Attributes:
        x: ln C - ln C0 [R]; `z` [R] is 1 for the second arm; `y` [R] is the mean of ln loss.
        weight: sum of the runs' weights [R]; `seeds` [R] is their number.
        seed_variance: of ln L among the seeds of a cell, pooled; None without repeated cells.
        ln_n, ln_d: centred [R], or None.
        ln_floor: ln E of a pinned floor, or None.
        pairs: of cells of the two arms, or None.
    """

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    seeds: np.ndarray
    seed_variance: float | None
    ln_c0: float
    ln_n: np.ndarray | None
    ln_d: np.ndarray | None
    ln_floor: float | None = None
    pairs: Pairs | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: np.ndarray) -> "TwoArms":
        """Selects cells by a mask or by indices."""
        names = ("x", "z", "y", "weight", "seeds", "ln_n", "ln_d")
        columns = {k: getattr(self, k) for k in names}
        taken = {k: None if a is None else a[rows] for k, a in columns.items()}
        return replace(self, **taken, pairs=None if self.pairs is None else self.pairs.take(rows))

    def budgets(self) -> tuple[int, int]:
        """Counts the distinct compute budgets of each arm."""
        first, second = (len(set(np.round(self.x[self.z == arm], 2))) for arm in (0.0, 1.0))
        return first, second


@dataclass(frozen=True)
class ShiftEstimate:
    """A fitted shift.

    Attributes:
        baseline: form of the common curve: "power", "quadratic", "cubic", "floor" or "surface".
        theta: parameters of the curve, then tau and s [P]; `null` [P] is the fit with s = 0.
        covariance: of theta [P, P].
        variance: of ln L at weight 1, from the means of cells, with `degrees` degrees of freedom;
            where `paired`, half of that of the differences of pairs.
        p: of the F test of s = 0; `p_both` of that of s = 0 and tau = 0 together.
        aicc, ssr: corrected Akaike criterion and sum of squared residuals.
    """

    baseline: str
    theta: np.ndarray
    null: np.ndarray
    covariance: np.ndarray
    variance: float
    degrees: int
    paired: bool
    p: float
    p_both: float
    aicc: float
    ssr: float

    @property
    def s(self) -> float:
        return float(self.theta[-1])

    @property
    def tau(self) -> float:
        return float(self.theta[-2])

    @property
    def se(self) -> float:
        return float(np.sqrt(self.covariance[-1, -1]))

    def t(self, level: float) -> float:
        """Returns the two-sided quantile of Student's t at a level."""
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, self.degrees))

    def interval(self, level: float) -> list[float]:
        """Computes the interval [low, high] of s."""
        half = self.t(level) * self.se
        return [self.s - half, self.s + half]

    def log_gain(self, x: np.ndarray, level: float):
        """Computes (ln k, low, high) at x = ln C - ln C0."""
        x = np.asarray(x, float)
        c = self.covariance[-2:, -2:]
        se = np.sqrt(np.maximum(c[0, 0] + 2 * x * c[0, 1] + x * x * c[1, 1], 0))
        value = self.tau + self.s * x
        return value, value - self.t(level) * se, value + self.t(level) * se


def two_arms(table: Table, first: str, second: str, floor: float | None = None) -> TwoArms:
    """Averages the cells of two variants; C0 is the geometric mean of the runs' FLOPs."""
    runs = table.take((table.variant == first) | (table.variant == second))
    both, cell, seed_variance = pairs.average_seeds(runs)
    ln_c, ln_c0 = np.log(both.c), float(np.log(runs.c).mean())
    centred = [None if a is None else np.log(a) - np.log(a).mean() for a in (both.n, both.d)]
    return TwoArms(
        x=ln_c - ln_c0,
        z=(both.variant == second).astype(float),
        y=np.log(both.loss),
        weight=both.weight,
        seeds=np.bincount(cell),
        seed_variance=seed_variance,
        ln_c0=ln_c0,
        ln_n=centred[0],
        ln_d=centred[1],
        ln_floor=None if floor is None else float(np.log(floor)),
        pairs=pairs.match_cells(runs, both, cell),
    )


def shifted_curve(baseline: str, theta, data: TwoArms, floor=None):
    """Evaluates f [B, R] and its derivatives by the curve [B, R, M] and by ln k [B, R].

    Args:
        theta: [B, P].
        floor: pinned ln E [B, 1] instead of the data's, only for "floor", whose parameters exclude
            ln E where it is pinned.
    """
    shape, tau, s = theta[:, :-2], theta[:, -2:-1], theta[:, -1:]
    k = data.z * (tau + s * data.x)
    if baseline == "surface":
        return _loss_surface(shape, data, k)
    u = data.x + k
    if baseline != "floor":
        powers = u[..., None] ** np.arange(shape.shape[1])
        rise = np.arange(1, shape.shape[1])
        by_u = np.einsum("brm,bm->br", powers[..., :-1], shape[:, 1:] * rise)
        return np.einsum("brm,bm->br", powers, shape), powers, by_u
    floor = data.ln_floor if floor is None else floor
    ln_E = shape[:, :1] if floor is None else floor
    a, b = shape[:, -2:-1], shape[:, -1:]
    falling = a - b * u
    f = np.logaddexp(ln_E, falling)
    p = np.exp(falling - f)
    parts = [p, -p * u] if floor is not None else [1 - p, p, -p * u]
    return f, np.stack(parts, axis=-1), -b * p


def _loss_surface(shape, data: TwoArms, k):
    """Evaluates L(N, D) with N and D of the second arm both multiplied by sqrt(k)."""
    e, a, alpha, b, beta = (shape[:, i : i + 1] for i in range(5))
    x, z = data.ln_n + k / 2, data.ln_d + k / 2
    t = np.stack(np.broadcast_arrays(e, a - alpha * x, b - beta * z))
    f = np.logaddexp.reduce(t)
    p = np.exp(t - f)
    parts = [p[0], p[1], -p[1] * x, p[2], -p[2] * z]
    return f, np.stack(parts, axis=-1), -(alpha * p[1] + beta * p[2]) / 2


def levenberg_marquardt(
    baseline, theta, data: TwoArms, y=None, fixed=(), floor=None, steps: int = 60
):
    """Minimises the sum of squares by Levenberg-Marquardt: (theta [B, P], SSR [B]).

    Args:
        y: [B, R], replaces the data's.
        fixed: indices of coordinates that are not fitted.
        floor: see `shifted_curve`.
    """
    theta = np.array(theta, float)
    y = np.broadcast_to(data.y if y is None else y, (len(theta), len(data)))
    free = np.ones(theta.shape[1])
    free[list(fixed)] = 0.0
    damping = np.full(len(theta), 1e-3)
    f, J = curve_jacobian(baseline, theta, data, floor)
    ssr = (data.weight * (y - f) ** 2).sum(axis=1)
    for _ in range(steps):
        weighted = J * data.weight[:, None] * free
        H = np.einsum("brp,brq->bpq", weighted, J * free)
        g = np.einsum("brp,br->bp", weighted, y - f)
        diagonal = np.maximum(np.einsum("bpp->bp", H), 1e-12)
        diagonal = np.where(free > 0, diagonal, 1.0)
        H = H + np.eye(len(free)) * (damping[:, None] * diagonal + (1 - free))[:, None, :]
        step = np.linalg.solve(H, g[..., None])[..., 0]
        if ((step * g).sum(axis=1) <= 1e-13 * ssr + 1e-26).all():
            break
        step /= np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True) / 2)
        trial = theta + step
        f2, J2 = curve_jacobian(baseline, trial, data, floor)
        trial_ssr = (data.weight * (y - f2) ** 2).sum(axis=1)
        better = trial_ssr < ssr
        theta = np.where(better[:, None], trial, theta)
        f, J = np.where(better[:, None], f2, f), np.where(better[:, None, None], J2, J)
        ssr = np.where(better, trial_ssr, ssr)
        damping = np.where(better, np.maximum(damping / 10, 1e-10), damping * 10)
    return theta, ssr


def curve_jacobian(baseline, theta, data: TwoArms, floor=None):
    """Evaluates f [B, R] and its Jacobian [B, R, P]; see `shifted_curve`."""
    with np.errstate(over="ignore", invalid="ignore"):
        f, by_shape, by_k = shifted_curve(baseline, theta, data, floor)
        by_tau = data.z * by_k
        J = np.concatenate([by_shape, by_tau[..., None], (by_tau * data.x)[..., None]], axis=-1)
    # An overflow becomes a large residual, so that the step is rejected.
    return np.nan_to_num(f, nan=1e6, posinf=1e6, neginf=-1e6), np.nan_to_num(J, nan=0.0)


def start_point(baseline: str, data: TwoArms) -> np.ndarray:
    """Computes a start [P] with s = 0 from the best constant factor on a grid."""
    degree = DEGREE.get(baseline, 2)
    u_TxR = data.x + data.z * TAUS[:, None]
    X = u_TxR[..., None] ** np.arange(degree + 1)
    weighted = X * data.weight[:, None]
    H = np.einsum("trp,trq->tpq", weighted, X) + 1e-12 * np.eye(degree + 1)
    c = np.linalg.solve(H, np.einsum("trp,r->tp", weighted, data.y)[..., None])[..., 0]
    ssr = (data.weight * (np.einsum("trp,tp->tr", X, c) - data.y) ** 2).sum(axis=1)
    # Excludes polynomials that rise over most of the data.
    rise = np.arange(1, degree + 1)
    slope = np.einsum("trp,tp->tr", X[..., :-1], c[:, 1:] * rise)
    ssr = np.where((slope < 0).mean(axis=1) > 0.5, ssr, np.inf)
    best = int(ssr.argmin()) if np.isfinite(ssr).any() else len(TAUS) // 2
    tau, shape = TAUS[best], c[best]
    if baseline == "floor" and data.ln_floor is not None:
        shape = pinned_shape(data, tau, float(np.exp(data.ln_floor)))
    if baseline in DEGREE or data.ln_floor is not None:
        return np.concatenate([shape, [tau, 0.0]])
    return np.concatenate([_law_shape(baseline, data, tau), [tau, 0.0]])


def pinned_shape(data: TwoArms, tau: float, floor: float) -> np.ndarray:
    """Fits (ln a, b) of a power law above a floor E to both arms, the second moved by tau."""
    slope, height = np.polyfit(data.x + data.z * tau, np.log(np.exp(data.y) - floor), 1)
    return np.array([height, max(-slope, 1e-3)])


def _law_shape(baseline: str, data: TwoArms, tau: float) -> np.ndarray:
    """Fits the law's coordinates to both arms, with the second arm moved by tau."""
    columns = [data.x] if baseline == "floor" else [data.ln_n, data.ln_d]
    moved = [x + data.z * tau / len(columns) for x in columns]
    blocks = [(np.array([0]), np.ones((len(data), 1)))]
    for i, x in enumerate(moved):
        blocks.append((np.array([1, 2]) + 2 * i, np.stack([np.ones_like(x), -x], axis=1)))
    law = laws.LAWS["power_floor" if baseline == "floor" else "chinchilla"]
    size = 1 + 2 * len(columns)
    low = np.array([data.y.min() - 8] + [data.y.min() - laws.DEPTH, 0.0] * len(columns))
    high = np.array([data.y.max()] + [data.y.max() + laws.DEPTH, 5.0] * len(columns))
    problem = laws.Problem(law, data.y, data.weight, tuple(blocks), None, low, high, {})
    return solve.solve_many_starts(problem, np.inf).theta[:size]


def estimate_shift(baseline: str, data: TwoArms) -> ShiftEstimate | None:
    """Estimates the shift under one baseline, with its tests; None without degrees of freedom."""
    start = start_point(baseline, data)
    size = len(start)
    if len(data) - size < 1 or min(data.budgets()) <= DEGREE.get(baseline, 2):
        return None
    null, ssr_tau = levenberg_marquardt(baseline, start[None], data, fixed=[size - 1])
    equal = np.append(null[0, :-2], [0.0, 0.0])
    _, ssr_equal = levenberg_marquardt(baseline, equal[None], data, fixed=[size - 2, size - 1])
    starts = np.stack([null[0] + np.eye(size)[-1] * v for v in (0.0, -0.1, 0.1)])
    thetas, ssrs = levenberg_marquardt(baseline, starts, data)
    theta, ssr = thetas[ssrs.argmin()], float(ssrs.min())
    f, J = curve_jacobian(baseline, theta[None], data)
    variances, degrees = pairs.error_variance(data.pairs, data.weight, data.y - f, size)
    variance = float(variances[0])
    X = J[0] * np.sqrt(data.weight)[:, None]
    # Above the root of the smallest float, as lengths are multiplied.
    length = np.maximum(np.linalg.norm(X, axis=0), 1e-150)
    inverse = np.linalg.pinv((X / length).T @ (X / length)) / np.outer(length, length)
    from scipy.stats import f as f_distribution

    def p_value(null_ssr: float, tested: int) -> float:
        ratio = max(null_ssr - ssr, 0.0) / tested / variance
        return float(f_distribution.sf(ratio, tested, degrees))

    return ShiftEstimate(
        baseline=baseline,
        theta=theta,
        null=null[0],
        covariance=inverse * variance,
        variance=variance,
        degrees=degrees,
        paired=data.pairs is not None and data.pairs.pay(size),
        p=p_value(float(ssr_tau[0]), 1),
        p_both=p_value(float(ssr_equal[0]), 2),
        aicc=corrected_aic(ssr, len(data), size),
        ssr=ssr,
    )


def corrected_aic(ssr: float, count: int, size: int) -> float:
    """Computes AICc of a least-squares fit; inf with too few points for the correction."""
    k = size + 1
    if count - k - 1 < 1:
        return np.inf
    return count * np.log(max(ssr, 1e-300) / count) + 2 * k + 2 * k * (k + 1) / (count - k - 1)


def is_off_curve(data: TwoArms) -> bool:
    """Tells whether tokens per parameter vary at equal compute, so that L is no function of C."""
    if data.ln_n is None or data.ln_d is None:
        return False
    for arm in (0.0, 1.0):
        in_arm = data.z == arm
        ratio = (data.ln_d - data.ln_n)[in_arm]
        if in_arm.sum() > 3:
            trend = np.polyfit(data.x[in_arm], ratio, 1)
            if np.std(ratio - np.polyval(trend, data.x[in_arm])) > MAX_RATIO_SPREAD:
                return True
    return False


def wild_bootstrap(fitted: ShiftEstimate, data: TwoArms, count: int, seed: int = 0) -> float:
    """Computes p of s = 0 by a wild bootstrap: residuals of the null fit times random numbers.

    They are signs, or normal numbers that the cells of a pair share: few pairs have few signs.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    baseline, size = fitted.baseline, len(fitted.null)
    f0 = curve_jacobian(baseline, fitted.null[None], data)[0][0]
    if fitted.paired:
        units = len(data) // 2
        factors = rng.standard_normal((count, units))[:, data.pairs.label]
        r = (data.y - f0) * np.sqrt(units / (units - 1))
    else:
        factors = rng.choice([-1.0, 1.0], (count, len(data)))
        r = (data.y - f0) * np.sqrt(len(data) / max(len(data) - size + 1, 1))

    def statistics(y_BxR, start):
        """Computes the decrease of the sum of squares over the variance that is left [B]."""
        null, ssr0 = levenberg_marquardt(baseline, start, data, y_BxR, fixed=[size - 1], steps=12)
        theta, ssr = levenberg_marquardt(baseline, null, data, y_BxR, steps=12)
        r_BxR = y_BxR - curve_jacobian(baseline, theta, data)[0]
        left, _ = pairs.error_variance(data.pairs, data.weight, r_BxR, size)
        return (ssr0 - ssr) / left

    drawn = statistics(f0 + r * factors, np.broadcast_to(fitted.null, (count, size)))
    _, ssr0 = levenberg_marquardt(baseline, fitted.null[None], data, fixed=[size - 1])
    observed = (float(ssr0[0]) - fitted.ssr) / fitted.variance
    return float((1 + (drawn >= observed).sum()) / (1 + count))


def shift_error(fitted: ShiftEstimate, parts: list[tuple[TwoArms, int]]) -> float:
    """Computes the standard error of s from cells [of data], each with so many more seeds.

    The first part is what was fitted. The variance of a cell's mean is that of its seeds, divided
    by their number, and a rest that more seeds do not reduce.
    """
    measured = parts[0][0]
    seeds = measured.seeds.mean()
    of_mean = fitted.variance / measured.weight.mean()
    of_seed = of_mean * seeds
    if measured.seed_variance is not None:
        alike = measured.pairs.correlation if fitted.paired else None
        of_seed = min(of_seed, measured.seed_variance * (1 - (alike or 0.0)))
    rest = of_mean - of_seed / seeds
    information = np.zeros((len(fitted.theta),) * 2)
    for data, more in parts:
        _, J = curve_jacobian(fitted.baseline, fitted.theta[None], data)
        variance = rest + of_seed / (data.seeds + more)
        information += (J[0] / variance[:, None]).T @ J[0]
    return float(np.sqrt(np.linalg.pinv(information)[-1, -1]))
