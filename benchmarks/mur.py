"""What Marginal Utility Regularization adds to a training step, in time and in memory:

    python -m benchmarks.mur --shapes=1,2

All forms are steps of train/step.py in one process, compiled first and then taken in turns. "two
passes" and "combined pull-back" are the ways of benchmarks/mur_forms.py to the same gradient.
"""

import functools

from absl import flags

from benchmarks import interleave, machine, tables
from benchmarks.shapes import SHAPES, config_of, shape_text
from lmscale_jax import cli

WANTED = flags.DEFINE_list("shapes", ["1", "2"], "numbers of the shapes")
ROUNDS = flags.DEFINE_integer("rounds", 16, "turns of each form", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 400.0, "milliseconds of one turn; 2 steps at the least")
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


class Form(interleave.Turns):
    """A compiled step that takes turns."""

    def __init__(self, label: str, shape: dict):
        from lmscale_jax.train import step
        from lmscale_jax.train.setup import TrainStep

        super().__init__(label, self._steps)
        setup, measure, gradient = _setup(shape, *FORMS[label])
        if gradient is not None:
            ours, step.make_gradient = step.make_gradient, lambda *_: _as_ours(gradient)
        self._batch, self._state = _batch(shape, setup.mesh), setup.begin()
        take = TrainStep(setup)
        self._step = take.lower(self._state, self._batch, measure=measure).compile()
        self._hparams = take.hparams
        if gradient is not None:
            step.make_gradient = ours
        memory = self._step.memory_analysis()
        self.flops = self._step.cost_analysis()["flops"]
        self.bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        self._steps(2)

    def _steps(self, steps: int) -> float:
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch, self._hparams)
        return float(metrics["train_loss"])


def _as_ours(gradient):
    """Returns a function of `mur_forms` with the signature of what `step.make_gradient` makes."""

    def same(params, slots, tokens_BxT, targets_BxT, key):
        from lmscale_jax.data.batches import Batch

        loss, grads = gradient(params, Batch(tokens_BxT, targets_BxT), key)[:2]
        return loss, (grads, slots), {}

    return same


def _setup(shape: dict, changes: dict, measure: tuple, form: str | None):
    from benchmarks import mur_forms
    from lmscale_jax.config.blocks import mur_layers
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import mesh
    from lmscale_jax.mur import utility
    from lmscale_jax.train.setup import build_setup

    how = {"model.stack": STACK.value, "model.remat": REMAT.value}
    config = config_of(shape, DTYPE.value, CORES.value, how | changes)
    config = resolve(config, shape["V"])
    mesh.start_jax(config)
    setup = build_setup(config, None)
    gradient = None
    if form:
        weigh = functools.partial(utility.token_weights, "mean", key=None, k=1, share=1.0)
        how = utility.Measure(config.mur.metric, config.mur.eps)
        layers, lam = mur_layers(config), config.mur.lambda_max
        value = getattr(mur_forms, form)(config, setup.model, how, lam, layers, weigh)

        def gradient(params, batch, key, asked=None, step=None):
            # The step reports nothing, so what would be taken out is not missed.
            return *value(params, batch, key), {}

    return setup, measure, gradient


def _batch(shape: dict, grid):
    import numpy as np

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model import mesh

    size = (shape["B"], shape["T"] + 1)
    tokens = np.random.default_rng(0).integers(0, shape["V"], size, np.int32)
    return mesh.put_batch(Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy()), grid)


def compare(shape: dict) -> dict:
    """{form: {"ms", "ratio", "bytes", "bytes_ratio"}}, ratios to the step without it."""
    forms = [Form(label, shape) for label in FORMS if label in (FORMS_WANTED.value or FORMS)]
    rounds, chunk_ms = ROUNDS.value, CHUNK.value
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


def main() -> None:
    wanted = [int(number) for number in WANTED.value]
    asked = machine.asked(
        "shapes", "stack", "remat", "dtype", "devices", "rounds", "chunk_ms", "limit"
    )
    result = {"machine": machine.facts(None, asked), "shapes": {}}
    print(tables.headline(result["machine"]))
    for number in wanted:
        rows = compare(SHAPES[number])
        result["shapes"][str(number)] = {"shape": SHAPES[number], "rows": rows}
        print(f"\nShape {number} ({shape_text(SHAPES[number])})\n\n{tables.mur(rows)}", flush=True)
        machine.save(f"mur_{STACK.value}_{REMAT.value}_{DTYPE.value}", result)


if __name__ == "__main__":
    cli.run_command(main)
