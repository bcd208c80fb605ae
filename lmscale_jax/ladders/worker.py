"""Trains cells of a ladder that has a plan: one run, or several as a pack.

The executors start it as a separate process:

python -m lmscale_jax.ladders.worker --workdir=runs/ladder --ids=ID,ID
"""

from pathlib import Path

from lmscale_jax.config import own_code
from lmscale_jax.errors import InputError
from lmscale_jax.ladders import forecasts
from lmscale_jax.ladders.grid import HELD_OUT, Cell
from lmscale_jax.ladders.plan import LadderPlan, cell_dir, check_products, read_plan
from lmscale_jax.train.watchdog import leave_with_parent


def train_cells(plan: LadderPlan, cells: list[Cell], workdir: Path) -> None:
    """Trains the cells' runs, each from its last checkpoint; several cells train as a pack.

    Raises InputError for a held-out cell without a written forecast, and where this device lacks
    the products in which the arms differ.
    """
    if not cells:
        raise InputError("--ids is empty; use ids of cells from plan.json")
    notes = {}
    if any(cell.role == HELD_OUT for cell in cells):
        notes["forecast"] = forecasts.fixed_hash(workdir)
    runs = [(plan.config(cell, workdir), cell_dir(workdir, cell.id)) for cell in cells]
    import jax

    from lmscale_jax.model import mesh

    mesh.start_jax(runs[0][0])
    check_products(plan, jax.default_backend())
    if len(runs) == 1:
        from lmscale_jax.train.loop import train as train_run

        train_run(*runs[0], notes=notes)
        return
    from lmscale_jax.ladders import pack

    pack.run_pack(runs, notes=notes | {"packed": len(runs)})


def train_job(workdir: Path, ids: list[str]) -> None:
    """Trains the cells with these ids. Raises InputError where there is no plan or no such cell."""
    plan = read_plan(workdir)
    if plan is None:
        raise InputError(f"--workdir={workdir} holds no plan.json; run lmscale_jax.ladder first")
    own_code.look_in(workdir)
    train_cells(plan, [plan.cell(name) for name in ids], workdir)


if __name__ == "__main__":
    from absl import flags

    from lmscale_jax import cli

    # Not at the top: commands that import this module define a --workdir of their own.
    WORKDIR = cli.path_flag("workdir", "directory of a ladder", required=True)
    IDS = flags.DEFINE_list("ids", None, "cells of its plan.json; several train as one program")
    cli.trust_flag()
    leave_with_parent()
    cli.run_command(lambda: train_job(WORKDIR.value, IDS.value or []))
