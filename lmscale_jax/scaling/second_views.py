"""Alternative comparisons of two arms: the shift at pinned floors, and nested joint laws."""

from dataclasses import replace

import numpy as np

from lmscale_jax.scaling import diagnostics, laws, pairs, shift, solve
from lmscale_jax.scaling.laws import Law, Problem
from lmscale_jax.scaling.shift import TwoArms
from lmscale_jax.scaling.table import Table

FLOORS = 12
# Shares of the smallest loss at which the floors of a joint law are started too: a joint law
# without a floor cannot leave it for one in one arm.
FLOOR_SHARES = (0.3, 0.6, 0.9)
# Relative decrease of a sum of squares at which a joint law's descent stops, and its longest.
GAIN, STEPS = 1e-6, 60
# Largest |difference| of a coordinate between the arms.
MAX_CONTRAST = 5.0


def shifts_at_floors(data: TwoArms, level: float) -> list[dict] | None:
    """Estimates the shift with a power law above each floor E that the data do not reject.

    A coarse grid covers all floors below the smallest loss; a finer one the compatible range.

    Returns:
        Rows of E, s, se, p and k at the lowest, middle and highest compute, which show how much
        the result depends on the unidentified floor. None with too few cells for a floor, and
        where the floor is pinned.
    """
    if len(data) <= 5 or min(data.budgets()) < 3:
        return None
    if data.ln_floor is not None or shift.is_off_curve(data):
        return None
    E = np.linspace(0.0, 0.98, FLOORS) * np.exp(data.y.min())
    compatible = np.flatnonzero(_fit_floors(data, E, level)[-1])
    low, high = E[max(compatible[0] - 1, 0)], E[min(compatible[-1] + 1, FLOORS - 1)]
    E = np.linspace(low, high, FLOORS)
    theta, se, p, compatible = _fit_floors(data, E, level)
    x = np.array([data.x.min(), 0.0, data.x.max()])
    return [
        {"E": float(E[i]), "s": float(theta[i, -1]), "se": float(se[i]), "p": float(p[i]),
         "k": np.exp(theta[i, -2] + theta[i, -1] * x).tolist()}
        for i in np.flatnonzero(compatible)
    ]  # fmt: skip


def _fit_floors(data: TwoArms, E: np.ndarray, level: float):
    """Fits each floor: (theta [G, 4] of ln a, b, tau, s; se and p of s [G]; not rejected [G])."""
    from scipy.stats import f as f_distribution
    from scipy.stats import t

    ln_E = np.log(np.maximum(E, 1e-12))[:, None]
    tau = shift.start_point("quadratic", data)[-2]
    starts = [[*shift.pinned_shape(data, tau, floor), tau, 0.0] for floor in E]
    theta, ssr = shift.levenberg_marquardt("floor", np.array(starts), data, floor=ln_E)
    spare = len(data) - 4
    limit = ssr.min() * (1 + f_distribution.ppf(level, 1, spare) / spare)
    f, J = shift.curve_jacobian("floor", theta, data, ln_E)
    variance, degrees = pairs.error_variance(data.pairs, data.weight, data.y - f, 4)
    X = J * np.sqrt(data.weight)[:, None]
    inverse = np.linalg.pinv(np.einsum("brp,brq->bpq", X, X))
    se = np.sqrt(np.maximum(inverse[:, -1, -1] * variance, 0))
    p = 2 * t.sf(np.abs(theta[:, -1]) / np.maximum(se, 1e-300), degrees)
    return theta, se, p, ssr <= limit


# Ratio of likelihoods at which one reading of a change with scale is taken for the only one: a
# wrong one reaches it in at most 1 of 20 cases (Royall 1997, section 1.4).
LIKELIHOOD_RATIO = 20.0
MODELS = ("same", "offsets", "exponents", "floors", "separate")


def nested_laws(table: Table, first: str, second: str, floor=None) -> dict | None:
    """Compares joint laws of both arms by AICc and by the error at the largest size held out.

    `same`: one law; `offsets`: coefficients differ between the arms; `exponents`: coefficients and
    exponents differ; `floors`: coefficients and floors; `separate`: all. The law is in n and d if
    they vary independently, otherwise in c.

    Args:
        floor: pins E, nats/token; models whose floors differ are then left out.

    Returns:
        `law`, `models`, `best_by_aicc`, `best_by_left_out` and `reading`, what a change with scale
        is due to: "exponents", "floors", or None where both explain it about as well. None with
        too few cells.
    """
    means = pairs.average_seeds(table.take(np.isin(table.variant, [first, second])))[0]
    z = (means.variant == second).astype(float)
    law = _joint_law(means, floor)
    base = laws.fit_problem(means, law, floor)
    names = [k for k in MODELS if floor is None or k not in ("floors", "separate")]
    problems = {k: _joint(base, z, k) for k in names}
    if len(means) <= problems["exponents"].size + 2:
        return None
    size = np.log(means.n if means.n is not None else means.c)
    held_out = size > size.max() - 0.05
    base_theta = solve.solve_many_starts(base, np.inf).theta
    rows = {}
    for name, problem in problems.items():
        theta, ssr = _least(problem, _floor_starts(problem, base_theta))
        rows[name] = {
            "parameters": problem.size,
            "aicc": shift.corrected_aic(ssr, len(means), problem.size),
            "largest_left_out_rms": _left_out(problem, theta, held_out),
        }
    errors = {k: v["largest_left_out_rms"] for k, v in rows.items()}
    scored = {k: v for k, v in errors.items() if v is not None}
    return {
        "law": law.name,
        "models": rows,
        "best_by_aicc": min(rows, key=lambda k: rows[k]["aicc"]),
        "best_by_left_out": min(scored, key=lambda k: scored[k]) if scored else None,
        "reading": _reading(rows, len(means)),
    }


def _reading(rows: dict, count: int) -> str | None:
    """Names the reading that explains the data better than the other by LIKELIHOOD_RATIO.

    AICc takes the number of cells for that of the residuals' degrees of freedom. The latter is
    used, as few cells make the ratio of sums of squares vary.
    """
    if "floors" not in rows:
        return "exponents"
    best, other = sorted(("exponents", "floors"), key=lambda k: rows[k]["aicc"])
    degrees = count - max(rows[k]["parameters"] for k in (best, other))
    gap = rows[other]["aicc"] - rows[best]["aicc"]
    if not gap * degrees / count >= 2 * np.log(LIKELIHOOD_RATIO):
        return None
    return best if rows["separate"]["aicc"] >= rows[best]["aicc"] else None


def _joint_law(both: Table, floor: float | None) -> Law:
    """Selects the law in n and d if they vary independently, otherwise the law in c."""
    name = "power_floor"
    if both.n is not None and both.d is not None and len(both) >= 14:
        n, d = np.log(both.n), np.log(both.d)
        if (
            np.ptp(n) > 0
            and np.ptp(d) > 0
            and abs(np.corrcoef(n, d)[0, 1]) < diagnostics.MAX_CORRELATION
        ):
            name = "chinchilla"
    return laws.choose_law(name, floor)


def _joint(base: Problem, z: np.ndarray, model: str) -> Problem:
    """Appends contrasts of the second arm to the coordinates of the base problem."""
    blocks, low, high = [], list(base.low), list(base.high)
    for index, X_Rxq in base.blocks:
        # A floor has one column, 1; a term has two, 1 and -ln x.
        constant = ("floors", "separate") if X_Rxq.shape[1] == 1 else MODELS[1:]
        columns = [X_Rxq]
        if model in constant:
            columns.append(z[:, None])
        if X_Rxq.shape[1] > 1 and model in ("exponents", "separate"):
            columns.append((X_Rxq[:, 1] * z)[:, None])
        extra = len(low) + np.arange(len(columns) - 1)
        low += [-MAX_CONTRAST] * len(extra)
        high += [MAX_CONTRAST] * len(extra)
        merged = np.concatenate([index, extra]).astype(int)
        blocks.append((merged, np.concatenate(columns, axis=1)))
    return replace(base, blocks=tuple(blocks), low=np.array(low), high=np.array(high))


def _floor_starts(problem: Problem, base_theta: np.ndarray) -> np.ndarray:
    """Makes starts [S, P] without contrasts: the joint law, and others with larger floors."""
    starts = np.tile(base_theta, (1 + len(FLOOR_SHARES), 1))
    if problem.law.floor == "free":
        starts[1:, 0] = problem.y.min() + np.log(FLOOR_SHARES)
    contrasts = np.zeros((len(starts), problem.size - len(base_theta)))
    return np.concatenate([starts, contrasts], axis=1)


def _least(problem: Problem, starts: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimises the sum of squares from several starts: (theta, SSR)."""
    theta, F = solve.minimise(problem, starts, np.inf, steps=STEPS, gain=GAIN)
    best = int(F.argmin())
    return theta[best], 2 * float(F[best])


def _left_out(problem: Problem, theta: np.ndarray, held_out: np.ndarray) -> float | None:
    """Computes the RMS error at the held-out rows of a fit to the others; None with too few."""
    train = problem.take(~held_out)
    if (~held_out).sum() <= problem.size:
        return None
    theta, _ = _least(train, theta[None])
    r = solve.predict_log_loss(problem, theta)[0][held_out] - problem.y[held_out]
    return float(np.sqrt((r**2).mean()))
