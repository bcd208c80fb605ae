"""What a residual stream in bfloat16 does to the loss of a small model, over several seeds:

    python -m benchmarks.residual_dtype --workdir=runs/residual_dtype

The arms differ in model.residual_dtype alone; runs of one seed share initial values and data order.
The compiler may keep no more precision than the program asks for. The table is written to
results/residual_dtype.json; runs that are done are not done again.
"""

import json
import os
from pathlib import Path

from absl import flags

from benchmarks import machine
from lmscale_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the runs", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each arm", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 250, "steps of each run", lower_bound=20)
ARMS = ("float32", "dtype")


def train(arm: str, seed: int, workdir: Path) -> float:
    """Trains one run, or continues it; returns its last validation loss, in nats."""
    from lmscale_jax.configs import quickstart
    from lmscale_jax.model import mesh
    from lmscale_jax.train import loop

    config = quickstart.get_config()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 12, 64, 2
    config.model.dtype, config.model.residual_dtype = "bfloat16", arm
    config.train.steps, config.train.batch_size = STEPS.value, 8
    config.eval.every = config.checkpoint.every = STEPS.value
    config.seed = config.data.seed = seed
    config.log.tensorboard, config.log.per_layer, config.mesh.cpu_devices = False, False, 1
    mesh.start_jax(config)
    loop.train(config, workdir, say=lambda line: None)
    return json.loads((workdir / "run.json").read_text())["final"]["val_loss"]


def main() -> None:
    flag = "--xla_allow_excess_precision=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import numpy as np

    losses = {arm: [] for arm in ARMS}
    for seed in range(SEEDS.value):
        for arm in ARMS:
            losses[arm].append(train(arm, seed, Path(WORKDIR.value) / f"{arm}_{seed}"))
        print(
            f"seed {seed}: " + ", ".join(f"{a} {x[-1]:.4f}" for a, x in losses.items()), flush=True
        )
    wide, narrow = (np.array(losses[arm]) for arm in ARMS)
    difference = narrow - wide
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    print(
        f"dtype - float32: {difference.mean():+.4f} nats, standard error {error:.4f}; "
        f"standard deviation over seeds {wide.std(ddof=1):.4f}"
    )
    result = {"losses": losses, "difference": difference.mean(), "standard_error": error}
    machine.save(
        "residual_dtype",
        {"machine": machine.facts(None, machine.asked("seeds", "steps"))} | result,
    )


if __name__ == "__main__":
    cli.run_command(main)
