"""A process that takes the project's own training step on random tokens; see interleave.Worker."""

import json

from absl import flags

from benchmarks.shapes import SHAPES, config_of
from benchmarks.turns import serve
from lmscale_jax import cli

SHAPE = flags.DEFINE_string("shape", "1", "number of the shape, or the shape as JSON")
CHANGES = flags.DEFINE_string("changes", "{}", "further keys of the config, as JSON")
PRODUCT = flags.DEFINE_integer("product", 0, "side of a bare product in place of steps; 0: steps")
DTYPE = flags.DEFINE_string("dtype", "float32", "model.dtype")
GELU = flags.DEFINE_string("gelu", "", "model.gelu; empty: the shape's own")
DEVICES = flags.DEFINE_integer("devices", 0, "mesh.cpu_devices")
BATCH = flags.DEFINE_integer("batch", 0, "sequences a step; 0: the shape's own")
OPTIMIZER = flags.DEFINE_string("optimizer", "adamw", "optim.name")
NS_DTYPE = flags.DEFINE_string("ns_dtype", "auto", "optim.muon_dtype")
CALLS = flags.DEFINE_enum(
    "calls", "stacked", ["stacked", "each"], "Newton-Schulz once for all matrices, or for each"
)


def one_by_one(stacks: dict, iterate, mesh) -> dict:
    """What stands in for `muon.orthogonalize` with --calls=each: a call for every matrix."""
    import jax

    def each(x):
        return jax.numpy.concatenate([iterate(matrix) for matrix in jax.lax.split(x, [1] * len(x))])

    return {path: each(x) for path, x in stacks.items()}


def make(shape: dict, dtype: str, devices: int, changes: dict):
    """(a function that takes N steps as train/loop.py does and returns the last loss, facts)."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import mesh

    config = config_of(shape, dtype, devices, changes)
    config.optim.name = OPTIMIZER.value
    if OPTIMIZER.value != "adamw":
        config.optim.muon_dtype = NS_DTYPE.value
    config = resolve(config, shape["V"])
    mesh.start_jax(config)

    import jax
    import numpy as np

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model import flops
    from lmscale_jax.model.build import build_model
    from lmscale_jax.optim import build as optim
    from lmscale_jax.optim import muon
    from lmscale_jax.train import step

    if CALLS.value == "each":
        muon.orthogonalize = one_by_one
    grid = mesh.make_mesh(config)
    platform = grid.devices.flat[0].platform
    model = build_model(config, platform=platform, mesh=grid)
    transform = optim.build_optimizer(config, model.param_rules, grid, platform)
    placed = step.train_state_shardings(config, model, transform, grid)
    state = jax.jit(lambda: step.initial_state(config, model, transform, 0), out_shardings=placed)()
    take_step = step.TrainStep(config, model, grid, placed)
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

    per_token = flops.flops_per_token(config, model.specs)["model"]
    counts = flops.parameter_counts(model.specs)
    return run, device(grid) | {"flops": per_token * shape["B"] * shape["T"], "counts": counts}


def device(grid) -> dict:
    first = grid.devices.flat[0]
    kind = {"platform": first.platform, "kind": first.device_kind, "count": grid.devices.size}
    return {"device": kind}


def make_product(side: int, dtype: str):
    """(a function that multiplies two square matrices N times, facts)."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import mesh

    config = resolve(config_of(SHAPES[1], dtype, 0), 65)
    mesh.start_jax(config)

    import jax
    import jax.numpy as jnp

    platform = jax.devices()[0].platform
    # Where a CPU has no kernel that rounds, the float32 sums are several times faster.
    wide = jnp.float32 if platform == "cpu" else jnp.dtype(dtype)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in keys)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=wide))

    def run(times: int) -> float:
        for _ in range(times):
            c = product(a, b)
        return float(c[0, 0])

    return run, device(mesh.make_mesh(config, jax.devices()[:1])) | {"flops": 2 * side**3}


def main() -> None:
    if PRODUCT.value:
        serve(*make_product(PRODUCT.value, DTYPE.value))
        return
    text = SHAPE.value
    shape = SHAPES[int(text)] if text.isdigit() else json.loads(text)
    shape = shape | ({"gelu": GELU.value} if GELU.value else {})
    shape = shape | ({"B": BATCH.value} if BATCH.value else {})
    serve(*make(shape, DTYPE.value, DEVICES.value, json.loads(CHANGES.value)))


if __name__ == "__main__":
    cli.run_command(main)
