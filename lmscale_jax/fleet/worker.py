"""The process that trains cells of a ladder: one run, or several as a pack."""

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
    """Trains the cells' runs, each from its last checkpoint; several cells train as a pack.

    Raises InputError for a held-out cell without a written forecast.
    """
    if not cells:
        raise InputError("--ids is empty; use ids of cells from plan.json")
    leave_with_parent()
    notes = {}
    if any(cell.role == HELD_OUT for cell in cells):
        notes["forecast"] = forecasts.fixed(workdir)
    runs = [(plan.config(cell, workdir), run_dir(workdir, cell.id)) for cell in cells]
    from lmscale_jax.run import mesh

    mesh.start(runs[0][0])
    if len(runs) == 1:
        from lmscale_jax.run.train import train as train_run

        train_run(*runs[0], notes=notes)
        return
    from lmscale_jax.lab import pack

    pack.run(runs, notes=notes | {"packed": len(runs)})


def leave_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent dies, so that no orphaned run continues unnoticed."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
