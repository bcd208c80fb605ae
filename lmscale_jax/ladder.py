"""Plans, runs and resumes a ladder: forecasts, scores and judges it, and writes its report.

python -m lmscale_jax.ladder --config=configs/ladders/quickstart.py --workdir=runs/ladder
"""

import functools
import shlex
import sys
from pathlib import Path

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

CONFIG = cli.config_flag()
WORKDIR = cli.path_flag("workdir", "directory of the ladder; continued if it exists")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the cells and their cost, and exit")
ANCHORS_ONLY = flags.DEFINE_bool("anchors_only", False, "stop after the forecast")
ONLY = flags.DEFINE_list(
    "only", [], "train only these cells: arms, ids, sizes (100k), roles (held_out), seed=0"
)

CODE_CHANGE = flags.DEFINE_string(
    "allow_code_change", "", "why runs that other code of this package trained are comparable"
)


def main() -> None:
    from lmscale_jax.ladders import run, scheduler

    if DRY_RUN.value:
        print(run.preview_ladder(CONFIG.value, Path(WORKDIR.value or "."), ONLY.value))
        return
    if not WORKDIR.value:
        raise InputError("--workdir is missing; use --workdir=runs/ladder")
    from lmscale_jax.reports import ladder_report as page

    workdir = WORKDIR.value
    command = f"python -m lmscale_jax.ladder {shlex.join(sys.argv[1:])}"
    try:
        message = run.run_ladder(
            CONFIG.value,
            workdir,
            only=ONLY.value,
            until="forecast" if ANCHORS_ONLY.value else "verdict",
            code_change=CODE_CHANGE.value,
            write_report=functools.partial(page.write_ladder_report, command=command),
        )
    except scheduler.Interrupted as error:
        print("stopped: run the same command to continue", flush=True)
        raise SystemExit(error.status) from None
    except OSError as error:
        raise RunFailed(f"--workdir={workdir}: {error}; complete files are kept") from error
    print(message)


if __name__ == "__main__":
    cli.run_command(main)
