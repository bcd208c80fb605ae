"""forecast.json: predictions for the held-out rung, written before it may start, scored after."""

import hashlib
import json
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.files import plain_values, write_json
from lmscale_jax.study import records, results
from lmscale_jax.study.cells import ANCHOR, HELD_OUT
from lmscale_jax.study.plan import Plan, now


def fixed(workdir: Path) -> str:
    """The hash of the forecasts that the held-out runs are held to. Raises InputError."""
    return read(workdir)["sha256"]


def read(workdir: Path) -> dict:
    """forecast.json. Raises InputError where it is missing or was changed."""
    path = workdir / "forecast.json"
    try:
        found = json.loads(path.read_text())
        said = found["sha256"]
    except FileNotFoundError:
        raise InputError(
            f"{path} is not written yet, and the held-out rung starts after it; run "
            f"lmscale_jax.ladder without --only first"
        ) from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is no forecast ({error})") from None
    if _hash({k: found.get(k) for k in FIXED}) != said:
        raise InputError(f"{path} was changed after it was written; its own hash is {said}")
    return found


FIXED = ("made", "plan", "level", "inputs", "inputs_sha256", "arms")


def begun(plan: Plan, workdir: Path) -> bool:
    """Whether a held-out run has started."""
    return any(records.status(workdir, cell) != "planned" for cell in plan.of(HELD_OUT))


def make(plan: Plan, workdir: Path, found: list[dict]) -> dict:
    """Forecasts each arm's held-out loss from its finished anchors and writes it.

    Once a held-out run has started, what is written stays, whatever anchors have joined since.
    Raises InputError where a run has started and the forecast is gone, or an arm cannot be fitted.
    """
    path = workdir / "forecast.json"
    if begun(plan, workdir):
        if not path.exists():
            raise InputError(
                f"{path} is missing though the held-out rung has started; what was forecast cannot "
                f"be written afterwards: put the file back, or name a new --workdir"
            )
        made = read(workdir)
        _check_held(plan, workdir, made)
        return made
    rows, warnings = results.chosen(results.finished(found, ANCHOR))
    inputs = {
        k: v for k, v in results.table(rows, plan.ladder["fit"]["n"]).items() if k != "variant"
    }
    before = read(workdir) if path.exists() else None
    digest = _hash([inputs, plan.id])
    if before is not None and before["inputs_sha256"] == digest:
        return before
    content = {
        "made": now(),
        "plan": plan.id,
        "level": plan.ladder["fit"]["forecast_level"],
        "inputs": inputs,
        "inputs_sha256": digest,
        "arms": {arm: _of_arm(plan, rows, arm) for arm in plan.ladder["arms"]},
    }
    content = json.loads(json.dumps(plain_values(content)))
    made = content | {"sha256": _hash(content), "warnings": warnings, "scores": None}
    write_json(path, made)
    return made


def _of_arm(plan: Plan, rows: list[dict], arm: str) -> dict:
    """The forecast of one arm's held-out run."""
    from lmscale_jax import science

    own = [row for row in rows if row["variant"] == arm]
    target = next(cell for cell in plan.of(HELD_OUT) if cell.arm == arm)
    fit = plan.ladder["fit"]
    if len({row["flops"] for row in own}) < 2:
        raise InputError(
            f"arm {arm!r} has finished anchors at {len({row['flops'] for row in own})} compute "
            f"budget(s); a forecast needs 2, so look at runs/*/run.json of those that failed"
        )
    made = science.forecast(
        results.table(own, fit["n"]),
        n=target.counts[fit["n"]],
        d=target.tokens,
        c=target.flops,
        level=fit["forecast_level"],
    )
    # The held-out runs take the values that the largest anchor found best.
    return made | {"tune": max(own, key=lambda row: row["flops"])["tune"]}


def _check_held(plan: Plan, workdir: Path, made: dict) -> None:
    """Every held-out run names the forecast it was held to."""
    for cell in plan.of(HELD_OUT):
        found = records.record_of(workdir, cell)
        if found and found.get("forecast", made["sha256"]) != made["sha256"]:
            raise InputError(
                f"runs/{cell.id} was started under another forecast ({found['forecast'][:12]}) "
                f"than forecast.json ({made['sha256'][:12]}); put that file back"
            )


def score(plan: Plan, workdir: Path, made: dict, found: list[dict]) -> dict:
    """Adds to forecast.json what the held-out runs came to, and whether it was foreseen."""
    rows, _ = results.chosen(results.finished(found, HELD_OUT))
    scores = {}
    for arm, said in made["arms"].items():
        losses = [row["val_loss"] for row in rows if row["variant"] == arm]
        if not losses:
            continue
        mean = float(np.mean(losses))
        scores[arm] = {
            "loss": mean,
            "runs": len(losses),
            "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
            "error": mean - said["loss"],
            "relative_error": mean / said["loss"] - 1,
            "inside": said["low"] <= mean <= said["high"],
        }
    if scores and scores != made.get("scores"):
        made = made | {"scores": plain_values(scores), "scored": now()}
        write_json(workdir / "forecast.json", made)
    return made


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
