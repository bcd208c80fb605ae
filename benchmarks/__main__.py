"""All benchmarks, one after the other, each in processes of its own:

    python -m benchmarks --torch_python=PATH [--length=short|full] [--only=train_step,start]
    python -m benchmarks --tables

Each prints its tables and writes its JSON to --results. One that fails is named, the others go on,
and the exit status is 1. `--tables` runs nothing: it makes the tables of benchmarks/README.md anew
from the JSON.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine, readme, tables
from benchmarks.children import Outcome, carry_out
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

ONLY = flags.DEFINE_list("only", [], "some of the benchmarks by name; all by default")
LENGTH = flags.DEFINE_enum(
    "length", "short", ["short", "full"], "short: under half an hour on two quiet cores"
)
TABLES = flags.DEFINE_bool("tables", False, "only make the README's tables of the results anew")


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes:
    module: what is run.
    short: flags of --length=short; full takes the module's own defaults and `always`.
    always: flags of both.
    minutes: after which it is stopped, short; full has ten times as long.
    """

    module: str
    short: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    minutes: float = 10


# In the order of interest. Shortening is by rounds, by the time after which none begins (of a
# shape, a process or a pair) and by leaving rows out, never by other sizes or lengths of a turn, so
# that a short result can be put beside a full one.
PLAN = {
    "train_step": Run("train_step", ("--rounds=5", "--limit=45"), minutes=25),
    "start": Run("start", ("--rounds=3",)),
    "cores": Run("cores", ("--rounds=4", "--limit=20")),
    "breakdown": Run("breakdown", ("--rounds=4", "--limit=8"), minutes=12),
    "overheads": Run("overheads", ("--rounds=3", "--limit=6"), minutes=12),
    "mur": Run("mur", ("--rounds=4", "--limit=20", "--shapes=1")),
    "optimizers": Run("optimizers", ("--sizes=1:12,1:48,2:8", "--turns=4", "--limit=15")),
    "attention": Run("attention", ("--rounds=3",)),
    "attention_bfloat16": Run("attention", ("--rounds=3",), ("--dtype=bfloat16",)),
    "population": Run("population", ("--rounds=3", "--widths=16,32,64,128")),
    "fits": Run(
        "fits", ("--starts=150", "--draws=1000", "--peer_draws=100", "--repeats=5", "--limit=30")
    ),
    "prepare": Run("prepare", ("--rounds=1",)),
}
# Commands that take longer and stay apart.
APART = {
    "nanogpt_char": "nanoGPT's CPU run from end to end, about 20 minutes",
    "pieces": "parts of a step beside PyTorch's",
    "optimizer_sweep": "AdamW and Muon at their best rates",
    "gating_study": "gates of attention and their controls",
    "mur_study --workdir=runs/mur_study": "arms of Marginal Utility Regularization",
    "accelerator --minutes=8": "everything that one accelerator should be asked",
    "config_memory": "named configs compiled for an H100 that is not here",
    "packs_compiled": "packs compiled for an H100 that is not here",
    "fits_reference --data=DIR": "fits beside published ones",
    "calibration": "how often intervals and verdicts are right, by simulation",
}


def command_of(run: Run) -> list[str]:
    shared = [f"--{n}={flags.FLAGS[n].value}" for n in ("results", "torch_python", "others")]
    more = run.short if LENGTH.value == "short" else ()
    return [sys.executable, "-m", f"benchmarks.{run.module}", *run.always, *more, *shared]


def summary(outcomes: list[Outcome], results: Path) -> str:
    """What ran, how long, what it left."""
    rows = [
        [o.name, f"{o.seconds:.0f}", o.fault or "done", ", ".join(o.written) or "nothing"]
        for o in outcomes
    ]
    lines = [tables.table(["benchmark", "seconds", "end", "written"], rows)]
    total = sum(o.seconds for o in outcomes)
    lines.append(f"{total / 60:.1f} minutes; results in {results}. Into benchmarks/README.md: "
                 f"python -m benchmarks --tables")  # fmt: skip
    lines.append("Not included, commands of their own:")
    lines += [f"  python -m benchmarks.{name}: {what}" for name, what in APART.items()]
    return "\n".join(lines)


def run_all(programs: dict[str, tuple[list[str], float]], results: Path) -> None:
    """{name: (command, seconds after which it is stopped)}, one after the other.

    Raises RunFailed at the end if one failed.
    """
    outcomes = [carry_out(name, *program, results) for name, program in programs.items()]
    print(f"\n## Summary\n\n{summary(outcomes, results)}", flush=True)
    if failed := [f"{o.name} ({o.fault})" for o in outcomes if o.fault]:
        raise RunFailed(f"{len(failed)} of {len(outcomes)} benchmarks failed: {', '.join(failed)}")


def main() -> None:
    results = Path(machine.OUT.value)
    if TABLES.value:
        print("\n".join(readme.rewrite_file(readme.README, results)) or "nothing changed")
        return
    if unknown := [name for name in ONLY.value if name not in PLAN]:
        raise InputError(f"--only={unknown[0]}: one of {','.join(PLAN)} would work")
    longer = 1 if LENGTH.value == "short" else 10
    run_all(
        {
            name: (command_of(run), 60 * run.minutes * longer)
            for name, run in PLAN.items()
            if not ONLY.value or name in ONLY.value
        },
        results,
    )


if __name__ == "__main__":
    cli.run_command(main)
