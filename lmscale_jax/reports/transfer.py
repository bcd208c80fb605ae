"""Plots a learning-rate sweep over widths from its JSON."""

from pathlib import Path

import numpy as np

from lmscale_jax.reports.plots import fill_band, graded_colours, new_figure, save


def draw(result: dict, path: Path) -> Path:
    """Plots held-out loss over log2(learning rate), a line for each width, a panel for each arm."""
    arms = result["arms"]
    figure, axes = new_figure((5.2 * len(arms), 4.2), columns=len(arms), sharey=True, squeeze=False)
    lowest = min(o["loss"] for arm in arms.values() for o in arm["optimum"])
    for axis, (name, arm) in zip(axes.flat, arms.items(), strict=True):
        _plot_rates(axis, result, arm)
        drift = arm["drift"]
        axis.set(
            xlabel="log2 of the peak learning rate",
            title=f"{name}: optimum moves {drift['octaves']:+.2f} ± {drift['se']:.2f} octaves",
        )
        axis.set_ylim(lowest - 0.05, lowest + 1.6)
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("held-out loss, nats per token")
    axes.flat[0].legend()
    return save(figure, path)


def _plot_rates(axis, result: dict, arm: dict) -> None:
    """Plots the mean over seeds with its range, and the optimum of each width."""
    x_R = np.array(result["log2_lr"])
    colours = graded_colours(len(result["widths"]))
    for width, colour, loss, best in zip(
        result["widths"], colours, arm["val_loss"], arm["optimum"], strict=True
    ):
        loss_RxS = np.array(loss, float)
        axis.plot(x_R, loss_RxS.mean(axis=1), "-", color=colour, lw=1.2, label=f"width {width}")
        fill_band(axis, x_R, loss_RxS.min(axis=1), loss_RxS.max(axis=1), colour)
        axis.errorbar(
            best["log2_lr"], best["loss"], xerr=best["se"], fmt="o", color=colour,
            mec="tab:red", ms=6, capsize=3,
        )  # fmt: skip
