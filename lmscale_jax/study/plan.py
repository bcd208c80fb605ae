"""plan.json: what a ladder's directory is for, fixed before its first run starts.

A ladder may grow: more seeds, anchors, budgets or arms join the cells that are there. What the runs
have in common, and what an arm means, may not change.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax import config as configs
from lmscale_jax.data import prepared
from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json
from lmscale_jax.study import cells
from lmscale_jax.study.cells import Cell

# Keys of a ladder that may differ from those of the plan that its directory holds.
GROWS = (
    "seeds", "rungs.sizes", "tokens.amounts", "tokens.held_out", "question", "max_hours", "switch",
)  # fmt: skip
GROW_GROUPS = ("tune", "arms", "per_rung", "executor", "pack", "fit")


class Plan(NamedTuple):
    """Attributes:
    ladder: the ladder's config as a plain dict.
    cells: in the order in which they are trained.
    vocab_size: the tokenizer's.
    """

    ladder: dict
    cells: list[Cell]
    vocab_size: int

    @property
    def id(self) -> str:
        """Twelve hex digits of everything that decides what is trained and judged."""
        machine = ("executor", "pack", "max_hours")
        chosen = {k: v for k, v in self.ladder.items() if k not in machine}
        text = json.dumps([chosen, [cell.id for cell in self.cells]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def of(self, *roles: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.role in roles]

    def cell(self, name: str) -> Cell:
        """The cell of that id. Raises InputError."""
        for cell in self.cells:
            if cell.id == name:
                return cell
        raise InputError(f"--ids={name} is no cell of the plan; plan.json lists them")

    def config(self, cell: Cell, workdir: Path) -> ConfigDict:
        """The unresolved config of a cell's run under that directory."""
        own = dict(cell.overrides)
        if cell.needs:
            own["train.parent"] = str(run_dir(workdir, cell.needs))
        return configs.apply_overrides(ConfigDict(self.ladder["run"]), own)


def run_dir(workdir: Path, name: str) -> Path:
    return workdir / "runs" / name


def make(ladder: ConfigDict, say: Callable[[str], None]) -> Plan:
    """The plan of a ladder's config; prepares the data, whose vocabulary counts as parameters."""
    cells.check(ladder)
    vocab_size = prepared.vocab_size_of(ladder.run.data)
    if not vocab_size:
        vocab_size = prepared.prepare(ladder.run.data, log=say).vocab_size
    return Plan(_plain(ladder.to_dict()), cells.make(ladder, vocab_size), vocab_size)


def _plain(value):
    """Tuples as lists, so that a plan reads back from JSON equal to what was written."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def read(workdir: Path) -> Plan | None:
    """The plan that a directory holds, or None. Raises InputError where it cannot be read."""
    path = workdir / "plan.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return Plan(found["ladder"], [Cell(**cell) for cell in found["cells"]], found["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--workdir={workdir}: plan.json is no plan ({error})") from None


def check(plan: Plan, workdir: Path) -> Plan | None:
    """The plan that is there already, if this one may go on with it. Writes nothing.

    Raises InputError where the directory holds something else, or a ladder that disagrees.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    before = read(workdir)
    if before is None:
        if workdir.exists() and any(p.name != ".lock" for p in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} holds files but no plan.json; name an empty or new directory"
            )
        return None
    ours, theirs = (_fixed(one.ladder) for one in (plan, before))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"--workdir={workdir} holds a ladder that disagrees: {key} is {theirs.get(key)!r} "
                f"there and {ours.get(key)!r} here; name a new --workdir"
            )
    for arm in plan.ladder["arms"].keys() & before.ladder["arms"].keys():
        if plan.ladder["arms"][arm] != before.ladder["arms"][arm]:
            raise InputError(
                f"--workdir={workdir} holds a ladder that disagrees: arm {arm!r} is "
                f"{before.ladder['arms'][arm]} there and {plan.ladder['arms'][arm]} here; give the "
                f"new arm another name, or name a new --workdir"
            )
    return before


def _fixed(ladder: dict) -> dict:
    """{dotted key: value} of what may not change as a ladder grows."""
    machine = {path for path, key in configs.keys() if not key.identity}
    return {
        key: value
        for key, value in cells.flat(ladder).items()
        if key not in GROWS
        and key.split(".")[0] not in GROW_GROUPS
        and key.removeprefix("run.") not in machine
    }


def write(plan: Plan, before: Plan | None, workdir: Path) -> None:
    """Writes plan.json; one that another plan replaces is kept under plans/."""
    if before is not None and before.id == plan.id and before.ladder == plan.ladder:
        return
    path = workdir / "plan.json"
    if before is not None and before.id != plan.id:
        (workdir / "plans").mkdir(exist_ok=True)
        (workdir / "plans" / f"{before.id}.json").write_bytes(path.read_bytes())
    write_json(
        path,
        {
            "id": plan.id,
            "made": now(),
            "vocab_size": plan.vocab_size,
            "ladder": plan.ladder,
            "cells": [dataclasses.asdict(cell) for cell in plan.cells],
        },
    )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def select(plan: Plan, terms: list[str]) -> list[Cell]:
    """The cells that the terms of --only name: arms, ids, roles, sizes ("100k") or "seed=1".

    Terms of one kind add up; kinds narrow each other. Trunks that are needed come too. Raises
    InputError.
    """
    kinds = {
        "arm": lambda cell: cell.arm,
        "id": lambda cell: cell.id,
        "role": lambda cell: cell.role,
        "size": lambda cell: cells.short(cell.size),
        "seed": lambda cell: f"seed={cell.seed}",
    }
    wanted: dict[str, set] = {}
    for term in terms:
        kind = next((k for k, f in kinds.items() if any(f(c) == term for c in plan.cells)), None)
        if kind is None:
            names = sorted({f(c) for k, f in kinds.items() if k != "id" for c in plan.cells})
            raise InputError(f"--only={term} names no cell; one of {', '.join(names)} would work")
        wanted.setdefault(kind, set()).add(term)
    chosen = [c for c in plan.cells if all(kinds[k](c) in v for k, v in wanted.items())]
    needed = {cell.needs for cell in chosen} | {cell.id for cell in chosen}
    return [cell for cell in plan.cells if cell.id in needed]
