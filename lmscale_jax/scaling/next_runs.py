"""Plans runs: the compute optimum of a budget, and the runs that reduce a forecast's variance."""

import dataclasses

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import laws, solve
from lmscale_jax.scaling.fit import FitResult
from lmscale_jax.scaling.forecast import NEAR
from lmscale_jax.scaling.intervals import percentiles
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import Table

MOST_RUNS = 200


def plan_optimum(result: FitResult, budget: float, level: float | None = None) -> dict:
    """Computes the parameters and tokens that minimise the loss for a budget of FLOPs.

    n* = G (C/k)^a and d* = (C/k) / n*, where C = k n d and k is the table's median of c / (n d)
    (Hoffmann et al. 2022, eq. 4). Intervals come from the fit's bootstrap draws.

    Raises:
        InputError: the law is not a law in n and d, or an exponent has the wrong sign.
    """
    if "alpha" not in result.params:
        raise InputError(
            f"--budget={budget:g} does not apply to --law={result.law.name}; use --law=chinchilla"
        )
    if not (budget > 0 and np.isfinite(budget)):
        raise InputError(f"--budget={budget} must be positive FLOPs; use 1e18")
    if min(result.params["alpha"], result.params["beta"]) <= 0:
        raise InputError(
            f"--budget={budget:g} has no optimum: alpha {result.params['alpha']:.3g} and beta "
            f"{result.params['beta']:.3g} must both be positive; see the fit's warnings"
        )
    table = result.table
    k = table.flops_factor
    optimum = _optimum(result.params, budget / k)
    level = result.level if level is None else level
    spans = {}
    if result.draws is not None:
        drawn = laws.natural_parameters(
            result.law, result.problem.centre, result.draws.theta, result.floor
        )
        with np.errstate(all="ignore"):
            spans = {x: percentiles(v, level) for x, v in _optimum(drawn, budget / k).items()}
    beyond = budget / table.c.max()
    return plain({"c": budget, **optimum, "intervals": spans, "level": level,
                  "times_largest_c": beyond, "flops_per_parameter_token": k})  # fmt: skip


def _optimum(params: dict, product) -> dict:
    """Describes the run that minimises the loss where n d equals `product`."""
    n, d = laws.compute_optimum(params, product)
    loss = params["E"] + params["A"] / n ** params["alpha"] + params["B"] / d ** params["beta"]
    return {"n": n, "d": d, "tokens_per_parameter": d / n, "loss": loss}


def rank_next_runs(
    result: FitResult,
    budget: float,
    n: float | None = None,
    d: float | None = None,
    c: float | None = None,
    cells=None,
    tau: float = 0.0,
) -> dict:
    """Ranks candidate runs by the variance they remove from a forecast (c-optimal design).

    Args:
        budget: FLOPs to spend on new runs.
        n, d, c: the forecast's target, as far as the law needs it.
        cells: candidates, a sequence of (n, d). None: a grid by factors of 2 from the table's
            smallest values to 4 times its largest, restricted to runs within the budget.
        tau: discrepancy of the forecast, which runs closer to the target reduce as well.

    Returns:
        `sd_before` and `sd_after` of ln L at the target; `ranking` of cells by one run's reduction
        of the variance, also per FLOP; `allocation` of runs to cells within the budget.

    Raises:
        InputError: the target is incomplete, or no cell is within the budget.
    """
    if not (budget > 0 and np.isfinite(budget)):
        raise InputError(f"--advise={budget} must be positive FLOPs; use 1e18")
    table = result.table
    target, target_c = _sensitivity(result, n, d, c)
    cells = _grid(table) if cells is None else np.asarray(cells, float).reshape(-1, 2)
    costs = table.flops(cells[:, 0], cells[:, 1])
    cells, costs = cells[costs <= budget], costs[costs <= budget]
    if not len(cells):
        raise InputError(f"--advise={budget:g} pays for no cell; use {table.c.min():.2g}")
    variance, covariance = _covariance(result)
    X = np.stack([_sensitivity(result, *cell, cost)[0]
                  for cell, cost in zip(cells, costs, strict=True)])  # fmt: skip
    reach = (tau, target_c, float(table.c.max()))
    before = _uncertainty(covariance, target, reach)
    single = _after_one(covariance, X, target, variance, costs, reach)
    order = np.argsort(single)
    gain = 1 - single / before
    ranking = [
        {"n": cells[i, 0], "d": cells[i, 1], "c": costs[i], "sd_after": np.sqrt(single[i]),
         "reduction": gain[i], "reduction_per_flop": gain[i] / costs[i]}
        for i in order
    ]  # fmt: skip
    design = (covariance, X, target, variance, costs, budget, reach)
    plans = [_greedy(*design, power) for power in (0.0, 1.0)]
    runs, after = min(plans, key=lambda p: p[1])
    allocation = [
        {"n": cells[i, 0], "d": cells[i, 1], "runs": int(runs[i]), "c": costs[i] * runs[i]}
        for i in np.flatnonzero(runs)
    ]
    return plain({"target": {"n": n, "d": d, "c": target_c}, "sd_before": np.sqrt(before),
                  "sd_after": np.sqrt(after), "ranking": ranking, "allocation": allocation,
                  "spent": float((costs * runs).sum())})  # fmt: skip


def _covariance(result: FitResult) -> tuple[float, np.ndarray]:
    """Linearises the fit: (variance of one run's ln L, covariance of theta [P, P])."""
    problem = result.problem
    J_RxP = solve.log_loss_jacobian(problem, result.solution.theta)
    J_RxP = J_RxP * np.sqrt(problem.weight)[:, None]
    r = result.residuals()
    variance = max(float((r**2).sum()) / max(len(r) - problem.size, 1), 1e-12)
    return variance, variance * np.linalg.pinv(J_RxP.T @ J_RxP, rcond=1e-14)


def _sensitivity(result: FitResult, n, d, c) -> tuple[np.ndarray, float]:
    """Computes (d ln L / d theta [P], FLOPs) of one run."""
    if c is None and n is not None and d is not None:
        c = result.table.flops(n, d)
    target = {"n": n, "d": d, "c": c}
    missing = [k for k in result.law.columns if target[k] is None]
    if missing:
        raise InputError(
            f"--law={result.law.name} needs a target's {', '.join(result.law.columns)}; "
            f"--forecast_{missing[0]} is missing"
        )
    blocks = [(i, X) for i, X in result.problem.blocks if X.shape[1] == 1]
    rows = [(i, np.ones((1, 1))) for i, _ in blocks]
    slopes = [i for i, X in result.problem.blocks if X.shape[1] == 2]
    for index, column in zip(slopes, result.law.columns, strict=True):
        x = np.log(target[column]) - result.problem.centre[column]
        rows.append((index, np.array([[1.0, -x]])))
    one_row = {"y": np.zeros(1), "weight": np.ones(1), "blocks": tuple(rows)}
    problem = dataclasses.replace(result.problem, **one_row)
    return solve.log_loss_jacobian(problem, result.solution.theta)[0], float(c)


def _grid(table: Table) -> np.ndarray:
    """Lists candidate (n, d) by factors of 2 up to 4 times the table's largest values."""
    n, d = table.column("n"), table.column("d")
    sizes = n.min() * 2.0 ** np.arange(int(np.log2(4 * n.max() / n.min())) + 1)
    tokens = d.min() * 2.0 ** np.arange(int(np.log2(4 * d.max() / d.min())) + 1)
    return np.array([(a, b) for a in sizes for b in tokens])


def _uncertainty(covariance, target, reach) -> float:
    """Computes the variance of ln L at the target; `reach` is (tau, target C, largest C)."""
    tau, target_c, largest = reach
    h = max(np.log(target_c / largest), 0.0)
    return float(target @ covariance @ target + (tau * (h + NEAR)) ** 2)


def _after_one(covariance, X, target, variance, costs, reach) -> np.ndarray:
    """Computes the variance at the target after one more run of each cell (rank-one update)."""
    tau, target_c, largest = reach
    covariances = X @ covariance @ target
    leverage = np.einsum("cp,pq,cq->c", X, covariance, X)
    h = np.maximum(np.log(target_c / np.maximum(largest, costs)), 0.0)
    reduction = covariances**2 / (variance + leverage)
    return target @ covariance @ target - reduction + (tau * (h + NEAR)) ** 2


def _greedy(covariance, X, target, variance, costs, budget, reach, power: float):
    """Adds the run with the largest gain per FLOP^power, repeatedly: (runs of cells, variance)."""
    covariance, remaining = covariance.copy(), budget
    runs = np.zeros(len(costs))
    tau, target_c, largest = reach
    current = _uncertainty(covariance, target, reach)
    for _ in range(MOST_RUNS):
        affordable = costs <= remaining
        if not affordable.any():
            break
        after = _after_one(covariance, X, target, variance, costs, (tau, target_c, largest))
        worth = np.where(affordable, (current - after) / costs**power, -np.inf)
        i = int(worth.argmax())
        if worth[i] <= 0:
            break
        v = covariance @ X[i]
        covariance -= np.outer(v, v) / (variance + X[i] @ v)
        runs[i] += 1
        remaining -= costs[i]
        largest = max(largest, costs[i])
        current = _uncertainty(covariance, target, (tau, target_c, largest))
    return runs, current
