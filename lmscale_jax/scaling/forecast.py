"""Forecasts the loss of an untrained run, with an interval that includes the error of the law.

A named law has var(ln L) = s_boot^2 + s_res^2 + tau^2 reach^2: the uncertainty of the fit, the
scatter of runs, and a discrepancy that grows with the distance from the runs fitted (`reach`). tau
is estimated from the same table: its cheaper and its smaller runs are fitted and the others
predicted. Without a named law, runs on one curve in C are forecast by an average over laws
(curve_average.py).
"""

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import curve_average, laws, solve
from lmscale_jax.scaling.fit import FitResult, fit_law
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import Table, as_table, fit_warning

CUTS = (0.4, 0.5, 0.6, 0.7, 0.8)
NEAR, NEAR_EDGE = 0.1, 0.5
# tau of the reference tables, about their median (docs/fits.md); it counts as so many cuts.
USUAL_TAU, USUAL_CUTS = 0.01, 2


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
        law: as for `fit_law`, or "auto": chinchilla where the table identifies it, else an average
            over laws in c (`curve_average`), whose `law` is "averaged".
        level: probability that the interval should cover the run's loss.
        settings: further arguments of `fit_law`.

    Returns:
        `loss`, `low`, `high` in nats/token, `level`, `law`, `parts` (standard deviations of ln L),
        `tau`, `log_distance` (h in ln c), `params`, `n_points`, `warnings`.

    Raises:
        InputError: n, d or c is missing for the law, or the table cannot be fitted.
    """
    table = as_table(table)
    if law == "auto" and richest_law(table) != "chinchilla":
        return forecast_averaged(table, n=n, d=d, c=c, level=level)
    chosen = "chinchilla" if law == "auto" else law
    return forecast_from_fit(fit_law(table, law=chosen, **settings), n=n, d=d, c=c, level=level)


def forecast_averaged(table: Table, n=None, d=None, c=None, level: float = 0.9) -> dict:
    """Forecasts a run from its c alone, averaged over laws; returns as `forecast_loss`.

    `low` and `high` are quantiles, and need not be equally far from `loss`, the median.

    Raises:
        InputError: c is missing, or the table has fewer than two budgets.
    """
    _check_target(n, d, c, level)
    if c is None and n is not None and d is not None:
        c = table.flops(n, d)
    if c is None:
        raise InputError("--law=auto forecasts these runs from c; use --forecast_c")
    budgets = curve_average.average_budgets(np.log(table.c), np.log(table.loss), table.weight)
    if len(budgets.log_c) < 2:
        raise InputError(
            f"{table.name} has {len(budgets.log_c)} compute budget and a forecast needs 2; add "
            f"runs of {4 * table.c.max():.2g} FLOPs"
        )
    h = float(np.log(c / table.c.max()))
    growth, cuts = curve_average.growth_of_error(budgets)
    discrepancy = growth * (max(h, 0.0) + NEAR)
    plain_mixture = curve_average.forecast_curve(budgets, np.log(c))
    mixture = plain_mixture.widened(discrepancy)
    tail = (1 - level) / 2
    low, median, high = mixture.quantiles([tail, 0.5, 1 - tail])
    floors = np.nan_to_num(mixture.share) * table.loss.min()
    between = plain_mixture.variance - plain_mixture.scatter**2
    warnings = [*table.notes, *_forecast_warnings(table, n, h)]
    if len(budgets.log_c) < 5:
        warnings.append(_averaged_warning(mixture, floors, len(budgets.log_c)))
    return plain(
        {
            "loss": np.exp(median),
            "low": np.exp(low),
            "high": np.exp(high),
            "level": level,
            "n": n,
            "d": d,
            "c": c,
            "law": "averaged",
            "params": {"E": float(mixture.probability @ floors)},
            "n_points": len(table),
            "parts": {
                "fit": np.sqrt(max(between, 0.0)),
                "residual": mixture.scatter,
                "discrepancy": discrepancy,
            },
            "tau": growth,
            "cuts": cuts,
            "log_distance": h,
            "warnings": warnings,
        }
    )


def _averaged_warning(mixture, floors, budgets: int) -> dict:
    """Warns that few budgets leave the floor open, with its central 90 %."""
    order = np.argsort(floors)
    below = np.cumsum(mixture.probability[order])
    low, high = (
        floors[order][min(np.searchsorted(below, q), len(below) - 1)] for q in (0.05, 0.95)
    )
    return fit_warning(
        "floor_averaged",
        f"{budgets} compute budgets do not identify the floor E: the forecast averages over "
        f"floors, mostly {low:.3g} to {high:.3g} nats per token; a fourth and fifth small budget "
        "narrow it most; a law that changes beyond these budgets is not in the interval",
    )


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
    return _distinct_values(np.log(table.c))


def _distinct_values(x: np.ndarray) -> np.ndarray:
    x = np.sort(x)
    return x[np.concatenate([[True], np.diff(x) > 0.02])]


def forecast_from_fit(
    result: FitResult, n=None, d=None, c=None, level: float = 0.9, tau_and_cuts=None
) -> dict:
    """Forecasts from a fitted law; see `forecast_loss`.

    `tau_and_cuts` is the result of `law_discrepancy`, to share it between forecasts of one fit.
    """
    _check_target(n, d, c, level)
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
    at = (np.array([np.nan if x is None else x]) for x in (n, d, c))
    stretch = float(reach(table, *at)[0])
    tau, cuts = law_discrepancy(result) if tau_and_cuts is None else tau_and_cuts
    warnings = [*result.warnings, *_forecast_warnings(table, n, h)]
    if not cuts:
        warnings.append(_assumed_growth(table))
    r = result.residuals()
    spare = max(len(r) - result.problem.size, 1)
    parts = {
        "fit": _draw_spread(result, n, d, c),
        "residual": float(np.sqrt((r**2).sum() / spare)),
        "discrepancy": tau * stretch,
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
            "cuts": cuts,
            "log_distance": h,
            "warnings": warnings,
        }
    )


def reach(table: Table, n, d, c) -> np.ndarray:
    """Computes how far from the table's runs a law is stretched for others [R]: h + NEAR.

    h is the root of three squares: how far ln c and ln n exceed the largest of the table, and how
    far ln(d / n) is outside its range; NaN in n or d leaves those out. Errors at the edge of n or
    d / n hardly shrink with the distance, so that NEAR is larger there.
    """
    squared = np.maximum(np.log(c / table.c.max()), 0) ** 2
    if table.n is None or table.d is None:
        return np.sqrt(squared) + NEAR
    ratio, of_table = np.log(d / n), np.log(table.d / table.n)
    outside = np.maximum(np.maximum(ratio - of_table.max(), of_table.min() - ratio), 0)
    beyond = np.nan_to_num(outside**2 + np.maximum(np.log(n / table.n.max()), 0) ** 2)
    return np.sqrt(squared + beyond) + np.where(beyond > 0, NEAR_EDGE, NEAR)


def _check_target(n, d, c, level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"--forecast_level={level} must be between 0 and 1; use 0.9")
    for name, value in (("n", n), ("d", d), ("c", c)):
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise InputError(f"--forecast_{name}={value} must be a positive number; use 1e9")


def _draw_spread(result: FitResult, n, d, c) -> float:
    """Computes half the central 68 % of drawn ln L; 0 if the law passes through every point.

    Draws with the tails of t are taken back to their scale, as the interval has a quantile of t.
    """
    from scipy.stats import t

    if result.draws is None and len(result.table) <= result.problem.size:
        return 0.0
    drawn = np.log(result.predict_draws(n=n, d=d, c=c))
    low, high = np.nanpercentile(drawn, [15.87, 84.13])
    tails = 1.0
    if result.draws.kind == "student":
        tails = float(t.ppf(0.8413, max(result.draws.degrees, 1)))
    return float(high - low) / 2 / tails


def _interpolated_quantile(level: float, result: FitResult) -> float:
    """Returns Student's t quantile for the fit's residual degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, max(len(result.table) - result.problem.size, 2)))


def law_discrepancy(result: FitResult) -> tuple[float, int]:
    """Estimates tau, the growth of extrapolation errors per nat of distance: (tau, number of cuts).

    tau^2 is the mean over cuts of max(error^2 - s_res^2, 0) / `reach`^2, together with USUAL_CUTS
    times USUAL_TAU^2. A cut fits the runs up to some c, or up to some n, and predicts the others.
    """
    table, law = result.table, result.law
    problem = laws.fit_problem(table, law, result.floor, result.r_star)
    n = np.full(len(table), np.nan) if table.n is None else table.n
    d = np.full(len(table), np.nan) if table.d is None else table.d
    excess = []
    for train in _cuts(table, law):
        cheaper = problem.take(train)
        theta = solve.solve_many_starts(cheaper, result.delta).theta
        r = solve.predict_log_loss(cheaper, theta)[0] - cheaper.y
        error = (solve.predict_log_loss(problem, theta)[0] - problem.y)[~train]
        s2 = (r**2).sum() / max(train.sum() - len(law.coordinates), 1)
        stretch = reach(table.take(train), n[~train], d[~train], table.c[~train])
        excess.append(float(np.mean(np.maximum(error**2 - s2, 0) / stretch**2)))
    total = USUAL_CUTS * USUAL_TAU**2 + sum(excess)
    return float(np.sqrt(total / (USUAL_CUTS + len(excess)))), len(excess)


def _cuts(table: Table, law: laws.Law) -> list[np.ndarray]:
    """Lists masks [R] of the runs up to a budget, and up to a size, that determine the law."""
    size, masks = len(law.coordinates), {}
    columns = [table.c] if table.n is None or "n" not in law.columns else [table.c, table.n]
    for values in columns:
        x = np.log(values)
        distinct = _distinct_values(x)
        if len(distinct) < 2:
            continue
        for share in CUTS:
            train = x <= distinct[min(int(len(distinct) * share), len(distinct) - 2)] + 0.02
            part = table.take(train)
            levels = [len(_distinct_values(np.log(part.column(k)))) for k in law.columns]
            if train.sum() >= size and len(distinct_budgets(part)) >= size and min(levels) >= 2:
                masks[train.tobytes()] = train
    return list(masks.values())


def _assumed_growth(table: Table) -> dict:
    return fit_warning(
        "no_inner_cuts",
        f"{len(distinct_budgets(table))} compute budgets are too few to hold some out, so the "
        f"error of the law is assumed to be {USUAL_TAU:g} per factor e of compute, about the "
        "median of the reference tables; add budgets",
    )


def _forecast_warnings(table: Table, n, h: float) -> list[dict]:
    """Warns about targets far from the runs of the table."""
    warnings = []
    if h > np.log(30):
        warnings.append(
            fit_warning(
                "far_forecast",
                f"the target has {np.exp(h):.3g} times the compute of the largest run fitted; "
                "intervals were validated up to about 30 times; train a size in between",
            )
        )
    if n is not None and table.n is not None and h <= 0 and n > table.n.max() * 4:
        warnings.append(
            fit_warning(
                "outside_range",
                f"n is {n / table.n.max():.3g} times the largest fitted, at no larger compute; add "
                "a run of that size",
            )
        )
    return warnings
