"""A process that takes the project's own training step on random tokens; see interleave.Worker."""

from absl import flags

from benchmarks.shapes import SHAPES, config_of
from benchmarks.turns import serve
from lmscale_jax import command

SHAPE = flags.DEFINE_integer("shape", 1, "number of the shape")
DTYPE = flags.DEFINE_string("dtype", "float32", "model.dtype")
GELU = flags.DEFINE_string("gelu", "", "model.gelu; empty: the shape's own")
DEVICES = flags.DEFINE_integer("devices", 0, "mesh.cpu_devices; 0: the default, one a core")
BATCH = flags.DEFINE_integer("batch", 0, "sequences a step; 0: the shape's own")
OPTIMIZER = flags.DEFINE_string("optimizer", "adamw", "optim.name")
NS_DTYPE = flags.DEFINE_string("ns_dtype", "auto", "optim.muon_dtype")
CALLS = flags.DEFINE_enum(
    "calls", "stacked", ["stacked", "each"], "Newton-Schulz once for all matrices, or for each"
)


def one_by_one(stacks: dict, iterate, mesh) -> dict:
    """What stands in for `muon.orthogonal` with --calls=each: a call for every matrix."""
    import jax

    def each(x):
        return jax.numpy.concatenate([iterate(one) for one in jax.lax.split(x, [1] * len(x))])

    return {path: each(x) for path, x in stacks.items()}


def make(shape: dict, dtype: str, devices: int):
    """A function that takes N steps and returns the last loss, as run/train.py takes them."""
    from lmscale_jax import config as configs
    from lmscale_jax.run import mesh

    config = config_of(shape, dtype, devices)
    config.optim.name = OPTIMIZER.value
    if OPTIMIZER.value != "adamw":
        config.optim.muon_dtype = NS_DTYPE.value
    config = configs.resolve(config, shape["V"])
    mesh.start(config)

    import jax
    import numpy as np

    from lmscale_jax.data.pipeline import Batch
    from lmscale_jax.model.build import build
    from lmscale_jax.optim import build as optim
    from lmscale_jax.optim import muon
    from lmscale_jax.run import step

    if CALLS.value == "each":
        muon.orthogonal = one_by_one
    grid = mesh.make(config)
    platform = grid.devices.flat[0].platform
    model = build(config, platform=platform, mesh=grid)
    transform = optim.build(config, model.rows, grid, platform)
    placed = step.shardings(config, model, transform, grid)
    state = jax.jit(lambda: step.initial(config, model, transform, 0), out_shardings=placed)()
    take_step = step.Step(config, model, grid, placed)
    tokens = np.random.default_rng(0).integers(0, shape["V"], (8, shape["B"], shape["T"] + 1))
    tokens = tokens.astype(np.int32)
    batches = [Batch(t[:, :-1].copy(), t[:, 1:].copy()) for t in tokens]
    done = 0

    def run(steps: int) -> float:
        nonlocal state, done
        for _ in range(steps):
            batch = mesh.put_batch(batches[done % len(batches)], grid)
            state, metrics = take_step(state, batch)
            done += 1
        jax.block_until_ready(state)
        return float(metrics["train_loss"])

    return run


def main() -> None:
    shape = SHAPES[SHAPE.value]
    shape = shape | {"gelu": GELU.value or shape["gelu"], "B": BATCH.value or shape["B"]}
    run = make(shape, DTYPE.value, DEVICES.value)
    serve(run)


if __name__ == "__main__":
    command.run(main)
