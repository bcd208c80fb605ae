"""What has become of a plan's cells: their records, and the attempts that left none."""

import json
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import now, run_dir

ATTEMPTS = "attempts.jsonl"


def status(workdir: Path, cell: Cell) -> str:
    """The status in a cell's run.json; "planned" where it has not begun."""
    found = record_of(workdir, cell)
    return found["status"] if found else "planned"


def record_of(workdir: Path, cell: Cell) -> dict | None:
    """A cell's run.json, or None."""
    path = run_dir(workdir, cell.id) / "run.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is no run record ({error})") from None


def note(workdir: Path, names: list[str], status: int, said: str) -> None:
    """A line in attempts.jsonl for each run that did not end well."""
    with open(workdir / ATTEMPTS, "a") as file:
        for name in names:
            line = {"id": name, "ended": now(), "exit_status": status, "said": said}
            file.write(json.dumps(line) + "\n")


def failures(workdir: Path) -> dict[str, str]:
    """{id: what its last failed attempt said}."""
    try:
        lines = (workdir / ATTEMPTS).read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found[entry["id"]] = entry["said"]
        except (ValueError, KeyError):
            raise InputError(f"{workdir / ATTEMPTS} holds a line that is no attempt") from None
    return found
