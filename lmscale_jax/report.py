"""Writes a page about a run from its records: python -m lmscale_jax.report --workdir=runs/first

Or about pairs of evaluated runs, of any number of seeds and sizes (directories or globs, joined by
commas):

python -m lmscale_jax.report --workdir=runs/mur --baseline='runs/base_*' --variant='runs/loss_*'
"""

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError
from lmscale_jax.files import check_writable

WORKDIR = cli.path_flag("workdir", "a run, or the directory that gets report/", required=True)
BASELINE = flags.DEFINE_string("baseline", "", "run directories without the switch")
VARIANT = flags.DEFINE_string("variant", "", "run directories with it, of the same seeds")
SWITCH = flags.DEFINE_string("switch", "mur", "the key or group of keys that is studied")
OUT = cli.path_flag("out", "directory for the page; default: report/ in --workdir")
ALLOW = flags.DEFINE_bool("allow_differences", False, "compare runs that differ in more than that")


def main() -> None:
    if bool(BASELINE.value) != bool(VARIANT.value):
        raise InputError(
            f"--baseline={BASELINE.value!r} and --variant={VARIANT.value!r} go together; "
            f"use --baseline=runs/a --variant=runs/b"
        )
    from lmscale_jax.config.keys import SPEC, keys
    from lmscale_jax.config.resolve import hint
    from lmscale_jax.reports import pairs, run_report

    folder = OUT.value or WORKDIR.value / "report"
    check_writable(folder, "--out" if OUT.value else "--workdir", remedy_flag="--out")
    if not BASELINE.value:
        page = run_report.report_run(pairs.read_run(WORKDIR.value), folder)
        print(f"page                 {page}")
        return
    switches = [*SPEC, *(path for path, _ in keys())]
    if SWITCH.value not in switches:
        raise InputError(
            f"--switch={SWITCH.value} is not a config key; {hint(SWITCH.value, switches)}"
        )
    sides = (pairs.read_runs(f.name, f.value) for f in (BASELINE, VARIANT))
    matched = pairs.match_runs(*sides, SWITCH.value, ALLOW.value)
    page = run_report.report_pairs(matched, SWITCH.value, folder)
    print(
        f"difference           {run_report.difference_sentence(pairs.paired_difference(matched))}"
    )
    print(f"page                 {page}")


if __name__ == "__main__":
    cli.run_command(main)
