"""Where a training step's time goes, part by part, beside PyTorch eager:

    python -m benchmarks.pieces --torch_python=PATH

The two sides alternate in processes of their own; medians over the rounds.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine
from benchmarks.shapes import SHAPES
from lmscale_jax import command
from lmscale_jax.errors import RunFailed

ROUNDS = flags.DEFINE_integer("rounds", 3, "processes of each side and precision", lower_bound=1)

HERE = Path(__file__).parent
PRECISIONS = ("float32", "bfloat16")


def often(name: str, layers: int) -> int:
    """How many times a part occurs in one step."""
    return {"norm": 2 * layers + 1, "readout and loss": 1, "clip and AdamW": 1}.get(name, layers)


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
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"{side}, {precision}: status {done.returncode}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict, shape: str, precision: str) -> str:
    """The table of one shape and precision: parts times how often they occur, and their sum."""
    layers = SHAPES[int(shape)]["L"]
    sides = [side for side in ("torch", "ours") if side in found[precision]]
    rows, totals = [], dict.fromkeys(sides, 0.0)
    for part in found[precision]["ours"][shape]:
        n = often(part, layers)
        cells = []
        for side in sides:
            ms = n * statistics.median(found[precision][side][shape][part])
            totals[side] += ms
            cells.append(ms)
        rows.append([part, str(n), *(f"{ms:.2f}" for ms in cells), f"{cells[-1] / cells[0]:.2f}"])
    sums = [totals[side] for side in sides]
    rows.append(["sum", "", *(f"{ms:.1f}" for ms in sums), f"{sums[-1] / sums[0]:.2f}"])
    return machine.table(
        ["", "times a step", *(f"{s}, ms a step" for s in sides), "ours / torch"], rows
    )


def main() -> None:
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    sides = ["torch", "ours"] if torch else ["ours"]
    found: dict = {p: {s: {} for s in sides} for p in PRECISIONS}
    for number in range(ROUNDS.value):
        for precision in PRECISIONS:
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                for shape, parts in run(side, precision).items():
                    kept = found[precision][side].setdefault(shape, {})
                    for part, ms in parts.items():
                        kept.setdefault(part, []).append(round(ms, 4))
    result = {"machine": machine.facts(torch, machine.asked("rounds")), "ms": found}
    print(machine.headline(result["machine"]))
    for shape in map(str, SHAPES):
        for precision in PRECISIONS:
            print(f"\nShape {shape}, {precision}\n\n{show(found, shape, precision)}", flush=True)
    machine.save("pieces", result)


if __name__ == "__main__":
    command.run(main)
