"""Packs beside single runs on a GPU that is not here, by the roofline of the compiled programs:

    python -m benchmarks.packs_compiled --chip=H100

For the anchors of shipped ladders, in float32 and bfloat16: microseconds of a step alone, and how
many times faster K members train together than one after the other. Needs jax[cuda13] and no GPU.
Not measured, and without what the host does between steps, which a pack does once for all.
"""

import importlib

from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError

CHIP = flags.DEFINE_string("chip", "H100", "a GPU of --topology")
COUNTS = flags.DEFINE_list("counts", ["8", "16"], "members")
LADDERS = flags.DEFINE_list(
    "ladders", ["quickstart", "muon_vs_adamw", "gelu_vs_swiglu"], "of configs/ladders"
)
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "model.dtype")
SIZES = flags.DEFINE_integer("sizes", 2, "anchors of each ladder", lower_bound=1)
# Steps of a scan: enough to make it a loop.
STEPS = 5


def anchors(name: str, dtype: str) -> list:
    """(size, resolved config) of the first arm's anchors, with products in a type."""
    from pathlib import Path

    from lmscale_jax.config.resolve import apply_overrides, resolve
    from lmscale_jax.ladders import grid, plan

    ladder = importlib.import_module(f"lmscale_jax.configs.ladders.{name}").get_config()
    ladder.run = apply_overrides(ladder.run, {"model.dtype": dtype})
    vocab = ladder.run.model.vocab_size or ladder.run.data.vocab_size
    cells = plan.LadderPlan(ladder.to_dict(), grid.make_cells(ladder, vocab), vocab)
    chosen = {
        cell.size: cell
        for cell in cells.with_role(grid.ANCHOR)
        if cell.arm == ladder.baseline and cell.seed == 0
    }
    return [
        (size, resolve(cells.config(chosen[size], Path()), vocab))
        for size in sorted(chosen)[: SIZES.value]
    ]


def estimated_us(compiled, chip) -> tuple[float, int]:
    """(microseconds, kernels) of a program."""
    from lmscale_jax.train import gpu_report, hlo_text

    kernels = gpu_report.estimate_step(hlo_text.parse_program(compiled.as_text()), chip)
    return 1e6 * sum(k.seconds for k in kernels), sum(k.times for k in kernels)


def compiled_alone(config, mesh):
    """(a step, its FLOPs)."""
    from lmscale_jax.config.durations import tokens_per_step
    from lmscale_jax.model import flops
    from lmscale_jax.train import gpu_report
    from lmscale_jax.train.setup import build_setup

    setup = build_setup(config, None, mesh)
    program = setup.lower_step().compile(gpu_report.COMPILER_OPTIONS)
    per_token = flops.flops_per_token(config, setup.model.specs)["model"]
    return program, per_token * tokens_per_step(config)


def compiled_pack(config, mesh, count: int):
    """STEPS steps of `count` members that differ in seed and order of the data."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.sweeps import population
    from lmscale_jax.train import gpu_report

    def member(seed: int):
        copy = ConfigDict(config.to_dict())
        copy.seed, copy.data.seed = seed, seed
        return copy

    together = population.Population([member(k) for k in range(count)], None, mesh)
    on_device = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device),
        jax.eval_shape(together.begin),
    )
    shape = (count, STEPS, config.train.batch_size, config.data.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=on_device)
    return together.lower(state, Batch(tokens, tokens)).compile(gpu_report.COMPILER_OPTIONS)


def measure(name: str, dtype: str, mesh, chip) -> list[dict]:
    rows = []
    for size, config in anchors(name, dtype):
        program, flops = compiled_alone(config, mesh)
        alone, kernels = estimated_us(program, chip)
        row = {"ladder": name, "size": size, "dtype": dtype, "flops": flops}
        row |= {"alone_us": alone, "kernels": kernels, "faster": {}}
        for count in COUNTS.value:
            pack = estimated_us(compiled_pack(config, mesh, int(count)), chip)[0] / STEPS
            row["faster"][count] = int(count) * alone / pack
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    import jax

    from lmscale_jax.model import flops, mesh
    from lmscale_jax.train import gpu_descriptions

    jax.config.update("jax_platforms", "cpu")
    chip = flops.CHIPS.get(CHIP.value)
    if chip is None or chip.platform != "gpu" or not gpu_descriptions.gpu_compiler_installed():
        raise InputError(f"--chip={CHIP.value} needs jax[cuda13], and a GPU: H100 would work")
    devices = gpu_descriptions.described_gpus(chip, 1, f"{chip.name}:1")
    result = machine.facts(None, machine.asked("chip", "counts", "ladders")) | {"rows": []}
    for name in LADDERS.value:
        for dtype in DTYPES.value:
            grid = mesh.make_mesh(anchors(name, dtype)[0][1], devices)
            result["rows"] += measure(name, dtype, grid, chip)
            machine.save("packs_compiled", result)
    print(tables.packs_compiled(result))


if __name__ == "__main__":
    cli.run_command(main)
