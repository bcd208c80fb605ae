"""Where a training step's time goes, part by part, beside PyTorch eager:

    python -m benchmarks.pieces --torch_python=PATH

The two sides alternate in processes of their own; medians over the rounds.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine, tables
from benchmarks.shapes import GPT2_WITHOUT_READOUT, SHAPES
from lmscale_jax import cli
from lmscale_jax.errors import RunFailed

ROUNDS = flags.DEFINE_integer("rounds", 3, "processes of each side and precision", lower_bound=1)

HERE = Path(__file__).parent
PRECISIONS = ("float32", "bfloat16")


def run(side: str, precision: str) -> dict:
    """{shape: {part: ms}} of one process."""
    program = {
        "torch": [machine.TORCH_PYTHON.value, str(HERE / "pieces_torch.py"), "--precision"],
        "ours": [sys.executable, "-m", "benchmarks.pieces_jax", "--dtype"],
    }[side]
    done = subprocess.run(
        [*program, precision], capture_output=True, text=True, cwd=HERE.parent
    )  # fmt: skip
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"{side}, {precision}: status {done.returncode}: {errors[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    sides = ["torch", "ours"] if torch else ["ours"]
    times: dict = {p: {s: {} for s in sides} for p in PRECISIONS}
    for number in range(ROUNDS.value):
        for precision in PRECISIONS:
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                for shape, parts in run(side, precision).items():
                    kept = times[precision][side].setdefault(shape, {})
                    for part, ms in parts.items():
                        kept.setdefault(part, []).append(round(ms, 4))
    result = {"machine": machine.facts(torch, machine.asked("rounds")), "ms": times}
    print(tables.headline(result["machine"]))
    for shape in map(str, GPT2_WITHOUT_READOUT):
        for precision in PRECISIONS:
            text = tables.pieces(times, shape, precision, SHAPES[int(shape)]["L"])
            print(f"\nShape {shape}, {precision}\n\n{text}", flush=True)
    machine.save("pieces", result)


if __name__ == "__main__":
    cli.run_command(main)
