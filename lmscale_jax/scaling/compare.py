"""Tests whether two arms differ with scale or only by a constant factor of compute."""

from dataclasses import replace

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import pairs, second_views, shift, verdicts
from lmscale_jax.scaling.shift import ShiftEstimate, TwoArms
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import Table, as_table, fit_warning
from lmscale_jax.scaling.verdicts import smallest_shift

# Smallest relative change of the exponent that matters by default.
EFFECT = 0.1
MAX_OPTIONS = 3
# Largest numbers of sizes and seeds that are suggested to be added.
MORE_SIZES, MORE_SEEDS = 4, 12


def compare_arms(
    table,
    first: str,
    second: str,
    level: float = 0.95,
    effect: float = EFFECT,
    target_c: float | None = None,
    bootstrap: int = 499,
    seed: int = 0,
    floor: float | None = None,
) -> dict:
    """Tests whether the second arm gains on the first with scale, or by a constant factor.

    Args:
        table: see `as_table`; the arms are values of its column `variant`.
        level: level of the tests, both together, and of the intervals.
        effect: smallest relative change of the exponent that matters. If the data could not have
            shown it, the verdict is "undetermined".
        target_c: further FLOPs at which to report the gain.
        bootstrap: number of draws of the wild bootstrap; 0: none.
        floor: pins E, nats/token; the common curve is then the power law above it.

    Returns:
        `verdict`: "exponent shift", "changes with scale", "constant offset", "no detectable
        difference" or "undetermined"; `reason`: a sentence; `shift`: s, se, interval, p, p_both,
        ...; `pairing`: how cells of equal size and seeds correlate between the arms, and whether
        the test uses it, or None; `gain`: rows of c, k, low, high, with k the factor of compute
        that the first arm needs more than the second for equal loss; `detectable`; `power`: the
        smallest `shift` and relative `offset` that would have shown; `checks`; `floors`; `nested`;
        `next_runs`; `warnings`.

    Raises:
        InputError: an arm is not in the table or has too few sizes, or the floor cannot be pinned.
    """
    table = as_table(table)
    warnings = _check_arms(table, first, second, effect, level)
    data = shift.two_arms(table, first, second, _checked_floor(table, first, second, floor))
    main, refits = _estimates(data, table, first, second)
    floors = second_views.shifts_at_floors(data, level)
    overlap = _overlap_warnings(data, first, second)
    evidence = verdicts.Evidence(
        arms=(first, second),
        main=main,
        checks=verdicts.judge_checks(refits, floors, main, level, effect),
        level=level,
        effect=effect,
        p_wild=shift.wild_bootstrap(main, data, bootstrap, seed) if bootstrap else None,
        nested=second_views.nested_laws(table, first, second, floor),
        c_range=(float(table.c.min()), float(table.c.max())),
        obstacle=_obstacle(data, overlap),
    )
    shown = _as_fields(evidence, data, target_c)
    return plain(shown | {"floors": floors, "warnings": [*warnings, *overlap]})


def _as_fields(e: verdicts.Evidence, data: TwoArms, target_c: float | None) -> dict:
    """Decides the verdict and collects the JSON fields of a comparison."""
    verdict, reason = verdicts.decide(e)
    detectable = smallest_shift(e.main, e.level)
    return {
        "arms": list(e.arms),
        "verdict": verdict,
        "reason": reason,
        "shift": _shift(e.main, data, e.level, e.p_wild),
        "pairing": _pairing(e.main, data),
        "gain": _gain(e.main, data, e.level, target_c),
        "target_c": target_c,
        "effect": e.effect,
        "detectable": detectable,
        "power": {"shift": detectable, "offset": verdicts.smallest_offset(e.main, e.level)},
        "checks": e.checks,
        "nested": e.nested,
        "next_runs": settling_runs(e.main, data, e.effect, e.level),
    }


def _shift(main: ShiftEstimate, data: TwoArms, level: float, p_wild) -> dict:
    """Collects the JSON fields of the estimate."""
    return {
        "s": main.s,
        "se": main.se,
        "interval": main.interval(level),
        "p": main.p,
        "p_both": main.p_both,
        "p_bootstrap": p_wild,
        "level": level,
        "tau": main.tau,
        "at_c": float(np.exp(data.ln_c0)),
        "baseline": main.baseline,
        "floor": None if data.ln_floor is None else float(np.exp(data.ln_floor)),
        "unit": "pairs" if main.paired else "cells" if data.seeds.max() > 1 else "runs",
        "degrees_of_freedom": main.degrees,
        "n_runs": int(data.seeds.sum()),
    }


def _pairing(main: ShiftEstimate, data: TwoArms) -> dict | None:
    """Collects what the pairs of cells share and save; None without pairs."""
    if data.pairs is None:
        return None
    f, _ = shift.curve_jacobian(main.baseline, main.theta[None], data)
    size = len(main.theta)
    unpaired, _ = pairs.error_variance(None, data.weight, data.y - f, size)
    return {
        "pairs": len(data) // 2,
        "used": main.paired,
        "seed_correlation": data.pairs.correlation,
        "cell_correlation": pairs.residual_correlation(
            data.pairs, data.weight, (data.y - f)[0], size
        ),
        "variance_ratio": main.variance / float(unpaired[0]),
    }


def _checked_floor(table: Table, first: str, second: str, floor: float | None) -> float | None:
    """Checks that a floor is below the losses of both arms."""
    if floor is None:
        return None
    least = min(table.arm(arm).loss.min() for arm in (first, second))
    if not 0 < floor < least:
        raise InputError(
            f"--floor={floor} must be positive and below the smallest loss, {least:.4f}; "
            f"use {0.8 * least:.2f}"
        )
    return floor


def _check_arms(table: Table, first: str, second: str, effect, level) -> list[dict]:
    """Checks the request; lists the warnings that precede any estimate."""
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
    return warnings


def _fits(data: TwoArms) -> dict[str, ShiftEstimate]:
    """Estimates the shift under each baseline; on a surface if L is no function of C."""
    if shift.is_off_curve(data):
        if data.ln_floor is not None:
            raise InputError(
                f"--floor={np.exp(data.ln_floor):g} pins E of a law in c, and the tokens per "
                "parameter of these arms vary at equal c; leave --floor out"
            )
        kinds = ["surface"]
    else:
        kinds = ["quadratic", "cubic", "floor"]
    fits = {k: shift.estimate_shift(k, data) for k in kinds}
    fits = {k: v for k, v in fits.items() if v is not None}
    if not fits:
        linear = shift.estimate_shift("power", data)
        fits = {} if linear is None else {"power": linear}
    if data.ln_floor is not None and "floor" in fits:
        # A pinned floor is the curve that was asked for; the others are checks.
        fits = {"floor": fits.pop("floor"), **fits}
    return fits


def _estimates(data: TwoArms, table: Table, first: str, second: str):
    """Estimates the shift: (main estimate, {check: refit}).

    The main one is selected by AICc, polynomials before other baselines.

    Raises:
        InputError: no baseline could be estimated.
    """
    fits = _fits(data)
    if not fits:
        raise InputError(
            f"arms {first} and {second} of {table.name} have too few cells for the test; train at "
            "least 3 compute budgets in each arm; seeds of one cell count once"
        )
    shapes = [fits[k] for k in ("quadratic", "cubic") if k in fits] or list(fits.values())
    # A pinned floor comes first and is the curve that was asked for.
    pinned = next(iter(fits)) == "floor"
    main = fits["floor"] if pinned else min(shapes, key=lambda e: e.aicc)
    return main, _checks(fits, main, data)


def _checks(fits: dict, main: ShiftEstimate, data: TwoArms) -> dict[str, ShiftEstimate]:
    """Repeats the estimate with other baselines and without the smallest and the largest size."""
    checks = {f"{name} baseline": refit for name, refit in fits.items() if refit is not main}
    # With n in the table its sizes are held out, otherwise its budgets.
    size = data.ln_n if data.ln_n is not None else data.x
    ends = {"without the smallest size": size > size.min() + 0.05,
            "without the largest size": size < size.max() - 0.05}  # fmt: skip
    for name, rows in ends.items():
        part = data.take(rows)
        kind = "quadratic" if main.baseline == "cubic" else main.baseline
        if kind != "surface" and min(part.budgets()) < 3:
            kind = "power"
        checks[name] = shift.estimate_shift(kind, part)
    return {name: refit for name, refit in checks.items() if refit is not None}


def _obstacle(data: TwoArms, overlap: list[dict]) -> str | None:
    """Says why these runs cannot show that a factor is the same at every scale, or None."""
    if min(data.budgets()) < 3:
        return "an arm has fewer than 3 compute budgets"
    codes = {w["code"] for w in overlap}
    if "disjoint_compute" in codes:
        return "the arms hardly share a range of compute"
    if "little_overlap" in codes:
        return "the arms' losses hardly overlap"
    return None


def _gain(main: ShiftEstimate, data: TwoArms, level: float, target_c: float | None) -> list[dict]:
    """Lists k with its interval at five budgets over the data, and at the target."""
    x = np.linspace(data.x.min(), data.x.max(), 5)
    if target_c is not None:
        if not target_c > 0:
            raise InputError(f"--target_c={target_c} must be positive FLOPs; use 1e18")
        x = np.append(x, np.log(target_c) - data.ln_c0)
    columns = [x + data.ln_c0, *main.log_gain(x, level)]
    return [
        dict(zip(("c", "k", "low", "high"), row, strict=True))
        for row in np.exp(np.stack(columns, axis=1))
    ]


def _overlap_warnings(data: TwoArms, first: str, second: str) -> list[dict]:
    """Warns if the arms' losses or budgets hardly overlap, so that the shift is extrapolated."""
    warnings = []
    losses, share = _spans(data, data.y)
    if share <= 0.5:
        warnings.append(
            fit_warning(
                "little_overlap",
                f"the losses of {first} ({losses[0]}) and {second} ({losses[1]}) hardly overlap, "
                "so their compute factor is extrapolated; train the better arm at less compute",
            )
        )
    budgets, share = _spans(data, data.x + data.ln_c0)
    if share <= 0.5:
        warnings.append(
            fit_warning(
                "disjoint_compute",
                f"the FLOPs of {first} ({budgets[0]}) and {second} ({budgets[1]}) hardly overlap, "
                "so nothing is known about both at one scale; train both at the same budgets",
            )
        )
    return warnings


def _spans(data: TwoArms, logs: np.ndarray) -> tuple[list[str], float]:
    """Formats the range of each arm, and computes the shared part of the shorter one."""
    arms = [logs[data.z == arm] for arm in (0.0, 1.0)]
    shared = min(a.max() for a in arms) - max(a.min() for a in arms)
    words = [f"{np.exp(a.min()):.3g} to {np.exp(a.max()):.3g}" for a in arms]
    return words, shared / max(min(np.ptp(a) for a in arms), 1e-300)


def settling_runs(main: ShiftEstimate, data: TwoArms, effect: float, level: float) -> list[dict]:
    """Lists the three cheapest sets of runs after which a shift of `effect` would be detectable.

    Candidates are further seeds of every cell and up to four larger sizes, each with twice the
    compute of the previous one, in both arms. [] if the shift is detectable already.
    """
    if smallest_shift(main, level) <= effect:
        return []
    cost = float(np.exp(data.x + data.ln_c0).sum())
    before = shift.shift_error(main, [(data, 0)])
    options = []
    for sizes in range(MORE_SIZES + 1):
        larger = _larger_budgets(data, sizes)
        larger_cost = float(np.exp(larger.x + data.ln_c0).sum())
        # Each new size is two further cells, or one pair.
        enough = replace(main, degrees=main.degrees + (1 if main.paired else 2) * sizes)
        for seeds in range(MORE_SEEDS + 1):
            # New sizes get one run, plus as many seeds as are added to the other cells.
            parts = [(data, seeds), *([(larger, seeds)] if sizes else [])]
            se = shift.shift_error(main, parts) * main.se / before
            detectable = smallest_shift(enough, level) * se / main.se
            if detectable <= effect:
                flops = seeds * cost + (1 + seeds) * larger_cost
                options.append(_option(data, sizes, seeds, detectable, flops))
                break
    return sorted(options, key=lambda o: o["flops"])[:MAX_OPTIONS]


def _option(data: TwoArms, sizes: int, seeds: int, detectable: float, flops: float) -> dict:
    """Describes one set of further runs, its cost and the shift that it makes detectable."""
    top = float(np.exp(data.x.max() + data.ln_c0))
    words = []
    if seeds:
        words.append(f"{seeds} more seed{'s' * (seeds > 1)} of every cell in both arms")
    if sizes:
        grown = ", ".join(f"{top * 2 ** (i + 1):.3g}" for i in range(sizes))
        words.append(f"{1 + seeds} run{'s' * (seeds > 0)} an arm at {grown} FLOPs")
    runs = seeds * len(data) + sizes * 2 * (1 + seeds)
    return {"add": " and ".join(words), "runs": runs, "flops": flops, "detectable": detectable}


def _larger_budgets(data: TwoArms, sizes: int) -> TwoArms:
    """Makes one run an arm at each larger budget, with n and d growing equally."""
    top = int(data.x.argmax())
    step = np.repeat(np.arange(1, sizes + 1), 2) * np.log(2.0)
    larger = data.take(np.full(2 * sizes, top))
    grown = {"x": larger.x + step, "z": np.tile([0.0, 1.0], sizes)}
    grown["seeds"] = np.ones(2 * sizes, int)
    if larger.ln_n is not None and larger.ln_d is not None:
        grown |= {"ln_n": larger.ln_n + step / 2, "ln_d": larger.ln_d + step / 2}
    return replace(larger, **grown)
