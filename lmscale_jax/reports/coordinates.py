"""The figure of a coordinate check, from its JSON alone."""

import re
from pathlib import Path

import numpy as np

from lmscale_jax.parametrization.coords import CHANGE
from lmscale_jax.reports.plots import save

KINDS = (
    "embed", "query", "key", "value", "scores", "attention",
    "mlp_hidden", "mlp", "residual", "final", "logits", CHANGE + "logits",
)  # fmt: skip


def draw(result: dict, path: Path) -> Path:
    """One panel a kind of activation, its last block; mean |x| over size, a line a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [name for name in (_last(result["values"], kind) for kind in KINDS) if name]
    columns = 4
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, chosen, strict=False):
        _panel(axis, result, name)
    axes.flat[0].legend(frameon=False, fontsize=7, title="step", title_fontsize=7)
    name = result["config"]["parametrization"]["name"]
    wrong = "" if result["control"] == "none" else f", control {result['control']}"
    verdict = "passed" if result["passed"] else "out of bounds"
    figure.suptitle(f"{name}{wrong}: mean |x| over {result['sweep']}: {verdict}")
    return save(figure, path)


def _last(values: dict, kind: str) -> str | None:
    """The tensor of that kind in the last block, or outside of blocks."""
    found = [n for n in values if n == kind or re.fullmatch(rf"blocks/\d+/{kind}", n)]
    return max(
        found, key=lambda n: int(n.split("/")[1]) if n.startswith("blocks") else 0, default=None
    )


def _panel(axis, result: dict, name: str) -> None:
    from matplotlib import pyplot as plt

    values_WxT = np.array(result["values"][name], float)
    steps = values_WxT.shape[1]
    colours = plt.cm.viridis(np.linspace(0, 0.9, steps))
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
