"""Forecasts the loss of an untrained run, with an interval that includes the error of the law.

var(ln L) = s_boot^2 + s_res^2 + tau^2 (h + 0.1)^2: the uncertainty of the fit, the scatter of runs,
and a discrepancy that grows with h = ln(C / largest C fitted). tau is estimated from the same
table: its cheaper runs are fitted and the others predicted.
"""

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import laws, solve
from lmscale_jax.scaling.fit import FitResult, fit_law
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import Table, as_table, fit_warning

CUTS = (0.4, 0.5, 0.6, 0.7, 0.8)
NEAR = 0.1
# tau of tables that are too small to estimate it: about the median of the reference tables
# (docs/fits.md).
USUAL_TAU = 0.01


def forecast_loss(
    table,
    n: float | None = None,
    d: float | None = None,
    c: float | None = None,
    law: str = "auto",
    level: float = 0.9,
    **settings,
) -> dict:
    """Predicts the loss of one run.

    Args:
        table: see `as_table`; all its rows are fitted, so pass one arm.
        n, d, c: parameters, tokens and FLOPs of the run, as far as the law needs them; a missing c
            is n d times the table's median of c / (n d).
        law: as for `fit_law`, or "auto" (`richest_law`).
        level: probability that the interval should cover the run's loss.
        settings: further arguments of `fit_law`.

    Returns:
        `loss`, `low`, `high` in nats/token, `level`, `law`, `parts` (standard deviations of ln L),
        `tau`, `log_distance` (h), `params`, `n_points`, `warnings`.

    Raises:
        InputError: n, d or c is missing for the law, or the table cannot be fitted.
    """
    table = as_table(table)
    chosen = richest_law(table) if law == "auto" else law
    return forecast_from_fit(fit_law(table, law=chosen, **settings), n=n, d=d, c=c, level=level)


def richest_law(table: Table) -> str:
    """Selects the richest law that the table can identify.

    Returns:
        "chinchilla", "power_floor" or "power".
    """
    if table.n is not None and table.d is not None and len(table) >= 9:
        n, d = np.log(table.n), np.log(table.d)
        wide = min(np.ptp(n), np.ptp(d)) > np.log(4)
        if wide and abs(np.corrcoef(n, d)[0, 1]) < 0.95:
            return "chinchilla"
    return "power_floor" if len(distinct_budgets(table)) >= 5 else "power"


def distinct_budgets(table: Table) -> np.ndarray:
    """Lists the distinct ln c; values within 2 % count once."""
    x = np.sort(np.log(table.c))
    return x[np.concatenate([[True], np.diff(x) > 0.02])]


def forecast_from_fit(
    result: FitResult, n=None, d=None, c=None, level: float = 0.9, tau_and_cuts=None
) -> dict:
    """Forecasts from a fitted law; see `forecast_loss`.

    `tau_and_cuts` is the result of `law_discrepancy`, to share it between forecasts of one fit.
    """
    if not 0 < level < 1:
        raise InputError(f"--forecast_level={level} must be between 0 and 1; use 0.9")
    for name, value in (("n", n), ("d", d), ("c", c)):
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise InputError(f"--forecast_{name}={value} must be a positive number; use 1e9")
    table = result.table
    if c is None and n is not None and d is not None:
        c = table.flops(n, d)
    if c is None or ("n" in result.law.columns and (n is None or d is None)):
        raise InputError(
            f"--law={result.law.name} forecasts from {', '.join(result.law.columns)}; use "
            + ("--forecast_n and --forecast_d" if "n" in result.law.columns else "--forecast_c")
        )
    centre = float(np.log(result.predict(n=n, d=d, c=c)))
    h = float(np.log(c / table.c.max()))
    tau, cuts = law_discrepancy(result) if tau_and_cuts is None else tau_and_cuts
    warnings = list(result.warnings) + _forecast_warnings(result, n, h, cuts)
    tau = USUAL_TAU if tau is None else tau
    r = result.residuals()
    spare = max(len(r) - result.problem.size, 1)
    parts = {
        "fit": _draw_spread(result, n, d, c),
        "residual": float(np.sqrt((r**2).sum() / spare)),
        "discrepancy": tau * (max(h, 0.0) + NEAR),
    }
    half = _interpolated_quantile(level, result) * float(
        np.sqrt(sum(v * v for v in parts.values()))
    )
    return plain(
        {
            "loss": np.exp(centre),
            "low": np.exp(centre - half),
            "high": np.exp(centre + half),
            "level": level,
            "n": n,
            "d": d,
            "c": c,
            "law": result.law.name,
            "params": result.params,
            "n_points": len(table),
            "parts": parts,
            "tau": tau,
            "log_distance": h,
            "warnings": warnings,
        }
    )


def _draw_spread(result: FitResult, n, d, c) -> float:
    """Computes half the central 68 % of drawn ln L; 0 if the law passes through every point."""
    if result.draws is None and len(result.table) <= result.problem.size:
        return 0.0
    drawn = np.log(result.predict_draws(n=n, d=d, c=c))
    low, high = np.nanpercentile(drawn, [15.87, 84.13])
    return float(high - low) / 2


def _interpolated_quantile(level: float, result: FitResult) -> float:
    """Returns Student's t quantile for the fit's residual degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, max(len(result.table) - result.problem.size, 2)))


def law_discrepancy(result: FitResult) -> tuple[float | None, int]:
    """Estimates tau, the growth of extrapolation errors per nat of C: (tau, number of cuts).

    tau is the root mean square over cuts of max(error^2 - s_res^2, 0) / (h + 0.1)^2; None if no cut
    leaves enough runs for the law.
    """
    table, law = result.table, result.law
    problem = laws.fit_problem(table, law, result.floor, result.r_star)
    x, distinct = np.log(table.c), distinct_budgets(table)
    excess = []
    limits = {distinct[min(int(len(distinct) * q), len(distinct) - 2)] for q in CUTS
              if len(distinct) > 1}  # fmt: skip
    for limit in sorted(limits):
        train, test = x <= limit + 0.02, x > limit + 0.02
        if train.sum() < len(law.coordinates) or not test.any():
            continue
        if len(distinct_budgets(table.take(train))) < len(law.coordinates):
            continue
        cheaper = problem.take(train)
        theta = solve.solve_many_starts(cheaper, result.delta).theta
        r = solve.predict_log_loss(cheaper, theta)[0] - cheaper.y
        error = (solve.predict_log_loss(problem, theta)[0] - problem.y)[test]
        s2 = (r**2).sum() / max(train.sum() - len(law.coordinates), 1)
        h = x[test] - x[train].max()
        excess.append(float(np.mean(np.maximum(error**2 - s2, 0) / (h + NEAR) ** 2)))
    return (float(np.sqrt(np.mean(excess))), len(excess)) if excess else (None, 0)


def _forecast_warnings(result: FitResult, n, h: float, cuts: int) -> list[dict]:
    """Warns about an assumed tau and about targets far from the fitted runs."""
    warnings = []
    if not cuts:
        warnings.append(
            fit_warning(
                "no_inner_cuts",
                f"{len(distinct_budgets(result.table))} compute budgets are too few to hold some "
                f"out, so the error of the law is assumed to be {USUAL_TAU:g} per factor e of "
                "compute, about the median of the reference tables; add budgets",
            )
        )
    if h > np.log(30):
        warnings.append(
            fit_warning(
                "far_forecast",
                f"the target has {np.exp(h):.3g} times the compute of the largest run fitted; "
                "intervals were validated up to about 30 times; train a size in between",
            )
        )
    table = result.table
    if n is not None and table.n is not None and h <= 0 and n > table.n.max() * 4:
        warnings.append(
            fit_warning(
                "outside_range",
                f"n is {n / table.n.max():.3g} times the largest fitted, at no larger compute: the "
                "interval grows with compute only; add a run of that size",
            )
        )
    return warnings
