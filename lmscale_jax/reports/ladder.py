"""The page of a ladder: one self-contained HTML file, from the records alone."""

import json
import shlex
from pathlib import Path

from lmscale_jax.reports import ladder_figures as figures
from lmscale_jax.reports.page import Page
from lmscale_jax.study import results
from lmscale_jax.study.cells import short
from lmscale_jax.study.plan import Plan
from lmscale_jax.study.verdict import NOT_ENOUGH


def write(
    plan: Plan,
    workdir: Path,
    found: list[dict],
    forecast: dict | None,
    verdict: dict,
    argv: list[str],
) -> Path:
    """report/index.html, with its figures beside it as PNG.

    Args:
      found: rows of `study.results.rows`.
      forecast: forecast.json, or None without a held-out rung.
      verdict: of `study.verdict.judge`.
      argv: the arguments of the command, to say how it is repeated.
    """
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    arms = [plan.ladder["baseline"]]
    arms += [arm for arm in sorted(plan.ladder["arms"]) if arm not in arms]
    rows, _ = results.chosen(results.finished(found))
    fits, without = figures.fits_of(arms, rows, plan.ladder["fit"]["n"])
    page = Page(verdict["question"] or "A ladder")
    page.say(verdict["answer"], "answer")
    _notes(page, verdict)
    page.figures([figures.losses(arms, rows, fits, forecast, folder / "losses.png")])
    page.say(
        "Points: runs; diamonds: held-out runs; lines: laws fitted to the anchors, with 95 % "
        "bands; bars: the forecast, written before the held-out rung was trained."
    )
    if forecast:
        _forecast(page, forecast)
    _comparisons(page, verdict, folder)
    _next(page, verdict)
    _cells(page, found, folder)
    page.head("Learning curves")
    page.figures([figures.curves(arms, rows, workdir, folder / "curves.png")])
    _diagnostics(page, arms, fits, without, folder)
    _differences(page, plan, verdict)
    _reproduce(page, plan, workdir, found, argv)
    return page.write(folder)


def _notes(page: Page, verdict: dict) -> None:
    for warning in verdict["warnings"]:
        page.say(warning["message"], "warn")
    for run in verdict["left_out"]:
        why = f": {run['why']}" if run["why"] else ""
        page.say(f"Run {run['run_id']} is left out, it {run['status']}{why}", "warn")
    planned = verdict["runs"].get("planned", 0) + verdict["runs"].get("running", 0)
    if planned and not verdict["forecast"]:
        page.say(f"{planned} run(s) of the plan are not finished.", "warn")


def _forecast(page: Page, forecast: dict) -> None:
    page.head("Forecast and outcome")
    rows = []
    for arm, one in forecast["arms"].items():
        score = (forecast.get("scores") or {}).get(arm)
        interval = f"{one['low']:.4f} to {one['high']:.4f}"
        said = [arm, f"{one['loss']:.4f}", interval, one["law"], one["n_points"]]
        if score:
            said += [
                f"{score['loss']:.4f}", f"{100 * score['relative_error']:+.2f} %",
                "inside" if score["inside"] else "outside",
            ]  # fmt: skip
        else:
            said += ["not trained yet", "", ""]
        rows.append(said)
    level = next(iter(forecast["arms"].values()))["level"]
    interval = f"{level:.0%} interval"
    head = ["arm", "forecast", interval, "law", "points", "came to", "error", "it is"]
    page.table(head, rows)
    page.say(
        f"Fixed {forecast['made']}, before the held-out rung started; hash of the inputs "
        f"{forecast['inputs_sha256'][:16]}, of the forecast {forecast['sha256'][:16]}."
    )


def _comparisons(page: Page, verdict: dict, folder: Path) -> None:
    page.head("The comparison")
    path = figures.factors(verdict["comparisons"], folder / "factors.png")
    if path:
        page.figures([path])
    for one in verdict["comparisons"]:
        first, second = one["arms"]
        page.say(f"{second} against {first}: {one['verdict']}. {one['reason']}.")
        if one["gain"]:
            rows = [[f"{g['c']:.3g}", g["k"], g["low"], g["high"]] for g in one["gain"]]
            page.table(["FLOPs", f"compute of {first} / of {second}", "low", "high"], rows)
        if one["checks"]:
            rows = [
                [c["check"], c.get("s"), c.get("se"), c.get("p"), "yes" if c["holds"] else "NO"]
                for c in one["checks"]
            ]
            page.table(["check", "shift", "standard error", "p", "holds"], rows)


def _next(page: Page, verdict: dict) -> None:
    page.head("What to run next")
    if not verdict["next_runs"]:
        page.say(
            "More sizes, then more seeds: a difference of usual size is out of reach of these runs."
            if NOT_ENOUGH in str(verdict["verdict"])
            else "Nothing: these runs could have shown the effect that was asked for."
        )
        return
    rows = [
        [one["arm"], one["add"], one["runs"], f"{one['flops']:.3g}", f"{one['detectable']:.3g}"]
        for one in verdict["next_runs"]
    ]
    page.table(["arm", "add", "runs", "FLOPs", "shift it would show"], rows, kind="wide")


def _cells(page: Page, found: list[dict], folder: Path) -> None:
    page.head("Runs")
    head = ["arm", "size", "role", "layers x width", "parameters", "non-embedding", "tokens",
            "epochs", "FLOPs", "seed", "tuned", "status", "held-out loss", "± windows"]  # fmt: skip
    rows = [
        [
            row["variant"], short(row["size"]), row["role"],
            f"{row['n_layers']} x {row['d_model']}",
            f"{row['n_total']:,}", f"{row['n_non_embedding']:,}", f"{row['tokens']:,}",
            "" if row["epochs"] is None else f"{row['epochs']:.3g}", f"{row['flops']:.3g}",
            row["seed"], ", ".join(f"{k}={v:g}" for k, v in row["tune"].items()), row["status"],
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            "" if row["val_loss_sem"] is None else f"{row['val_loss_sem']:.4f}",
        ]
        for row in found
    ]  # fmt: skip
    page.table(head, rows, folder / "runs.csv")


def _diagnostics(page: Page, arms: list[str], fits: dict, without: dict, folder: Path) -> None:
    page.head("The laws")
    for arm, why in without.items():
        page.say(f"{arm} has no law: {why}", "warn")
    path = figures.residuals(arms, fits, folder / "residuals.png")
    page.figures([path] if path else [])
    for arm, result in fits.items():
        said = ", ".join(f"{k} = {v:.4g}" for k, v in result.params.items())
        page.say(f"{arm}: {result.law.name}, {said}; {len(result.table)} runs.")
        for warning in result.warnings:
            page.say(f"{arm}: {warning['message']}", "warn")


def _differences(page: Page, plan: Plan, verdict: dict) -> None:
    page.head("What differs between the arms")
    rows = [
        [arm, key, str(value)]
        for arm, changed in verdict["differences"].items()
        for key, value in (changed or {"nothing": "as config.run has it"}).items()
    ]
    page.table(["arm", "key", "value"], rows, kind="wide")
    switch = ", ".join(plan.ladder["switch"])
    page.say(f"The switch is {switch}; everything else is the same for all arms of a size.")


def _reproduce(page: Page, plan: Plan, workdir: Path, found: list[dict], argv: list[str]) -> None:
    page.head("How to repeat this")
    page.code("python -m lmscale_jax.ladder " + shlex.join(argv))
    first = next((row for row in found if row["status"] == "finished"), None)
    if first is None:
        return
    record = json.loads((workdir / "runs" / first["run_id"] / "run.json").read_text())
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    code = record.get("code") or {}
    changed = " with changes" if code.get("changed") else ""
    page.say(
        f"Plan {plan.id}. {versions}. Code {code.get('commit', 'no git checkout')[:12]}{changed}. "
        f"Device: {record['device']['kind']}. Held-out tokens: {record['final']['val_tokens']:,}, "
        f"fingerprint {record['data']['val_fingerprint'][:16]}, the same for every run."
    )
