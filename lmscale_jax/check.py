"""Checks a config before compute is spent: the guards, for the arms of a ladder or for one run.

python -m lmscale_jax.check --config=configs/ladders/quickstart.py [--workdir=runs/ladder]

Exits with status 2 where a guard refuses an arm. With --workdir the findings are kept in
guards.json, and the ladder of that directory does not repeat them.
"""

import tempfile
from pathlib import Path

from lmscale_jax import cli

CONFIG = cli.config_flag()
WORKDIR = cli.path_flag("workdir", "directory of the ladder, where guards.json is kept")


def main() -> None:
    from lmscale_jax.guards import record
    from lmscale_jax.ladders import arm_checks, plan

    config = CONFIG.value
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        workdir = WORKDIR.value or Path(folder)
        if "run" in config:
            judged = arm_checks.check_plan_arms(plan.make_plan(config, print), workdir, print)
        else:
            judged = record.check_run(config, workdir / record.NAME, print)
    passed = sum(each.status == "passed" for each in judged)
    print(f"passed {passed} of {len(judged)} checks in {sum(j.seconds for j in judged):.0f} s")


if __name__ == "__main__":
    cli.run_command(main)
