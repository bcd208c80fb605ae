"""Makes, checks, reads and writes plan.json, which is written before a ladder's first run starts.

A ladder may grow by seeds, anchors, budgets or arms. The config that its runs share, and the
settings of an arm, may not change.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config import own_code
from lmscale_jax.config.key import Modes
from lmscale_jax.config.keys import keys
from lmscale_jax.config.own_keys import adopted_ladder, code_parts
from lmscale_jax.config.resolve import apply_overrides, late_defaults
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json
from lmscale_jax.ladders import grid, machine
from lmscale_jax.ladders.grid import Cell

# Keys that may differ from those of the plan in the same directory.
GROWING_KEYS = (
    "seeds", "rungs.sizes", "tokens.amounts", "tokens.held_out", "question", "max_hours", "switch",
    "dtype",
)  # fmt: skip
# Files that a directory may have before its plan.
BEFORE_PLAN = (".lock", "guards.json")
GROWING_GROUPS = ("tune", "arms", "per_rung", "executor", "pack", "fit", "guards")


class LadderPlan(NamedTuple):
    """A ladder's config and its cells.

    Attributes:
      ladder: the config as a plain dict.
      cells: in training order.
      vocab_size: the tokenizer's.
    """

    ladder: dict
    cells: list[Cell]
    vocab_size: int

    @property
    def id(self) -> str:
        """Returns 12 hex digits that identify the cells and the settings of their comparison."""
        # The type of products that `dtype` chose is in `run`.
        machine = ("executor", "pack", "max_hours", "dtype", "guards")
        identity = {k: v for k, v in self.ladder.items() if k not in machine}
        identity["run"] = {
            name: dict(group) if isinstance(group, dict) else group
            for name, group in identity["run"].items()
        }
        for path in late_defaults(identity["run"]):
            group, _, name = path.partition(".")
            del identity["run"][group][name]
        # Ladders from before a group keep their ids too.
        identity["run"] = {name: group for name, group in identity["run"].items() if group != {}}
        text = json.dumps([identity, [cell.id for cell in self.cells]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def with_role(self, *roles: str) -> list[Cell]:
        """Returns the cells of these roles."""
        return [cell for cell in self.cells if cell.role in roles]

    def cell(self, name: str) -> Cell:
        """Returns the cell with that id. Raises InputError where there is none."""
        for cell in self.cells:
            if cell.id == name:
                return cell
        raise InputError(f"--ids={name} is not a cell of the plan; use an id from plan.json")

    def config(self, cell: Cell, workdir: Path) -> ConfigDict:
        """Returns the unresolved config of a cell's run in a ladder's directory."""
        overrides = dict(cell.overrides)
        if cell.needs:
            overrides["train.parent"] = str(cell_dir(workdir, cell.needs))
        return apply_overrides(ConfigDict(self.ladder["run"]), overrides)


def cell_dir(workdir: Path, name: str) -> Path:
    """Returns the run directory of the cell with that id."""
    return workdir / "runs" / name


def _dtype_of_hardware(ladder: ConfigDict) -> str:
    """Returns bfloat16 for runs on accelerators, unless the ladder varies model.dtype itself."""
    varied = [ladder.per_rung, *ladder.arms.values(), *ladder.tune.values()]
    if any("model.dtype" in grid.flat_overrides(group) for group in varied):
        return ladder.run.model.dtype
    on_accelerators = ladder.executor.gpus > 0 or not machine.runs_on_cpu()
    return "bfloat16" if on_accelerators else ladder.run.model.dtype


# ladder -> model.dtype of its runs.
RUN_DTYPES = Modes(
    "dtype", {"auto": _dtype_of_hardware, "run": lambda ladder: ladder.run.model.dtype}
)


def describe_dtype(plan: LadderPlan) -> str:
    """Says in which type the runs multiply, and which choice that follows from."""
    chosen = plan.ladder["run"]["model"]["dtype"]
    return f"products in {chosen} (config.dtype={plan.ladder.get('dtype', 'run')!r})"


def make_plan(ladder: ConfigDict, say: Callable[[str], None]) -> LadderPlan:
    """Makes the plan of a ladder's config, whose runs have the model.dtype that RUN_DTYPES gives.

    Prepares the data where parameter counts or FLOPs depend on it: where its vocabulary size is
    unknown, or a mask follows its documents.
    """
    ladder = ConfigDict(adopted_ladder(ladder.to_dict()))
    grid.check_ladder(ladder)
    ladder.run.model.dtype = RUN_DTYPES[ladder.dtype](ladder)
    vocab_size = prepare.find_token_ids(ladder.run.data).vocab_size
    masks = {
        v for k, v in grid.flat_overrides(ladder.to_dict()).items() if k.endswith("model.mask")
    }
    if not vocab_size or "document" in masks:
        data, model = ladder.run.data, ladder.run.model
        vocab_size = prepare.prepare_data(data, model.vocab_size, say).vocab_size
    return LadderPlan(
        _plain_config(ladder.to_dict()), grid.make_cells(ladder, vocab_size), vocab_size
    )


def check_products(plan: LadderPlan, platform: str) -> None:
    """Raises InputError where arms differ in products that this platform's device computes alike.

    A single run falls back to other products and says so; as an arm it would be compared with
    itself.
    """
    from lmscale_jax.model import fp8

    models = {cell.arm: plan.config(cell, Path()).model for cell in plan.cells}
    if len({model.matmul for model in models.values()}) == 1:
        return
    for arm, model in models.items():
        chosen = fp8.choose_fp8(model, platform)
        if chosen.product is None and chosen.description:
            raise InputError(
                f"config.arms.{arm}: model.matmul={model.matmul!r} would be computed in "
                f"{chosen.description}, like the other arms; use a device with float8 products, or "
                f"the same model.matmul in all arms"
            )


def _plain_config(value):
    """Turns tuples into lists, so that a plan read from JSON equals the one that was written."""
    if isinstance(value, dict):
        return {k: _plain_config(v) for k, v in value.items()}
    return [_plain_config(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_plan(workdir: Path) -> LadderPlan | None:
    """Reads a directory's plan; None where there is none. Raises InputError where it is invalid."""
    path = workdir / "plan.json"
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        plan_cells = [Cell(**cell) for cell in fields["cells"]]
        return LadderPlan(fields["ladder"], plan_cells, fields["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--workdir={workdir}: plan.json is not a plan ({error}); use a new --workdir"
        ) from None


def check_plan(plan: LadderPlan, workdir: Path) -> LadderPlan | None:
    """Returns the plan that the directory holds, or None. Writes nothing.

    Raises InputError where it holds other files, or a plan that this one does not extend.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; use a directory")
    previous = read_plan(workdir)
    if previous is None:
        if workdir.exists() and any(p.name not in BEFORE_PLAN for p in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} holds files but no plan.json; use an empty or new directory"
            )
        return None
    ours, theirs = _fixed(plan.ladder), _fixed(previous.ladder)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            # Where `dtype` chooses it, another machine may choose another one.
            kept = f"--config.dtype=run --config.{key}={theirs.get(key)}, or "
            raise InputError(
                f"--workdir={workdir} holds a ladder that disagrees: {key} is {theirs.get(key)!r} "
                f"there and {ours.get(key)!r} here; use "
                f"{kept if key == 'run.model.dtype' else ''}a new --workdir"
            )
    for arm in plan.ladder["arms"].keys() & previous.ladder["arms"].keys():
        if plan.ladder["arms"][arm] != previous.ladder["arms"][arm]:
            _check_same_code(arm, plan.ladder["arms"][arm], previous.ladder["arms"][arm])
            raise InputError(
                f"--workdir={workdir} holds a ladder that disagrees: arm {arm!r} is "
                f"{previous.ladder['arms'][arm]} there and {plan.ladder['arms'][arm]} here; use "
                f"another name for the new arm, or a new --workdir"
            )
    return previous


def _check_same_code(arm: str, settings: dict, previous: dict) -> None:
    """Raises InputError where the settings of an arm differ in the content of its code alone."""
    settings, previous = grid.flat_overrides(settings), grid.flat_overrides(previous)
    for key in settings.keys() & previous.keys():
        here, there = settings[key], previous[key]
        if here != there and own_code.is_code(here) and own_code.is_code(there):
            raise InputError(
                f"config.arms.{arm}: arm {arm} was trained by other code ({there[:12]} there, "
                f"{here[:12]} here); give it another name, or use a new --workdir"
            )


def _fixed(ladder: dict) -> dict:
    """Returns {dotted key: value} of the keys that must not change while a ladder grows."""
    machine = {path for path, key in keys() if not key.identity} | late_defaults(ladder["run"])
    return {
        key: value
        for key, value in grid.flat_overrides(ladder).items()
        if key not in GROWING_KEYS
        and key.split(".")[0] not in GROWING_GROUPS
        and key.removeprefix("run.") not in machine
    }


def write_plan(plan: LadderPlan, previous: LadderPlan | None, workdir: Path) -> None:
    """Writes plan.json and the arms' code; keeps a different previous plan as plans/ID.json."""
    for cell in plan.cells:
        own_code.save_sources(code_parts(plan.config(cell, workdir)), workdir)
    if previous is not None and previous.id == plan.id and previous.ladder == plan.ladder:
        return
    path = workdir / "plan.json"
    if previous is not None and previous.id != plan.id:
        (workdir / "plans").mkdir(exist_ok=True)
        (workdir / "plans" / f"{previous.id}.json").write_bytes(path.read_bytes())
    write_json(
        path,
        {
            "id": plan.id,
            "made": timestamp(),
            "vocab_size": plan.vocab_size,
            "ladder": plan.ladder,
            "cells": [dataclasses.asdict(cell) for cell in plan.cells],
        },
    )


def timestamp() -> str:
    """Returns the present time in UTC, in ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def select_cells(plan: LadderPlan, terms: list[str]) -> list[Cell]:
    """Selects cells by the terms of --only: arms, ids, roles, sizes ("100k") or "seed=1".

    A cell must match one term of every kind that is present. The trunks of selected branches are
    included. Raises InputError for a term that matches nothing.
    """
    kinds = {
        "arm": lambda cell: cell.arm,
        "id": lambda cell: cell.id,
        "role": lambda cell: cell.role,
        "size": lambda cell: grid.short_count(cell.size),
        "seed": lambda cell: f"seed={cell.seed}",
    }
    terms_by_kind: dict[str, set] = {}
    for term in terms:
        kind = next((k for k, f in kinds.items() if any(f(c) == term for c in plan.cells)), None)
        if kind is None:
            names = sorted({f(c) for k, f in kinds.items() if k != "id" for c in plan.cells})
            raise InputError(f"--only={term} matches no cell; use one of {', '.join(names)}")
        terms_by_kind.setdefault(kind, set()).add(term)
    matches = [c for c in plan.cells if all(kinds[k](c) in v for k, v in terms_by_kind.items())]
    ids = {cell.needs for cell in matches} | {cell.id for cell in matches}
    return [cell for cell in plan.cells if cell.id in ids]
