"""Writes the page of a ladder as one HTML file, from its records."""

from pathlib import Path

from lmscale_jax.files import read_json
from lmscale_jax.guards.record import NAME as GUARDS_FILE
from lmscale_jax.guards.record import read_judgements
from lmscale_jax.ladders import arm_checks, results
from lmscale_jax.ladders.grid import short_count
from lmscale_jax.ladders.plan import LadderPlan, describe_dtype
from lmscale_jax.ladders.step_time import seconds_sentence
from lmscale_jax.ladders.verdict import NOT_ENOUGH
from lmscale_jax.reports import ladder_plots as figures
from lmscale_jax.reports.page import Page
from lmscale_jax.scaling.summary import pairing_sentence


def write_ladder_report(
    plan: LadderPlan,
    workdir: Path,
    rows: list[dict],
    forecast: dict | None,
    verdict: dict,
    command: str,
) -> Path:
    """Writes report/index.html and its figures as PNG; returns the path of the page.

    Args:
      rows: all rows of `results.csv`.
      forecast: forecast.json, or None without a held-out rung.
      verdict: verdict.json.
      command: repeats the ladder; the page shows it.
    """
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    arms = [plan.ladder["baseline"]]
    arms += [arm for arm in sorted(plan.ladder["arms"]) if arm not in arms]
    tuned, _ = results.choose_tuned(results.finished_rows(rows))
    fits, reasons = figures.fit_arms(arms, tuned, plan.ladder["fit"]["n"])
    page = Page(verdict["question"] or "A ladder")
    page.say(verdict["answer"], "answer")
    _add_warnings(page, verdict)
    page.figures([figures.plot_ladder_losses(arms, tuned, fits, forecast, folder / "losses.png")])
    page.say(
        "Points: runs; diamonds: held-out runs; lines: laws fitted to the anchors, with 95 % "
        "bands; bars: the forecast, written before the held-out rung was trained."
    )
    if forecast:
        _add_forecast(page, forecast)
    _add_comparisons(page, verdict, folder)
    _add_next_runs(page, verdict)
    _add_runs(page, rows, folder)
    page.head("Learning curves")
    page.figures([figures.plot_training_curves(arms, tuned, workdir, folder / "curves.png")])
    _add_laws(page, arms, fits, reasons, folder)
    _add_settings(page, plan, verdict)
    _add_guards(page, plan, workdir)
    _add_reproduction(page, plan, workdir, rows, command)
    return page.write(folder)


def _add_warnings(page: Page, verdict: dict) -> None:
    for warning in verdict["warnings"]:
        page.say(warning["message"], "warn")
    for run in verdict["left_out"]:
        reason = f": {run['why']}" if run["why"] else ""
        page.say(f"Run {run['run_id']} is left out, it {run['status']}{reason}", "warn")
    unfinished = verdict["runs"].get("planned", 0) + verdict["runs"].get("running", 0)
    if unfinished and not verdict["forecast"]:
        page.say(f"{unfinished} run(s) of the plan are not finished.", "warn")


def _add_forecast(page: Page, forecast: dict) -> None:
    page.head("Forecast and outcome")
    rows = []
    for arm, law in forecast["arms"].items():
        score = (forecast.get("scores") or {}).get(arm)
        interval = f"{law['low']:.4f} to {law['high']:.4f}"
        row = [arm, f"{law['loss']:.4f}", interval, law["law"], law["n_points"]]
        if score:
            row += [
                f"{score['loss']:.4f}", f"{100 * score['relative_error']:+.2f} %",
                "inside the interval" if score["inside"] else "outside the interval",
            ]  # fmt: skip
        else:
            row += ["not trained yet", "", ""]
        rows.append(row)
    level = next(iter(forecast["arms"].values()))["level"]
    interval = f"{level:.0%} interval"
    head = [
        "arm",
        "forecast",
        interval,
        "law",
        "points",
        "measured loss",
        "error",
        "measured loss is",
    ]
    page.table(head, rows)
    page.say(
        f"Written {forecast['made']}, before the held-out rung was trained. SHA-256 of the inputs: "
        f"{forecast['inputs_sha256'][:16]}; of the forecast: {forecast['sha256'][:16]}."
    )


def _add_comparisons(page: Page, verdict: dict, folder: Path) -> None:
    page.head("The comparison")
    path = figures.plot_compute_factors(verdict["comparisons"], folder / "factors.png")
    if path:
        page.figures([path])
    for comparison in verdict["comparisons"]:
        first, second = comparison["arms"]
        page.say(f"{second} against {first}: {comparison['verdict']}. {comparison['reason']}.")
        if comparison.get("pairing"):
            page.say(f"{pairing_sentence(comparison['pairing'])}.")
        if comparison["gain"]:
            rows = [[f"{g['c']:.3g}", g["k"], g["low"], g["high"]] for g in comparison["gain"]]
            page.table(["FLOPs", f"compute of {first} / of {second}", "low", "high"], rows)
        _add_seconds(page, comparison)
        if comparison["checks"]:
            rows = [
                [c["check"], c.get("s"), c.get("se"), c.get("p"), c.get("claim", ""),
                 "yes" if c["holds"] else "NO"]
                for c in comparison["checks"]
            ]  # fmt: skip
            page.table(["check", "shift", "standard error", "p", "claim", "holds"], rows)


def _add_seconds(page: Page, comparison: dict) -> None:
    """Appends k(C) in seconds, and the step times from which it follows."""
    seconds, (first, second) = comparison["seconds"], comparison["arms"]
    page.say(seconds_sentence(comparison), "warn" if seconds["reason"] else "")
    if seconds["gain"]:
        rows = [
            [f"{g['c']:.3g}", g["k"], *(_or_unknown(g[x]) for x in ("low", "high"))]
            for g in seconds["gain"]
        ]
        page.table(["FLOPs", f"seconds of {first} / of {second}", "low", "high"], rows)
    if seconds["steps"]:
        rows = [
            [short_count(s["size"]), s["ratio"], *(_or_unknown(s[x]) for x in ("low", "high")),
             s["runs"]]
            for s in seconds["steps"]
        ]  # fmt: skip
        page.table(["size", f"time of a token, {second} / {first}", "low", "high", "runs"], rows)


def _or_unknown(value: float | None) -> float | str:
    return "unknown" if value is None else value


def _add_next_runs(page: Page, verdict: dict) -> None:
    page.head("What to run next")
    if not verdict["next_runs"]:
        page.say(
            "Add sizes, then seeds: these runs cannot show a difference of the usual size."
            if NOT_ENOUGH in str(verdict["verdict"])
            else "Nothing: these runs could have shown the effect in question."
        )
        return
    rows = [
        [plan["arm"], plan["add"], plan["runs"], f"{plan['flops']:.3g}",
         f"{plan['detectable']:.3g}"]
        for plan in verdict["next_runs"]
    ]  # fmt: skip
    page.table(["arm", "add", "runs", "FLOPs", "detectable shift"], rows, kind="wide")


def _add_runs(page: Page, rows: list[dict], folder: Path) -> None:
    page.head("Runs")
    head = ["arm", "size", "role", "layers x width", "parameters", "non-embedding", "tokens",
            "epochs", "FLOPs", "seed", "tuned", "status", "held-out loss", "± windows"]  # fmt: skip
    cells = [
        [
            row["variant"], short_count(row["size"]), row["role"],
            f"{row['n_layers']} x {row['d_model']}",
            f"{row['n_total']:,}", f"{row['n_non_embedding']:,}", f"{row['tokens']:,}",
            "" if row["epochs"] is None else f"{row['epochs']:.3g}", f"{row['flops']:.3g}",
            row["seed"], ", ".join(f"{k}={v:g}" for k, v in row["tune"].items()), row["status"],
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            "" if row["val_loss_sem"] is None else f"{row['val_loss_sem']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    page.table(head, cells, folder / "runs.csv")


def _add_laws(page: Page, arms: list[str], fits: dict, reasons: dict, folder: Path) -> None:
    page.head("The laws")
    for arm, reason in reasons.items():
        page.say(f"{arm} has no law: {reason}", "warn")
    path = figures.plot_residuals(arms, fits, folder / "residuals.png")
    page.figures([path] if path else [])
    for arm, result in fits.items():
        values = ", ".join(f"{k} = {v:.4g}" for k, v in result.params.items())
        page.say(f"{arm}: {result.law.name}, {values}; {len(result.table)} runs.")
        for warning in result.warnings:
            page.say(f"{arm}: {warning['message']}", "warn")


def _add_settings(page: Page, plan: LadderPlan, verdict: dict) -> None:
    page.head("What differs between the arms")
    rows = [
        [arm, key, str(value)]
        for arm, changed in verdict["differences"].items()
        for key, value in (changed or {"none": "as in config.run"}).items()
    ]
    page.table(["arm", "key", "value"], rows, kind="wide")
    switch = ", ".join(plan.ladder["switch"])
    page.say(
        f"The switch is {switch}. Everything else is the same for all arms of a size: "
        f"{describe_dtype(plan)}."
    )


def _add_guards(page: Page, plan: LadderPlan, workdir: Path) -> None:
    page.head("Checks of the arms before the first run")
    settings, arms = arm_checks.guard_settings(plan), list(plan.ladder["arms"])
    judged = read_judgements(workdir / GUARDS_FILE, settings, arms)
    if judged:
        rows = [[j.guard, j.arm, j.status, j.text, f"{j.seconds:.1f}"] for j in judged]
        page.table(["check", "arm", "result", "measured", "seconds"], rows, kind="wide")
    else:
        page.say("The guards did not run (config.guards.mode, or a ladder of before).")
    for each in judged:
        if each.status == "warned":
            page.say(f"Guard {each.guard}, arm {each.arm}: {each.text}", "warn")
    if fault := arm_checks.held_out_fault(plan, workdir):
        page.say(fault, "warn")


def _add_reproduction(
    page: Page, plan: LadderPlan, workdir: Path, rows: list[dict], command: str
) -> None:
    page.head("How to repeat this")
    page.code(command)
    first = next((row for row in rows if row["status"] == "finished"), None)
    if first is None:
        return
    record = read_json(workdir / "runs" / first["run_id"] / "run.json")
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    code = record.get("code") or {}
    changed = " with changes" if code.get("changed") else ""
    revision = code.get("commit", "no git checkout")[:12]
    hashes = ", ".join(results.code_hashes(plan, workdir)) or "not recorded"
    page.say(
        f"Plan {plan.id}. {versions}. Code {revision}{changed}, hash of the package: {hashes}. "
        f"Device: {record['device']['kind']}. Held-out tokens: {record['final']['val_tokens']:,}, "
        f"fingerprint {record['data']['val_fingerprint'][:16]}, the same for every run."
    )
