"""From a question to a verdict: plans, runs and resumes a ladder, forecasts, scores, reports.

python -m lmscale_jax.ladder --config=configs/ladders/quickstart.py --workdir=runs/ladder
"""

import sys
from pathlib import Path

from absl import flags

from lmscale_jax import command
from lmscale_jax.errors import InputError, RunFailed

CONFIG = command.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the ladder; continued if it is one")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the grid and what it costs, and leave")
ANCHORS_ONLY = flags.DEFINE_bool("anchors_only", False, "stop after the forecast")
ONLY = flags.DEFINE_list(
    "only", [], "trains these cells only: arms, ids, sizes (100k), roles (held_out), seed=0"
)


def main() -> None:
    from lmscale_jax.fleet import conduct

    if DRY_RUN.value:
        print(conduct.preview(CONFIG.value, Path(WORKDIR.value or "."), ONLY.value))
        return
    if not WORKDIR.value:
        raise InputError("--workdir is missing; --workdir=runs/ladder would work")
    workdir = Path(WORKDIR.value)
    try:
        finished = conduct.run(
            CONFIG.value,
            workdir,
            only=ONLY.value,
            until="forecast" if ANCHORS_ONLY.value else "verdict",
            argv=sys.argv[1:],
        )
    except conduct.Stopped as error:
        print("stopped: the same command goes on from there", flush=True)
        raise SystemExit(error.status) from None
    except OSError as error:
        raise RunFailed(f"--workdir={workdir}: {error}; what is written is whole") from error
    if finished:
        print(finished)


if __name__ == "__main__":
    command.run(main)
