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
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli

SEEDS = flags.DEFINE_integer("seeds", 8, "members of each arm and size", lower_bound=3)
TRAIN_ONLY = flags.DEFINE_bool("train_only", False, "leaves the simulations out")
# Change of the exponent that is to be found, and how often.
SHIFT, POWER = 0.08, 0.9
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


def measured_noise(result: dict, arm: str) -> dict:
    """Measures, by size: ln C, ln L of the baseline, scatter of the seeds, their correlation."""
    log_c, log_loss, scatter, correlation = [], [], [], []
    for size, base in result["arms"]["gelu"].items():
        a, b = (np.log(runs["loss"]) for runs in (base, result["arms"][arm][size]))
        log_c.append(np.log(base["flops"]))
        log_loss.append(a.mean())
        a, b = a - a.mean(), b - b.mean()
        squares = a @ a + b @ b
        scatter.append(np.sqrt(squares / 2 / (len(a) - 1)))
        correlation.append(2 * (a @ b) / squares)
    return {"log_c": log_c, "log_loss": log_loss, "scatter": scatter, "correlation": correlation}


def design(noise: dict, between: int) -> dict:
    """Adds `between` sizes between each two, with noise and losses between theirs."""
    x = np.array(noise["log_c"])
    steps = np.linspace(0, len(x) - 1, (len(x) - 1) * (between + 1) + 1)
    return {name: np.interp(steps, np.arange(len(x)), values) for name, values in noise.items()}


def draw_arms(sizes: dict, seeds: int, rng):
    """Draws the cells of two arms of which the second gains by SHIFT with scale."""
    from lmscale_jax.scaling.pairs import Pairs
    from lmscale_jax.scaling.shift import TwoArms

    log_c = sizes["log_c"]
    x, count = log_c - log_c.mean(), len(log_c)
    curve = np.polyfit(x, sizes["log_loss"], 2)
    alike = np.clip(sizes["correlation"], 0, 1)[:, None]
    common, *separate = rng.standard_normal((3, count, seeds))
    errors = [
        sizes["scatter"][:, None] * (np.sqrt(alike) * common + np.sqrt(1 - alike) * e)
        for e in separate
    ]
    y = [
        np.polyval(curve, x * (1 + gain)) + e.mean(axis=1)
        for gain, e in zip((0, SHIFT), errors, strict=True)
    ]
    a, b = (e - e.mean(axis=1, keepdims=True) for e in errors)
    squares = (a**2 + b**2).sum()
    pairs = Pairs(
        np.tile(np.arange(count), 2),
        float(2 * (a * b).sum() / squares) if seeds > 1 else None,
        count * (seeds - 1),
    )
    ones = np.full(2 * count, float(seeds))
    return TwoArms(
        x=np.tile(x, 2), z=np.repeat([0.0, 1.0], count), y=np.concatenate(y), weight=ones,
        seeds=ones.astype(int), seed_variance=None, ln_c0=float(log_c.mean()), ln_n=None,
        ln_d=None, pairs=pairs,
    )  # fmt: skip


def power(sizes: dict, seeds: int, draws: int = 200) -> dict[str, float]:
    """Simulates how often the shift is detected at 5 % without pairs and with them."""
    from lmscale_jax.scaling import shift, verdicts

    detected = {"cells": 0, "pairs": 0}
    for i in range(draws):
        data = draw_arms(sizes, seeds, np.random.default_rng([i, seeds]))
        for name, arms in (("cells", replace(data, pairs=None)), ("pairs", data)):
            fits = [shift.estimate_shift(kind, arms) for kind in ("quadratic", "cubic")]
            main = min((fit for fit in fits if fit is not None), key=lambda fit: fit.aicc)
            detected[name] += verdicts.is_change(main, 0.95)
    return {name: count / draws for name, count in detected.items()}


def seeds_needed(sizes: dict) -> dict[str, float]:
    """Computes the number of seeds at which the power is 90 %, between whole numbers too.

    It is 1 where one is enough.
    """
    from scipy.stats import norm

    grid = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    by_seeds, needed = [], {}
    for seeds in grid:
        by_seeds.append(power(sizes, seeds))
        if min(by_seeds[-1].values()) > 0.95:
            break
    for name in ("cells", "pairs"):
        z = norm.ppf(np.clip([p[name] for p in by_seeds], 0.002, 0.998))
        z = np.maximum.accumulate(z)
        reached = np.interp(norm.ppf(POWER), z, np.log(grid[: len(z)]), right=np.nan)
        needed[name] = float(np.exp(reached))
    return needed


def simulate(result: dict) -> None:
    """Adds, for each arm and design, the seeds and FLOPs at which the shift is detected."""
    result["simulated"] = []
    for arm in ("swiglu", "muon"):
        noise = measured_noise(result, arm)
        for between in (0, 1):
            sizes = design(noise, between)
            needed = seeds_needed(sizes)
            each = 2 * float(np.exp(sizes["log_c"]).sum())
            result["simulated"].append({
                "arm": arm, "sizes": len(sizes["log_c"]), "seeds": needed,
                "flops": {name: seeds * each for name, seeds in needed.items()},
                "scatter": list(map(float, noise["scatter"])),
                "correlation": list(map(float, noise["correlation"])),
            })  # fmt: skip
            print(result["simulated"][-1], flush=True)


def show(result: dict) -> str:
    """Makes the table of docs/ladders.md."""
    head = ["second arm", "scatter of seeds by size", "correlation by size", "sizes",
            "seeds without pairs", "FLOPs", "seeds with pairs", "FLOPs", "ratio"]  # fmt: skip
    rows = []
    for row in result["simulated"]:
        rows.append([
            row["arm"], ", ".join(f"{100 * x:.2g} %" for x in row["scatter"]),
            ", ".join(f"{x:.2f}" for x in row["correlation"]), str(row["sizes"]),
            *(f"{row[k][name]:.2g}" for name in ("cells", "pairs") for k in ("seeds", "flops")),
            f"{row['flops']['pairs'] / row['flops']['cells']:.2f}",
        ])  # fmt: skip
    return tables.table(head, rows)


def main() -> None:
    path = Path(machine.OUT.value) / "paired_arms.json"
    result = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    result["machine"] = machine.facts(None, machine.asked("seeds"))
    train(result)
    if not TRAIN_ONLY.value:
        simulate(result)
        machine.save("paired_arms", result)
        print(show(result))


if __name__ == "__main__":
    cli.run_command(main)
