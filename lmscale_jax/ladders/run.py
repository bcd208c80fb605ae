"""Runs a ladder from its config to its verdict: plan, anchors, forecast, held-out rung, report."""

from collections.abc import Callable
from pathlib import Path

from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.ladders import (
    arm_checks,
    executors,
    forecasts,
    plan,
    preview,
    results,
    scheduler,
    verdict,
)
from lmscale_jax.ladders.grid import HELD_OUT, Cell
from lmscale_jax.ladders.plan import LadderPlan
from lmscale_jax.train import run_dir

# (plan, workdir, rows of results.csv, forecast.json or None, verdict.json) -> path of the page.
WriteReport = Callable[[LadderPlan, Path, list[dict], dict | None, dict], Path]


def preview_ladder(config, workdir: Path, only: list[str]) -> str:
    """Describes the cells of a ladder and their cost. Writes nothing but the prepared data."""
    ladder_plan = _make_plan(config, print)
    if (workdir / "plan.json").exists():
        plan.check_plan(ladder_plan, workdir)
    slots = executors.executor_slots(ladder_plan.ladder["executor"])
    return preview.preview_table(ladder_plan, plan.select_cells(ladder_plan, only), workdir, slots)


def run_ladder(
    config,
    workdir: Path,
    only: list[str],
    until: str,
    write_report: WriteReport,
    say: Callable[[str], None] = print,
    make_executor: Callable = executors.make_executor,
    code_change: str = "",
) -> str:
    """Trains and judges a ladder, and returns a closing message. Finished work is not repeated.

    Args:
      only: terms that select cells, as in --only; with anchors alone, nothing is forecast.
      until: "forecast" or "verdict", the last step to take.
      write_report: called once, after the verdict is written.
      code_change: why runs that another state of this package trained are comparable; "": they are
        refused.

    Raises InputError on bad input, RunFailed where no run finished, and
    Interrupted on SIGTERM and SIGINT.
    """
    ladder_plan = _make_plan(config, say)
    previous = plan.check_plan(ladder_plan, workdir)
    selected = plan.select_cells(ladder_plan, only)
    slots = executors.executor_slots(ladder_plan.ladder["executor"])
    preview.check_hours(ladder_plan, selected, workdir, slots)
    lock = run_dir.RunLock(workdir)
    try:
        if previous and forecasts.held_out_begun(previous, workdir):
            _check_held_out_cells(ladder_plan, previous)
        results.check_code(ladder_plan, selected, workdir, code_change)
        arm_checks.check_before(ladder_plan, selected, workdir, say)
        plan.write_plan(ladder_plan, previous, workdir)
        executor = make_executor(ladder_plan.ladder["executor"], workdir)
        anchors = [cell for cell in selected if cell.role != HELD_OUT]
        scheduler.run_cells(ladder_plan, anchors, workdir, executor, say)
        if only and anchors == selected:
            results.write_results(
                results.result_rows(ladder_plan, workdir), workdir / "results.csv"
            )
            return f"trained {len(selected)} cell(s); run without --only to continue the ladder"
        forecast = None
        if ladder_plan.with_role(HELD_OUT):
            forecast = _write_forecast(ladder_plan, workdir, say)
        if until == "forecast":
            return f"the forecast is in {workdir / 'forecast.json'}"
        if forecast:
            held_out = [c for c in _held_out(ladder_plan, forecast) if c in selected]
            scheduler.run_cells(ladder_plan, held_out, workdir, executor, say)
        return _conclude(ladder_plan, workdir, forecast, write_report)
    finally:
        lock.release()


def _make_plan(config, say) -> LadderPlan:
    """Makes a plan. Raises InputError where this machine, if it trains, cannot tell arms apart."""
    ladder_plan = plan.make_plan(config, say)
    if executors.trains_on_cpu(ladder_plan.ladder["executor"]):
        plan.check_products(ladder_plan, "cpu")
    return ladder_plan


def _check_held_out_cells(ladder_plan: LadderPlan, previous: LadderPlan) -> None:
    """Raises InputError where a plan drops held-out cells of a forecast that is in use."""
    ids = {cell.id for cell in ladder_plan.with_role(HELD_OUT)}
    dropped = sorted({cell.id for cell in previous.with_role(HELD_OUT)} - ids)
    if dropped:
        raise InputError(
            f"config.tokens.held_out, config.tune or config.seeds drops {len(dropped)} held-out "
            f"run(s) of the forecast ({dropped[0]}); use their previous values, or a new --workdir"
        )


def _write_forecast(ladder_plan: LadderPlan, workdir: Path, say) -> dict:
    """Writes results.csv and forecast.json, and prints the forecasts."""
    rows = results.result_rows(ladder_plan, workdir)
    results.write_results(rows, workdir / "results.csv")
    forecast = forecasts.make_forecast(ladder_plan, workdir, rows)
    say(f"forecast of the held-out rung, fixed {forecast['made']}:")
    for arm, predicted in forecast["arms"].items():
        say(
            f"  {arm}: {predicted['loss']:.4f} nats/token, {predicted['low']:.4f} to "
            f"{predicted['high']:.4f} ({predicted['level']:.0%}), {predicted['law']}"
        )
    return forecast


def _held_out(ladder_plan: LadderPlan, forecast: dict) -> list[Cell]:
    """Returns the held-out cells with the tuned values that the forecast chose for their arm."""
    held_out = ladder_plan.with_role(HELD_OUT)
    return [c for c in held_out if c.tune == forecast["arms"][c.arm]["tune"]]


def _conclude(
    ladder_plan: LadderPlan, workdir: Path, forecast: dict | None, write_report: WriteReport
) -> str:
    """Writes results.csv, scores, verdict.json and the report; returns the closing message."""
    rows = results.result_rows(ladder_plan, workdir)
    results.write_results(rows, workdir / "results.csv")
    if not results.finished_rows(rows):
        raise RunFailed(f"--workdir={workdir}: no run finished; see logs/ and attempts.jsonl")
    if forecast:
        forecast = forecasts.score_forecast(workdir, forecast, rows)
    judgement = verdict.judge_ladder(ladder_plan, workdir, rows, forecast)
    verdict.write_verdict(judgement, workdir)
    report = write_report(ladder_plan, workdir, rows, forecast, judgement)
    lines = [
        f"{arm}: forecast {forecast['arms'][arm]['loss']:.4f}, measured {score['loss']:.4f} "
        f"({'inside' if score['inside'] else 'OUTSIDE'} the interval)"
        for arm, score in (judgement["forecast"] or {}).items()
    ]
    lines += [f"verdict: {judgement['verdict']}", judgement["answer"], f"report: {report}"]
    return "\n".join(lines)
