"""Sweeps learning rates over widths, to see whether the best one stays as the model grows.

All learning rates and seeds of a parametrization and width train as one population.
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
    """Returns {parametrization: a config for each width}, for sp and the config's own."""
    validate(config)
    by_width = [at_size(config, "width", width) for width in widths]
    sp_by_width = [ConfigDict(arm.to_dict()) for arm in by_width]
    for arm in sp_by_width:
        with_mistake(arm.parametrization, "sp")
    arms = {"sp": sp_by_width}
    if config.parametrization.name != "sp":
        arms[config.parametrization.name] = by_width
    for arm in (*by_width, *sp_by_width):
        validate(arm)
    return arms


def sweep_rates(
    config: ConfigDict,
    widths: list[int],
    log2_lrs: list[float],
    n_seeds: int,
    workdir: Path,
    say: Callable[[str], None],
) -> dict:
    """Trains every cell and writes lr_transfer.json, after each width."""
    data = prepare.prepare_data(config.data, config.model.vocab_size, say)
    seeds, log_lrs = range(n_seeds), np.asarray(log2_lrs, float)
    result = {
        "widths": widths, "log2_lr": list(log2_lrs), "seeds": n_seeds,
        "config": config.to_dict(), "versions": run_dir.provenance()["versions"], "arms": {},
    }  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    for name, configs in sweep_arms(config, widths).items():
        arm = result["arms"][name] = {"val_loss": [], "train_loss": [], "optimum": []}
        for width, width_config in zip(widths, configs, strict=True):
            begin = time.perf_counter()
            members = [
                resolve(_at_rate(width_config, 2.0**e, seed), data.vocab_size)
                for e in log_lrs
                for seed in seeds
            ]
            trained = population.train_population(members, data)
            shape = (len(log_lrs), n_seeds)
            val_RxS = trained.val_loss_K.reshape(shape)
            arm["val_loss"].append(val_RxS.tolist())
            tail = trained.train_loss_KxS[:, -max(1, width_config.train.steps // 10) :]
            arm["train_loss"].append(tail.mean(axis=1).reshape(shape).tolist())
            arm["optimum"].append(optimum(log_lrs, val_RxS))
            best = arm["optimum"][-1]
            say(
                f"{name} width {width}: best lr 2^{best['log2_lr']:.2f} ± {best['se']:.2f} "
                f"(on the grid 2^{best['grid']:g}), {time.perf_counter() - begin:.0f} s"
            )
            write_json(workdir / "lr_transfer.json", result)
        arm["drift"] = optimum_drift(arm["optimum"])
        say(f"{name}: {transfer_headline(arm['drift'], widths)}")
    write_json(workdir / "lr_transfer.json", result)
    return result


def _at_rate(config: ConfigDict, lr: float, seed: int) -> ConfigDict:
    """Copies a config with this peak rate and seed; muon_lr keeps its ratio to lr."""
    config = ConfigDict(config.to_dict())
    peak = OPTIMIZERS[config.optim.name].peak
    if peak != "lr":
        config.optim[peak] *= lr / config.optim.lr
    config.optim.lr, config.seed = float(lr), seed
    return config


def optimum(log_lr_R: np.ndarray, loss_RxS: np.ndarray) -> dict:
    """Finds the lowest loss over log2(lr): {"log2_lr", "se", "grid", "loss", "at_edge"}.

    For each seed it is the vertex of a parabola through the lowest point and up to two neighbours
    on either side; at the edge of the grid it is the edge. "log2_lr" is the mean over seeds and
    "se" its standard error, with a single seed a quarter of the grid's step.
    """
    loss_RxS = np.where(np.isfinite(loss_RxS), loss_RxS, np.inf)
    vertices = [_vertex(log_lr_R, loss_R) for loss_R in loss_RxS.T]
    mean_R = loss_RxS.mean(axis=1)
    spacing = float(np.min(np.diff(log_lr_R)))
    se = np.std(vertices, ddof=1) / np.sqrt(len(vertices)) if len(vertices) > 1 else spacing / 4
    best = int(np.argmin(mean_R))
    return {
        "log2_lr": float(np.mean(vertices)),
        "se": float(se),
        "grid": float(log_lr_R[best]),
        "loss": float(mean_R[best]),
        "at_edge": best in (0, len(log_lr_R) - 1),
    }


def _vertex(x_R: np.ndarray, y_R: np.ndarray) -> float:
    best = int(np.argmin(y_R))
    near = [i for i in range(best - 2, best + 3) if 0 <= i < len(x_R) and np.isfinite(y_R[i])]
    # Losses of runs that nearly diverged do not follow the parabola.
    near = [i for i in near if y_R[i] < y_R[best] + 0.5]
    if best in (0, len(x_R) - 1) or len(near) < 3:
        return float(x_R[best])
    a, b, _ = np.polyfit(x_R[near], y_R[near], 2)
    if a <= 0:
        return float(x_R[best])
    return float(np.clip(-b / (2 * a), x_R[best] - 1, x_R[best] + 1))


def optimum_drift(optima: list[dict]) -> dict:
    """Measures the octaves between the optima of the first and last width, and between any two."""
    first, last = optima[0], optima[-1]
    log2_lrs = [o["log2_lr"] for o in optima]
    grid = [o["grid"] for o in optima]
    return {
        "octaves": last["log2_lr"] - first["log2_lr"],
        "se": float(np.hypot(first["se"], last["se"])),
        "range": max(log2_lrs) - min(log2_lrs),
        "grid_range": max(grid) - min(grid),
        "at_edge": any(o["at_edge"] for o in optima),
    }


def transfer_headline(drift: dict, widths: list[int]) -> str:
    """Formats the drift of the best learning rate as one line."""
    edge = "; an optimum lies at the edge of the grid" if drift["at_edge"] else ""
    return (
        f"the best learning rate moves {drift['octaves']:+.2f} ± {drift['se']:.2f} octaves from "
        f"width {widths[0]} to {widths[-1]} (on the grid {drift['grid_range']:g}){edge}"
    )
