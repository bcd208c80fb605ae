"""Does the best learning rate stay where it is when the model grows?

For each parametrization and width, all learning rates and seeds train as one population.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve, validate
from lmscale_jax.data import prepare
from lmscale_jax.files import write_json
from lmscale_jax.model.sizes import at_size, with_mistake
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.sweeps import population
from lmscale_jax.train import run_dir


def sweep_arms(config: ConfigDict, widths: list[int]) -> dict[str, list[ConfigDict]]:
    """{parametrization: a config for each width}: sp beside the config's own."""
    validate(config)
    own = [at_size(config, "width", width) for width in widths]
    plain = [ConfigDict(one.to_dict()) for one in own]
    for one in plain:
        with_mistake(one.parametrization, "sp")
    made = {"sp": plain} if config.parametrization.name == "sp" else {
        "sp": plain, config.parametrization.name: own,
    }  # fmt: skip
    for several in made.values():
        for one in several:
            validate(one)
    return made


def sweep_rates(
    config: ConfigDict,
    widths: list[int],
    log2_lrs: list[float],
    n_seeds: int,
    workdir: Path,
    say: Callable[[str], None],
) -> dict:
    """Trains every cell and writes lr_transfer.json, after each width, and the figure."""
    data = prepare.prepare_data(config.data, log=say)
    seeds, log_lrs = range(n_seeds), np.asarray(log2_lrs, float)
    result = {
        "widths": widths, "log2_lr": list(log2_lrs), "seeds": n_seeds,
        "config": config.to_dict(), "versions": run_dir.provenance()["versions"], "arms": {},
    }  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    for name, several in sweep_arms(config, widths).items():
        arm = result["arms"][name] = {"val_loss": [], "train_loss": [], "optimum": []}
        for width, one in zip(widths, several, strict=True):
            begin = time.perf_counter()
            members = [
                resolve(_at_rate(one, 2.0**e, seed), data.vocab_size)
                for e in log_lrs
                for seed in seeds
            ]
            found = population.train_population(members, data)
            shape = (len(log_lrs), n_seeds)
            val_RxS = found.val_loss_K.reshape(shape)
            arm["val_loss"].append(val_RxS.tolist())
            tail = found.train_loss_KxS[:, -max(1, one.train.steps // 10) :]
            arm["train_loss"].append(tail.mean(axis=1).reshape(shape).tolist())
            arm["optimum"].append(optimum(log_lrs, val_RxS))
            said = arm["optimum"][-1]
            say(
                f"{name} width {width}: best lr 2^{said['log2_lr']:.2f} ± {said['se']:.2f} "
                f"(on the grid 2^{said['grid']:g}), {time.perf_counter() - begin:.0f} s"
            )
            write_json(workdir / "lr_transfer.json", result)
        arm["drift"] = optimum_drift(arm["optimum"])
        say(f"{name}: {transfer_headline(arm['drift'], widths)}")
    write_json(workdir / "lr_transfer.json", result)
    return result


def _at_rate(config: ConfigDict, lr: float, seed: int) -> ConfigDict:
    """A copy with that peak rate and seed; muon_lr keeps its ratio to lr."""
    config = ConfigDict(config.to_dict())
    peak = OPTIMIZERS[config.optim.name].peak
    if peak != "lr":
        config.optim[peak] *= lr / config.optim.lr
    config.optim.lr, config.seed = float(lr), seed
    return config


def optimum(log_lr_R: np.ndarray, loss_RxS: np.ndarray) -> dict:
    """Where the loss is least over log2(lr): "log2_lr" and "se" over seeds, "grid", "loss".

    A parabola through the lowest point of a seed and two neighbours on either side, where they
    are there and trained; at the edge of the grid the edge itself. The standard error is that of
    the mean over seeds, at least a quarter of the grid's step with a single seed.
    """
    loss_RxS = np.where(np.isfinite(loss_RxS), loss_RxS, np.inf)
    each = [_vertex(log_lr_R, loss_R) for loss_R in loss_RxS.T]
    mean_R = loss_RxS.mean(axis=1)
    spacing = float(np.min(np.diff(log_lr_R)))
    se = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else spacing / 4
    best = int(np.argmin(mean_R))
    return {
        "log2_lr": float(np.mean(each)),
        "se": float(se),
        "grid": float(log_lr_R[best]),
        "loss": float(mean_R[best]),
        "at_edge": best in (0, len(log_lr_R) - 1),
    }


def _vertex(x_R: np.ndarray, y_R: np.ndarray) -> float:
    best = int(np.argmin(y_R))
    near = [i for i in range(best - 2, best + 3) if 0 <= i < len(x_R) and np.isfinite(y_R[i])]
    # Where a run nearly diverged the valley is no parabola.
    near = [i for i in near if y_R[i] < y_R[best] + 0.5]
    if best in (0, len(x_R) - 1) or len(near) < 3:
        return float(x_R[best])
    a, b, _ = np.polyfit(x_R[near], y_R[near], 2)
    if a <= 0:
        return float(x_R[best])
    return float(np.clip(-b / (2 * a), x_R[best] - 1, x_R[best] + 1))


def optimum_drift(optima: list[dict]) -> dict:
    """Octaves between the optima of the first and the last width, and the largest between any."""
    first, last = optima[0], optima[-1]
    centre = [o["log2_lr"] for o in optima]
    grid = [o["grid"] for o in optima]
    return {
        "octaves": last["log2_lr"] - first["log2_lr"],
        "se": float(np.hypot(first["se"], last["se"])),
        "range": max(centre) - min(centre),
        "grid_range": max(grid) - min(grid),
        "at_edge": any(o["at_edge"] for o in optima),
    }


def transfer_headline(found: dict, widths: list[int]) -> str:
    edge = "; an optimum lies at the edge of the grid" if found["at_edge"] else ""
    return (
        f"the best learning rate moves {found['octaves']:+.2f} ± {found['se']:.2f} octaves from "
        f"width {widths[0]} to {widths[-1]} (on the grid {found['grid_range']:g}){edge}"
    )
