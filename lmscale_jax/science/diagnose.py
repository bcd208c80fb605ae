"""What a fit cannot know, said in sentences with a remedy. These checks cannot be switched off."""

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.science import intervals, laws, solve
from lmscale_jax.science.laws import Law, Problem
from lmscale_jax.science.table import Table, warning

DEAD = 0.01
NARROW = 8.0
MOVED = 1.5
COLLINEAR = 0.95
ILL = 100.0
AUTOCORRELATED = 0.3
# Degrees of freedom of seeds below which their scatter is no yardstick.
FEW_REPLICATES = 3
WORDS = {"n": "parameters", "d": "tokens", "c": "FLOPs"}


def check_table(table: Table, law: Law) -> list[dict]:
    """Warnings of the table alone. Raises InputError where the law cannot be fitted to it."""
    size = len(law.names)
    if len(table) < size:
        raise InputError(
            f"{table.name} has {len(table)} points and {law.name} has {size} parameters; at least "
            f"{size + 1} points are needed{_smaller(law, len(table))}"
        )
    warnings = list(table.notes)
    for column, exponent in zip(law.columns, law.exponents, strict=True):
        x = table.column(column)
        if x.max() / x.min() < 1.001:
            raise InputError(
                f"column {column!r} of {table.name} is {x[0]:.4g} in every row, so {exponent} "
                f"cannot be fitted; add runs of at least {NARROW * x[0]:.2g} {WORDS[column]}, or "
                f"choose a law without {column}"
            )
    if len(table) == size:
        warnings.append(
            warning(
                "no_residuals",
                f"{size} points and {size} parameters: the law passes through every point, which "
                "says nothing of its error; add a run",
            )
        )
    named = [v for v in table.variants() if v]
    if len(named) > 1:
        warnings.append(
            warning(
                "mixed_variants",
                f"one law is fitted to the variants {', '.join(named)} together; "
                f"--variant={named[0]} takes one, --compare={named[0]},{named[1]} compares two",
            )
        )
    if table.unique is not None and table.d is not None:
        epochs = table.d / table.unique
        if epochs.max() > 4:
            warnings.append(
                warning(
                    "repeated_data",
                    f"runs see their data up to {epochs.max():.3g} times; beyond about 4 a "
                    "repeated token is worth less than a new one: --repetition=fit accounts for it",
                )
            )
    return warnings


def _smaller(law: Law, points: int) -> str:
    fitting = [x.name for x in laws.LAWS.values() if len(x.names) < min(points, len(law.names))]
    return f", or --law={fitting[0]}" if fitting else ""


def ranges(table: Table, law: Law) -> tuple[dict, list[dict]]:
    """Spans of the columns, their correlation, and what is too narrow."""
    numbers: dict = {}
    warnings = []
    for column, exponent in zip(law.columns, law.exponents, strict=True):
        x = table.column(column)
        span = float(x.max() / x.min())
        numbers[f"{column}_range"] = [float(x.min()), float(x.max())]
        numbers[f"{column}_span"] = span
        if span < NARROW:
            warnings.append(
                warning(
                    f"narrow_{column}",
                    f"{column} spans {span:.3g}x; {exponent} is not identified; add a run of at "
                    f"least {NARROW * x.min():.2g} {WORDS[column]} ({NARROW:.0f}x the smallest)",
                )
            )
    if len(law.columns) == 2 and len(table) > 2:
        n, d = np.log(table.column("n")), np.log(table.column("d"))
        corr = float(np.corrcoef(n, d)[0, 1])
        numbers["corr_ln_n_ln_d"] = corr
        if abs(corr) > COLLINEAR:
            ratio = np.exp(d - n)
            warnings.append(
                warning(
                    "collinear",
                    f"ln n and ln d have correlation {corr:.3f} (d / n is {ratio.min():.3g} to "
                    f"{ratio.max():.3g}): alpha and beta cannot be told apart, only the exponent "
                    "in c; add runs with other tokens per parameter, or --law=power_floor",
                )
            )
    return numbers, warnings


def terms(problem: Problem, theta_P, table: Table) -> tuple[dict, list[dict]]:
    """Every term's share of the loss and of its spread; dead terms, wrong signs, bounds."""
    share_KxR = solve.shares(problem, theta_P)
    loss = np.exp(solve.predict(problem, theta_P)[0])
    law, numbers, warnings = problem.law, {}, []
    falling = share_KxR[-len(law.columns) :]
    spread = max(float(np.ptp(loss)), 1e-300)
    first = 1 if law.floor == "free" else 0
    for k, (column, exponent) in enumerate(zip(law.columns, law.exponents, strict=True)):
        slope = float(theta_P[first + 2 * k + 1])
        low, high = float(falling[k].min()), float(falling[k].max())
        moved = float(np.ptp(falling[k] * loss)) / spread
        numbers[column] = {"share": [low, high], "share_of_spread": moved}
        x = table.column(column)
        if high < DEAD or moved < DEAD:
            warnings.append(
                warning(
                    "dead_term",
                    f"the term in {column} is {low:.2g} to {high:.2g} of the loss and {moved:.2g} "
                    f"of its spread: it is dead, {exponent} is not identified; {column} spans "
                    f"{x.max() / x.min():.3g}x, widen it to at least {NARROW * 4:.0f}x, up to "
                    f"{NARROW * 4 * x.min():.2g} {WORDS[column]}",
                )
            )
        if slope < 0:
            warnings.append(
                warning(
                    "wrong_sign",
                    f"{exponent} is {slope:.3g}: the fitted loss grows with {column}, which no "
                    "scaling law does; look for a learning rate or batch not tuned at each size, "
                    f"or runs of different campaigns, before adding {WORDS[column]}",
                )
            )
    return numbers, warnings + _bounds(problem, theta_P, share_KxR)


def _bounds(problem: Problem, theta_P, share_KxR) -> list[dict]:
    found = []
    for i, name in enumerate(problem.law.names):
        if not problem.low[i] + 1e-6 < theta_P[i] < problem.high[i] - 1e-6:
            found.append(
                warning(
                    "at_bound",
                    f"{name} lies at its bound, {theta_P[i]:.3g}: the data push it further, so it "
                    "has no finite estimate; leave the term out (another --law) or widen the range",
                )
            )
    if problem.law.floor == "free" and share_KxR[0].max() < 1e-3:
        found.append(
            warning(
                "no_floor",
                f"E fell to {share_KxR[0].max():.1g} of the loss: these data show no floor; "
                "--law=power fits without one, --floor=1.7 pins it, larger runs would show it",
            )
        )
    return found


def condition(problem: Problem, theta_P) -> tuple[dict, list[dict]]:
    """Condition number of the Jacobian with columns of unit length, and its weakest direction."""
    J_RxP = solve.jacobian(problem, theta_P) * np.sqrt(problem.weight)[:, None]
    length = np.maximum(np.linalg.norm(J_RxP, axis=0), 1e-300)
    _, s, vt = np.linalg.svd(J_RxP / length, full_matrices=False)
    names = problem.law.names
    weakest = {name: float(v) for name, v in zip(names, vt[-1], strict=True)}
    number = float(s[0] / max(s[-1], 1e-300))
    numbers = {"condition_number": number, "weakest_direction": weakest}
    if number <= ILL:
        return numbers, []
    first, second = sorted(weakest, key=lambda k: -abs(weakest[k]))[:2]
    return numbers, [
        warning(
            "ill_conditioned",
            f"the scaled condition number is {number:.3g}: {first} and {second} can change "
            "together with almost no change of the fit; only their combination is known, so widen "
            "the range of sizes and of tokens or pin --floor",
        )
    ]


def residuals(problem: Problem, theta_P, table: Table) -> tuple[dict, list[dict]]:
    """Spread of the log residuals, their correlation along runs, and lack of fit to replicates."""
    r = problem.y - solve.predict(problem, theta_P)[0]
    numbers = {
        "rms_log_residual": float(np.sqrt(np.average(r**2, weights=problem.weight))),
        "mad_sigma": float(1.4826 * np.median(np.abs(r - np.median(r)))),
    }
    warnings = []
    lag = lag_one(r, table.run_id)
    numbers["lag_1_autocorrelation"] = lag
    if lag is not None and lag > AUTOCORRELATED:
        warnings.append(
            warning(
                "autocorrelated",
                f"residuals along a run have lag-1 correlation {lag:.2f}: the curve's shape is not "
                "the law's; use final points, or leave out more of the start with --skip=10",
            )
        )
    lack = lack_of_fit(problem, r, table)
    numbers["lack_of_fit"] = lack
    if lack and lack["p"] < 0.05:
        warnings.append(
            warning(
                "lack_of_fit",
                f"the law misses the means of repeated runs by {lack['rms_lack']:.2g} in ln L, "
                f"more than seeds explain ({lack['rms_seed']:.2g}, p = {lack['p']:.2g}): residual-"
                "based errors include the law's own; try --law=chinchilla or a narrower range",
            )
        )
    return numbers, warnings


def lag_one(r: np.ndarray, run_id: np.ndarray) -> float | None:
    """Correlation of neighbouring residuals within runs of three rows and more; None without."""
    pairs = []
    for run in dict.fromkeys(run_id):
        own = r[run_id == run]
        if len(own) >= 3:
            pairs.append(np.stack([own[:-1], own[1:]]))
    if not pairs:
        return None
    first, second = np.concatenate(pairs, axis=1)
    norm = np.sqrt((first**2).mean() * (second**2).mean())
    return float((first * second).mean() / max(norm, 1e-300))


def lack_of_fit(problem: Problem, r: np.ndarray, table: Table) -> dict | None:
    """F test of the law against the scatter of runs that differ in nothing but the seed.

    Draper & Smith (1998), section 2.2. None without replicates.
    """
    from scipy.stats import f as f_distribution

    _, cell = np.unique(cells(table), return_inverse=True)
    count = np.bincount(cell)
    means = np.bincount(cell, r) / count
    within = float(((r - means[cell]) ** 2).sum())
    free, lack_free = len(r) - len(count), len(count) - problem.size
    if table.points != "final" or free < FEW_REPLICATES or lack_free < 1 or within <= 0:
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


def cells(table: Table) -> np.ndarray:
    """A label [R] that runs share which differ in nothing but the seed: variant, n, d or c."""
    parts = [table.variant.astype(str)]
    columns = [x for x in (table.n, table.d) if x is not None] or [table.c]
    parts += [np.char.mod("%.6f", np.log(x)) for x in columns]
    return np.array(["|".join(row) for row in zip(*parts, strict=True)])


def largest_left_out(problem: Problem, delta: float, table: Table):
    """Error in ln L at the largest size, of a fit without it."""
    column = "n" if "n" in problem.law.columns else "c"
    x = np.log(table.column(column))
    held = x > x.max() - 0.02
    if len(x) - held.sum() <= problem.size:
        return {"largest_left_out": None}, []
    shorter = problem.rows(~held)
    theta = solve.solve(shorter, delta).theta
    error = solve.predict(problem, theta)[0] - problem.y
    r = solve.predict(shorter, theta)[0] - shorter.y
    numbers = {
        "column": column,
        "value": float(np.exp(x.max())),
        "runs": int(held.sum()),
        "mean_error": float(error[held].mean()),
        "rms_error": float(np.sqrt((error[held] ** 2).mean())),
    }
    found = []
    if numbers["rms_error"] > max(0.01, 3 * float(np.sqrt((r**2).mean()))):
        found.append(
            warning(
                "largest_left_out",
                f"a fit without the largest {column} ({np.exp(x.max()):.3g}) misses it by "
                f"{100 * numbers['mean_error']:+.2g} %, more than three times the residuals: do "
                "not trust the law beyond the data; train one more size in between",
            )
        )
    return {"largest_left_out": numbers}, found


def floor(profile: "intervals.Profile", table: Table, level: float) -> list[dict]:
    """A warning where the data allow floors of a wide range."""
    least = float(table.loss.min())
    if profile.low > 0 and profile.high - profile.low < 0.3 * least:
        return []
    return [
        warning(
            "floor_unidentified",
            f"floors from {profile.low:.3g} to {profile.high:.3g} fit about equally well "
            f"({100 * level:.0f} %): E and the exponents trade off; runs with less loss than "
            f"{least:.3g} would tell, or pin --floor",
        )
    ]


def clusters(draws: "intervals.Draws") -> list[dict]:
    """Warnings of what the intervals rest on."""
    found = []
    if draws.clusters < intervals.FEW:
        found.append(
            warning(
                "few_clusters",
                f"intervals rest on {draws.clusters} {draws.unit}s, fewer than {intervals.FEW}, "
                f"and are rough (drawn with {draws.kind} resampling); add "
                f"{intervals.FEW - draws.clusters} more, seeds count",
            )
        )
    if draws.unit == "row":
        found.append(
            warning(
                "rows_resampled",
                "intervals resample rows, so rows of one run are taken as independent; they are "
                "far too narrow for curves; --cluster=run is right",
            )
        )
    return found


def moved(path: list[dict], spread: dict) -> list[dict]:
    """A warning where the answer depends on delta by more than 1.5 standard errors.

    A median fit and least squares of Gaussian data differ by 0.75 of one, root mean square.
    """
    last = path[-1]["params"]
    for name, se in spread.items():
        values = [p["params"][name] for p in path]
        if se and np.isfinite(se) and max(values) - min(values) > MOVED * se:
            return [
                warning(
                    "delta_matters",
                    f"{name} goes from {path[0]['params'][name]:.4g} (least squares) to "
                    f"{last[name]:.4g} as delta falls to {path[-1]['delta']:.1g}, against "
                    f"a standard error of {se:.2g}: outliers or misfit; look at the residuals and "
                    "leave out runs known to be bad",
                )
            ]
    return []
