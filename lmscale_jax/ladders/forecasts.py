"""Writes forecast.json before the held-out rung may start, and scores it afterwards."""

import hashlib
import json
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.files import plain_values, write_json
from lmscale_jax.ladders import results
from lmscale_jax.ladders.grid import ANCHOR, HELD_OUT
from lmscale_jax.ladders.plan import LadderPlan, timestamp


def fixed_hash(workdir: Path) -> str:
    """Returns the hash of forecast.json, which held-out runs record. Raises InputError."""
    return read_forecast(workdir)["sha256"]


def read_forecast(workdir: Path) -> dict:
    """Reads forecast.json. Raises InputError where it is missing or was changed."""
    path = workdir / "forecast.json"
    try:
        forecast = json.loads(path.read_text(encoding="utf-8"))
        digest = forecast["sha256"]
    except FileNotFoundError:
        raise InputError(
            f"{path} is not written yet, and held-out runs need it; run lmscale_jax.ladder "
            f"without --only first"
        ) from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is not a forecast ({error}); put the original back") from None
    if _hash({k: forecast.get(k) for k in FIXED}) != digest:
        raise InputError(
            f"{path} was changed after it was written; put back the one with the hash {digest}"
        )
    return forecast


# The hashed fields. Scores and warnings are not among them.
FIXED = ("made", "plan", "level", "inputs", "inputs_sha256", "arms")


def held_out_begun(plan: LadderPlan, workdir: Path) -> bool:
    """Returns whether a held-out run has started."""
    return any(results.cell_status(workdir, cell) != "planned" for cell in plan.with_role(HELD_OUT))


def make_forecast(plan: LadderPlan, workdir: Path, rows: list[dict]) -> dict:
    """Forecasts each arm's held-out loss from its finished anchors, and writes forecast.json.

    Once a held-out run has started, returns the written forecast, even if there are new anchors.
    Raises InputError where a held-out run has started and forecast.json is missing or another, or
    where an arm cannot be fitted.
    """
    path = workdir / "forecast.json"
    if held_out_begun(plan, workdir):
        if not path.exists():
            raise InputError(
                f"{path} is missing though the held-out rung has started, and a forecast cannot be "
                f"written afterwards; put the file back, or use a new --workdir"
            )
        forecast = read_forecast(workdir)
        _check_held_out_records(plan, workdir, forecast)
        return forecast
    anchors, warnings = results.choose_tuned(results.finished_rows(rows, ANCHOR))
    table = results.fit_table(anchors, plan.ladder["fit"]["n"])
    inputs = {k: v for k, v in table.items() if k != "variant"}
    previous = read_forecast(workdir) if path.exists() else None
    digest = _hash([inputs, plan.id])
    if previous is not None and previous["inputs_sha256"] == digest:
        return previous
    content = {
        "made": timestamp(),
        "plan": plan.id,
        "level": plan.ladder["fit"]["forecast_level"],
        "inputs": inputs,
        "inputs_sha256": digest,
        "arms": {arm: _forecast_arm(plan, anchors, arm) for arm in plan.ladder["arms"]},
    }
    content = json.loads(json.dumps(plain_values(content)))
    forecast = content | {"sha256": _hash(content), "warnings": warnings, "scores": None}
    write_json(path, forecast)
    return forecast


def _forecast_arm(plan: LadderPlan, anchors: list[dict], arm: str) -> dict:
    """Forecasts the loss of one arm's held-out runs from its finished anchors."""
    from lmscale_jax import scaling

    rows = [row for row in anchors if row["variant"] == arm]
    target = next(cell for cell in plan.with_role(HELD_OUT) if cell.arm == arm)
    fit = plan.ladder["fit"]
    n_budgets = len({row["flops"] for row in rows})
    if n_budgets < 2:
        raise InputError(
            f"arm {arm!r} has finished anchors at {n_budgets} compute budget(s) and a forecast "
            f"needs 2; see attempts.jsonl for the failed runs, or use more config.rungs.sizes"
        )
    forecast = scaling.forecast_loss(
        results.fit_table(rows, fit["n"]),
        n=target.counts[fit["n"]],
        d=target.tokens,
        c=target.flops,
        level=fit["forecast_level"],
    )
    # The held-out runs take the values that were best at the largest anchor.
    return forecast | {"tune": max(rows, key=lambda row: row["flops"])["tune"]}


def _check_held_out_records(plan: LadderPlan, workdir: Path, forecast: dict) -> None:
    """Raises InputError where a held-out run recorded the hash of another forecast."""
    for cell in plan.with_role(HELD_OUT):
        fields = results.cell_record(workdir, cell)
        if fields and fields.get("forecast", forecast["sha256"]) != forecast["sha256"]:
            raise InputError(
                f"runs/{cell.id} was started under another forecast ({fields['forecast'][:12]}) "
                f"than forecast.json ({forecast['sha256'][:12]}); put that file back"
            )


def score_forecast(workdir: Path, forecast: dict, rows: list[dict]) -> dict:
    """Adds the mean held-out losses, and whether each is inside its interval, to forecast.json."""
    held_out, _ = results.choose_tuned(results.finished_rows(rows, HELD_OUT))
    scores = {}
    for arm, predicted in forecast["arms"].items():
        losses = [row["val_loss"] for row in held_out if row["variant"] == arm]
        if not losses:
            continue
        mean = float(np.mean(losses))
        scores[arm] = {
            "loss": mean,
            "runs": len(losses),
            "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
            "error": mean - predicted["loss"],
            "relative_error": mean / predicted["loss"] - 1,
            "inside": predicted["low"] <= mean <= predicted["high"],
        }
    if scores and scores != forecast.get("scores"):
        forecast = forecast | {"scores": plain_values(scores), "scored": timestamp()}
        write_json(workdir / "forecast.json", forecast)
    return forecast


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
