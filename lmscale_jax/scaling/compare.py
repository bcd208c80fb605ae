"""Tests whether two arms differ in the exponent or only by a constant factor of compute."""

from dataclasses import replace

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import second_views, shift
from lmscale_jax.scaling.shift import ShiftEstimate, TwoArms
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import Table, as_table, fit_warning

EXPONENT, OFFSET = "exponent shift", "constant offset"
NOTHING, UNDETERMINED = "no detectable difference", "undetermined"
# Smallest relative change of the exponent that matters by default.
EFFECT = 0.1
POWER = 0.8
MAX_OPTIONS = 3


def compare_arms(
    table,
    first: str,
    second: str,
    level: float = 0.95,
    effect: float = EFFECT,
    target_c: float | None = None,
    bootstrap: int = 499,
    seed: int = 0,
) -> dict:
    """Tests whether the second arm changes the exponent of the first, or only a constant.

    Args:
        table: see `as_table`; the arms are values of its column `variant`.
        level: level of the test and of the intervals.
        effect: smallest relative change of the exponent that matters. If the data could not have
            shown it, the verdict is "undetermined".
        target_c: further FLOPs at which to report the gain.
        bootstrap: number of draws of the wild bootstrap; 0: none.

    Returns:
        `verdict`: "exponent shift", "constant offset", "no detectable difference" or
        "undetermined"; `reason`: a sentence; `shift`: s, se, interval, p, ...; `gain`: rows of c,
        k, low, high, with k the factor of compute that the first arm needs more than the second for
        equal loss; `detectable`; `checks`; `floors`; `nested`; `next_runs`; `warnings`.

    Raises:
        InputError: an arm is not in the table or has too few sizes.
    """
    table = as_table(table)
    data, warnings = _arm_rows(table, first, second, effect, level)
    fits = _fits(data)
    main = _select_estimate(fits, table, first, second)
    p_wild = shift.wild_bootstrap(main, data, bootstrap, seed) if bootstrap else None
    checks = [*_checks(fits, main, data, level), second_views.check_floors(data, main, level)]
    checks = [c for c in checks if c is not None]
    detectable = smallest_shift(main, level)
    verdict, reason = _verdict(main, checks, level, effect, detectable, p_wild, (first, second))
    x = _gain_points(data, target_c)
    ln_k, low, high = main.log_gain(x, level)
    rows = np.stack([np.exp(x + data.ln_c0), np.exp(ln_k), np.exp(low), np.exp(high)], axis=1)
    return plain(
        {
            "arms": [first, second],
            "verdict": verdict,
            "reason": reason,
            "shift": _shift(main, data, level, p_wild),
            "gain": [dict(zip(("c", "k", "low", "high"), row, strict=True)) for row in rows],
            "target_c": target_c,
            "effect": effect,
            "detectable": detectable,
            "checks": checks,
            "floors": second_views.shifts_at_floors(data, level),
            "nested": second_views.nested_laws(table, first, second),
            "next_runs": settling_runs(main, data, effect, level),
            "warnings": [*warnings, *_compute_overlap(data, first, second)],
        }
    )


def _shift(main: ShiftEstimate, data: TwoArms, level: float, p_wild) -> dict:
    """Collects the JSON fields of the estimate."""
    return {
        "s": main.s,
        "se": main.se,
        "interval": main.interval(level),
        "p": main.p,
        "p_bootstrap": p_wild,
        "level": level,
        "tau": main.tau,
        "at_c": float(np.exp(data.ln_c0)),
        "baseline": main.baseline,
        "unit": main.unit,
        "degrees_of_freedom": main.degrees,
        "n_runs": len(data),
    }


def _arm_rows(table: Table, first: str, second: str, effect, level) -> tuple[TwoArms, list[dict]]:
    """Checks the request and collects the arms with the warnings that precede any estimate."""
    if first == second:
        raise InputError(f"--compare={first},{second} names one arm twice; use two different arms")
    if not effect > 0 or not 0 < level < 1:
        raise InputError(
            f"--effect={effect} must be positive and --level={level} between 0 and 1; use 0.1, 0.95"
        )
    sizes = []
    for arm in (first, second):
        rows = table.arm(arm)
        sizes.append(len(set(np.round(np.log(rows.c), 2))))
        if sizes[-1] < 2:
            raise InputError(
                f"arm {arm!r} has {sizes[-1]} compute budget; train at least 3 in each arm"
            )
    warnings = list(table.notes)
    if min(sizes) < 4:
        warnings.append(
            fit_warning(
                "few_sizes",
                f"the arms have {sizes[0]} and {sizes[1]} compute budgets; fewer than 4 hardly "
                "determine the common curve and leave no check without the smallest and the "
                "largest size; add sizes before seeds",
            )
        )
    warnings.append(
        fit_warning(
            "tune_both",
            "s measures everything that changes with size between the arms, including an untuned "
            "learning rate; tune it at every size in both arms",
        )
    )
    return shift.two_arms(table, first, second), warnings


def _fits(data: TwoArms) -> dict[str, ShiftEstimate]:
    """Estimates the shift under each baseline; on a surface if L is no function of C."""
    if shift.is_off_curve(data):
        kinds = ["surface"]
    else:
        kinds = ["quadratic", "cubic", "floor"]
    fits = {k: shift.estimate_shift(k, data) for k in kinds}
    fits = {k: v for k, v in fits.items() if v is not None}
    if not fits:
        linear = shift.estimate_shift("power", data)
        fits = {} if linear is None else {"power": linear}
    return fits


def _select_estimate(fits: dict, table: Table, first: str, second: str) -> ShiftEstimate:
    """Selects the main estimate by AICc, polynomials before other baselines.

    Raises:
        InputError: no baseline could be estimated.
    """
    if not fits:
        raise InputError(
            f"arms {first} and {second} of {table.name} have too few runs for the test; train at "
            "least 3 compute budgets and 6 runs over both arms"
        )
    shapes = [fits[k] for k in ("quadratic", "cubic") if k in fits] or list(fits.values())
    return min(shapes, key=lambda e: e.aicc)


def smallest_shift(main: ShiftEstimate, level: float) -> float:
    """Computes the smallest |s| that the test detects with a power of 80 %."""
    from scipy.stats import t

    return (main.t(level) + float(t.ppf(POWER, main.degrees))) * main.se


def _checks(fits: dict, main: ShiftEstimate, data: TwoArms, level: float) -> list[dict]:
    """Repeats the estimate with other baselines and without the smallest and the largest size."""
    checks = []
    for name, refit in fits.items():
        if refit is not main:
            holds = refit.s * main.s > 0 and refit.p < 2 * (1 - level)
            checks.append(_check_arms(f"{name} baseline", refit, holds))
    # With n in the table its sizes are held out, otherwise its budgets.
    size = data.ln_n if data.ln_n is not None else data.x
    ends = {"without the smallest size": size > size.min() + 0.05,
            "without the largest size": size < size.max() - 0.05}  # fmt: skip
    for name, rows in ends.items():
        if main.baseline == "surface" or shift.arm_budgets(data.take(rows)) >= 3:
            kind = main.baseline if main.baseline in ("surface", "power") else "quadratic"
            refit = shift.estimate_shift(kind, data.take(rows))
        else:
            refit = shift.estimate_shift("power", data.take(rows))
        if refit is not None:
            checks.append(_check_arms(name, refit, refit.s * main.s > 0))
    return checks


def _check_arms(name: str, refit: ShiftEstimate, holds: bool) -> dict:
    return {"check": name, "s": refit.s, "se": refit.se, "p": refit.p, "holds": bool(holds)}


def _verdict(main, checks, level, effect, detectable, p_wild, names) -> tuple[str, str]:
    """Decides the verdict and the sentence that gives the reason."""
    alpha = 1 - level
    low, high = main.interval(level)
    finding = (
        f"the exponent ratio is 1 {main.s:+.3f} ({100 * level:g} % interval {low:+.3f} to "
        f"{high:+.3f}, p = {main.p:.2g})"
    )
    failed = [c["check"] for c in checks if not c["holds"]]
    significant = main.p < alpha and (p_wild is None or p_wild < 2 * alpha)
    if significant and not failed:
        gains = "gains" if main.s > 0 else "loses"
        return EXPONENT, f"{names[1]} {gains} with scale: {finding}, and every check agrees"
    if main.p < alpha:
        why = f"not {', not '.join(failed)}" if failed else f"not by bootstrap (p = {p_wild:.2g})"
        return UNDETERMINED, f"{finding}, but not every check agrees: {why}"
    if detectable > effect:
        return UNDETERMINED, (
            f"{finding}; these runs can detect a shift of {detectable:.2g} or more, but not the "
            f"requested {effect:.2g}; next_runs lists runs that can"
        )
    ln_k, k_low, k_high = (float(v) for v in main.log_gain(np.array(0.0), level))
    factor = f"{np.exp(ln_k):.3g} ({np.exp(k_low):.3g} to {np.exp(k_high):.3g})"
    if k_low > 0 or k_high < 0:
        return OFFSET, (
            f"{names[0]} needs {factor} times the compute of {names[1]} at every scale; {finding}, "
            f"and a shift of {detectable:.2g} would have been detected"
        )
    return NOTHING, (
        f"compute factor {factor} and {finding}; {detectable:.2g} would have been detected"
    )


def _gain_points(data: TwoArms, target_c: float | None) -> np.ndarray:
    """Lists five budgets over the data, and the target, as ln C - ln C0."""
    x = np.linspace(data.x.min(), data.x.max(), 5)
    if target_c is None:
        return x
    if not target_c > 0:
        raise InputError(f"--target_c={target_c} must be positive FLOPs; use 1e18")
    return np.append(x, np.log(target_c) - data.ln_c0)


def _compute_overlap(data: TwoArms, first: str, second: str) -> list[dict]:
    """Warns if the arms' losses hardly overlap, so that the shift is extrapolated."""
    y0, y1 = data.y[data.z == 0], data.y[data.z == 1]
    shared = min(y0.max(), y1.max()) - max(y0.min(), y1.min())
    if shared > 0.5 * min(np.ptp(y0), np.ptp(y1)):
        return []
    return [
        fit_warning(
            "little_overlap",
            f"the losses of {first} ({np.exp(y0.min()):.3g} to {np.exp(y0.max()):.3g}) and "
            f"{second} ({np.exp(y1.min()):.3g} to {np.exp(y1.max()):.3g}) hardly overlap, so their "
            "compute factor is extrapolated; train the better arm at less compute",
        )
    ]


def settling_runs(main: ShiftEstimate, data: TwoArms, effect: float, level: float) -> list[dict]:
    """Lists the three cheapest sets of runs after which a shift of `effect` would be detectable.

    Candidates are further seeds of every cell and up to four larger sizes, each with twice the
    compute of the previous one, in both arms. The variance of a run is assumed to stay. [] if the
    shift is detectable already.
    """
    if smallest_shift(main, level) <= effect:
        return []
    target_se = effect / (main.t(level) + 0.84)
    base = shift.fisher_information(main, data)
    per_seed = shift.fisher_information(main, _run_per_cell(data))
    cost = float(np.exp(_run_per_cell(data).x + data.ln_c0).sum())
    options = []
    for sizes in range(5):
        larger = _larger_budgets(data, sizes)
        per_larger = shift.fisher_information(main, larger) if sizes else np.zeros_like(base)
        larger_cost = float(np.exp(larger.x + data.ln_c0).sum()) if sizes else 0.0
        for seeds in range(13):
            # New sizes get one run, plus as many seeds as are added to the other cells.
            repeats = 1 + seeds
            total = base + seeds * per_seed + repeats * per_larger
            se = float(np.sqrt(np.linalg.pinv(total)[-1, -1]))
            if se > target_se or (main.unit == "cells" and seeds):
                continue
            flops = seeds * cost + repeats * larger_cost
            options.append(_option(data, sizes, seeds, se, flops, main, level))
            break
    return sorted(options, key=lambda o: o["flops"])[:MAX_OPTIONS]


def _option(data, sizes, seeds, se, flops, main, level) -> dict:
    """Describes one set of further runs, its cost and the shift that it makes detectable."""
    top = float(np.exp(data.x.max() + data.ln_c0))
    words = []
    if seeds:
        words.append(f"{seeds} more seed{'s' * (seeds > 1)} of every cell in both arms")
    if sizes:
        grown = ", ".join(f"{top * 2 ** (i + 1):.3g}" for i in range(sizes))
        words.append(f"{1 + seeds} run{'s' * (seeds > 0)} an arm at {grown} FLOPs")
    runs = seeds * len(set(data.cell)) + sizes * 2 * (1 + seeds)
    detectable = se * smallest_shift(main, level) / main.se
    return {"add": " and ".join(words), "runs": runs, "flops": flops, "detectable": detectable}


def _run_per_cell(data: TwoArms) -> TwoArms:
    """Selects one run of each cell."""
    return data.take(np.unique(data.cell, return_index=True)[1])


def _larger_budgets(data: TwoArms, sizes: int) -> TwoArms:
    """Adds one run per arm at each larger budget, with n and d growing equally."""
    top = int(data.x.argmax())
    rows = np.full(2 * max(sizes, 1), top)
    step = np.repeat(np.arange(1, max(sizes, 1) + 1), 2) * np.log(2.0)
    larger = data.take(rows)
    grown = {"x": larger.x + step, "z": np.tile([0.0, 1.0], max(sizes, 1))}
    if larger.ln_n is not None and larger.ln_d is not None:
        grown |= {"ln_n": larger.ln_n + step / 2, "ln_d": larger.ln_d + step / 2}
    return replace(larger, **grown)
