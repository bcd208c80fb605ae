"""Minimises Huber's loss of log residuals by Newton's method, over a batch of starts or weightings.

F(theta) = sum_i w_i rho(f_i(theta) - y_i), where rho is Huber's function of width delta (Huber
1964), or half the square for delta = inf. f is a log-sum-exp of linear terms, so that gradient and
Hessian are exact and cheap. Shapes: S starts or draws, R rows, P coordinates, K terms.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from lmscale_jax.scaling.laws import Problem

# Tables with more rows are solved from starts on so many of them, drawn at random.
SUBSET = 20_000
# Elements of an [S, R] array in one chunk, so that it fits a core's cache.
CHUNK = 40_000
MAX_STEP = 2.0
SLOPES = np.concatenate([np.geomspace(0.02, 2.0, 40), -np.geomspace(0.05, 3.0, 8)])
SPREAD_SLOPES = ((0.2, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.2), (1.0, 1.0), (0.35, 0.35))
MAX_STARTS = 18
# Coefficients that are zero in a start are set to this share of the mean loss: at zero the gradient
# vanishes.
REVIVED_SHARE = 1e-3
SAME_OBJECTIVE = 1e-6
# The first, rough descent: steps, gain, relative difference of equal minima, minima to continue.
ROUGH_STEPS, ROUGH_GAIN, ROUGH_SAME, ROUGH_MINIMA = 40, 1e-7, 1e-5, 3
# Absolute differences of the objective below this are rounding errors.
ROUNDING = 1e-15


@dataclass(frozen=True)
class Solution:
    """The best minimum of one solve, and the other minima that its starts reached.

    Attributes:
        theta: best minimum [P]; `objective` is F there, at width `delta`.
        n_starts: number of starts; `n_agreeing` of them ended within 1e-6 of the best objective.
        minima: distinct end points [M, P], best first; `objectives` [M] is F there.
    """

    theta: np.ndarray
    objective: float
    delta: float
    n_starts: int
    n_agreeing: int
    minima: np.ndarray
    objectives: np.ndarray


def predict_log_loss(problem: Problem, theta_SxP: np.ndarray) -> np.ndarray:
    """Predicts ln L [S, R] at every row."""
    return _terms(problem, np.atleast_2d(theta_SxP), problem.pinned)[0]


def term_shares(problem: Problem, theta_P: np.ndarray) -> np.ndarray:
    """Computes each term's share of the loss [K, R]; the floor, free or pinned, comes first."""
    _, p_KxSxR = _terms(problem, theta_P[None], problem.pinned)
    if problem.pinned is not None:
        return np.concatenate([p_KxSxR[-1:], p_KxSxR[:-1]])[:, 0]
    return p_KxSxR[:, 0]


def log_loss_jacobian(problem: Problem, theta_P: np.ndarray) -> np.ndarray:
    """Computes d f / d theta [R, P]."""
    _, p_KxSxR = _terms(problem, theta_P[None], problem.pinned)
    J_RxP = np.zeros((len(problem.y), problem.size))
    for k, (index, X_Rxq) in enumerate(problem.blocks):
        J_RxP[:, index] += p_KxSxR[k, 0][:, None] * X_Rxq
    return J_RxP


def objective_values(problem: Problem, theta_SxP: np.ndarray, delta: float) -> np.ndarray:
    """Evaluates F [S]."""
    r_SxR = predict_log_loss(problem, theta_SxP) - problem.y
    return (problem.weight * huber(r_SxR, delta)).sum(axis=-1)


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """Evaluates Huber's function: r^2/2 up to delta, delta (|r| - delta/2) beyond."""
    inside = np.abs(r) <= delta
    return np.where(inside, r * r / 2, np.minimum(delta, 1e300) * (np.abs(r) - delta / 2))


def _terms(problem: Problem, theta_SxP, pinned):
    """Computes f [S, R] and each term's share of the loss [K, S, R]; a pinned floor comes last."""
    terms = [theta_SxP[:, index] @ X_Rxq.T for index, X_Rxq in problem.blocks]
    if pinned is not None:
        terms.append(np.broadcast_to(pinned, terms[0].shape))
    t_KxSxR = np.stack(terms)
    top = t_KxSxR.max(axis=0)
    t_KxSxR -= top
    np.exp(t_KxSxR, out=t_KxSxR)
    total = t_KxSxR.sum(axis=0)
    t_KxSxR /= total
    return top + np.log(total), t_KxSxR


class _Objective:
    """F with its gradient and Hessian, for batches of (theta, weight, y)."""

    def __init__(self, problem: Problem, delta: float):
        self.problem, self.delta = problem, delta
        blocks = problem.blocks
        self.products = {
            (k, m): (blocks[k][1][:, :, None] * blocks[m][1][:, None, :]).reshape(
                len(problem.y), -1
            )
            for k in range(len(blocks))
            for m in range(k, len(blocks))
        }

    def evaluate(self, theta_SxP, weight, y, pinned):
        """Returns F [S], gradient [S, P], Hessian [S, P, P] and squared sensitivities [S, P]."""
        f_SxR, p_KxSxR = _terms(self.problem, theta_SxP, pinned)
        r_SxR = f_SxR - y
        inside = np.abs(r_SxR) <= self.delta
        psi = np.clip(r_SxR, -self.delta, self.delta)
        value = (weight * psi * (r_SxR - psi / 2)).sum(axis=1)
        slope = weight * psi
        bend = weight * inside - slope
        size, blocks = self.problem.size, self.problem.blocks
        g_SxP = np.zeros((len(theta_SxP), size))
        H_SxPxP = np.zeros((len(theta_SxP), size, size))
        scale_SxP = np.zeros((len(theta_SxP), size))
        for k, (index, X_Rxq) in enumerate(blocks):
            g_SxP[:, index] += (slope * p_KxSxR[k]) @ X_Rxq
            scale_SxP[:, index] += (weight * p_KxSxR[k] ** 2) @ X_Rxq**2
            weighted = bend * p_KxSxR[k]
            for m in range(k, len(blocks)):
                other = blocks[m][0]
                share = weighted * p_KxSxR[m]
                if m == k:
                    share = share + slope * p_KxSxR[k]
                part = (share @ self.products[k, m]).reshape(-1, len(index), len(other))
                H_SxPxP[:, index[:, None], other] += part
                if m != k:
                    H_SxPxP[:, other[:, None], index] += part.transpose(0, 2, 1)
        return value, g_SxP, H_SxPxP, scale_SxP


def minimise(
    problem: Problem,
    theta_SxP: np.ndarray,
    delta: float,
    weight: np.ndarray | None = None,
    y: np.ndarray | None = None,
    steps: int = 120,
    gain: float = 1e-14,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the local minimum reached from each start: (theta [S, P], F [S]).

    Args:
        weight: [S, R] or [R], replaces the problem's; each bootstrap draw is one weighting.
        y: [S, R] or [R], replaces the problem's.
        steps: maximum number of Newton steps.
        gain: a start stops when the predicted decrease is below this share of F.
    """
    weight = problem.weight if weight is None else weight
    y = problem.y if y is None else y
    theta = np.clip(np.array(theta_SxP, float), problem.low, problem.high)
    F = np.zeros(len(theta))
    function = _Objective(problem, delta)
    size = max(1, CHUNK // len(problem.y))
    for start in range(0, len(theta), size):
        part = slice(start, start + size)
        rows = [a[part] if np.ndim(a) == 2 else a for a in (weight, y, problem.pinned)]
        theta[part], F[part] = _newton(function, theta[part], *rows, steps, gain)
    return theta, F


def _newton(function: _Objective, theta, weight, y, pinned, steps: int, min_gain: float):
    """Runs damped Newton with absolute values of the eigenvalues (Dauphin et al. 2014)."""
    low, high = function.problem.low, function.problem.high
    value, g, H, scale = function.evaluate(theta, weight, y, pinned)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    tiny = 1e-30 * np.sum(weight, axis=-1) * np.ones(len(theta))

    def select(a, rows):
        return a[rows] if np.ndim(a) == 2 else a

    for _ in range(steps):
        move, gain = _step(theta[active], g[active], H[active], scale[active], damping[active],
                           low, high)  # fmt: skip
        moving = gain > min_gain * value[active] + tiny[active]
        active, move = active[moving], move[moving]
        if not len(active):
            break
        trial = np.clip(theta[active] + move, low, high)
        data = (select(a, active) for a in (weight, y, pinned))
        new = function.evaluate(trial, *data)
        better = new[0] < value[active]
        improved = active[better]
        theta[improved] = trial[better]
        for old, new_values in zip((value, g, H, scale), new, strict=True):
            old[improved] = new_values[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 8, 1e-12),
                                   damping[active] * 6)  # fmt: skip
        active = active[better | (damping[active] < 1e10)]
    return theta, value


def _step(theta, g, H, scale, damping, low, high):
    """Computes a Newton step [S, P] in scaled coordinates, and its predicted gain [S]."""
    # Coordinates at a bound with a gradient that points outwards do not move.
    stuck = ((theta <= low) & (g > 0)) | ((theta >= high) & (g < 0))
    g = np.where(stuck, 0.0, g)
    H = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, H)
    d = 1 / np.sqrt(np.maximum(scale, 1e-14 * scale.max(axis=1, keepdims=True) + 1e-300))
    values, vectors = np.linalg.eigh(H * d[:, :, None] * d[:, None, :])
    along = np.einsum("spq,sp->sq", vectors, g * d)
    curve = np.abs(values) + damping[:, None]
    step = -d * np.einsum("spq,sq->sp", vectors, along / curve)
    shrink = np.minimum(1.0, MAX_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))
    return step * shrink[:, None], -(g * step).sum(axis=1) * shrink / 2


def projection_starts(problem: Problem) -> np.ndarray:
    """Computes starting points [S, P] by variable projection (Golub & Pereyra 1973).

    At fixed slopes the law is linear in its non-negative coefficients. Least squares with weights
    1/L approximates the problem in ln L. It is solved exactly on a grid of slopes by enumerating
    the sets of non-zero coefficients. The starts are the grid's local minima and spread points.
    """
    columns, slopes = _grid_columns(problem)
    relative = np.ones(len(problem.y))
    if problem.pinned is not None:
        relative = 1 - np.exp(problem.pinned - problem.y)
    scaled = [c * np.exp(-problem.y) for c in columns]
    ssr, coefficients = _nonnegative(scaled, relative, problem.weight)
    picked = _pick_best(ssr, slopes)
    floor = np.log(REVIVED_SHARE) + problem.y.mean()
    thetas = []
    for cell in picked:
        values = np.log(np.maximum([c[cell] for c in coefficients], np.exp(floor)))
        theta = [values[0]] if problem.law.floor == "free" else []
        for axis, value in enumerate(values[len(theta) :]):
            theta += [value, slopes[cell[axis]]]
        thetas.append(theta)
    return np.unique(np.array(thetas), axis=0)


def _grid_columns(problem: Problem):
    """Builds columns [g1, g2, R] of the linear problem (size 1 where constant), and the slopes."""
    rows = len(problem.y)
    terms = [X_Rxq[:, 1] for _, X_Rxq in problem.blocks if X_Rxq.shape[1] > 1]
    columns = [np.ones((1, 1, rows))] if problem.law.floor == "free" else []
    for axis, x in enumerate(terms):
        with np.errstate(over="ignore"):
            grid = np.exp(np.clip(SLOPES[:, None] * x, -50, 50))
        columns.append(grid[:, None] if axis == 0 else grid[None])
    return columns, SLOPES


def _nonnegative(columns, target, weight):
    """Solves non-negative least squares on every cell: SSR [g1, g2] and an array for each column.

    Enumerates the non-empty subsets of the columns, seven for three.
    """

    def inner(a, b):
        if a.shape[0] > 1 and a.shape[1] == 1 and b.shape[0] == 1 and b.shape[1] > 1:
            return (a[:, 0] * weight) @ b[0].T
        return (a * b) @ weight

    count = len(columns)
    gram = {(i, j): inner(columns[i], columns[j]) for i in range(count) for j in range(i, count)}
    right = [(c * target) @ weight for c in columns]
    shape = np.broadcast_shapes(*(c.shape[:2] for c in columns))
    best = np.full(shape, np.inf)
    coefficients = [np.zeros(shape) for _ in columns]
    for subset in range(1, 2**count):
        index = [i for i in range(count) if subset >> i & 1]
        solved = _solve_newton([[gram[min(i, j), max(i, j)] for j in index] for i in index],
                        [right[i] for i in index])  # fmt: skip
        with np.errstate(invalid="ignore"):
            explained = sum(x * right[i] for x, i in zip(solved, index, strict=True))
        ssr = (target**2) @ weight - explained
        valid = np.all([np.broadcast_to(x >= 0, shape) for x in solved], axis=0)
        better = valid & np.isfinite(ssr) & (ssr < best)
        best = np.where(better, ssr, best)
        for i in range(count):
            value = solved[index.index(i)] if i in index else 0.0
            coefficients[i] = np.where(better, value, coefficients[i])
    return best, coefficients


def _solve_newton(matrix, right):
    """Solves up to three equations by Gaussian elimination, elementwise over grids."""
    matrix, right = [list(row) for row in matrix], list(right)
    count = len(right)
    with np.errstate(all="ignore"):
        for i in range(count):
            for j in range(i + 1, count):
                factor = matrix[j][i] / matrix[i][i]
                matrix[j] = [a - factor * b for a, b in zip(matrix[j], matrix[i], strict=True)]
                right[j] = right[j] - factor * right[i]
        solved = [None] * count
        for i in reversed(range(count)):
            substituted = sum(matrix[i][j] * solved[j] for j in range(i + 1, count))
            solved[i] = (right[i] - substituted) / matrix[i][i]
    return solved


def _pick_best(ssr: np.ndarray, slopes: np.ndarray) -> list[tuple]:
    """Picks the cells of the grid's local minima, best first, and of some spread slopes."""
    padded = np.pad(ssr, 1, constant_values=np.inf)
    lowest = np.ones(ssr.shape, bool)
    for i in range(3):
        for j in range(3):
            near = padded[i : i + ssr.shape[0], j : j + ssr.shape[1]]
            lowest &= ssr <= near
    lowest &= np.isfinite(ssr)
    cells = sorted(zip(*np.nonzero(lowest), strict=True), key=lambda cell: ssr[cell])
    cells = cells[: MAX_STARTS - len(SPREAD_SLOPES)]
    for pair in SPREAD_SLOPES:
        nearest = [int(np.abs(slopes - s).argmin()) for s in pair]
        cells.append(tuple(min(i, n - 1) for i, n in zip(nearest, ssr.shape, strict=True)))
    return cells


def solve_many_starts(
    problem: Problem, delta: float, theta_SxP: np.ndarray | None = None
) -> Solution:
    """Finds the best minimum over all starts at one delta.

    Least squares comes first, then delta falls by factors of 10: a narrow Huber loss has many flat
    stretches, and is minimised from nearby. Of large tables the starts go to the minima of a random
    subset, from which all rows are fitted.
    """
    if theta_SxP is None and len(problem.y) > SUBSET:
        rng = np.random.Generator(np.random.PCG64(0))
        rows = np.sort(rng.choice(len(problem.y), SUBSET, replace=False))
        return continue_from(problem, solve_many_starts(problem.take(rows), delta), delta)
    theta = projection_starts(problem) if theta_SxP is None else np.atleast_2d(theta_SxP)
    total = len(theta)
    counts = np.ones(total)
    # A rough descent merges most starts; only distinct minima continue. Finishing the starts that
    # are far behind leads to the same minima and takes three times as many steps.
    theta, F = minimise(problem, theta, delta_path(delta)[0], steps=ROUGH_STEPS, gain=ROUGH_GAIN)
    theta, _, counts = _distinct(theta, F, counts, ROUGH_SAME)
    theta, counts = theta[:ROUGH_MINIMA], counts[:ROUGH_MINIMA]
    for width in delta_path(delta):
        theta, F = minimise(problem, theta, width)
        theta, F, counts = _distinct(theta, F, counts, SAME_OBJECTIVE)
    return Solution(theta[0], float(F[0]), delta, total, int(counts[0]), theta, F)


def continue_from(problem: Problem, other: Solution, delta: float) -> Solution:
    """Solves from the minima of a wider fit or of fewer rows, and rescales its start counts."""
    solution = solve_many_starts(problem, delta, other.minima)
    n_agreeing = other.n_agreeing
    if solution.n_starts > 1:
        n_agreeing = round(solution.n_agreeing * (other.n_starts / solution.n_starts))
    return dataclasses.replace(solution, n_starts=other.n_starts, n_agreeing=n_agreeing)


def delta_path(delta: float) -> list[float]:
    """Lists the decreasing widths from least squares to delta."""
    if not np.isfinite(delta):
        return [np.inf]
    wide = [w for w in (1e-2, 1e-3, 1e-4, 1e-5) if w > 2 * delta]
    return [np.inf, *wide, delta]


def _distinct(theta, F, counts, same: float):
    """Merges minima whose objectives differ by less than `same`: best first, with counts."""
    order = np.argsort(F)
    distinct: list[int] = []
    n_ends = []
    for i in order:
        if distinct and F[i] - F[distinct[-1]] <= same * F[order[0]] + ROUNDING:
            n_ends[-1] += counts[i]
        else:
            distinct.append(i)
            n_ends.append(counts[i])
    return theta[distinct], F[distinct], np.array(n_ends)
