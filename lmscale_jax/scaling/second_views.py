"""Alternative comparisons of two arms: the shift at pinned floors, and nested joint laws."""

from dataclasses import replace

import numpy as np

from lmscale_jax.scaling import laws, shift, solve
from lmscale_jax.scaling.laws import Law, Problem
from lmscale_jax.scaling.shift import ShiftEstimate, TwoArms
from lmscale_jax.scaling.table import Table

FLOORS = 12


def shifts_at_floors(data: TwoArms, level: float) -> list[dict] | None:
    """Estimates the shift with a power law above each floor E that the data do not reject.

    Returns:
        Rows of E, s, se and k at the lowest, middle and highest compute, which show how much the
        result depends on the unidentified floor. None with too few runs for a floor.
    """
    sweep = _sweep_floors(data, level)
    if sweep is None:
        return None
    E, theta, se, compatible = sweep
    x = np.array([data.x.min(), 0.0, data.x.max()])
    rows = []
    for i in np.flatnonzero(compatible):
        k = np.exp(theta[i, -2] + theta[i, -1] * x)
        rows.append({"E": float(E[i]), "s": float(theta[i, -1]), "se": float(se[i]),
                     "k": [float(v) for v in k]})  # fmt: skip
    return rows


def check_floors(data: TwoArms, main: ShiftEstimate, level: float) -> dict | None:
    """Checks that s keeps its sign at every floor that the data do not reject."""
    sweep = _sweep_floors(data, level)
    if sweep is None:
        return None
    E, theta, se, compatible = sweep
    s = theta[compatible, -1]
    worst = int(np.argmin(s * np.sign(main.s)))
    return {
        "check": f"floors from {E[compatible].min():.3g} to {E[compatible].max():.3g}",
        "s": float(s[worst]),
        "se": float(se[compatible][worst]),
        "p": None,
        "holds": bool((s * main.s > 0).all()),
    }


def _sweep_floors(data: TwoArms, level: float):
    """Fits pinned floors: (E [G], theta [G, P], se of s [G], mask of compatible floors [G]).

    A coarse grid covers all floors below the smallest loss; a finer one the compatible range.
    """
    if len(data) <= 5 or shift.arm_budgets(data) < 3 or shift.is_off_curve(data):
        return None
    E = np.linspace(0.0, 0.98, FLOORS) * np.exp(data.y.min())
    compatible = np.flatnonzero(_fit_floors(data, E, level)[-1])
    low, high = E[max(compatible[0] - 1, 0)], E[min(compatible[-1] + 1, FLOORS - 1)]
    E = np.linspace(low, high, FLOORS)
    return E, *_fit_floors(data, E, level)


def _fit_floors(data: TwoArms, E: np.ndarray, level: float):
    """Fits each floor: (theta [G, 4] of ln a, b, tau, s; se of s [G]; mask not rejected [G])."""
    from scipy.stats import f as f_distribution

    ln_E = np.log(np.maximum(E, 1e-12))[:, None]
    tau = shift.start_point("quadratic", data)[-2]
    moved = data.x + data.z * tau
    starts = []
    for floor in E:
        slope, height = np.polyfit(moved, np.log(np.exp(data.y) - floor), 1)
        starts.append([height, max(-slope, 1e-3), tau, 0.0])
    theta, ssr = shift.levenberg_marquardt("floor", np.array(starts), data, floor=ln_E)
    degrees = len(data) - 4
    limit = ssr.min() * (1 + f_distribution.ppf(level, 1, degrees) / degrees)
    _, J = shift.curve_jacobian("floor", theta, data, ln_E)
    X = J * np.sqrt(data.weight)[:, None]
    inverse = np.linalg.pinv(np.einsum("brp,brq->bpq", X, X))
    se = np.sqrt(np.maximum(inverse[:, -1, -1] * ssr / degrees, 0))
    return theta, se, ssr <= limit


def nested_laws(table: Table, first: str, second: str) -> dict | None:
    """Compares four joint laws of both arms by AICc and by the error at the largest size held out.

    `same`: one law; `offsets`: coefficients differ between the arms; `exponents`: coefficients and
    exponents differ; `separate`: the floors differ too. The law is in n and d if they vary
    independently, otherwise in c. None with too few runs.
    """
    both = table.take((table.variant == first) | (table.variant == second))
    z = (both.variant == second).astype(float)
    law = _joint_law(both)
    base = laws.fit_problem(both, law)
    models = {k: _joint(base, z, k) for k in ("same", "offsets", "exponents", "separate")}
    if len(both) <= models["separate"].size + 1:
        return None
    size = np.log(both.n if both.n is not None else both.c)
    held_out = size > size.max() - 0.05
    rows = {}
    base_theta = solve.solve_many_starts(base, np.inf).theta
    for name, problem in models.items():
        _, ssr = _least(problem, base_theta)
        count, k = len(both), problem.size + 1
        rows[name] = {
            "parameters": problem.size,
            "aicc": count * np.log(ssr / count) + 2 * k + 2 * k * (k + 1) / max(count - k - 1, 1),
            "largest_left_out_rms": _left_out(problem, base_theta, held_out),
        }
    errors = {k: v["largest_left_out_rms"] for k, v in rows.items()}
    scored = {k: v for k, v in errors.items() if v is not None}
    return {
        "law": law.name,
        "models": rows,
        "best_by_aicc": min(rows, key=lambda k: rows[k]["aicc"]),
        "best_by_left_out": min(scored, key=lambda k: scored[k]) if scored else None,
    }


def _joint_law(both: Table) -> Law:
    """Selects the law in n and d if they vary independently, otherwise the law in c."""
    if both.n is not None and both.d is not None and len(both) >= 14:
        n, d = np.log(both.n), np.log(both.d)
        if np.ptp(n) > 0 and np.ptp(d) > 0 and abs(np.corrcoef(n, d)[0, 1]) < 0.95:
            return laws.LAWS["chinchilla"]
    return laws.LAWS["power_floor"]


def _joint(base: Problem, z: np.ndarray, model: str) -> Problem:
    """Appends contrasts of the second arm to the coordinates of the base problem."""
    blocks, low, high = [], list(base.low), list(base.high)

    def add(limit: float) -> int:
        low.append(-limit)
        high.append(limit)
        return len(low) - 1

    for i, (index, X_Rxq) in enumerate(base.blocks):
        columns, extra = [X_Rxq], []
        if i == 0 and model == "separate":
            extra.append(add(5.0))
            columns.append(z[:, None])
        if i > 0 and model != "same":
            extra.append(add(5.0))
            columns.append(z[:, None])
        if i > 0 and model in ("exponents", "separate"):
            extra.append(add(5.0))
            columns.append((X_Rxq[:, 1] * z)[:, None])
        merged = np.concatenate([index, np.array(extra, int)])
        blocks.append((merged, np.concatenate(columns, axis=1)))
    return replace(base, blocks=tuple(blocks), low=np.array(low), high=np.array(high))


def _least(problem: Problem, base_theta: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimises the sum of squares, starting without contrasts: (theta, SSR)."""
    start = np.concatenate([base_theta, np.zeros(problem.size - len(base_theta))])
    theta, F = solve.minimise(problem, start[None], np.inf)
    return theta[0], 2 * float(F[0])


def _left_out(problem: Problem, base_theta: np.ndarray, held_out: np.ndarray) -> float | None:
    """Computes the RMS error at the held-out rows of a fit to the others; None with too few."""
    train = problem.take(~held_out)
    if (~held_out).sum() <= problem.size:
        return None
    theta, _ = _least(train, base_theta)
    r = solve.predict_log_loss(problem, theta)[0][held_out] - problem.y[held_out]
    return float(np.sqrt((r**2).mean()))
