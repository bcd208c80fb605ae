"""Makes results.csv, one row a run, from the records of a ladder's cells.

Also selects the rows that compare the arms, and keeps the log of failed attempts.
"""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np

from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError
from lmscale_jax.ladders.grid import ANCHOR, HELD_OUT, TRUNK, Cell
from lmscale_jax.ladders.plan import LadderPlan, cell_dir, timestamp
from lmscale_jax.train import run_dir

FINAL = ("val_loss", "val_loss_sem", "val_tokens", "bits_per_byte")
COLUMNS = (
    "run_id", "variant", "role", "size", "budget", "seed", "status", "n_total", "n_non_embedding",
    "n_layers", "d_model", "n_heads", "d_ff", "tokens", "epochs", "flops", "flops_per_token",
    *FINAL, "train_seconds", "tokens_per_second", "devices", "packed",
    "val_fingerprint",
)  # fmt: skip


def result_rows(plan: LadderPlan, workdir: Path) -> list[dict]:
    """Makes a row for each cell: COLUMNS, and `tune` as a dict. Missing results are None.

    What a run has counted itself is taken from its record; the plan's counts stand for runs that
    have not begun. Raises InputError where the two differ, and where runs were evaluated on
    different tokens.
    """
    cell_rows = []
    for cell in plan.cells:
        planned = {
            "n_total": cell.counts["total"],
            "n_non_embedding": cell.counts["non_embedding"],
            **{name: cell.shape[name] for name in ("n_layers", "d_model", "n_heads", "d_ff")},
            "tokens": cell.tokens,
            "flops": cell.flops,
            "flops_per_token": cell.flops_per_token,
        }
        row = record_columns(cell_record(workdir, cell) or {"status": "planned"})
        counted = {name: row[name] for name in planned if row[name] is not None}
        _check_counts(cell, planned, counted)
        cell_rows.append(
            row
            | planned
            | counted
            | {
                "run_id": cell.id,
                "variant": cell.arm,
                "role": cell.role,
                "size": cell.size,
                "budget": cell.budget,
                "seed": cell.seed,
                "tune": cell.tune,
            }
        )
    _check_same_held_out_tokens(cell_rows)
    return cell_rows


def _check_counts(cell: Cell, planned: dict, counted: dict) -> None:
    """Raises InputError where a run counted otherwise than the plan: other code trained it."""
    for name, value in counted.items():
        if abs(value - planned[name]) > 1e-9 * abs(planned[name]):
            raise InputError(
                f"run {cell.id} ({cell.label}) has {name}={value:,}, and the plan "
                f"{planned[name]:,}: it was trained by other code; use a new --workdir"
            )


def check_code(plan: LadderPlan, selected: list[Cell], workdir: Path, reason: str) -> None:
    """Compares this package with the one that trained the runs that have begun.

    Where they differ and a selected cell is to be trained, a `reason` is appended to
    code_changes.jsonl, and without one InputError is raised: arms are compared as if the same code
    had trained them.
    """
    ours = run_dir.package_hash()
    others = {code: ids for code, ids in code_hashes(plan, workdir).items() if code != ours}
    if not others or all(cell_status(workdir, cell) == "finished" for cell in selected):
        return
    code, names = next(iter(others.items()))
    if not reason:
        raise InputError(
            f"--workdir={workdir}: {len(names)} run(s), such as {names[0]}, were trained by other "
            f"code of this package ({code} there, {ours} here); use a new --workdir, or "
            f"--allow_code_change='why their numbers are the same'"
        )
    line = {"code": ours, "others": sorted(others), "reason": reason, "at": timestamp()}
    with open(workdir / CODE_CHANGES, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def code_hashes(plan: LadderPlan, workdir: Path) -> dict[str, list[str]]:
    """Returns {hash of the package: ids of the cells that it trained}, of runs that have begun."""
    hashes: dict[str, list[str]] = {}
    for cell in plan.cells:
        code = (cell_record(workdir, cell) or {}).get("code") or {}
        if code.get("sha256"):
            hashes.setdefault(code["sha256"], []).append(cell.id)
    return hashes


def code_warnings(plan: LadderPlan, workdir: Path) -> list[dict]:
    """Warns where several states of this package trained the runs, with the user's reasons."""
    hashes, path = code_hashes(plan, workdir), workdir / CODE_CHANGES
    if len(hashes) < 2:
        return []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    reasons = "; ".join(dict.fromkeys(json.loads(line)["reason"] for line in lines))
    numbers = ", ".join(f"{len(ids)} by {code}" for code, ids in hashes.items())
    message = (
        f"the runs were trained by different code of this package ({numbers}); reason given: "
        f"{reasons or 'none'}"
    )
    return [{"code": "code_changed", "message": message}]


def record_columns(record: dict) -> dict:
    """Returns those of COLUMNS that a run's record has; None for what is not measured yet.

    `packed` is the number of runs that trained as one program.
    """
    final, counts = record.get("final") or {}, record.get("counts") or {}
    model = (record.get("config") or {}).get("model") or {}
    device = record.get("device")
    return {
        "seed": record.get("seed"),
        "status": record["status"],
        "n_total": counts.get("total"),
        "n_non_embedding": counts.get("non_embedding"),
        **{name: model.get(name) for name in ("n_layers", "d_model", "n_heads", "d_ff")},
        "tokens": record.get("tokens"),
        "epochs": record.get("epochs"),
        "flops": record.get("flops_total"),
        "flops_per_token": record.get("flops_per_token"),
        **{name: final.get(name) for name in FINAL},
        "train_seconds": record.get("wall_seconds"),
        "tokens_per_second": (record.get("throughput") or {}).get("tokens_per_second"),
        "devices": device and f"{device['count']} x {device['kind']}",
        "packed": record.get("packed", 1),
        "val_fingerprint": (record.get("data") or {}).get("val_fingerprint"),
    }


def _check_same_held_out_tokens(rows: list[dict]) -> None:
    """Raises InputError where losses were measured on different tokens and cannot be compared."""
    texts = {(row["val_fingerprint"], row["val_tokens"]) for row in rows if row["val_loss"]}
    if len(texts) > 1:
        raise InputError(
            f"the runs were evaluated on {len(texts)} different sets of held-out tokens "
            f"({', '.join(sorted(str(t[0]) for t in texts))}); use a new --workdir"
        )


def write_results(rows: list[dict], path: Path) -> None:
    """Writes results.csv, with a column for each tuned key; trunks are left out."""
    tuned = sorted({key for row in rows for key in row["tune"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *tuned], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row["tune"] for row in rows if row["role"] != TRUNK)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


def finished_rows(rows: list[dict], *roles: str) -> list[dict]:
    """Returns the finished rows of the roles; all but trunks by default."""
    roles = roles or (ANCHOR, HELD_OUT)
    return [r for r in rows if r["role"] in roles and r["status"] == "finished"]


def choose_tuned(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Chooses, for each arm, size and budget, the tuned values with the lowest mean loss.

    Only values with the most finished seeds are candidates. A best value at the edge of its grid
    gives a warning, because the arm may not be tuned there. Returns (rows, warnings).
    """
    best_rows, warnings = [], []
    for place in dict.fromkeys(_row_place(row) for row in rows):
        by_tune: dict[tuple, list[dict]] = {}
        for row in rows:
            if _row_place(row) == place:
                by_tune.setdefault(tuple(sorted(row["tune"].items())), []).append(row)
        n_seeds = max(len(seeds) for seeds in by_tune.values())
        full = {tune: seeds for tune, seeds in by_tune.items() if len(seeds) == n_seeds}
        best = min(full, key=lambda tune: np.mean([row["val_loss"] for row in full[tune]]))
        best_rows += full[best]
        for key, value in best:
            values = sorted({dict(tune)[key] for tune in by_tune})
            if len(values) > 1 and value in (values[0], values[-1]):
                message = (
                    f"{place[0]} at {place[1]:g}: the best {key} is {value:g}, at the edge of "
                    f"{', '.join(f'{v:g}' for v in values)}; widen config.tune.{key}"
                )
                warnings.append({"code": "edge_of_grid", "message": message})
    return best_rows, warnings


def _row_place(row: dict) -> tuple[str, float, float]:
    """Returns (arm, size, budget) of a row."""
    return row["variant"], row["size"], row["budget"]


# Column of results.csv that is the laws' N.
N_COLUMNS = Modes("fit.n", {"non_embedding": "n_non_embedding", "total": "n_total"})


def fit_table(rows: list[dict], n: str) -> dict[str, list]:
    """Makes the columns of a table to fit; `n` is "non_embedding" or "total"."""
    return {
        "n": [row[N_COLUMNS[n]] for row in rows],
        "d": [row["tokens"] for row in rows],
        "c": [row["flops"] for row in rows],
        "loss": [row["val_loss"] for row in rows],
        "run_id": [row["run_id"] for row in rows],
        "variant": [row["variant"] for row in rows],
        "seed": [str(row["seed"]) for row in rows],
    }


ATTEMPTS, CODE_CHANGES = "attempts.jsonl", "code_changes.jsonl"


def cell_status(workdir: Path, cell: Cell) -> str:
    """Returns the status in a cell's run.json, or "planned" where there is none."""
    record = cell_record(workdir, cell)
    return record["status"] if record else "planned"


def cell_record(workdir: Path, cell: Cell) -> dict | None:
    """Reads a cell's run.json; None where there is none. Raises InputError where it is invalid."""
    path = cell_dir(workdir, cell.id) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"{path} is not a run record ({error}); delete its directory to train it anew"
        ) from None


def note_failure(workdir: Path, names: list[str], status: int, message: str) -> None:
    """Appends a line to attempts.jsonl for each of the failed cells (ids)."""
    with open(workdir / ATTEMPTS, "a", encoding="utf-8") as file:
        for name in names:
            line = {"id": name, "ended": timestamp(), "exit_status": status, "said": message}
            file.write(json.dumps(line) + "\n")


def last_failures(workdir: Path) -> dict[str, str]:
    """Returns {cell id: message of its last failed attempt}."""
    try:
        lines = (workdir / ATTEMPTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    messages = {}
    for line in lines:
        try:
            entry = json.loads(line)
            messages[entry["id"]] = entry["said"]
        except (ValueError, KeyError):
            raise InputError(
                f"{workdir / ATTEMPTS} has an invalid line, {line!r}; delete that line"
            ) from None
    return messages
