"""From the start of a training command to the end of its first step, and where that time goes:

    python -m benchmarks.start

The command is lmscale_jax.main, stopped after one step (start_worker.py). The data are prepared
already. "cold": a cache directory that holds nothing but the data, so that every program is
compiled; "warm": one that an earlier run has filled.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import interleave, machine, tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

ROUNDS = flags.DEFINE_integer("rounds", 3, "processes of each kind", lower_bound=1)
WANTED = flags.DEFINE_list("configs", [], "some of the configs by name; all by default")
EXTRA = flags.DEFINE_list("set", [], "further config keys, as train.batch_size=8")

# Name: the config, and what makes it short. The size of the model and of the vocabulary stay; the
# tokens are bytes, so that no large tokenizer has to be trained first.
_SMALL = ["data.tokenizer=bytes", "data.vocab_size=4096", "model.vocab_size=32000",
          "data.seq_len=128", "train.batch_size=4", "train.accum=1", "train.steps=20"]  # fmt: skip
CONFIGS = {
    "quickstart": ("configs/quickstart.py", []),
    "llama_50m": ("configs/llama_50m.py:embedded,16gb", _SMALL),
}
ROOT = Path(__file__).parents[1]
# What a process says it has reached, in this order: the parts of its time.
PARTS = ("imports, devices", "data and model", "record, checkpoints", "initial state",
         "loop, first batch", "step compiled", "first step")  # fmt: skip


def once(name: str, cache: Path, workdir: Path) -> tuple[dict[str, float], dict]:
    """(seconds of each part of one process, and of all; its device)."""
    path, keys = CONFIGS[name]
    program = [sys.executable, "-m", "benchmarks.start_worker", f"--config={path}"]
    program += [f"--config.{key}" for key in [*keys, *EXTRA.value]] + [f"--workdir={workdir}"]
    # Programs too are in this cache, so that a cold start has none.
    environment = os.environ | {"LMSCALE_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": ""}
    begin = time.time()
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"start of {name}: status {done.returncode}: {errors[-1]}")
    marks = json.loads(done.stdout.splitlines()[-1])
    seconds, last = {}, begin
    for part in PARTS:
        seconds[part], last = marks[part] - last, marks[part]
    return seconds | {"all": last - begin}, marks["device"]


def cold_copy(filled: Path, empty: Path) -> Path:
    """A cache with the data of another and none of its programs."""
    shutil.copytree(filled, empty, ignore=shutil.ignore_patterns("compiled"))
    return empty


def measure(name: str, folder: Path) -> dict[str, dict]:
    """{"NAME, cold": {"parts": ..., "by_round": ...}, "NAME, warm": ...}; the two alternate."""
    filled = folder / f"{name}-cache"
    once(name, filled, folder / f"{name}-first")  # prepares and fills the cache
    seen: dict[str, list] = {"cold": [], "warm": []}
    for number in range(ROUNDS.value):
        for kind in list(seen)[:: 1 if number % 2 == 0 else -1]:
            label = f"{name}-{kind}-{number}"
            cache = filled if kind == "warm" else cold_copy(filled, folder / f"{label}-cache")
            seconds, device = once(name, cache, folder / label)
            seen[kind].append(seconds)
            print(f"{label}: {seen[kind][-1]['all']:.1f} s", flush=True)
            if kind == "cold":
                shutil.rmtree(cache)
    return {
        f"{name}, {kind}": {
            "parts": {
                part: interleave.quartiles([parts[part] for parts in rounds]) for part in rounds[0]
            },
            "by_round": rounds,
            "device": device,
        }
        for kind, rounds in seen.items()
    }


def main() -> None:
    if unknown := set(WANTED.value) - set(CONFIGS):
        raise InputError(f"--configs={unknown.pop()}: one of {','.join(CONFIGS)} would work")
    asked = machine.asked("rounds", "configs", "set")
    result = {"machine": machine.facts(None, asked), "rows": {}}
    print(tables.headline(result["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in WANTED.value or CONFIGS:
            result["rows"] |= measure(name, Path(folder))
            machine.save("start", result)
    print(f"\n{tables.start(result)}")


if __name__ == "__main__":
    cli.run_command(main)
