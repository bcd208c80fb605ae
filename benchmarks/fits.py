"""Compares scaling-law fits with common practice, on the same machine in the same run:

    python -m benchmarks.fits --input=kyo_takano

Common practice is scipy's L-BFGS-B with finite differences from a grid of 4,500 starts (Hoffmann et
al. 2022; Besiroglu et al. 2024) and one such descent for each bootstrap draw. Both sides minimise
Huber's loss (1e-3) of ln residuals of the law in n and d, and draw the same resamples.
"""

import itertools
import os
import time

import numpy as np
from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli

INPUT = flags.DEFINE_string("input", "kyo_takano", "bundled table, or a CSV with n, d or c, loss")
STARTS = flags.DEFINE_integer("starts", 4500, "starts of the peer's grid, spread evenly if fewer")
DRAWS = flags.DEFINE_integer("draws", 4000, "bootstrap draws, ours")
PEER_DRAWS = flags.DEFINE_integer("peer_draws", 4000, "bootstrap draws, peer")
REPEATS = flags.DEFINE_integer("repeats", 20, "repeats of our point fit; the median is reported")
DELTA = 1e-3
GRID = {
    "a": np.arange(0, 30, 5.0),
    "b": np.arange(0, 30, 5.0),
    "e": np.arange(-1, 1.5, 0.5),
    "alpha": np.arange(0, 2.5, 0.5),
    "beta": np.arange(0, 2.5, 0.5),
}


def peer_objective(theta, ln_n, ln_d, y, weight) -> float:
    """Evaluates Huber's loss of one parameter vector."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * ln_n, b - beta * ln_d, np.full_like(y, e)])
    top = terms.max(axis=0)
    r = np.abs(top + np.log(np.exp(terms - top).sum(axis=0)) - y)
    return float((weight * np.where(r <= DELTA, r * r / 2, DELTA * (r - DELTA / 2))).sum())


def descend(start, *data):
    """Runs L-BFGS-B with finite differences from one start."""
    from scipy.optimize import minimize

    return minimize(peer_objective, start, args=data, method="L-BFGS-B")


def peer(table, weights) -> dict:
    """Fits from the grid, then one descent per draw; each part stops at the time limit."""
    data = (np.log(table.n), np.log(table.d), np.log(table.loss))
    grid = list(itertools.product(*GRID.values()))
    grid = [grid[int(i)] for i in np.linspace(0, len(grid) - 1, min(STARTS.value, len(grid)))]
    # In random order, so that a grid stopped early still covers the whole range.
    np.random.default_rng(0).shuffle(grid)
    ends = []
    start_time = time.perf_counter()
    for start in grid:
        ends.append(descend(start, *data, table.weight))
        if time.perf_counter() - start_time > machine.LIMIT.value:
            break
    fit_s = time.perf_counter() - start_time
    values = np.array([end.fun for end in ends])
    best = ends[int(np.nanargmin(values))]
    drawn = []
    start_time = time.perf_counter()
    for weight in weights[: PEER_DRAWS.value]:
        drawn.append(descend(best.x, *data, weight))
        if time.perf_counter() - start_time > machine.LIMIT.value:
            break
    seconds = time.perf_counter() - start_time
    return {
        "starts": len(ends),
        "fit_s": fit_s,
        "objective": float(best.fun),
        "within_0.1%": float(np.mean(values < best.fun * 1.001)),
        "over_10%": float(np.mean(values > best.fun * 1.1)),
        "draws": len(drawn),
        "draws_s": seconds,
        "drawn": [float(end.fun) for end in drawn],
        "params": best.x.tolist(),
    }


def ours(table, weights) -> dict:
    """Times our point fit, the fit with all checks, and the bootstrap draws."""
    from lmscale_jax.scaling import fit_law, intervals, laws, solve

    problem = laws.fit_problem(table, laws.LAWS["chinchilla"])
    times, full = [], []
    for _ in range(REPEATS.value):
        start_time = time.perf_counter()
        solution = solve.solve_many_starts(problem, DELTA)
        times.append(time.perf_counter() - start_time)
        start_time = time.perf_counter()
        result = fit_law(table, bootstrap=0)
        full.append(time.perf_counter() - start_time)
    start_time = time.perf_counter()
    theta = intervals.refit_draws(problem, solution.theta, DELTA, weight=weights[: DRAWS.value])
    seconds = time.perf_counter() - start_time
    r = solve.predict_log_loss(problem, theta) - problem.y
    drawn = (weights[: DRAWS.value] * solve.huber(r, DELTA)).sum(axis=1)
    return {
        "starts": solution.n_starts,
        "fit_s": float(np.median(times)),
        "fit_and_checks_s": float(np.median(full)),
        "objective": solution.objective,
        "agree": solution.n_agreeing,
        "draws": len(theta),
        "draws_s": seconds,
        "drawn": drawn.tolist(),
        "params": result.alternatives["huber_1e-3"]["params"],
    }


def main() -> None:
    from lmscale_jax.scaling import read_table

    table = read_table(INPUT.value)
    count = max(DRAWS.value, PEER_DRAWS.value)
    rows = len(table)
    rng = np.random.Generator(np.random.PCG64(0))
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), count) * table.weight
    settings = machine.asked("input", "starts", "draws", "peer_draws", "repeats")
    result = machine.facts(None, settings) | {
        "points": rows,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "ours": ours(table, weights),
        "peer": peer(table, weights),
    }
    ours_F, peer_F = (np.array(result[side].pop("drawn")) for side in ("ours", "peer"))
    if count_both := min(len(ours_F), len(peer_F)):
        ratio = peer_F[:count_both] / ours_F[:count_both]
        result["ours"]["worse_draws"] = float(np.mean(ratio < 1 - 1e-6))
        result["peer"]["worse_draws"] = float(np.mean(ratio > 1 + 1e-6))
    print(f"{tables.headline(result)}\n{table.name}, {rows} points\n\n{tables.fits(result)}")
    machine.save("fits", result)


if __name__ == "__main__":
    cli.run_command(main)
