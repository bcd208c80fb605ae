"""The estimate of memory beside the compiler's own account, and beside what a process takes:

    python -m benchmarks.memory

Each row is the step of train/step.py for one config. `compiled`: the compiler's bytes on one
device; rows that are there already keep theirs unless --fresh. `measured`, on CPU: the highest
resident size of a process that takes three steps, less its size before it has a state, from a warm
cache of compiled programs, over its devices. Rows of GPUs need JAX's CUDA plugin, and no GPU.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine
from lmscale_jax import cli

CASE = flags.DEFINE_string("case", "", "what one process does, by the command itself")
WHERE = flags.DEFINE_string("where", "", "only rows whose place begins with this: cpu, H100")
FRESH = flags.DEFINE_bool("fresh", False, "compile rows again that are there already")
VOCABULARY = 32_000


def case(name: str, where: str, measured: bool = False, **changes) -> dict:
    """`where`: cpu and how many devices, or a topology."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    settings = {"train.accum": 1} | changes
    if where.startswith("cpu"):
        settings["mesh.cpu_devices"] = int(where[3:])
    return {"config": name, "where": where, "changes": settings, "measured": measured}


def cases() -> list[dict]:
    f32 = {"model__dtype": "float32"}
    on_cpu = [
        case("gpt2_50m", "cpu1", True, train__batch_size=4, **f32),
        case("gpt2_50m", "cpu1", True, train__batch_size=16),
        case("gpt2_50m", "cpu1", train__batch_size=16, model__remat="dots"),
        case("gpt2_50m", "cpu1", train__batch_size=16, model__remat="block"),
        case("gpt2_50m", "cpu2", True, train__batch_size=8),
        case("llama_50m", "cpu1", True, train__batch_size=8),
        case("llama_50m", "cpu1", train__batch_size=8, model__remat="block", model__stack="scan"),
        case("gpt2_100m", "cpu2", train__batch_size=16),
        case("transformer_pp_100m", "cpu1", train__batch_size=8, train__accum=2),
        case("llama_300m", "cpu1", train__batch_size=4),
    ]
    on_gpu = [
        case("llama_100m", "H100:1", train__batch_size=32),
        case("llama_100m", "H100:1", train__batch_size=32, model__residual_dtype="dtype"),
        case("llama_100m", "H100:1", train__batch_size=32, model__remat="dots"),
        case("llama_100m", "H100:1", train__batch_size=32, model__remat="block"),
        case("llama_100m", "H100:1", train__batch_size=32, model__stack="scan"),
        case("gpt2_100m", "H100:1", train__batch_size=32),
        case("llama_300m", "H100:1", train__batch_size=16),
        case("llama_100m", "H100:8", train__batch_size=256),
    ]
    return on_cpu + on_gpu


def described(row: dict):
    """The setup of a case."""
    import jax

    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model.mesh import make_mesh, start_jax
    from lmscale_jax.train import aot
    from lmscale_jax.train.setup import build_setup

    config = importlib.import_module(f"lmscale_jax.configs.{row['config']}").get_config()
    config.update_from_flattened_dict(row["changes"])
    config = resolve(config, VOCABULARY)
    start_jax(config)
    where = row["where"]
    if where.startswith("H100"):
        jax.config.update("jax_platforms", "cpu")
    devices = None if where.startswith("cpu") else aot.parse_topology(where).devices()
    return build_setup(config, None, make_mesh(config, devices))


def compiled(row: dict) -> dict:
    from lmscale_jax.train import aot, gpu_report

    setup = described(row)
    on_gpu = setup.platform in ("gpu", "cuda")
    options = gpu_report.COMPILER_OPTIONS if on_gpu else None
    return aot.compiled_memory(setup.lower_step().compile(compiler_options=options))


def measured(row: dict) -> dict:
    """Bytes that training adds to a process for each of its devices, at the most."""
    import jax
    import numpy as np

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model.mesh import put_batch
    from lmscale_jax.train.setup import TrainStep

    setup = described(row)
    config, mesh = setup.config, setup.mesh
    shape = (config.train.batch_size, config.data.seq_len)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)
    batch = put_batch(Batch(rows, rows), mesh)
    jax.block_until_ready(batch)
    before = resident("VmRSS")
    state, take_step = setup.begin(), TrainStep(setup)
    for _ in range(3):
        state, metrics = take_step(state, batch)
        jax.block_until_ready((state, metrics))
    return {"added": (resident("VmHWM") - before) // mesh.size}


def resident(name: str) -> int:
    """Bytes of this process by a line of Linux's /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) * 1024


def apart(row: dict, what: str) -> dict:
    """A process of its own: the number of CPU devices is fixed once."""
    text = json.dumps(row | {"what": what})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", f"--case={text}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def estimate(row: dict) -> dict:
    from lmscale_jax.train import aot

    setup = described(row)
    kind = setup.mesh.devices.flat[0].device_kind
    return aot.memory_sizes(setup.config, setup.model, setup.mesh.shape, setup.platform, kind)


def key(row: dict) -> str:
    changes = " ".join(f"{k}={v}" for k, v in sorted(row["changes"].items()))
    return f"{row['config']} {row['where']} {changes}"


WHAT = {"compiled": compiled, "measured": measured, "estimate": estimate}


def main() -> None:
    if CASE.value:
        new_case = json.loads(CASE.value)
        print(json.dumps(WHAT[new_case["what"]](new_case)))
        return
    path = Path(machine.OUT.value) / "memory.json"
    before = json.loads(path.read_text())["rows"] if path.exists() and not FRESH.value else {}
    result = {"machine": machine.facts(None, machine.asked("fresh")), "rows": before}
    for new_case in cases():
        if not new_case["where"].startswith(WHERE.value):
            continue
        row = before.get(key(new_case), {})
        if "compiled" not in row:
            row["compiled"] = apart(new_case, "compiled")
        if new_case["measured"] and "measured" not in row:
            # From the cache: compiling takes memory too.
            row["measured"] = apart(new_case, "measured")["added"]
        row["estimate"] = apart(new_case, "estimate")
        result["rows"][key(new_case)] = row
        machine.save("memory", result)
        print(show(key(new_case), row), flush=True)


def show(name: str, row: dict) -> str:
    peak, ours = row["compiled"]["peak"], row["estimate"]["total"]
    ratios = f"estimate / compiled {ours / peak:.2f}"
    if "measured" in row:
        ratios += f", compiled / measured {peak / row['measured']:.2f}"
    return f"{name}: compiled {peak / 2**20:,.0f} MiB, {ratios}"


if __name__ == "__main__":
    cli.run_command(main)
