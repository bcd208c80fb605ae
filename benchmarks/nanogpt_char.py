"""nanoGPT's documented CPU run, whole processes, ours beside PyTorch eager:

    python -m benchmarks.nanogpt_char --torch_python=PATH --text=input.txt

Ours is the command a user types; the peer is peer_torch.py. One process at a time; the two sides
alternate, seed by seed, the first one changing.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

TEXT = flags.DEFINE_string("text", "", "UTF-8 text file; empty: one of Python's own source")
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each kind", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 2000, "training steps", lower_bound=200)
PRECISIONS = flags.DEFINE_list("precisions", ["float32", "bfloat16"], "which, in this order")

ROOT = Path(__file__).parents[1]
TEXT_CHARACTERS = 1_115_394  # as many as tiny Shakespeare has


def library_text(path: Path) -> str:
    """Writes ASCII source of the standard library, in the order of its names; says what it is."""
    parts, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content = file.read_bytes()
        if size < TEXT_CHARACTERS and content.isascii() and b"\r" not in content:
            parts.append(content.decode()[: TEXT_CHARACTERS - size])
            size += len(parts[-1])
    path.write_text("".join(parts), newline="\n")
    return f"{size:,} characters of the standard library of Python {sys.version.split()[0]}"


def ours(text: Path, precision: str, seed: int, out: Path) -> tuple[list[str], dict]:
    """The command, and the variables, of one run of ours."""
    arguments = [
        f"data.path={text}", f"data.seed={seed}", f"seed={seed}",
        f"train.steps={STEPS.value}", f"model.dtype={precision}",
    ]  # fmt: skip
    program = [sys.executable, "-m", "lmscale_jax.main", "--config=configs/nanogpt_char.py"]
    program += [f"--workdir={out / 'run'}", *(f"--config.{a}" for a in arguments)]
    # A cache of its own, shared by the runs: the first one of a precision prepares and compiles.
    return program, {"LMSCALE_CACHE": str(out.parent / "cache")}


def peer(text: Path, precision: str, seed: int, out: Path) -> tuple[list[str], dict]:
    precision = {"bfloat16": "bf16-autocast"}.get(precision, precision)
    program = [machine.TORCH_PYTHON.value, str(ROOT / "benchmarks/peer_torch.py"), "train"]
    program += ["--text", str(text), "--precision", precision, "--seed", str(seed)]
    return [*program, "--steps", str(STEPS.value), "--out", str(out)], {}


def read_ours(out: Path) -> dict:
    run = json.loads((out / "run/run.json").read_text())
    tokens = run["config"]["train"]["batch_size"] * run["config"]["data"]["seq_len"]
    return {
        "steps_per_second": run["throughput"]["tokens_per_second"] / tokens,
        "val_loss": run["final"]["val_loss"],
        "val_tokens": run["final"]["val_tokens"],
    }


def read_peer(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


SIDES = {"torch": (peer, read_peer), "ours": (ours, read_ours)}


def timed(side: str, text: Path, precision: str, seed: int, folder: Path) -> dict:
    """One whole process."""
    make, read = SIDES[side]
    out = folder / f"{side}-{precision}-{seed}"
    out.mkdir()
    program, variables = make(text, precision, seed, out)
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"{side}, {precision}, seed {seed}: status {done.returncode}: {errors[-1]}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    run = {"side": side, "precision": precision, "seed": seed, "seconds": seconds}
    return run | {"cpu_seconds": cpu} | read(out)


def measure(text: Path, torch: bool, result: dict, folder: Path) -> None:
    """All pairs of runs; results are written after each."""
    begin, sides = time.perf_counter(), ["torch", "ours"] if torch else ["ours"]
    pairs = [(p, seed) for p in PRECISIONS.value for seed in range(SEEDS.value)]
    for number, (precision, seed) in enumerate(pairs):
        if time.perf_counter() - begin > machine.LIMIT.value:
            result["not_run"] = [list(pair) for pair in pairs[number:]]
            print(f"--limit reached; not run: {result['not_run']}", flush=True)
            break
        for side in sides[:: 1 if number % 2 == 0 else -1]:
            run = timed(side, text, precision, seed, folder)
            result["runs"].append(run)
            print(
                f"{side} {precision} seed {seed}: {run['seconds']:.1f} s, "
                f"{run['steps_per_second']:.1f} steps/s, loss {run['val_loss']:.4f}",
                flush=True,
            )
            machine.save("nanogpt_char", result)
    if len({run["val_tokens"] for run in result["runs"]}) != 1:
        raise RunFailed("the two sides were not evaluated on the same number of characters")
    machine.save("nanogpt_char", result)


def main() -> None:
    if unknown := set(PRECISIONS.value) - {"float32", "bfloat16"}:
        raise InputError(f"--precisions={unknown.pop()}: float32,bfloat16 would work")
    if TEXT.value and not Path(TEXT.value).is_file():
        raise InputError(f"--text={TEXT.value}: no such file; without it one is made")
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(TEXT.value).absolute() if TEXT.value else Path(folder) / "input.txt"
        description = text.name if TEXT.value else library_text(text)
        asked = machine.asked("seeds", "steps", "precisions", "limit")
        result = {"machine": machine.facts(torch, asked), "text": description, "runs": []}
        print(f"{tables.headline(result['machine'])}\ntext: {description}", flush=True)
        measure(text, torch is not None, result, Path(folder))
    print("\n" + tables.whole_runs(result["runs"]))


if __name__ == "__main__":
    cli.run_command(main)
