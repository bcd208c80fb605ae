"""Checks of a table and of a fit; each warning names a remedy. They cannot be switched off."""

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import intervals, laws, solve
from lmscale_jax.scaling.laws import Law, Problem
from lmscale_jax.scaling.table import Table, fit_warning, number_labels

MIN_SHARE = 0.01
MIN_SPAN = 8.0
MAX_CHANGE = 1.5
MAX_CORRELATION = 0.95
MAX_CONDITION = 100.0
UNITS_OF = {"n": "parameters", "d": "tokens", "c": "FLOPs"}


def check_table(table: Table, law: Law) -> list[dict]:
    """Lists warnings about the table alone.

    Raises:
        InputError: the table has too few points, or a column of the law does not vary.
    """
    size = len(law.coordinates)
    if len(table) < size:
        raise InputError(
            f"{table.name} has {len(table)} points and {law.name} has {size} parameters; at least "
            f"{size + 1} points are needed{_smaller_law(law, len(table))}"
        )
    if table.loss.max() / table.loss.min() < 1 + 1e-9:
        raise InputError(
            f"column 'loss' of {table.name} is {table.loss[0]:.6g} in every row, from which no law "
            "follows; add runs of other sizes"
        )
    warnings = list(table.notes)
    for column, exponent in zip(law.columns, law.exponents, strict=True):
        x = table.column(column)
        if x.max() / x.min() < 1.001:
            raise InputError(
                f"column {column!r} of {table.name} is {x[0]:.4g} in every row, so {exponent} "
                f"cannot be fitted; add runs of at least {MIN_SPAN * x[0]:.2g} {UNITS_OF[column]}, "
                f"or choose a law without {column}"
            )
    if len(table) == size:
        warnings.append(
            fit_warning(
                "no_residuals",
                f"{size} points and {size} parameters: the law passes through every point, so its "
                "error is unknown; add a run",
            )
        )
    named = [v for v in table.variants() if v]
    if len(named) > 1:
        warnings.append(
            fit_warning(
                "mixed_variants",
                f"one law is fitted to the variants {', '.join(named)} together; "
                f"--variant={named[0]} fits one, --compare={named[0]},{named[1]} compares two",
            )
        )
    if table.unique is not None and table.d is not None:
        epochs = table.d / table.unique
        if epochs.max() > 4:
            warnings.append(
                fit_warning(
                    "repeated_data",
                    f"runs repeat their data up to {epochs.max():.3g} times; beyond about 4 epochs "
                    "a repeated token is worth less than a new one; use --repetition=fit",
                )
            )
    return warnings


def pooled_settings(unused: dict[str, list], picked: dict, points: str, name: str) -> list[dict]:
    """Warns of unused columns that differ between runs of equal variant, n and d (curves: n).

    Such runs are taken for seeds of one cell. A column of which most values are distinct, or of a
    curve one that changes along runs, is a measurement or a name, not a setting.
    """
    size = len(picked["loss"])
    names = [k for k in ("variant", "n", "d", "c") if k in picked][:3]
    rows = {k: picked[k] for k in names} | {
        column: texts
        for column, values in unused.items()
        if len(texts := [str(v) for v in values]) == size and 1 < len(set(texts)) <= size / 2
    }
    if points == "curve" and "run_id" in picked:
        run = number_labels(picked["run_id"])
        _, first = np.unique(run, return_index=True)
        names = [k for k in names if k in ("variant", "n")]
        rows = {
            k: [values[i] for i in first]
            for k, values in rows.items()
            if all(x == values[first[r]] for x, r in zip(values, run, strict=True))
        }
    cells = list(zip(*(rows[k] for k in names), strict=True)) or [()] * len(first)
    distinct = len(set(cells))
    pooled = [
        column
        for column in rows
        if column not in picked and len(set(zip(cells, rows[column], strict=True))) > distinct
    ]
    if not pooled:
        return []
    first_column, sizes = pooled[0], "n" if points == "curve" else "n and d"
    best = "" if points == "curve" else f"--best for the lowest loss of each {sizes}, "
    return [
        fit_warning(
            "pooled_settings",
            f"{', '.join(pooled[:12])} of {name} take several values at equal {sizes}, and those "
            f"runs are fitted as if they were seeds of one setting; use {best}"
            f"--columns=variant:{first_column}, or --where={first_column}:VALUE",
        )
    ]


def _smaller_law(law: Law, points: int) -> str:
    """Suggests a law with fewer parameters than points, or ""."""
    limit = min(points, len(law.coordinates))
    fitting = [x.name for x in laws.LAWS.values() if len(x.coordinates) < limit]
    return f", or --law={fitting[0]}" if fitting else ""


def check_ranges(table: Table, law: Law) -> tuple[dict, list[dict]]:
    """Measures the columns' spans and correlation; warns about narrow or collinear ones."""
    numbers: dict = {}
    warnings = []
    for column, exponent in zip(law.columns, law.exponents, strict=True):
        x = table.column(column)
        span = float(x.max() / x.min())
        numbers[f"{column}_range"] = [float(x.min()), float(x.max())]
        numbers[f"{column}_span"] = span
        if span < MIN_SPAN:
            warnings.append(
                fit_warning(
                    f"narrow_{column}",
                    f"{column} spans {span:.3g}x; {exponent} is not identified; add a run of at "
                    f"least {MIN_SPAN * x.min():.2g} {UNITS_OF[column]} ({MIN_SPAN:.0f}x the "
                    "smallest)",
                )
            )
    if len(law.columns) == 2 and len(table) > 2:
        n, d = np.log(table.column("n")), np.log(table.column("d"))
        corr = float(np.corrcoef(n, d)[0, 1])
        numbers["corr_ln_n_ln_d"] = corr
        if abs(corr) > MAX_CORRELATION:
            ratio = np.exp(d - n)
            warnings.append(
                fit_warning(
                    "collinear",
                    f"ln n and ln d have correlation {corr:.3f} (d / n is {ratio.min():.3g} to "
                    f"{ratio.max():.3g}): alpha and beta cannot be separated, only the exponent in "
                    "c is identified; add runs with other tokens per parameter, or use "
                    "--law=power_floor",
                )
            )
    return numbers, warnings


def check_terms(problem: Problem, theta_P, table: Table) -> tuple[dict, list[dict]]:
    """Measures each term's share of the loss and of its spread.

    Warns about dead terms, exponents of the wrong sign and coordinates at their bounds.
    """
    share_KxR = solve.term_shares(problem, theta_P)
    loss = np.exp(solve.predict_log_loss(problem, theta_P)[0])
    law, numbers, warnings = problem.law, {}, []
    falling = share_KxR[-len(law.columns) :]
    spread = max(float(np.ptp(loss)), 1e-300)
    first = 1 if law.floor == "free" else 0
    for k, (column, exponent) in enumerate(zip(law.columns, law.exponents, strict=True)):
        slope = float(theta_P[first + 2 * k + 1])
        low, high = float(falling[k].min()), float(falling[k].max())
        share_of_spread = float(np.ptp(falling[k] * loss)) / spread
        numbers[column] = {"share": [low, high], "share_of_spread": share_of_spread}
        x = table.column(column)
        if high < MIN_SHARE or share_of_spread < MIN_SHARE:
            warnings.append(
                fit_warning(
                    "dead_term",
                    f"the term in {column} is {low:.2g} to {high:.2g} of the loss and "
                    f"{share_of_spread:.2g} of its spread: it is dead, {exponent} is not "
                    f"identified; {_dead_term_remedy(column, x)}",
                )
            )
        if slope < 0:
            warnings.append(
                fit_warning(
                    "wrong_sign",
                    f"{exponent} is {slope:.3g}: the fitted loss grows with {column}, which no "
                    "scaling law does; before adding runs, check that learning rate and batch are "
                    "tuned at each size and that all runs belong to one campaign",
                )
            )
    return numbers, warnings + _check_bounds(problem, theta_P, share_KxR)


def _dead_term_remedy(column: str, x: np.ndarray) -> str:
    span, least = x.max() / x.min(), 4 * MIN_SPAN
    if span >= least:
        return f"{column} spans {span:.3g}x already, so use a law without {column}"
    return (
        f"{column} spans {span:.3g}x, widen it to at least {least:.0f}x, up to "
        f"{least * x.min():.2g} {UNITS_OF[column]}"
    )


def _check_bounds(problem: Problem, theta_P, share_KxR) -> list[dict]:
    """Warns about coordinates at their bounds and about a floor that vanished."""
    warnings = []
    for i, name in enumerate(problem.law.coordinates):
        if not problem.low[i] + 1e-6 < theta_P[i] < problem.high[i] - 1e-6:
            warnings.append(
                fit_warning(
                    "at_bound",
                    f"{name} is at its bound, {theta_P[i]:.3g}, so it has no finite estimate; "
                    "choose a --law without the term or widen the range",
                )
            )
    if problem.law.floor == "free" and share_KxR[0].max() < 1e-3:
        warnings.append(
            fit_warning(
                "no_floor",
                f"E fell to {share_KxR[0].max():.1g} of the loss: these data show no floor; use "
                "--law=power, pin it with --floor=1.7, or add larger runs",
            )
        )
    return warnings


def check_condition(problem: Problem, theta_P) -> tuple[dict, list[dict]]:
    """Computes the condition number of the Jacobian, its columns scaled to unit length.

    Also reports the weakest direction, the right singular vector of the smallest singular value.
    """
    J_RxP = solve.log_loss_jacobian(problem, theta_P) * np.sqrt(problem.weight)[:, None]
    length = np.maximum(np.linalg.norm(J_RxP, axis=0), 1e-300)
    _, s, vt = np.linalg.svd(J_RxP / length, full_matrices=False)
    names = problem.law.coordinates
    weakest = {name: float(v) for name, v in zip(names, vt[-1], strict=True)}
    number = float(s[0] / max(s[-1], 1e-300))
    numbers = {"condition_number": number, "weakest_direction": weakest}
    if number <= MAX_CONDITION:
        return numbers, []
    first, second = sorted(weakest, key=lambda k: -abs(weakest[k]))[:2]
    return numbers, [
        fit_warning(
            "ill_conditioned",
            f"the scaled condition number is {number:.3g}: {first} and {second} can change "
            "together with almost no effect on the fit, so only their combination is identified; "
            "widen the range of sizes and of tokens or pin --floor",
        )
    ]


def check_floor(profile: "intervals.Profile", table: Table, level: float) -> list[dict]:
    """Warns if a wide range of floors fits about equally well."""
    least = float(table.loss.min())
    if profile.low > 0 and profile.high - profile.low < 0.3 * least:
        return []
    return [
        fit_warning(
            "floor_unidentified",
            f"floors from {profile.low:.3g} to {profile.high:.3g} fit about equally well "
            f"({100 * level:.0f} %): E and the exponents trade off; add runs with a loss below "
            f"{least:.3g} or pin --floor",
        )
    ]


def check_clusters(draws: "intervals.Draws") -> list[dict]:
    """Warns if intervals rest on few clusters, or on rows instead of runs."""
    missing = intervals.MIN_CLUSTERS - draws.clusters
    warnings = []
    if draws.too_few:
        short = intervals.MIN_DEGREES - draws.degrees
        warnings.append(
            fit_warning(
                "few_clusters",
                f"no interval: {draws.clusters} {draws.unit}s leave {max(draws.degrees, 0)} "
                f"degree{'s' * (draws.degrees != 1)} of freedom, and any would be too wide to say "
                f"something; add {short} {draws.unit}{'s' * (short > 1)} or choose a law with "
                "fewer parameters",
            )
        )
    elif missing > 0:
        warnings.append(
            fit_warning(
                "few_clusters",
                f"intervals rest on only {draws.clusters} {draws.unit}s, and are as wide as "
                f"{draws.degrees} degrees of freedom make them; {missing} more would narrow them",
            )
        )
    if draws.unit == "row":
        warnings.append(
            fit_warning(
                "rows_resampled",
                "intervals resample rows as if rows of one run were independent, and are far too "
                "narrow for curves; use --cluster=run",
            )
        )
    return warnings


def check_delta(path: list[dict], spread: dict) -> list[dict]:
    """Warns if a parameter changes with delta by more than 1.5 standard errors.

    On Gaussian data a median fit and least squares differ by 0.75 standard errors (RMS).
    """
    last = path[-1]["params"]
    for name, se in spread.items():
        values = [p["params"][name] for p in path]
        if se and np.isfinite(se) and max(values) - min(values) > MAX_CHANGE * se:
            return [
                fit_warning(
                    "delta_matters",
                    f"{name} goes from {path[0]['params'][name]:.4g} (least squares) to "
                    f"{last[name]:.4g} as delta falls to {path[-1]['delta']:.1g}, with a standard "
                    f"error of {se:.2g}: outliers or misfit; inspect the residuals and remove bad "
                    "runs",
                )
            ]
    return []
