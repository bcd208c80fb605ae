"""Trains cells of a ladder that has a plan; the executors start it as a process of its own:

python -m lmscale_jax.cell --workdir=runs/ladder --ids=ID,ID
"""

from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.fleet import worker
from lmscale_jax.study.plan import read


def main(workdir: Path, ids: list[str]) -> None:
    """Trains the cells with these ids. Raises InputError where there is no plan or no such cell."""
    plan = read(workdir)
    if plan is None:
        raise InputError(f"--workdir={workdir} holds no plan.json; run lmscale_jax.ladder first")
    worker.train(plan, [plan.cell(name) for name in ids], workdir)


if __name__ == "__main__":
    from absl import flags

    from lmscale_jax import command

    # Not at the top: commands that import this module define a --workdir of their own.
    WORKDIR = flags.DEFINE_string("workdir", None, "directory of a ladder", required=True)
    IDS = flags.DEFINE_list("ids", None, "cells of its plan.json; several train as one program")
    command.run(lambda: main(Path(WORKDIR.value), IDS.value or []))
