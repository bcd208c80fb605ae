"""How alike runs of two arms with one seed end, and what pairing them saves:

    python -m benchmarks.paired_arms [--train_only]

Trains each arm and size of a small ladder as one population of seeds. A seed has the same initial
values of common parameters and the same data order in all arms. From the scatter of the seeds and
their correlation between two arms, ladders are simulated, and the FLOPs at which a shift of 8 % is
found with 90 % power are compared for the test with pairs and without. What is in
results/paired_arms.json is not trained again.
"""

import json
import time
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import machine
from lmscale_jax import cli

SEEDS = flags.DEFINE_integer("seeds", 8, "members of each arm and size", lower_bound=3)
TRAIN_ONLY = flags.DEFINE_bool("train_only", False, "leaves the simulations out")
SIZES = (12_500.0, 25_000.0, 50_000.0, 100_000.0)


def ladder():
    """The quickstart ladder with smaller sizes, more steps and a second arm: another optimizer."""
    from lmscale_jax.configs.ladders import quickstart

    config = quickstart.get_config()
    config.rungs.sizes, config.rungs.held_out = SIZES, 0.0
    config.switch = ("model.mlp", "optim.name")
    config.arms = {"gelu": {}, "swiglu": {"model": {"mlp": "swiglu"}},
                   "muon": {"optim": {"name": "muon"}}}  # fmt: skip
    config.run.train.batch_size, config.run.eval.tokens = 8, 100_000
    config.seeds = SEEDS.value
    return config


def train(result: dict) -> None:
    """Trains what `result` lacks: {arm: {size: {"flops", "loss" by seed, ...}}}."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.data import prepare
    from lmscale_jax.ladders.plan import make_plan
    from lmscale_jax.model import mesh
    from lmscale_jax.sweeps import population

    config = ladder()
    mesh.start_jax(config.run)
    plan = make_plan(config, print)
    data = prepare.prepare_data(config.run.data, config.run.model.vocab_size)
    groups: dict[tuple, list] = {}
    for cell in plan.cells:
        groups.setdefault((cell.arm, cell.size), []).append(cell)
    for (arm, size), cells in groups.items():
        of_arm = result["arms"].setdefault(arm, {})
        if f"{size:g}" in of_arm:
            continue
        start = time.process_time()
        cells.sort(key=lambda cell: cell.seed)
        members = [resolve(plan.config(cell, Path()), plan.vocab_size) for cell in cells]
        loss = population.train_population(members, data).val_loss_K
        of_arm[f"{size:g}"] = {
            "parameters": cells[0].counts["non_embedding"], "tokens": cells[0].tokens,
            "flops": cells[0].flops, "steps": members[0].train.steps, "loss": loss.tolist(),
            "cpu_seconds": time.process_time() - start,
        }  # fmt: skip
        print(f"{arm} {size:g}: {loss.mean():.4f} ± {loss.std(ddof=1):.4f} nats", flush=True)
        machine.save("paired_arms", result)


def main() -> None:
    path = Path(machine.OUT.value) / "paired_arms.json"
    result = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    result["machine"] = machine.facts(None, machine.asked("seeds"))
    train(result)
    _ = np


if __name__ == "__main__":
    cli.run_command(main)
