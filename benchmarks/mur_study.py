"""The study of docs/mur.md: every arm of configs/mur_small.py over several seeds.

    python -m benchmarks.mur_study --workdir=runs/mur_study

Runs of one seed share initial values and data order. Each run is evaluated; every arm is compared
with the baseline, pair by pair, and the table is written to results/mur_study.json. What is done is
not done again.
"""

import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine
from lmscale_jax import cli
from lmscale_jax.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the runs", required=True)
SEEDS = flags.DEFINE_integer("seeds", 5, "runs of each arm", lower_bound=1)
ARMS = flags.DEFINE_list("arms", [], "of configs/mur_small.py; all by default, baseline first")


def train(arm: str, seed: int, workdir: Path) -> None:
    """Trains and evaluates one run, or does nothing where that was done."""
    from lmscale_jax.configs import mur_small
    from lmscale_jax.model import mesh
    from lmscale_jax.train import loop

    config = mur_small.get_config(arm)
    config.seed = config.data.seed = seed
    config.log.tensorboard, config.mesh.cpu_devices = False, 1
    config.eval.redundancy_every, config.eval.redundancy_tokens = "100", 2048
    config.log.every, config.log.per_layer = 50, False
    mesh.start_jax(config)
    loop.train(config, workdir, say=lambda line: None)
    if not (workdir / "eval.json").exists():
        program = [sys.executable, "-m", "lmscale_jax.evaluate"]
        program += [f"--workdir={workdir}", "--tokens=20000"]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)


def compare(folder: Path, arm: str, seeds: range) -> dict:
    """Differences of an arm to the baseline, and means by layer."""
    import numpy as np

    from lmscale_jax.reports import pairs, run_report

    sides = [[pairs.read_run(folder / f"{a}_{s}") for s in seeds] for a in ("baseline", arm)]
    matched = pairs.match_runs(*sides, "mur", allow_differences=False) if arm != "baseline" else []
    result = pairs.paired_difference(matched) if matched else {}
    if matched:
        print(f"{arm:<10} {run_report.difference_sentence(result)}", flush=True)
    runs = sides[1]

    def mean(pick):
        return np.mean([pick(run.scores) for run in runs], axis=0).tolist()

    losses = [run.scores["val_loss"] for run in runs]
    return result | {
        "val_loss": losses,
        "perplexity": float(np.mean([run.scores["perplexity"] for run in runs])),
        "utility": mean(lambda s: s["mur"]["mean"]),
        "utility_p90": mean(lambda s: s["mur"]["p90"]),
        "block_influence": mean(lambda s: s["block_influence"]),
        "layer_drop": mean(lambda s: s["layer_drop"]),
        "rank_correlation": {
            pair: [run.scores["rank_correlation"][pair]["rho"] for run in runs]
            for pair in runs[0].scores["rank_correlation"]
        },
        "tokens_per_second": mean_speed(runs),
    }


def mean_speed(runs) -> float | None:
    speeds = [run.record["throughput"]["tokens_per_second"] for run in runs]
    return sum(speeds) / len(speeds) if all(speeds) else None


def main() -> None:
    from lmscale_jax.configs import mur_small

    arms = ARMS.value or list(mur_small.ARMS)
    if arms[0] != "baseline" or set(arms) - set(mur_small.ARMS):
        raise InputError(
            f"--arms={','.join(arms)}: the baseline first, then any of "
            f"{','.join(mur_small.ARMS)}; --arms=baseline,update would work"
        )
    folder, seeds = Path(WORKDIR.value), range(SEEDS.value)
    for seed in seeds:
        for arm in arms:
            train(arm, seed, folder / f"{arm}_{seed}")
        print(f"seed {seed}: {len(arms)} runs are done", flush=True)
    result = {"machine": machine.facts(None, machine.asked("seeds")), "arms": {}}
    for arm in arms:
        result["arms"][arm] = compare(folder, arm, seeds)
    machine.save("mur_study", result)


if __name__ == "__main__":
    cli.run_command(main)
