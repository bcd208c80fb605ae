"""A process that takes the project's own training step on random tokens; see interleave.Worker.

The model is that of a shape, or with --config that of a config, each with keys of its own.
"""

import json
import time
from pathlib import Path

from absl import flags

from benchmarks import step_facts
from benchmarks.shapes import DOCUMENT, SHAPES, config_of
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
CONFIG = cli.config_flag(required=False)
REPORT = flags.DEFINE_string("report", "", "with --config: file for the facts of step_facts.py")
LOSSES = flags.DEFINE_integer("losses", 0, "with --config: steps whose losses go to --report")
PROFILED = flags.DEFINE_integer(
    "profiled", 0, "with --config: steps under the profiler, at the end"
)
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

    config = config_of(shape, dtype, devices, changes)
    config.optim.name = OPTIMIZER.value
    if OPTIMIZER.value != "adamw":
        config.optim.muon_dtype = NS_DTYPE.value
    steps = Steps(resolve(config, shape["V"]))
    return steps.run, steps.facts


class Steps:
    """The steps of a resolved config.

    Attributes:
      facts: device, FLOPs of a step and parameter counts.
      choices: what the model takes where the config leaves it open.
    """

    def __init__(self, config):
        from lmscale_jax.model import mesh

        mesh.start_jax(config)

        from lmscale_jax.config.durations import tokens_per_step
        from lmscale_jax.model import flops
        from lmscale_jax.optim import muon
        from lmscale_jax.train.setup import TrainStep, build_setup

        if CALLS.value == "each":
            muon.orthogonalize = one_by_one
        setup = build_setup(config, 0)
        self._grid, model = setup.mesh, setup.model
        self.device = self._grid.devices.flat[0]
        self._state, self._take = setup.begin(), TrainStep(setup)
        self._batches, self._done = random_batches(config), 0
        self.choices = dict(model.choices)
        per_token = flops.flops_per_token(config, model.specs)["model"]
        counts = flops.parameter_counts(model.specs)
        self.facts = device(self._grid) | {
            "flops": per_token * tokens_per_step(config),
            "counts": counts,
        }

    def compiled(self):
        """The program of a step. The first step to be taken finds it in JAX's cache on disk."""
        return self._take.lower(self._state, self._next_batch()).compile()

    def run(self, steps: int) -> float:
        """Takes some steps and returns the last loss."""
        import jax

        for _ in range(steps):
            self._state, metrics = self._take(self._state, self._next_batch())
            self._done += 1
        jax.block_until_ready(self._state)
        return float(metrics["train_loss"])

    def _next_batch(self):
        from lmscale_jax.model import mesh

        return mesh.put_batch(self._batches[self._done % len(self._batches)], self._grid)


def random_batches(config, count: int = 8) -> list:
    """Random tokens, of which every DOCUMENT-th begins a document where documents are masked."""
    import numpy as np

    from lmscale_jax.data.batches import Batch

    rows, length = config.train.batch_size, config.data.seq_len
    shape = (count, rows, length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.ids, shape).astype(np.int32)
    if config.model.mask == "document":
        tokens[tokens == 0] = 1
        tokens[..., ::DOCUMENT] = 0
    return [Batch(t[:, :-1].copy(), t[:, 1:].copy()) for t in tokens]


def report_config(config) -> None:
    """Serves turns of the steps of a config, and writes --report before and after them."""
    from lmscale_jax.config.resolve import resolve

    if BATCH.value:
        config.train.batch_size, config.train.accum = BATCH.value, 1
    steps = Steps(resolve(config, config.model.vocab_size or config.data.vocab_size))
    if LOSSES.value:
        write(steps.facts | {"losses": [steps.run(1) for _ in range(LOSSES.value)]})
        return
    begin = time.perf_counter()
    compiled = steps.compiled()
    facts = steps.facts | {
        "compile_s": round(time.perf_counter() - begin, 2),
        "choices": steps.choices,
        "estimate": step_facts.estimate(compiled, steps.device.device_kind),
        "memory": step_facts.memory(compiled, steps.device),
    }
    write(facts)
    serve(steps.run, lambda: steps.facts)
    facts |= {"memory": step_facts.memory(compiled, steps.device)}
    write(facts)
    if PROFILED.value:
        write(facts | {"profile": step_facts.profile(steps.run, PROFILED.value)})


def write(facts: dict) -> None:
    Path(REPORT.value).write_text(json.dumps(facts))


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
        run, facts = make_product(PRODUCT.value, DTYPE.value)
        serve(run, lambda: facts)
        return
    if CONFIG.value is not None:
        report_config(CONFIG.value)
        return
    text = SHAPE.value
    shape = SHAPES[int(text)] if text.isdigit() else json.loads(text)
    shape = shape | ({"gelu": GELU.value} if GELU.value else {})
    shape = shape | ({"B": BATCH.value} if BATCH.value else {})
    run, facts = make(shape, DTYPE.value, DEVICES.value, json.loads(CHANGES.value))
    serve(run, lambda: facts)


if __name__ == "__main__":
    cli.run_command(main)
