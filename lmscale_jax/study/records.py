"""Reads the cells' run records, and reads and writes the log of failed attempts."""

import json
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import now, run_dir

ATTEMPTS = "attempts.jsonl"


def status(workdir: Path, cell: Cell) -> str:
    """Returns the status in a cell's run.json, or "planned" where there is none."""
    record = record_of(workdir, cell)
    return record["status"] if record else "planned"


def record_of(workdir: Path, cell: Cell) -> dict | None:
    """Reads a cell's run.json; None where there is none. Raises InputError where it is invalid."""
    path = run_dir(workdir, cell.id) / "run.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"{path} is not a run record ({error}); delete its directory to train it anew"
        ) from None


def note(workdir: Path, names: list[str], status: int, message: str) -> None:
    """Appends a line to attempts.jsonl for each of the failed cells (ids)."""
    with open(workdir / ATTEMPTS, "a") as file:
        for name in names:
            line = {"id": name, "ended": now(), "exit_status": status, "said": message}
            file.write(json.dumps(line) + "\n")


def failures(workdir: Path) -> dict[str, str]:
    """Returns {cell id: message of its last failed attempt}."""
    try:
        lines = (workdir / ATTEMPTS).read_text().splitlines()
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
