"""Trains one run: python -m lmscale_jax.main --config=configs/quickstart.py --workdir=runs/first"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lmscale_jax import command
from lmscale_jax.errors import InputError

CONFIG = command.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; continued if it is one")
EXPLAIN = flags.DEFINE_bool("explain", False, "print what would be done, and why, and leave")


def main() -> None:
    if EXPLAIN.value:
        from lmscale_jax.run.explain import explain

        path = config_flags.get_config_filename(flags.FLAGS["config"])
        explain(CONFIG.value, command.overrides(), path)
        return
    if not WORKDIR.value:
        raise InputError("--workdir is missing; --workdir=runs/first would work")
    from lmscale_jax.config import validate
    from lmscale_jax.run import mesh

    validate(CONFIG.value)
    mesh.start(CONFIG.value)
    from lmscale_jax.run.train import train

    finished = train(CONFIG.value, Path(WORKDIR.value))
    if finished:
        from lmscale_jax.reports import closing

        closing.show(finished)


if __name__ == "__main__":
    command.run(main)
