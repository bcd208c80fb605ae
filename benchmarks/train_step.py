"""Whole training steps beside PyTorch eager:

    python -m benchmarks.train_step --torch_python=PATH

Ours is the step of run/step.py with the batch put on the devices, as in a run; PyTorch's is
forward, backward, clipping and fused AdamW of the same model (peer_torch.py) on tensors at hand.
"""

import sys
from pathlib import Path

from absl import flags

from benchmarks import interleave, machine
from benchmarks.shapes import SHAPES
from lmscale_jax import command
from lmscale_jax.errors import InputError

WANTED = flags.DEFINE_list("shapes", [str(n) for n in SHAPES], "numbers of the shapes")
GELU = flags.DEFINE_enum("gelu", "", ["", "erf", "tanh"], "empty: each shape's own")
ROUNDS = flags.DEFINE_integer("rounds", 16, "turns of each process", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 400.0, "milliseconds of one turn; 2 steps at the least")

HERE = Path(__file__).parent
# Label: precision of the peer, as it names it.
TORCH = {
    "torch float32": "float32",
    "torch bfloat16 autocast": "bf16-autocast",
    "torch bfloat16 pure": "bf16-pure",
}
# Label: model.dtype and mesh.cpu_devices.
OURS = {
    "ours float32, one device": ("float32", 1),
    "ours float32, one a core": ("float32", 0),
    "ours bfloat16, one device": ("bfloat16", 1),
    "ours bfloat16, one a core": ("bfloat16", 0),
}


def start(shape: int, torch: bool) -> list[interleave.Worker]:
    """All processes of a shape, warmed up one after the other."""
    commands = {}
    if torch:
        peer = [
            machine.TORCH_PYTHON.value,
            str(HERE / "peer_torch.py"),
            "step",
            "--shape",
            str(shape),
        ]
        commands |= {label: [*peer, "--precision", name] for label, name in TORCH.items()}
    module = [sys.executable, "-m", "benchmarks.worker_jax", f"--shape={shape}"]
    for label, (dtype, devices) in OURS.items():
        commands[label] = [*module, f"--dtype={dtype}", f"--devices={devices}"]
    workers = []
    for label, arguments in commands.items():
        gelu = [f"--gelu={GELU.value}"] if GELU.value else []
        workers.append(interleave.Worker(label, arguments + gelu))
        workers[-1].wait()
    return workers


def compare(shape: int, torch: bool) -> dict:
    """One shape: for each label the milliseconds, the ratios and the last loss."""
    workers = start(shape, torch)
    try:
        chunks, losses = interleave.measure(workers, ROUNDS.value, CHUNK.value, machine.LIMIT.value)
    finally:
        for worker in workers:
            worker.close()
    result = {}
    for label, own in chunks.items():
        precision = "float32" if "float32" in label else "bfloat16"
        bases = [base for base in TORCH if base in chunks and precision in base and base != label]
        result[label] = {
            "ms": interleave.ms(own),
            "ratio_to": {base: interleave.ratio(own, chunks[base]) for base in bases},
            "rounds": len(own),
            "last_loss": losses[label],
            "ms_by_round": [round(c.ms, 3) for c in own],
            "clean_by_round": [c.clean for c in own],
        }
    used = {"gelu": GELU.value} if GELU.value else {}
    return {"shape": SHAPES[shape] | used, "rows": result}


def show(result: dict) -> str:
    """The table of one shape."""
    head = [
        "",
        "ms a step",
        "clean rounds",
        "/ torch float32, or autocast",
        "/ torch pure bfloat16",
    ]
    rows = []
    for label, row in result["rows"].items():
        ratios = {"torch float32": "", "torch bfloat16 autocast": "", "torch bfloat16 pure": ""}
        ratios |= {base: cell(found, 2) for base, found in row["ratio_to"].items()}
        same = ratios["torch float32"] or ratios["torch bfloat16 autocast"]
        pure = ratios["torch bfloat16 pure"]
        rows.append([label, cell(row["ms"], 1), f"{row['ms']['n']} of {row['rounds']}", same, pure])
    return machine.table(head, rows)


def cell(found: dict, digits: int) -> str:
    """Median and quartiles."""
    if not found["n"]:
        return "no clean chunk"
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    unknown = [n for n in WANTED.value if n not in map(str, SHAPES)]
    if unknown or not WANTED.value:
        raise InputError(f"--shapes={','.join(unknown)}: no such shape; --shapes=1,2 would work")
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    asked = machine.asked("shapes", "gelu", "rounds", "chunk_ms", "limit")
    name = f"train_step_{GELU.value}" if GELU.value else "train_step"
    result = {"machine": machine.facts(torch, asked), "shapes": {}}
    print(machine.headline(result["machine"]))
    for number in WANTED.value:
        found = compare(int(number), torch is not None)
        result["shapes"][number] = found
        sizes = " ".join(f"{key}={value}" for key, value in found["shape"].items())
        print(f"\nShape {number} ({sizes})\n\n{show(found)}", flush=True)
        machine.save(name, result)


if __name__ == "__main__":
    command.run(main)
