"""A ladder from its config to its verdict: plan, anchors, forecast, held-out rung, report."""

from collections.abc import Callable
from pathlib import Path

from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.fleet import drive, estimate, executors
from lmscale_jax.fleet.drive import Stopped
from lmscale_jax.run import record
from lmscale_jax.study import forecasts, plan, results, verdict
from lmscale_jax.study.cells import HELD_OUT, Cell

__all__ = ["Stopped", "preview", "run"]


def preview(config, workdir: Path, only: list[str]) -> str:
    """What a ladder would train and cost. Writes nothing but the prepared data."""
    made = plan.make(config, print)
    if (workdir / "plan.json").exists():
        plan.check(made, workdir)
    slots = executors.slots(made.ladder["executor"])
    return estimate.text(made, plan.select(made, only), workdir, slots)


def run(
    config,
    workdir: Path,
    only: list[str],
    until: str,
    argv: list[str],
    say: Callable[[str], None] = print,
    make_executor: Callable = executors.make,
) -> str:
    """Goes as far as the forecast or the verdict; returns what to say at the end.

    Everything that is done already is left as it is. Raises InputError on bad input, RunFailed
    where no arm has enough finished runs, and Stopped.
    """
    made = plan.make(config, say)
    before = plan.check(made, workdir)
    chosen = plan.select(made, only)
    slots = executors.slots(made.ladder["executor"])
    estimate.check_cap(made, chosen, workdir, slots)
    lock = record.Lock(workdir)
    try:
        if before and forecasts.begun(before, workdir):
            _keep_held_out(made, before)
        plan.write(made, before, workdir)
        executor = make_executor(made.ladder["executor"], workdir)
        anchors = [cell for cell in chosen if cell.role != HELD_OUT]
        drive.run(made, anchors, workdir, executor, say)
        if only and anchors == chosen:
            results.write(results.rows(made, workdir), workdir / "results.csv")
            return f"trained {len(chosen)} cell(s); without --only the ladder goes on"
        forecast = _forecast(made, workdir, say) if made.of(HELD_OUT) else None
        if until == "forecast":
            return f"the forecast is in {workdir / 'forecast.json'}"
        if forecast:
            held = [c for c in _held_out(made, forecast) if c in chosen]
            drive.run(made, held, workdir, executor, say)
        return _close(made, workdir, forecast, argv)
    finally:
        lock.release()


def _keep_held_out(made: plan.Plan, before: plan.Plan) -> None:
    """A rung that was forecast and has begun stays the rung that is judged."""
    lost = {cell.id for cell in before.of(HELD_OUT)} - {cell.id for cell in made.of(HELD_OUT)}
    if lost:
        raise InputError(
            f"config.tokens.held_out, config.tune or config.seeds would drop {len(lost)} held-out "
            f"run(s) that the forecast was made for ({sorted(lost)[0]}); leave them as they are, "
            f"or name a new --workdir"
        )


def _forecast(made: plan.Plan, workdir: Path, say) -> dict:
    found = results.rows(made, workdir)
    results.write(found, workdir / "results.csv")
    forecast = forecasts.make(made, workdir, found)
    say(f"forecast of the held-out rung, fixed {forecast['made']}:")
    for arm, one in forecast["arms"].items():
        say(
            f"  {arm}: {one['loss']:.4f} nats/token, {one['low']:.4f} to {one['high']:.4f} "
            f"({one['level']:.0%}), {one['law']}"
        )
    return forecast


def _held_out(made: plan.Plan, forecast: dict) -> list[Cell]:
    """The held-out cells with the tuned values that the largest anchor of their arm found best."""
    return [c for c in made.of(HELD_OUT) if c.tune == forecast["arms"][c.arm]["tune"]]


def _close(made: plan.Plan, workdir: Path, forecast: dict | None, argv: list[str]) -> str:
    """Scores, judges and reports on what is finished."""
    from lmscale_jax.reports import ladder as page

    found = results.rows(made, workdir)
    results.write(found, workdir / "results.csv")
    if not results.finished(found):
        raise RunFailed(f"--workdir={workdir}: no run finished; logs/ and attempts.jsonl say why")
    if forecast:
        forecast = forecasts.score(made, workdir, forecast, found)
    judged = verdict.judge(made, workdir, found, forecast)
    verdict.write(judged, workdir)
    path = page.write(made, workdir, found, forecast, judged, argv)
    scores = [
        f"{arm}: forecast {forecast['arms'][arm]['loss']:.4f}, came to {one['loss']:.4f} "
        f"({'inside' if one['inside'] else 'OUTSIDE'} the interval)"
        for arm, one in (judged["forecast"] or {}).items()
    ]
    said = [*scores, f"verdict: {judged['verdict']}", judged["answer"], f"report: {path}"]
    return "\n".join(said)
