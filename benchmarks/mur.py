"""What Marginal Utility Regularization adds to a training step, in time and in memory:

    python -m benchmarks.mur --shapes=1,2

All forms are steps of run/step.py in one process, compiled first and then taken in turns. "two
passes" and "combined pull-back" are the ways of benchmarks/mur_forms.py to the same gradient.
"""

import functools
import time

from absl import flags

from benchmarks import interleave, machine
from benchmarks.shapes import SHAPES
from benchmarks.train_step import cell
from lmscale_jax import command

CORES = flags.DEFINE_integer("devices", 1, "mesh.cpu_devices")
STACK = flags.DEFINE_enum("stack", "unroll", ["unroll", "scan"], "model.stack")
REMAT = flags.DEFINE_enum("remat", "none", ["none", "block", "dots"], "model.remat")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "model.dtype")
FORMS_WANTED = flags.DEFINE_list("forms", [], "some of the forms by name; all by default")

LOSS = {"mur.mode": "loss", "mur.tau": 0.1, "mur.warmup": "0", "mur.ramp": "0"}
ALL = LOSS | {"mur.start": 0.0, "mur.end": 1.0}
# Label: config, what is measured in every step, the gradient's form where it is not ours.
FORMS = {
    "off": ({}, (), None),
    "diagnose: a step that reports": ({"mur.mode": "diagnose"}, ("mur",), None),
    "update": ({"mur.mode": "update", "mur.tau": 0.1}, (), None),
    "loss: middle third": (LOSS, (), None),
    "loss: all blocks": (ALL, (), None),
    "two passes: middle third": (LOSS, (), "two_pass"),
    "two passes: all blocks": (ALL, (), "two_pass"),
    "combined pull-back: all blocks": (ALL, (), "combined"),
}


class Form:
    """A compiled step with the two methods of `interleave.Worker` that `measure` uses."""

    def __init__(self, label: str, shape: dict):
        import jax

        from lmscale_jax.run import step

        self.label = label
        setup, measure, gradient = _setup(shape, *FORMS[label])
        config, model, transform, grid = setup
        if gradient is not None:
            ours, step.make_gradient = step.make_gradient, lambda *_: gradient
        placed = step.shardings(config, model, transform, grid)
        self._batch = _batch(shape, grid)
        begin = jax.jit(lambda: step.initial(config, model, transform, 0), out_shardings=placed)
        self._state = begin()
        take = step.Step(config, model, grid, placed)
        self._step = take.lower(self._state, self._batch, measure=measure).compile()
        if gradient is not None:
            step.make_gradient = ours
        memory = self._step.memory_analysis()
        self.flops = self._step.cost_analysis()["flops"]
        self.bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        self._run(2)

    def _run(self, steps: int) -> float:
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        return float(metrics["train_loss"])

    def chunk(self, steps: int) -> tuple[interleave.Chunk, float]:
        self._run(1)
        begin, busy, own = time.perf_counter(), interleave._busy_seconds(), time.process_time()
        loss = self._run(steps)
        spent = time.perf_counter() - begin
        others = (interleave._busy_seconds() - busy) - (time.process_time() - own)
        return interleave.Chunk(spent / steps * 1e3, others < interleave.DIRTY * spent), loss


def _setup(shape: dict, changes: dict, measure: tuple, form: str | None):
    from benchmarks import mur_forms
    from configs import nanogpt_char
    from lmscale_jax import config as configs
    from lmscale_jax import derived
    from lmscale_jax.model.build import build
    from lmscale_jax.mur import utility
    from lmscale_jax.optim import build as optim
    from lmscale_jax.run import mesh

    config = nanogpt_char.get_config()
    sizes = {
        "model.d_model": shape["D"], "model.n_layers": shape["L"], "model.n_heads": shape["H"],
        "model.gelu": shape["gelu"], "model.dtype": DTYPE.value, "model.stack": STACK.value,
        "model.remat": REMAT.value, "model.dropout": 0.0, "data.seq_len": shape["T"],
        "train.batch_size": shape["B"], "train.steps": 100_000, "mesh.cpu_devices": CORES.value,
    }  # fmt: skip
    config.update_from_flattened_dict(sizes | changes)
    config = configs.resolve(config, shape["V"])
    mesh.start(config)
    grid = mesh.make(config)
    model = build(config, platform="cpu", mesh=grid)
    gradient = None
    if form:
        weigh = functools.partial(utility.weights, "mean", key=None, k=1, share=1.0)
        how = utility.Measure(config.mur.metric, config.mur.eps)
        layers, lam = derived.mur_layers(config), config.mur.lambda_max
        value = getattr(mur_forms, form)(config, model, how, lam, layers, weigh)

        def gradient(params, batch, key, asked=None):
            # The step reports nothing, so what would be taken out is not missed.
            return *value(params, batch, key), {}

    return (config, model, optim.build(config, model.rows), grid), measure, gradient


def _batch(shape: dict, grid):
    import numpy as np

    from lmscale_jax.data.pipeline import Batch
    from lmscale_jax.run import mesh

    size = (shape["B"], shape["T"] + 1)
    tokens = np.random.default_rng(0).integers(0, shape["V"], size, np.int32)
    return mesh.put_batch(Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy()), grid)


def compare(shape: dict) -> dict:
    """{form: {"ms", "ratio", "bytes", "bytes_ratio"}}, ratios to the step without it."""
    forms = [Form(label, shape) for label in FORMS if label in (FORMS_WANTED.value or FORMS)]
    rounds, chunk_ms = flags.FLAGS.rounds, flags.FLAGS.chunk_ms
    chunks, losses = interleave.measure(forms, rounds, chunk_ms, machine.LIMIT.value)
    return {
        f.label: {
            "ms": interleave.ms(chunks[f.label]),
            "ratio": interleave.ratio(chunks[f.label], chunks["off"]),
            "ratio_of_all_rounds": interleave.quartiles(
                [a.ms / b.ms for a, b in zip(chunks[f.label], chunks["off"], strict=True)]
            ),
            "rounds": len(chunks[f.label]),
            "flops_ratio": f.flops / forms[0].flops,
            "bytes": f.bytes,
            "bytes_ratio": f.bytes / forms[0].bytes,
            "last_loss": losses.get(f.label),
        }
        for f in forms
    }


def show(result: dict) -> str:
    head = [
        "",
        "ms a step",
        "/ off",
        "/ off, all rounds",
        "clean rounds",
        "FLOPs / off",
        "memory / off",
    ]
    rows = [
        [
            label, cell(row["ms"], 1), cell(row["ratio"], 3), cell(row["ratio_of_all_rounds"], 3),
            f"{row['ms']['n']} of {row['rounds']}", f"{row['flops_ratio']:.3f}",
            f"{row['bytes_ratio']:.2f}",
        ]
        for label, row in result.items()
    ]  # fmt: skip
    return machine.table(head, rows)


def main() -> None:
    wanted = [int(number) for number in flags.FLAGS.shapes]
    asked = machine.asked(
        "shapes", "stack", "remat", "dtype", "devices", "rounds", "chunk_ms", "limit"
    )
    result = {"machine": machine.facts(None, asked), "shapes": {}}
    print(machine.headline(result["machine"]))
    for number in wanted:
        found = compare(SHAPES[number])
        result["shapes"][str(number)] = {"shape": SHAPES[number], "rows": found}
        print(f"\nShape {number} ({SHAPES[number]})\n\n{show(found)}", flush=True)
        machine.save(f"mur_{STACK.value}_{REMAT.value}_{DTYPE.value}", result)


if __name__ == "__main__":
    command.run(main)
