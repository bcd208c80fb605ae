"""Learning-rate sweeps of AdamW and Muon on real text, then seeds at each one's best:

    python -m benchmarks.optimizer_sweep --runs=runs/optimizers

Runs of configs/muon_small.py, one after the other, each in a directory of its own; what is finished
is not run again. The tables of docs/optimizers.md are printed from the records alone.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli

WORKDIR = flags.DEFINE_string("runs", "runs/optimizers", "directory of the runs")
SEEDS = flags.DEFINE_integer("best_seeds", 3, "seeds at the best rate", lower_bound=1)
STEPS = flags.DEFINE_integer("run_steps", 300, "steps of every run", lower_bound=10)

# Powers of two around the rates usual for each; muon_lr beside AdamW's best rate for the rest.
RATES = {
    "adamw": [2e-3, 4e-3, 8e-3, 16e-3, 32e-3],
    "muon": [5e-3, 10e-3, 20e-3, 40e-3, 80e-3],
}


def config_of(side: str, rate: float, adamw_rate: float, seed: int):
    from lmscale_jax.configs import muon_small

    config = muon_small.get_config()
    config.train.steps, config.seed, config.data.seed = STEPS.value, seed, seed
    config.eval.baselines, config.eval.sample, config.log.tensorboard = False, 0, False
    config.optim.name = side
    config.optim.lr = rate if side == "adamw" else adamw_rate
    config.optim.muon_lr = config_default("optim.muon_lr") if side == "adamw" else rate
    return config


def config_default(path: str):
    from lmscale_jax.config.keys import get
    from lmscale_jax.configs.base import get_config

    return get(get_config(), path)


def run(side: str, rate: float, adamw_rate: float, seed: int) -> dict:
    """Trains one run unless its record is there. {"rate", "seed", "loss", "curve"}."""
    from lmscale_jax.train import loop

    workdir = Path(WORKDIR.value) / f"{side}_{rate:g}_seed{seed}"
    loop.train(config_of(side, rate, adamw_rate, seed), workdir, say=lambda line: None)
    record = json.loads((workdir / "run.json").read_text())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    curve = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    final = record["final"]
    result = {"rate": rate, "seed": seed, "loss": final["val_loss"], "sem": final["val_loss_sem"]}
    print(f"{workdir.name}: {final['val_loss']:.4f}, {record['wall_seconds']:.0f} s", flush=True)
    return result | {"wall_seconds": record["wall_seconds"], "curve": curve}


def reached(curve: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first comes down to a loss, between two evaluations linearly."""
    for (a, high), (b, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return a + (b - a) * (high - loss) / (high - low)
    return None


def show(results: dict) -> str:
    """Both tables of docs/optimizers.md."""
    shown = []
    for side, result in results.items():
        rows = [[f"{r['rate']:g}", f"{r['loss']:.4f}"] for r in result["sweep"]]
        shown.append(tables.table([f"{side}: peak rate", "validation loss"], rows))
    aim = float(np.mean([r["loss"] for r in results["adamw"]["seeds"]]))
    rows = []
    for side, result in results.items():
        losses = [r["loss"] for r in result["seeds"]]
        steps = [reached(r["curve"], aim) for r in result["seeds"]]
        reached_at = ", ".join("never" if s is None else f"{s:.0f}" for s in steps)
        spread = np.std(losses, ddof=1) if len(losses) > 1 else 0.0
        mean = f"{np.mean(losses):.4f} ± {spread:.4f}"
        rows.append(
            [side, f"{result['best']:g}", ", ".join(f"{x:.4f}" for x in losses), mean, reached_at]
        )
    head = ["", "peak rate", "by seed", "mean ± deviation", f"step at which {aim:.4f} is reached"]
    shown.append(tables.table(head, rows))
    return "\n\n".join(shown)


def main() -> None:
    from lmscale_jax.model import mesh

    mesh.start_jax(config_of("adamw", 1e-3, 0.0, 0))
    results, adamw_rate = {}, 0.0
    for side, rates in RATES.items():
        sweep = [run(side, rate, adamw_rate, 0) for rate in rates]
        best = min(sweep, key=lambda r: r["loss"])
        adamw_rate = adamw_rate or best["rate"]
        more = [run(side, best["rate"], adamw_rate, seed) for seed in range(1, SEEDS.value)]
        results[side] = {"best": best["rate"], "sweep": sweep, "seeds": [best, *more]}
        asked = machine.asked("best_seeds", "run_steps")
        machine.save("optimizer_sweep", {"machine": machine.facts(None, asked), **results})
    print(f"\n{show(results)}")


if __name__ == "__main__":
    cli.run_command(main)
