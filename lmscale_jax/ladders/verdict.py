"""Makes verdict.json: the answer to a ladder's question, its evidence, and the next runs."""

from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json
from lmscale_jax.ladders import grid, results
from lmscale_jax.ladders.plan import LadderPlan, timestamp
from lmscale_jax.ladders.step_time import compare_seconds, seconds_sentence

NOT_ENOUGH, ONE_ARM = "not enough data", "one arm"
# Ratio of an interval's ends, for a compute factor, beyond which it is uninformative.
WIDE = 100.0
# Verdicts of `scaling.compare_arms` that a ladder words differently.
WORDS = {"undetermined": NOT_ENOUGH}
# What a change with scale is due to.
READINGS = {"exponent shift": "its exponent", "changes with scale": "its exponent or its floor"}


def judge_ladder(plan: LadderPlan, workdir: Path, rows: list[dict], forecast: dict | None) -> dict:
    """Compares every arm with the baseline over all finished runs.

    Returns:
      A dict with `question`, `answer` (in sentences), `verdict` ("exponent shift", "changes with
      scale", "constant offset", "no detectable difference", "not enough data"; {arm: verdict}
      where several arms are compared), `comparisons` (as `scaling.compare_arms` returns them, one
      for each arm but the baseline, each with `seconds` by `step_time.compare_seconds`),
      `forecast` (its scores), `runs` ({status: number}), `left_out`, `differences` between the
      arms, `warnings`, `next_runs`, `plan` (its id) and `made` (the time).
    """
    finished = results.finished_rows(rows)
    best_rows, warnings = results.choose_tuned(finished)
    ladder = plan.ladder
    others = [arm for arm in sorted(ladder["arms"]) if arm != ladder["baseline"]]
    comparisons = [_compare(ladder, best_rows, arm, finished) for arm in others]
    by_arm = {comparison["arms"][1]: comparison["verdict"] for comparison in comparisons}
    verdict = next(iter(by_arm.values())) if len(by_arm) == 1 else by_arm or ONE_ARM
    answer = " ".join(
        f"{comparison_sentence(comparison)} {seconds_sentence(comparison)}"
        for comparison in comparisons
    ) or (f"The ladder has one arm, {ladder['baseline']}: its law is in the report.")
    statuses = [row["status"] for row in rows]
    failed = results.last_failures(workdir)
    return {
        "question": ladder["question"],
        "answer": answer,
        "verdict": verdict,
        "comparisons": comparisons,
        "forecast": (forecast or {}).get("scores"),
        "runs": {status: statuses.count(status) for status in sorted(set(statuses))},
        "left_out": [
            {"run_id": row["run_id"], "status": row["status"], "why": failed.get(row["run_id"])}
            for row in rows
            if row["status"] in ("diverged", "failed") or row["run_id"] in failed
            if row["status"] != "finished"
        ],
        "differences": arm_settings(plan),
        "warnings": warnings
        + ((forecast or {}).get("warnings") or [])
        + results.code_warnings(plan, workdir),
        "next_runs": [
            step | {"arm": comparison["arms"][1]}
            for comparison in comparisons
            for step in comparison["next_runs"]
        ],
        "plan": plan.id,
        "made": timestamp(),
    }


def write_verdict(verdict: dict, workdir: Path) -> None:
    """Writes verdict.json."""
    write_json(workdir / "verdict.json", verdict)


def _compare(ladder: dict, rows: list[dict], arm: str, timed: list[dict]) -> dict:
    """Compares an arm with the baseline; too little data gives a verdict and not an error.

    `timed` are the runs by whose speed it is converted to seconds.
    """
    from lmscale_jax import scaling

    fit, baseline = ladder["fit"], ladder["baseline"]
    pair = [row for row in rows if row["variant"] in (baseline, arm)]
    try:
        table = scaling.as_table(results.fit_table(pair, fit["n"]), name="results.csv")
        comparison = scaling.compare_arms(
            table, baseline, arm, level=fit["level"], effect=fit["effect"]
        )
    except InputError as error:
        comparison = {
            "arms": [baseline, arm], "verdict": "undetermined", "reason": str(error), "shift": None,
            "pairing": None, "gain": [], "detectable": None, "power": None, "checks": [],
            "nested": None, "next_runs": [], "warnings": [],
        }  # fmt: skip
    comparison["seconds"] = compare_seconds(
        timed, [baseline, arm], comparison["gain"], fit["level"]
    )
    return comparison | {"verdict": WORDS.get(comparison["verdict"], comparison["verdict"])}


def comparison_sentence(comparison: dict) -> str:
    """Words one comparison for readers without statistics, in one or two sentences."""
    first, second = comparison["arms"]
    if not comparison["gain"]:
        return f"Not enough data to compare {second} with {first}: {comparison['reason']}."
    last = max(comparison["gain"], key=lambda row: row["c"])
    factor = f"{last['k']:.2f} ({last['low']:.2f} to {last['high']:.2f})"
    scale = f"at {last['c']:.2g} FLOPs"
    if comparison["verdict"] in READINGS:
        trend = "gains on" if comparison["shift"]["s"] > 0 else "loses to"
        by_floor = (comparison["nested"] or {}).get("reading") == "floors"
        reading = "its floor" if by_floor else READINGS[comparison["verdict"]]
        return (
            f"With scale, {second} {trend} {first}, by {reading}: {scale}, {first} needs {factor} "
            f"times the compute of {second} for the same loss."
        )
    if comparison["verdict"] == "constant offset":
        return (
            f"A constant offset: {first} needs {factor} times the compute of {second} for the same "
            f"loss, from {comparison['gain'][0]['c']:.2g} to {last['c']:.2g} FLOPs."
        )
    if comparison["verdict"] == NOT_ENOUGH:
        if comparison["detectable"] <= comparison["effect"]:
            return f"These runs do not say how {second} compares with {first} at scale: " + (
                f"{comparison['reason']}."
            )
        start = f"Not enough data to say how {second} compares with {first} at scale: "
        if last["high"] > WIDE * last["low"] or comparison["detectable"] > 1:
            return start + "these runs could not have shown any difference of usual size."
        return start + (
            f"so far {first} needs {factor} times the compute {scale}, and a change of the "
            f"exponent below {comparison['detectable']:.0%} would not have shown."
        )
    return (
        f"No detectable difference between {first} and {second}: compute factor {factor} {scale}."
    )


def arm_settings(plan: LadderPlan) -> dict:
    """Returns {arm: {name: value}}: the keys that an arm sets, and its deviations in shape.

    Shapes, parameters and FLOPs per token are listed where they differ from the baseline's.
    """
    arms = plan.ladder["arms"]
    settings = {arm: dict(grid.flat_overrides(arms[arm])) for arm in sorted(arms)}
    shapes: dict[float, dict[str, dict]] = {}
    for cell in plan.cells:
        shapes.setdefault(cell.size, {})[cell.arm] = cell.shape | {
            "non-embedding parameters": cell.counts["non_embedding"],
            "FLOPs per token": cell.flops_per_token,
        }
    for size, by_arm in shapes.items():
        base = by_arm.get(plan.ladder["baseline"], {})
        for arm, shape in by_arm.items():
            for name, value in shape.items():
                if base.get(name) != value:
                    text = f"{value:g} (baseline {base.get(name):g})"
                    settings[arm][f"{name} at {size:g}"] = text
    return settings
