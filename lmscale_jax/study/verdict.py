"""verdict.json: the answer to a ladder's question, what it rests on, and what to run next."""

from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json
from lmscale_jax.study import cells, records, results
from lmscale_jax.study.plan import Plan, now

NOT_ENOUGH, ONE_ARM = "not enough data", "one arm"
# An interval of a compute factor, high over low, beyond which it says nothing.
WIDE = 100.0
# What `science.compare` says, in the words of a ladder.
WORDS = {"undetermined": NOT_ENOUGH}


def judge(plan: Plan, workdir: Path, found: list[dict], forecast: dict | None) -> dict:
    """The verdict on all finished runs; see the keys below.

    Returns:
        `question`, `answer` (a sentence), `verdict` ("exponent shift", "constant offset", "no
        detectable difference", "not enough data"; with several arms one for each, by name),
        `comparisons` (one for each arm beside the baseline, as `science.compare` returns them),
        `forecast` (its scores), `runs` (how many by status), `left_out`, `differences` between the
        arms, `warnings`, `next_runs`.
    """
    rows, warnings = results.chosen(results.finished(found))
    ladder = plan.ladder
    others = [arm for arm in sorted(ladder["arms"]) if arm != ladder["baseline"]]
    comparisons = [_compare(ladder, rows, arm) for arm in others]
    each = {one["arms"][1]: one["verdict"] for one in comparisons}
    verdict = next(iter(each.values())) if len(each) == 1 else each or ONE_ARM
    answer = " ".join(sentence(one) for one in comparisons) or (
        f"The ladder has one arm, {ladder['baseline']}: its law is in the report."
    )
    statuses = [row["status"] for row in found]
    failed = records.failures(workdir)
    return {
        "question": ladder["question"],
        "answer": answer,
        "verdict": verdict,
        "comparisons": comparisons,
        "forecast": (forecast or {}).get("scores"),
        "runs": {status: statuses.count(status) for status in sorted(set(statuses))},
        "left_out": [
            {"run_id": row["run_id"], "status": row["status"], "why": failed.get(row["run_id"])}
            for row in found
            if row["status"] in ("diverged", "failed") or row["run_id"] in failed
            if row["status"] != "finished"
        ],
        "differences": differences(plan),
        "warnings": warnings + ((forecast or {}).get("warnings") or []),
        "next_runs": [
            step | {"arm": one["arms"][1]} for one in comparisons for step in one["next_runs"]
        ],
        "plan": plan.id,
        "made": now(),
    }


def write(verdict: dict, workdir: Path) -> Path:
    path = workdir / "verdict.json"
    write_json(path, verdict)
    return path


def _compare(ladder: dict, rows: list[dict], arm: str) -> dict:
    """`science.compare` of the baseline and an arm; too little data is a verdict, not an error."""
    from lmscale_jax import science

    fit, baseline = ladder["fit"], ladder["baseline"]
    own = [row for row in rows if row["variant"] in (baseline, arm)]
    try:
        table = science.as_table(results.table(own, fit["n"]), name="results.csv")
        found = science.compare(table, baseline, arm, level=fit["level"], effect=fit["effect"])
    except InputError as error:
        found = {
            "arms": [baseline, arm], "verdict": "undetermined", "reason": str(error), "shift": None,
            "gain": [], "detectable": None, "checks": [], "next_runs": [], "warnings": [],
        }  # fmt: skip
    return found | {"verdict": WORDS.get(found["verdict"], found["verdict"])}


def sentence(found: dict) -> str:
    """One comparison in a sentence or two that need no statistics to read."""
    first, second = found["arms"]
    if not found["gain"]:
        return f"Not enough data to compare {second} with {first}: {found['reason']}."
    last = max(found["gain"], key=lambda row: row["c"])
    factor = f"{last['k']:.2f} ({last['low']:.2f} to {last['high']:.2f})"
    at = f"at {last['c']:.2g} FLOPs"
    if found["verdict"] == "exponent shift":
        way = "grows" if found["shift"]["s"] > 0 else "shrinks"
        return (
            f"The advantage of {second} over {first} {way} with scale: {at}, {first} needs "
            f"{factor} times the compute of {second} for the same loss, and the factor changes "
            f"with compute."
        )
    if found["verdict"] == "constant offset":
        whose = f"{first} needs {factor} times the compute of {second}"
        return f"A constant offset: {whose} for the same loss, at every scale that was tried."
    if found["verdict"] == NOT_ENOUGH:
        said = f"Not enough data to say how {second} compares with {first} at scale: "
        if last["high"] > WIDE * last["low"] or found["detectable"] > 1:
            return said + "these runs could not have shown any difference of usual size."
        return said + (
            f"so far {first} needs {factor} times the compute {at}, and a change of the exponent "
            f"below {found['detectable']:.0%} would not have shown."
        )
    return f"No detectable difference between {first} and {second}: compute factor {factor} {at}."


def differences(plan: Plan) -> dict:
    """{arm: {key: value}}: what each arm sets, and where its shape is not the baseline's."""
    arms = plan.ladder["arms"]
    found = {arm: dict(cells.flat(arms[arm])) for arm in sorted(arms)}
    shapes: dict[tuple, dict[str, dict]] = {}
    for cell in plan.cells:
        shapes.setdefault((cell.size,), {})[cell.arm] = cell.shape | {
            "non-embedding parameters": cell.counts["non_embedding"],
            "FLOPs per token": cell.flops_per_token,
        }
    for (size,), by_arm in shapes.items():
        base = by_arm.get(plan.ladder["baseline"], {})
        for arm, shape in by_arm.items():
            for name, value in shape.items():
                if base.get(name) != value:
                    found[arm][f"{name} at {size:g}"] = f"{value:g} (baseline {base.get(name):g})"
    return found
