"""What a process does that trains cells: alone, or packed into one program."""

import ctypes
import platform
import signal
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.study import forecasts
from lmscale_jax.study.cells import HELD_OUT, Cell
from lmscale_jax.study.plan import Plan, run_dir

_PR_SET_PDEATHSIG = 1


def train(plan: Plan, cells: list[Cell], workdir: Path) -> None:
    """Trains or goes on with the cells' runs.

    Raises InputError for a held-out cell before its forecast is written.
    """
    if not cells:
        raise InputError("--ids is empty; plan.json lists the cells")
    leave_with_parent()
    notes = {}
    if any(cell.role == HELD_OUT for cell in cells):
        notes["forecast"] = forecasts.fixed(workdir)
    configs = [plan.config(cell, workdir) for cell in cells]
    from lmscale_jax.run import mesh

    mesh.start(configs[0])
    if len(cells) == 1:
        from lmscale_jax.run.train import train as train_one

        train_one(configs[0], run_dir(workdir, cells[0].id), notes=notes)
        return
    from lmscale_jax.lab import pack

    members = [(c, run_dir(workdir, cell.id)) for c, cell in zip(configs, cells, strict=True)]
    pack.run(members, notes=notes | {"packed": len(cells)})


def leave_with_parent() -> None:
    """Asks Linux to send SIGTERM when the parent dies, so that no orphan trains on unseen."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
