"""Where a training step's time goes: forward, backward, optimizer, data, host.

    python -m benchmarks.breakdown

Each shape and type is a process of its own, in which the parts take turns: the forward pass alone;
forward and backward; the whole step; a batch read by the pipeline; the same put on the devices; and
the loop of train/loop.py, which reads ahead, puts, steps and logs metrics. Backward pass,
optimizer and host are differences of turns of the same round; they can come out below 0 where what
is looked for is smaller than the noise. A line of metrics with norms by layer is a matter of
overheads.py: here log.per_layer is off.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import interleave, machine, tables
from benchmarks.shapes import SHAPES, config_of, shape_of
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

WANTED = flags.DEFINE_list("shapes", [str(n) for n in SHAPES], "numbers of the shapes")
CONFIG = cli.config_flag(required=False)
BATCH = flags.DEFINE_integer("batch", 8, "with --config: sequences a step", lower_bound=1)
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "model.dtype")
ROUNDS = flags.DEFINE_integer("rounds", 12, "turns of each part", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 400.0, "milliseconds of one turn; 2 calls at the least")
ONE = flags.DEFINE_string("one", "", "a shape as JSON: the part of a process of its own")

# Part: the turn it is, or the two whose difference it is.
PARTS = {
    "forward": ("forward",),
    "backward": ("forward and backward", "forward"),
    "optimizer": ("step", "forward and backward"),
    "step": ("step",),
    "a batch is read": ("read",),
    "put on devices": ("put",),
    "loop": ("loop",),
    "host, loop - step": ("loop", "step"),
}
TOKENS = 2_000_000


def parts(shape: dict, dtype: str, folder: Path) -> tuple[list, dict]:
    """The turns of one process, and its device."""
    import jax

    from benchmarks import inside
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import mesh
    from lmscale_jax.train import step

    config = config_of(shape, dtype, 0, {"log.per_layer": False})
    config = resolve(config, shape["V"])
    mesh.start_jax(config)
    of = inside.program(config)
    params, batch = of.setup.begin().params, of.batch()
    losses = of.setup.model.losses

    def forward(params, batch):
        return losses(params, *batch).mean()

    def both(params, batch):
        n_targets = step.count_targets(batch)
        gradient = step.make_gradient(config, of.setup.model, of.setup.mesh, n_targets)
        (_, (loss, _)), (grads, _) = gradient(params, (), *batch, None)
        return loss, grads

    batches, done = _reader(folder, shape), 0

    def read():
        nonlocal done
        done += 1
        return batches.at(done)

    turns = [
        inside.calls("forward", jax.jit(forward), params, batch),
        inside.calls("forward and backward", jax.jit(both), params, batch),
        inside.Steps("step", of),
        inside.calls("read", read),
        inside.calls("put", lambda: mesh.put_batch(of.batches[0], of.setup.mesh)),
        interleave.Turns("loop", Loop(of, batches, folder)),
    ]
    return turns, of.device()


def _reader(folder: Path, shape: dict):
    """The pipeline over random tokens on the disk."""
    import numpy as np

    from lmscale_jax.data import shards
    from lmscale_jax.data.batches import TrainBatches

    rng = np.random.default_rng(0)
    writer = shards.ShardWriter(folder, "train", shape["V"], TOKENS)
    writer.add(rng.integers(0, shape["V"], max(TOKENS, 2 * shape["B"] * shape["T"] + 1)))
    writer.close()
    tokens = shards.Shards(sorted(folder.glob("train*.bin")), shape["V"])
    # Only the training side of prepared data is asked for.
    prepared = type("Prepared", (), {"train": tokens, "mixture": ()})()
    return TrainBatches(prepared, shape["T"], shape["B"], 0)


class Loop:
    """N steps as `train.loop.train_steps` takes them where it neither evaluates nor saves."""

    def __init__(self, of, batches, folder: Path):
        from lmscale_jax.train.metrics import Clock, MetricLogger, SilentProgress
        from lmscale_jax.train.setup import TrainStep
        from lmscale_jax.train.watchdog import Watchdog

        self._of, self._batches, self._done = of, batches, 0
        self._clock, self._state = Clock(), of.setup.begin()
        silence = SilentProgress()
        self._journal = MetricLogger(
            of.setup.config, folder, 0, {}, self._clock, "benchmark", silence
        )
        self._watchdog = Watchdog(of.setup.config.log.watchdog)
        self._take = TrainStep(of.setup)
        self(2)

    def __call__(self, steps: int) -> float:
        from lmscale_jax.data.batches import prefetch
        from lmscale_jax.model import mesh
        from lmscale_jax.train import diagnostics

        first, config, pending = self._done, self._of.setup.config, None
        stream = prefetch(self._batches.at, first, first + steps)
        for done, batch in enumerate(self._clock.waiting_for(stream), first + 1):
            batch = mesh.put_batch(batch, self._of.setup.mesh)
            what = diagnostics.due_measurements(config, done)
            self._state, metrics = self._take(self._state, batch, measure=what)
            if pending:
                self._journal.log(*pending)
            self._watchdog.beat(done - 1)
            pending = (done, metrics)
        self._journal.log(*pending)
        self._done = done
        return float(metrics["train_loss"])

    def close(self) -> None:
        self._watchdog.stop()
        self._journal.close()


def measure_parts(shape: dict, dtype: str) -> dict:
    """{"parts": {part: median and quartiles}, "device", "turns"} of one process."""
    with tempfile.TemporaryDirectory() as folder:
        turns, device = parts(shape, dtype, Path(folder))
        try:
            chunks, _ = interleave.measure(turns, ROUNDS.value, CHUNK.value, machine.LIMIT.value)
        finally:
            turns[-1].run.close()
    return {
        "device": device,
        "parts": {name: difference(chunks, *of) for name, of in PARTS.items()},
        "rounds": len(chunks["step"]),
        "turns": {k: [dataclasses.asdict(c) for c in turn] for k, turn in chunks.items()},
    }


def difference(chunks: dict, whole: str, without: str | None = None) -> dict:
    """Of the rounds in which both were clean."""
    if without is None:
        return interleave.ms(chunks[whole])
    pairs = zip(chunks[whole], chunks[without], strict=True)
    return interleave.quartiles([a.ms - b.ms for a, b in pairs if a.clean and b.clean])


def apart(shape: dict, dtype: str) -> dict:
    """`one` in a process of its own, which holds no memory of the others."""
    arguments = [f"--{n}={flags.FLAGS[n].value}" for n in ("rounds", "chunk_ms", "limit", "others")]
    program = [sys.executable, "-m", "benchmarks.breakdown", f"--one={json.dumps(shape)}"]
    done = subprocess.run(
        [*program, f"--dtypes={dtype}", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"breakdown of {shape}, {dtype}: {errors[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def plans() -> tuple[str, dict]:
    """(name of the result, {label: (shape, type)})."""
    if CONFIG.value is None:
        unknown = [n for n in WANTED.value if n not in map(str, SHAPES)]
        if unknown or not WANTED.value:
            raise InputError(f"--shapes={','.join(unknown)}: no such shape; --shapes=1,2 would do")
        pairs = [(n, dtype) for n in WANTED.value for dtype in DTYPES.value]
        return "breakdown", {f"{n}, {dtype}": (SHAPES[int(n)], dtype) for n, dtype in pairs}
    name, resolved = machine.resolved(CONFIG.value)
    shape = shape_of(resolved, BATCH.value)
    dtype = resolved.model.dtype
    return f"breakdown_{name}", {f"{name} B={BATCH.value}, {dtype}": (shape, dtype)}


def main() -> None:
    if ONE.value:
        print(json.dumps(measure_parts(json.loads(ONE.value), DTYPES.value[0])))
        return
    name, wanted = plans()
    asked = machine.asked("shapes", "dtypes", "rounds", "chunk_ms", "limit")
    result = {"machine": machine.facts(None, asked), "shapes": {}, "rows": {}}
    print(tables.headline(result["machine"]), flush=True)
    for label, (shape, dtype) in wanted.items():
        result["shapes"][label] = shape
        result["rows"][label] = apart(shape, dtype)
        print(f"{label} done", flush=True)
        machine.save(name, result)
    print(f"\n{tables.breakdown(result)}")


if __name__ == "__main__":
    cli.run_command(main)
