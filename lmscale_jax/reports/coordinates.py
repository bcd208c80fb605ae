"""Plots a coordinate check from its JSON."""

import re
from pathlib import Path

import numpy as np

from lmscale_jax.parametrization.coords import CHANGE
from lmscale_jax.reports.plots import graded_colours, new_figure, save

KINDS = (
    "embed", "query", "key", "value", "scores", "attention",
    "mlp_hidden", "mlp", "residual", "final", "logits", CHANGE + "logits",
)  # fmt: skip
COLUMNS = 4


def draw(result: dict, path: Path) -> Path:
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
    verdict = "passed" if result["passed"] else "out of bounds"
    figure.suptitle(f"{name}{control}: mean |x| over {result['sweep']}: {verdict}")
    return save(figure, path)


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
