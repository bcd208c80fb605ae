"""Trains cells of a ladder that is under way; `ladder` starts it, as a process of its own:

python -m lmscale_jax.cell --workdir=runs/ladder --ids=ID,ID
"""

from pathlib import Path

from absl import flags

from lmscale_jax import command
from lmscale_jax.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of a ladder", required=True)
IDS = flags.DEFINE_list("ids", None, "cells of its plan.json; several train as one program")


def main() -> None:
    from lmscale_jax.fleet import worker
    from lmscale_jax.study import plan

    workdir = Path(WORKDIR.value)
    found = plan.read(workdir)
    if found is None:
        raise InputError(f"--workdir={workdir} holds no plan.json; start with lmscale_jax.ladder")
    worker.train(found, [found.cell(name) for name in IDS.value or []], workdir)


if __name__ == "__main__":
    command.run(main)
