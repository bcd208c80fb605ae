"""What Muon costs beside AdamW, and one call for all matrices beside one call for each:

    python -m benchmarks.optimizers

Whole training steps at several batch sizes, the processes of one size taking turns. By counts of
operations, Newton-Schulz over forward and backward is T m / B: T steps, m the short side of a
matrix, B tokens a batch (Jordan et al. 2024); `share` counts this model's own products instead.
"""

import sys

from absl import flags

from benchmarks import interleave, machine, tables
from benchmarks.shapes import SHAPES, config_of
from lmscale_jax import cli
from lmscale_jax.errors import InputError

SIZES = flags.DEFINE_list(
    "sizes", ["1:12", "1:48", "1:192", "2:8", "2:32"], "number of the shape : sequences a step"
)
COUNT = flags.DEFINE_integer("turns", 8, "turns of each process", lower_bound=1)
TURN = flags.DEFINE_float("turn_ms", 600.0, "milliseconds of one turn; 2 steps at the least")
CORES = flags.DEFINE_integer("cpu_devices", 1, "mesh.cpu_devices")

SIDES = {
    "adamw": [],
    "muon": ["--optimizer=muon"],
    "muon, a call for each": ["--optimizer=muon", "--calls=each"],
    "muon in bfloat16": ["--optimizer=muon", "--ns_dtype=bfloat16"],
    "normuon": ["--optimizer=normuon"],
}


def compare(number: int, batch: int) -> dict:
    """One size: for each side the milliseconds and the ratio to AdamW; and the prediction."""
    module = [sys.executable, "-m", "benchmarks.worker_jax", f"--shape={number}"]
    module += [f"--batch={batch}", f"--devices={CORES.value}"]
    workers = []
    try:
        for label, more in SIDES.items():
            workers.append(interleave.Worker(label, [*module, *more]))
            workers[-1].wait()
        chunks, losses = interleave.measure(workers, COUNT.value, TURN.value, machine.LIMIT.value)
    finally:
        for worker in workers:
            worker.close()
    rows = {
        label: {
            "ms": interleave.ms(turn),
            "ratio_to_adamw": interleave.ratio(turn, chunks["adamw"]),
            "ratio_to_stacked": interleave.ratio(turn, chunks["muon"]),
            "last_loss": losses[label],
            "ms_by_round": [round(c.ms, 3) for c in turn],
            "clean_by_round": [c.clean for c in turn],
        }
        for label, turn in chunks.items()
    }
    return {"shape": SHAPES[number] | {"B": batch}, "rows": rows, **predicted(number, batch)}


def predicted(number: int, batch: int) -> dict[str, float]:
    """{"rule": T m / B, "share": FLOPs of Newton-Schulz over those of the model's step}."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import flops
    from lmscale_jax.model.build import build_model
    from lmscale_jax.optim import muon
    from lmscale_jax.optim.rules import update_rules

    shape = SHAPES[number] | {"B": batch}
    config = config_of(shape, "float32", 1)
    config.optim.name = "muon"
    config = resolve(config, shape["V"])
    model = build_model(config, platform="cpu")
    steps, tokens = len(muon.COEFFICIENTS[config.optim.muon_coefficients].steps), batch * shape["T"]
    spent = 0.0
    for rule in update_rules(model.param_rules, config).values():
        if rule.optimizer == "muon":
            m, n = muon.as_matrices(rule.spec, "matrix").shape
            # X X', its square, and the product with X.
            spent += rule.spec.shape[0] * steps * (4 * m * m * n + 2 * m**3)
    whole = flops.flops_per_token(config, model.specs)["model"] * tokens
    return {"rule": steps * shape["D"] / tokens, "share": spent / whole}


def main() -> None:
    sizes = {}
    for text in SIZES.value:
        number, _, batch = text.partition(":")
        if number not in map(str, SHAPES) or not batch.isdigit() or not int(batch):
            raise InputError(f"--sizes={text}: no SHAPE:BATCH; --sizes=1:12,2:8 would work")
        sizes[text] = int(number), int(batch)
    asked = machine.asked("sizes", "turns", "turn_ms", "cpu_devices", "limit")
    result = {"machine": machine.facts(None, asked), "sizes": {}}
    print(tables.headline(result["machine"]), flush=True)
    for text, size in sizes.items():
        result["sizes"][text] = compare(*size)
        print(f"{text} done", flush=True)
        machine.save("optimizers", result)
    print(f"\n{tables.optimizers(result['sizes'])}")


if __name__ == "__main__":
    cli.run_command(main)
