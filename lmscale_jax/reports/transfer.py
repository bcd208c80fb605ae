"""The figure of a learning-rate sweep over widths, from its JSON alone."""

from pathlib import Path

import numpy as np

from lmscale_jax.reports.plots import save


def draw(result: dict, path: Path) -> Path:
    """Held-out loss over log2(learning rate), a line a width; one panel a parametrization."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = result["arms"]
    figure, axes = plt.subplots(
        1, len(arms), figsize=(5.2 * len(arms), 4.2), sharey=True, squeeze=False
    )
    x_R = np.array(result["log2_lr"])
    colours = plt.cm.viridis(np.linspace(0, 0.85, len(result["widths"])))
    lowest = min(o["loss"] for arm in arms.values() for o in arm["optimum"])
    for axis, (name, arm) in zip(axes.flat, arms.items(), strict=True):
        for width, colour, loss, best in zip(
            result["widths"], colours, arm["val_loss"], arm["optimum"], strict=True
        ):
            loss_RxS = np.array(loss, float)
            mean_R = loss_RxS.mean(axis=1)
            axis.plot(x_R, mean_R, "-", color=colour, lw=1.2, label=f"width {width}")
            axis.fill_between(
                x_R, loss_RxS.min(axis=1), loss_RxS.max(axis=1), color=colour, alpha=0.2, lw=0
            )
            axis.errorbar(
                best["log2_lr"], best["loss"], xerr=best["se"], fmt="o", color=colour,
                mec="tab:red", ms=6, capsize=3,
            )  # fmt: skip
        moved = arm["drift"]
        axis.set(
            xlabel="log2 of the peak learning rate",
            title=f"{name}: optimum moves {moved['octaves']:+.2f} ± {moved['se']:.2f} octaves",
        )
        axis.set_ylim(lowest - 0.05, lowest + 1.6)
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("held-out loss, nats per token")
    axes.flat[0].legend(frameon=False, fontsize=8)
    return save(figure, path)
