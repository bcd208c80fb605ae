"""Converts results to JSON and to lines of text."""

import math

import numpy as np

from lmscale_jax.scaling import laws


def plain(value):
    """Converts numpy types to Python's and non-finite floats to None, recursively."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fit_as_json(result) -> dict:
    """Converts a FitResult to plain values; docs/fits.md describes the fields."""
    law, params = result.law, result.params
    spans = {} if result.draws is None else {
        "unit": result.draws.unit,
        "clusters": result.draws.clusters,
        "kind": result.draws.kind,
        "degrees_of_freedom": result.draws.degrees,
        "draws": len(result.draws.theta),
        "linear": result.draws.linear,
        "level": result.level,
    }  # fmt: skip
    shown = dict(params)
    shown.setdefault("E", 0.0)
    return plain(
        {
            "law": law.name,
            "formula": formula_text(law),
            "input": result.table.name,
            "points": result.table.points,
            "n_points": len(result.table),
            "n_runs": len(set(result.table.run_id)),
            "params": shown,
            "compound": result.compound,
            "negative_exponents": negative_convention(law, params),
            "floor": "pinned" if law.floor == "pinned" else law.floor,
            "r_star": result.r_star,
            "objective": result.objective,
            "delta": result.delta if math.isfinite(result.delta) else None,
            "intervals": result.intervals,
            "resampling": spans,
            "alternatives": result.alternatives,
            "diagnostics": result.diagnostics,
            "warnings": list(result.warnings),
        }
    )


def formula_text(law: laws.Law) -> str:
    """Writes a law as text, such as "L = E + A n^-alpha + B d^-beta"."""
    pairs = zip(law.columns, law.coefficients, law.exponents, strict=True)
    parts = [f"{a} {x}^-{s}" for x, a, s in pairs]
    return "L = " + " + ".join(([] if law.floor == "none" else ["E"]) + parts)


def negative_convention(law: laws.Law, params: dict) -> dict:
    """Converts parameters to the convention L = exp(E) + exp(A) n^alpha + ..."""
    params_negative = {}
    with np.errstate(divide="ignore"):
        if "E" in params:
            params_negative["E"] = float(np.log(params["E"]))
        for a, s in zip(law.coefficients, law.exponents, strict=True):
            params_negative[a] = float(np.log(params[a]))
            params_negative[s] = -params[s]
    return params_negative


def fit_lines(result) -> list[str]:
    """Formats a fit: parameters with intervals, alternatives and warnings."""
    output = [f"{formula_text(result.law)}   {len(result.table)} points of "
             f"{len(set(result.table.run_id))} runs ({result.table.name})"]  # fmt: skip
    for name, value in (result.params | result.compound).items():
        output.append(f"  {name:<6} {value:<12.6g} {_interval(result, name)}")
    rows = result.diagnostics["starts"]["rows"]
    if rows < len(result.table):
        output.append(f"  fitted to all rows from the minima of {rows:,} drawn at random")
    output += residual_lines(result.diagnostics)
    if result.r_star is not None:
        span = result.diagnostics["r_star_interval"]
        shown = "" if span is None else f"[{span[0]:.5g}, {span[1]:.5g}]"
        output.append(f"  R*     {result.r_star:<12.6g} {shown}")
    if result.draws is not None:
        draws = result.draws
        kind = f"t with {draws.degrees} degrees of freedom" if draws.kind == "student" else "pairs"
        kind += ", single Newton steps" if draws.linear else ""
        stated = "no" if draws.too_few else f"{100 * result.level:g} %"
        output.append(
            f"  {stated} intervals, {len(draws.theta)} draws of {draws.clusters} {draws.unit}s "
            f"({kind})"
        )
    for name, other in result.alternatives.items():
        shown = ", ".join(f"{k} {other['params'][k]:.5g}" for k in result.params)
        delta, F = other["delta"], other["objective"]
        output.append(f"  {name:<14} delta {delta:.4g}  F {F:.9g}  {shown}")
    return output + warning_lines(result.warnings)


def residual_lines(diagnostics: dict) -> list[str]:
    """Formats how well the law fits, beside the scatter of seeds where that is known."""
    rms, lack = diagnostics.get("rms_log_residual"), diagnostics.get("lack_of_fit")
    if rms is None:
        return []
    seeds = f"; seeds scatter by {100 * lack['rms_seed']:.2g} %" if lack else ""
    return [f"  residuals: {100 * rms:.2g} % of the loss (rms){seeds}"]


def _interval(result, name: str) -> str:
    interval = result.intervals.get(name)
    return "" if interval is None else f"[{interval[0]:.5g}, {interval[1]:.5g}]"


def warning_lines(warnings) -> list[str]:
    """Formats warnings, one line each."""
    return [f"  warning {w['code']}: {w['message']}" for w in warnings]


def forecast_lines(prediction: dict, printed_codes) -> list[str]:
    """Formats a forecast without the warnings whose codes are already printed."""
    parts = ", ".join(f"{k} {100 * v:.2g} %" for k, v in prediction["parts"].items())
    return [
        f"forecast: {prediction['loss']:.4f} nats/token, {100 * prediction['level']:g} % interval "
        f"{prediction['low']:.4f} to {prediction['high']:.4f}",
        f"  {math.exp(prediction['log_distance']):.3g} times the largest run's compute; standard "
        f"deviations: {parts}",
        *warning_lines([w for w in prediction["warnings"] if w["code"] not in printed_codes]),
    ]


def advice_lines(advice: dict) -> list[str]:
    """Formats the allocation of new runs."""
    output = [
        f"advice: {advice['spent']:.3g} FLOPs reduce the standard deviation at the target from "
        f"{100 * advice['sd_before']:.2g} % to {100 * advice['sd_after']:.2g} %"
    ]
    return output + [
        f"  {row['runs']} x n {row['n']:.3g}, d {row['d']:.3g} ({row['c']:.3g} FLOPs)"
        for row in advice["allocation"]
    ]


def plan_lines(plan: dict) -> list[str]:
    """Formats the compute optimum of a budget."""
    output = [f"compute-optimal for {plan['c']:.3g} FLOPs:"]
    for name in ("n", "d", "tokens_per_parameter", "loss"):
        span = plan["intervals"].get(name)
        shown = "" if span is None else f"[{span[0]:.4g}, {span[1]:.4g}]"
        output.append(f"  {name:<21}{plan[name]:<12.5g} {shown}")
    return output


def verdict_lines(verdict: dict) -> list[str]:
    """Formats a comparison of two arms."""
    shift, (first, second) = verdict["shift"], verdict["arms"]
    output = [
        f"verdict: {verdict['verdict']}",
        f"  {verdict['reason']}",
        f"  baseline {shift['baseline']}, {shift['n_runs']} runs, unit {shift['unit']}, "
        f"{shift['degrees_of_freedom']} degrees of freedom, bootstrap p {shift['p_bootstrap']}",
        *([f"  {pairing_sentence(verdict['pairing'])}"] if verdict["pairing"] else []),
        f"  would have shown: a shift of {verdict['power']['shift']:.2g}, a constant factor of "
        f"{1 + verdict['power']['offset']:.3g}",
        f"  k = compute of {first} over compute of {second} at equal loss:",
    ]
    for row in verdict["gain"]:
        output.append(f"    c {row['c']:.3g}: {row['k']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    for check in verdict["checks"]:
        outcome = "holds" if check["holds"] else "does not hold"
        output.append(
            f"  {check['check']}: s {check['s']:+.3f} ± {check['se']:.3f}; {outcome}: "
            f"{check['claim']}"
        )
    output += _nested_lines(verdict["nested"])
    for option in verdict["next_runs"]:
        output.append(
            f"  next runs: {option['add']} ({option['runs']} runs, {option['flops']:.3g} FLOPs; "
            f"detects {option['detectable']:.2g})"
        )
    return output + warning_lines(verdict["warnings"])


def pairing_sentence(pairing: dict) -> str:
    """Words how the arms' cells correlate, and what that saves."""
    correlations = [
        f"{name} by {pairing[key]:.2f}"
        for name, key in (("seeds", "seed_correlation"), ("cells", "cell_correlation"))
        if pairing[key] is not None
    ]
    correlated = f", which correlate between the arms: {', '.join(correlations)}"
    effect = (
        f"the test is of their differences, of {pairing['variance_ratio']:.2f} times the variance "
        "of independent cells"
        if pairing["used"]
        else "too little for a test of differences, which has fewer degrees of freedom"
    )
    return (
        f"{pairing['pairs']} pairs of cells with equal size, tokens and seeds"
        f"{correlated if correlations else ''}; {effect}"
    )


def _nested_lines(nested: dict | None) -> list[str]:
    """Formats what distinguishes a change of exponents from one of floors."""
    if nested is None:
        return []
    aicc = {k: v["aicc"] for k, v in nested["models"].items() if v["aicc"] is not None}
    models = ", ".join(f"{k} {v - min(aicc.values()):.1f}" for k, v in aicc.items())
    reading = nested["reading"] or "undecided between exponents and floors"
    return [f"  joint laws, AICc above the best: {models}; a change with scale is: {reading}"]


def isoflop_lines(summary: dict, table) -> list[str]:
    """Formats N* = k C^a and the minima of each method."""
    output = [f"n* = k c^a from {len(table)} runs ({table.name})"]
    for name, method in summary["methods"].items():
        span = method["intervals"].get("a")
        shown = "" if span is None else f" [{span[0]:.4f}, {span[1]:.4f}]"
        output.append(f"  {name:<9} a {method['a']:.4f}{shown}  k {method['k']:.4g}")
        for b in method["budgets"]:
            if b["n_star"] is not None:
                bias = "" if b["bias"] is None else f", bias {b['bias']:.3f}"
                output.append(f"    c {b['c']:.3g}: n* {b['n_star']:.4g}{bias}")
    return output + warning_lines(summary["warnings"])


def table_lines(results: dict) -> list[str]:
    """Formats one row per data set: points, parameters, objective and codes of warnings."""
    names = list(next(iter(results.values())).params)
    output = [f"{'data set':<28}{'points':>7}" + "".join(f"{n:>11}" for n in names) + "  F"]
    for name, result in results.items():
        values = "".join(f"{v:>11.4g}" for v in result.params.values())
        codes = ", ".join(dict.fromkeys(w["code"] for w in result.warnings))
        output.append(f"{name:<28}{len(result.table):>7}{values}  {result.objective:.6g}  {codes}")
    return output
