"""Plots a coordinate check, and a learning-rate sweep over widths, each from its JSON."""

import re
from pathlib import Path

import numpy as np

from lmscale_jax.reports.plots import fill_band, graded_colours, new_figure, save_figure
from lmscale_jax.sweeps.slopes import CHANGE

KINDS = (
    "embed", "query", "key", "value", "scores", "attention",
    "mlp_hidden", "mlp", "residual", "final", "logits", CHANGE + "logits",
)  # fmt: skip
COLUMNS = 4


def draw_coord_check(result: dict, path: Path) -> Path:
    """Plots mean |x| over size, a line for each step and a panel for each kind of activation.

    Of the activations of blocks, that of the last block.
    """
    last_blocks = (_last_block(result["values"], kind) for kind in KINDS)
    names = [name for name in last_blocks if name]
    rows = -(-len(names) // COLUMNS)
    figure, axes = new_figure(
        (3.4 * COLUMNS, 2.9 * rows), rows, COLUMNS, squeeze=False, sharex=True
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        _plot_activation(axis, result, name)
    axes.flat[0].legend(fontsize=7, title="step", title_fontsize=7)
    name = result["config"]["parametrization"]["name"]
    control = "" if result["control"] == "none" else f", control {result['control']}"
    figure.suptitle(f"{name}{control}: mean |x| over {result['sweep']}: {result['verdict']}")
    return save_figure(figure, path)


def _last_block(values: dict, kind: str) -> str | None:
    """Returns the name of that activation in the last block, or outside of blocks."""
    matches = [n for n in values if n == kind or re.fullmatch(rf"blocks/\d+/{kind}", n)]
    return max(
        matches, key=lambda n: int(n.split("/")[1]) if n.startswith("blocks") else 0, default=None
    )


def _plot_activation(axis, result: dict, name: str) -> None:
    values_WxT = np.array(result["values"][name], float)
    steps = values_WxT.shape[1]
    colours = graded_colours(steps)
    # At step 1 a change is nothing but rounding.
    for t in range(name.startswith(CHANGE), steps):
        y_W = np.where(values_WxT[:, t] > 0, values_WxT[:, t], np.nan)
        label = str(t + 1) if t in (0, 1, steps // 2, steps - 1) else None
        axis.plot(result["sizes"], y_W, "o-", ms=3, lw=1, color=colours[t], label=label)
    last = result["slopes"][name][str(steps)]
    slope = "no slope" if last["slope"] is None else f"{last['slope']:+.2f}"
    axis.set(xscale="log", yscale="log")
    axis.set_xscale("log", base=2)
    axis.set_title(f"{name}: {slope}", fontsize=9)
    axis.tick_params(labelsize=7)


def draw_lr_transfer(result: dict, path: Path) -> Path:
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
    return save_figure(figure, path)


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
