"""A process on each core beside one process on all of them: steps a second, all together.

    python -m benchmarks.cores --torch_python=PATH

What a ladder on this machine does with its cells: each of its processes is pinned to a core. A turn
of "a process a core" is one of every such process at the same time.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from benchmarks import interleave, machine, tables
from benchmarks.shapes import SHAPES, shape_text
from lmscale_jax import cli
from lmscale_jax.ladders import executors

WANTED = flags.DEFINE_list("shapes", ["1", "2", "4"], "numbers of the shapes")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "model.dtype")
ROUNDS = flags.DEFINE_integer("rounds", 12, "turns of each", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 1000.0, "milliseconds of one turn; 2 steps at the least")

HERE = Path(__file__).parent
WHOLE, APART = "one process", "a process a core"
PEER_PRECISION = {"float32": "float32", "bfloat16": "bf16-autocast"}


class Together:
    """Processes on a core each; takes turns as one `interleave.Worker` does."""

    def __init__(self, label: str, program: list[str]):
        self.label, self._workers = label, []
        for core in sorted(os.sched_getaffinity(0)):
            with executors.pin_to([core]):
                worker = interleave.Worker(f"{label}, {core}", program, {"OMP_NUM_THREADS": "1"})
            self._workers.append(worker)

    def wait(self) -> None:
        for worker in self._workers:
            worker.wait()

    def chunk(self, steps: int) -> tuple[interleave.Chunk, float]:
        """Milliseconds over the steps of all of them."""
        watch = interleave.Watch(self._workers)
        for worker in self._workers:
            worker.ask(steps)
        answers = [worker.answer() for worker in self._workers]
        rate = sum(1 / ms for ms, _ in answers)
        return interleave.Chunk(1 / rate, watch.clean()), answers[0][1]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def programs(shape: dict, dtype: str, torch: bool) -> dict[str, list[str]]:
    """{side: command}."""
    text = json.dumps(shape)
    ours = [sys.executable, "-m", "benchmarks.worker_jax", f"--shape={text}", f"--dtype={dtype}"]
    peer = [machine.TORCH_PYTHON.value, str(HERE / "peer_torch.py"), "step", "--shape", text]
    peer += ["--precision", PEER_PRECISION[dtype], "--compile", "default"]
    return {"ours": ours} | ({"torch compiled": peer} if torch else {})


def compare(shape: dict, dtype: str, torch: bool) -> dict:
    """{row: times and ratios} of one shape and type."""
    workers = []
    for side, program in programs(shape, dtype, torch).items():
        workers.append(interleave.Worker(f"{side}, {WHOLE}", program))
        workers[-1].wait()
        workers.append(Together(f"{side}, {APART}", program))
        workers[-1].wait()
    try:
        rounds, chunk_ms, limit = ROUNDS.value, CHUNK.value, machine.LIMIT.value
        chunks, losses = interleave.measure(workers, rounds, chunk_ms, limit)
    finally:
        for worker in workers:
            worker.close()
    rows = {}
    for label, turn in chunks.items():
        whole = label.replace(APART, WHOLE)
        peer = label.replace("ours", "torch compiled")
        rows[label] = {
            "ms": interleave.ms(turn),
            # Of steps a second, so above 1 is faster.
            "gain": interleave.ratio(chunks[whole], turn) if whole != label else None,
            "over_torch": interleave.ratio(chunks[peer], turn)
            if peer in chunks and peer != label
            else None,
            "rounds": len(turn),
            "last_loss": losses[label],
            "ms_by_round": [round(c.ms, 3) for c in turn],
            "clean_by_round": [c.clean for c in turn],
        }
    return rows


def main() -> None:
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    asked = machine.asked("shapes", "dtypes", "rounds", "chunk_ms", "limit", "others")
    result = {"machine": machine.facts(torch, asked), "shapes": {}}
    print(tables.headline(result["machine"]), flush=True)
    for number in WANTED.value:
        shape = SHAPES[int(number)]
        rows = {dtype: compare(shape, dtype, torch is not None) for dtype in DTYPES.value}
        result["shapes"][number] = {"shape": shape, "rows": rows}
        machine.save("cores", result)
        print(f"shape {number} ({shape_text(shape)}) done", flush=True)
    print(f"\n{tables.cores(result)}")


if __name__ == "__main__":
    cli.run_command(main)
