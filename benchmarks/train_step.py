"""Whole training steps beside PyTorch, eager and compiled:

    python -m benchmarks.train_step --torch_python=PATH
    python -m benchmarks.train_step --config=configs/llama_100m.py --batches=8,16,32 --apart

Ours is the step of train/step.py with the batch put on the devices, as in a run; PyTorch's is
forward, backward, clipping and fused AdamW of the same model (peer_torch.py) on tensors at hand.
With --config the model is that of a config, in its own type, at several batch sizes; on a GPU take
--apart, so that one process at a time holds the memory.
"""

import functools
import json
import sys
from pathlib import Path

from absl import flags

from benchmarks import interleave, machine, tables
from benchmarks.shapes import SHAPES, shape_of, shape_text
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

WANTED = flags.DEFINE_list("shapes", [str(n) for n in SHAPES], "numbers of the shapes")
CONFIG = cli.config_flag(required=False)
BATCHES = flags.DEFINE_list("batches", ["8"], "with --config: sequences a step")
GELU = flags.DEFINE_enum("gelu", "", ["", "erf", "tanh"], "empty: each shape's own")
ROUNDS = flags.DEFINE_integer("rounds", 16, "turns of each process", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 400.0, "milliseconds of one turn; 2 steps at the least")
COMPILE = flags.DEFINE_string("compile", "default", "mode of torch.compile; empty: no such rows")
ROWS = flags.DEFINE_list("rows", [], "only rows whose label begins so; all by default")
SIDE = flags.DEFINE_integer("product", 0, "side of the bare products; 0: 2048, on a GPU 8192")
APART = flags.DEFINE_bool("apart", False, "one process at a time, all of its turns at once")

HERE = Path(__file__).parent
# Label: precision of the peer, as it names it, and whether it is compiled.
TORCH = {
    "torch float32": ("float32", False),
    "torch float32 compiled": ("float32", True),
    "torch bfloat16 autocast": ("bf16-autocast", False),
    "torch bfloat16 autocast compiled": ("bf16-autocast", True),
    "torch bfloat16 pure": ("bf16-pure", False),
}
# Label: model.dtype and mesh.cpu_devices; 0: as many as there are cores and the batch divides.
OURS = {
    "ours float32, one device": ("float32", 1),
    "ours float32, one a core": ("float32", 0),
    "ours bfloat16, one device": ("bfloat16", 1),
    "ours bfloat16, one a core": ("bfloat16", 0),
}
OURS_ACCELERATED = {"ours float32": ("float32", 0), "ours bfloat16": ("bfloat16", 0)}
PRODUCT = "product, "
# Several processes share one accelerator.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def commands(shape: dict, torch: bool, dtypes: tuple[str, ...], changes: dict) -> dict:
    """{label: command} of every row of a shape, and of the bare products."""
    programs, accelerated = {}, machine.accelerated()
    side = str(SIDE.value or (8192 if accelerated else 2048))
    peer = [machine.TORCH_PYTHON.value, str(HERE / "peer_torch.py")]
    module, text = [sys.executable, "-m", "benchmarks.worker_jax"], json.dumps(shape)
    for label, (precision, compiled) in TORCH.items() if torch else ():
        if any(dtype in label for dtype in dtypes) and (COMPILE.value or not compiled):
            mode = ["--compile", COMPILE.value] if compiled else []
            programs[label] = [*peer, "step", "--shape", text, "--precision", precision, *mode]
    for label, (dtype, devices) in (OURS_ACCELERATED if accelerated else OURS).items():
        if dtype in dtypes:
            devices = devices or (0 if accelerated else machine.cores_for(shape["B"]))
            arguments = [f"--shape={text}", f"--dtype={dtype}", f"--devices={devices}"]
            programs[label] = [*module, *arguments, f"--changes={json.dumps(changes)}"]
    chosen = tuple(ROWS.value)
    programs = {k: v for k, v in programs.items() if not chosen or k.startswith(chosen)}
    for dtype in dtypes:
        if not any(dtype in label for label in programs):
            continue
        if torch:
            precision = {"bfloat16": "bf16-pure"}.get(dtype, dtype)
            more = ["product", "--precision", precision, "--size", side]
            programs[f"{PRODUCT}torch {dtype}"] = [*peer, *more]
        programs[f"{PRODUCT}ours {dtype}"] = [*module, f"--product={side}", f"--dtype={dtype}"]
    return programs


def timed(jobs: dict) -> tuple[dict, dict, dict, dict]:
    """Chunks, last losses, what each process said of itself, and what the dead ones died of."""
    if APART.value:
        chunks, losses, facts, failed = {}, {}, {}, {}
        for label, job in jobs.items():
            for whole, part in zip(
                (chunks, losses, facts, failed), _together({label: job}), strict=True
            ):
                whole |= part
        return chunks, losses, facts, failed
    return _together(jobs)


def _together(jobs: dict) -> tuple[dict, dict, dict, dict]:
    failed, workers = {}, {}

    def wait(label: str) -> None:
        try:
            workers[label].wait()
        except RunFailed as error:
            failed[label] = str(error)

    try:
        before = None
        for label, job in jobs.items():
            # Two at a time: compiling takes one core.
            workers[label] = interleave.Worker(label, job, ENVIRONMENT)
            if before:
                wait(before)
            before = label
        wait(before)
        living = [worker for label, worker in workers.items() if label not in failed]
        rounds, chunk_ms, limit = ROUNDS.value, CHUNK.value, machine.LIMIT.value
        chunks, losses = interleave.measure(living, rounds, chunk_ms, limit, failed)
    finally:
        for worker in workers.values():
            worker.close()
    return chunks, losses, {label: w.facts for label, w in workers.items()}, failed


def compare(
    shape: dict, torch: bool, dtypes=("float32", "bfloat16"), changes: dict | None = None
) -> dict:
    """One shape: for each label the milliseconds, the ratios and the last loss."""
    jobs = commands(shape, torch, dtypes, changes or {})
    chunks, losses, facts, failed = timed(jobs)
    tokens = shape["B"] * shape["T"]
    flops = next((f["flops"] for k, f in facts.items() if k.startswith("ours") and f), None)
    products = {
        label.removeprefix(PRODUCT): {
            "ms": interleave.ms(turn),
            "gflops": _rate(facts[label]["flops"], interleave.ms(turn)["median"]),
        }
        for label, turn in chunks.items()
        if label.startswith(PRODUCT)
    }
    rows = {}
    for label in jobs:
        if label.startswith(PRODUCT):
            continue
        if label in failed:
            rows[label] = {"error": failed[label]}
            continue
        row = _row(label, chunks)
        row |= {"last_loss": losses[label], "device": facts[label].get("device")}
        row |= {"first_steps_s": facts[label].get("first_steps_s")}
        rows[label] = row | speeds(row["ms"]["median"], tokens, flops, label, products)
    return {
        "shape": shape,
        "tokens": tokens,
        "flops": flops,
        "rows": rows,
        "products": products,
        "failed": failed,
    }


def _row(label: str, chunks: dict) -> dict:
    ours = chunks[label]
    precision = "float32" if "float32" in label else "bfloat16"
    bases = [base for base in TORCH if base in chunks and precision in base and base != label]
    return {
        "ms": interleave.ms(ours),
        "ratio_to": {base: interleave.ratio(ours, chunks[base]) for base in bases},
        "rounds": len(ours),
        "ms_by_round": [round(c.ms, 3) for c in ours],
        "clean_by_round": [c.clean for c in ours],
    }


def _rate(flops: float | None, ms: float | None) -> float | None:
    """GFLOP/s."""
    return flops / ms / 1e6 if flops and ms else None


def speeds(
    ms: float | None, tokens: int, flops: float | None, label: str, products: dict
) -> dict[str, float | None]:
    """Tokens a second, GFLOP/s, and the share of the fastest bare product of the same type."""
    rate = _rate(flops, ms)
    dtype = "float32" if "float32" in label else "bfloat16"
    best = max((p["gflops"] or 0 for k, p in products.items() if dtype in k), default=0)
    return {
        "tokens_s": 1e3 * tokens / ms if ms else None,
        "gflops": rate,
        "of_product": rate / best if rate and best else None,
    }


def plans() -> tuple[str, dict]:
    """(name of the result, {label: a function that compares, given whether there is PyTorch})."""
    used = {"gelu": GELU.value} if GELU.value else {}
    if CONFIG.value is None:
        unknown = [n for n in WANTED.value if n not in map(str, SHAPES)]
        if unknown or not WANTED.value:
            raise InputError(f"--shapes={','.join(unknown)}: no such shape; --shapes=1,2 would do")
        name = f"train_step_{GELU.value}" if GELU.value else "train_step"
        return name, {n: functools.partial(compare, SHAPES[int(n)] | used) for n in WANTED.value}
    bad = [text for text in BATCHES.value if not text.isdigit() or not int(text)]
    if bad or not BATCHES.value:
        raise InputError(f"--batches={','.join(BATCHES.value)}: --batches=8,16 would work")
    config = CONFIG.value
    name, resolved = machine.resolved(config)
    how = ("attention", "stack", "remat", "loss_chunk", "matmul")
    changes = {f"model.{name}": config.model[name] for name in how}
    dtypes = (config.model.dtype,)
    return f"train_step_{name}", {
        f"{name} B={n}": functools.partial(
            compare, shape_of(resolved, int(n)), dtypes=dtypes, changes=changes
        )
        for n in BATCHES.value
    }


def main() -> None:
    name, wanted = plans()
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    asked = machine.asked("shapes", "gelu", "rounds", "chunk_ms", "limit", "compile", "apart")
    result = {"machine": machine.facts(torch, asked), "shapes": {}}
    print(tables.headline(result["machine"]), flush=True)
    failed = {}
    for label, compared in wanted.items():
        rows = compared(torch=torch is not None)
        failed |= {f"{label}: {row}": why for row, why in rows.pop("failed").items()}
        result["shapes"][label] = rows
        title = f"Shape {label} ({shape_text(rows['shape'])})"
        print(f"\n{title}\n\n{tables.train_step(rows)}", flush=True)
        machine.save(name, result)
    for row, why in failed.items():
        print(f"failed: {row}: {why}", flush=True)
    if failed:
        raise RunFailed(f"{len(failed)} row(s) could not be timed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run_command(main)
