"""Checks of residuals: along runs, against the scatter of seeds, and at the largest size."""

import numpy as np

from lmscale_jax.scaling import solve
from lmscale_jax.scaling.laws import Law, Problem
from lmscale_jax.scaling.table import Table, fit_warning, number_labels

MAX_LAG_CORRELATION = 0.3
# Fewest degrees of freedom within seeds for a test of lack of fit.
MIN_SEED_DEGREES = 3


def check_residuals(problem: Problem, theta_P, table: Table) -> tuple[dict, list[dict]]:
    """Measures the residuals' spread, their correlation along runs, and the lack of fit."""
    r = problem.y - solve.predict_log_loss(problem, theta_P)[0]
    numbers = {
        "rms_log_residual": float(np.sqrt(np.average(r**2, weights=problem.weight))),
        "mad_sigma": float(1.4826 * np.median(np.abs(r - np.median(r)))),
    }
    warnings = []
    lag = neighbour_correlation(r, table.run_id)
    numbers["lag_1_autocorrelation"] = lag
    if lag is not None and lag > MAX_LAG_CORRELATION:
        warnings.append(
            fit_warning(
                "autocorrelated",
                f"residuals along a run have lag-1 correlation {lag:.2f}: the curves do not have "
                "the law's shape; use final points, or omit more of the start with --skip=10",
            )
        )
    lack = lack_of_fit(problem, r, table)
    numbers["lack_of_fit"] = lack
    if lack and lack["p"] < 0.05:
        warnings.append(
            fit_warning(
                "lack_of_fit",
                f"the law misses the means of repeated runs by {lack['rms_lack']:.2g} in ln L, "
                f"more than seeds explain ({lack['rms_seed']:.2g}, p = {lack['p']:.2g}), so that "
                "seeds of one cell are not independent: use --cluster=cell, another law or a "
                "narrower range",
            )
        )
    return numbers, warnings


def _other_law(law: Law) -> str:
    if law.name == "chinchilla":
        return "tune each size, or fit a narrower range"
    return "try --law=chinchilla, or fit a narrower range"


def neighbour_correlation(r: np.ndarray, run_id: np.ndarray) -> float | None:
    """Computes the lag-1 correlation of residuals within runs of at least three rows, or None."""
    number = number_labels(run_id)
    length = np.bincount(number)
    if length.max() < 3:
        return None
    order = np.argsort(number, kind="stable")
    run, r = number[order], r[order]
    neighbours = (run[1:] == run[:-1]) & (length[run[1:]] >= 3)
    first, second = r[:-1][neighbours], r[1:][neighbours]
    norm = np.sqrt((first**2).mean() * (second**2).mean())
    return float((first * second).mean() / max(norm, 1e-300))


def lack_of_fit(problem: Problem, r: np.ndarray, table: Table) -> dict | None:
    """Tests the law against the scatter of runs that differ only in the seed (F test).

    Source: Draper & Smith (1998), section 2.2. None without replicates.
    """
    from scipy.stats import f as f_distribution

    cell = table.cells()
    count = np.bincount(cell)
    means = np.bincount(cell, r) / count
    within = float(((r - means[cell]) ** 2).sum())
    free, lack_free = len(r) - len(count), len(count) - problem.size
    if table.points != "final" or free < MIN_SEED_DEGREES or lack_free < 1 or within <= 0:
        return None
    between = float((count * means**2).sum())
    ratio = (between / lack_free) / (within / free)
    return {
        "f": ratio,
        "p": float(f_distribution.sf(ratio, lack_free, free)),
        "rms_seed": float(np.sqrt(within / free)),
        "rms_lack": float(np.sqrt(between / lack_free)),
        "degrees": [lack_free, free],
    }


def check_largest(problem: Problem, theta_P, delta: float, table: Table):
    """Measures the error in ln L at the largest size by a fit without it.

    Warns where the mean error is significant at 1 % against its own standard error, that of the
    prediction and of the runs, and above 1 %; where the rest of the table leaves two coordinates
    open, the prediction means nothing and nothing is said.
    """
    from scipy.stats import t

    column = "n" if "n" in problem.law.columns else "c"
    x = np.log(table.column(column))
    held_out = x > x.max() - 0.02
    spare = len(x) - int(held_out.sum()) - problem.size
    if spare < 1:
        return {"largest_left_out": None}, []
    train, test = problem.take(~held_out), problem.take(held_out)
    # In a large table the rest has the minima of all.
    start = theta_P if len(x) > solve.SUBSET else None
    theta = solve.solve_many_starts(train, delta, start).theta
    error = solve.predict_log_loss(test, theta)[0] - test.y
    r = solve.predict_log_loss(train, theta)[0] - train.y
    variance = float((r**2).sum() / spare)
    J_RxP = solve.log_loss_jacobian(train, theta)
    length = np.maximum(np.linalg.norm(J_RxP, axis=0), 1e-300)
    inverse = np.linalg.pinv((J_RxP / length).T @ (J_RxP / length), rcond=1e-12)
    mean_J_P = solve.log_loss_jacobian(test, theta).mean(axis=0) / length
    se = float(np.sqrt(variance * (mean_J_P @ inverse @ mean_J_P + 1 / held_out.sum())))
    numbers = {
        "column": column,
        "value": float(np.exp(x.max())),
        "runs": int(held_out.sum()),
        "mean_error": float(error.mean()),
        "standard_error": se,
        "rms_error": float(np.sqrt((error**2).mean())),
    }
    warnings = []
    limit = max(0.01, float(t.ppf(0.995, spare)) * se)
    if abs(numbers["mean_error"]) > limit:
        warnings.append(
            fit_warning(
                "largest_left_out",
                f"a fit without the largest {column} ({np.exp(x.max()):.3g}) misses it by "
                f"{100 * numbers['mean_error']:+.2g} % with a standard error of {100 * se:.2g} %: "
                "the law does not extrapolate; train one more size in between",
            )
        )
    return {"largest_left_out": numbers}, warnings
