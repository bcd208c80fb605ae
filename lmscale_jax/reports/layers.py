"""Plots quantities of each block: utility, Block Influence, layer drop; losses of two arms."""

from pathlib import Path

import numpy as np

from lmscale_jax.reports.pairs import Run
from lmscale_jax.reports.plots import ARM_COLOURS, new_figure, save

# File name, path in eval.json, label.
PROFILES = (
    ("mur_mean", ("mur", "mean"), "mean utility"),
    ("mur_frac_below_tau", ("mur", "frac_below_tau"), "share of tokens below tau"),
    ("mur_delta_norm", ("mur", "delta_norm"), "mean |δ|"),
    ("mur_grad_norm", ("mur", "grad_norm"), "mean |g|, summed loss"),
    ("bi_curve", ("block_influence",), "Block Influence, 1 - cos(h in, h out)"),
    ("layer_drop", ("layer_drop",), "rise of the loss without the block, nats"),
)
# File name, field by layer in metrics.jsonl, label.
TRACES = (
    ("bi", "block_influence", "Block Influence"),
    ("layer_drop", "layer_drop", "rise of the loss without the block, nats"),
    ("mur", "mur/mean", "mean utility, training batch"),
)


def profiles(arms: dict[str, list[Run]], folder: Path) -> list[Path]:
    """Plots each of PROFILES that a run has: runs as thin lines, the mean of an arm as a thick one.

    Args:
      arms: the runs by their name in the legend.
    """
    paths = []
    for name, keys, label in PROFILES:
        values = {arm: _stack_layers(runs, keys) for arm, runs in arms.items()}
        if any(len(v) for v in values.values()):
            paths.append(_plot_profile(values, label, folder / f"{name}.png"))
    return paths


def _stack_layers(runs: list[Run], keys: tuple[str, ...]) -> np.ndarray:
    """Stacks a quantity over runs, [runs, L]; leaves out runs without it or of another depth."""
    values = [value for run in runs if (value := _score(run.scores, keys)) is not None]
    return np.array([v for v in values if len(v) == len(values[0])], float)


def _score(scores: dict, keys: tuple[str, ...]):
    """Looks up a nested value of eval.json; None if it is missing."""
    for key in keys:
        scores = (scores or {}).get(key)
    return scores


def _plot_profile(values: dict[str, np.ndarray], label: str, path: Path) -> Path:
    figure, axis = new_figure((6, 3.8))
    for (arm, value_RxL), colour in zip(values.items(), ARM_COLOURS, strict=False):
        for value_L in value_RxL:
            axis.plot(value_L, "-", lw=0.6, color=colour, alpha=0.4)
        if len(value_RxL):
            axis.plot(value_RxL.mean(axis=0), "o-", ms=4, lw=2, color=colour, label=arm)
    axis.set(xlabel="block", ylabel=label)
    # The first block is often worth a thousand times the others.
    flat = np.concatenate([v.ravel() for v in values.values()])
    if (flat > 0).all() and flat.max() > 30 * np.median(flat):
        axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return save(figure, path)


def over_training(run: Run, folder: Path, prefix: str) -> list[Path]:
    """Plots each of TRACES in a run's metrics: a heat map, some blocks, and the mean."""
    paths = []
    for name, field, label in TRACES:
        lines = [line for line in run.lines if line.get(field)]
        if len(lines) > 1:
            tokens_S = np.array([line["tokens"] for line in lines], float)
            values_SxL = np.array([line[field] for line in lines], float)
            path = folder / f"{prefix}{name}_over_training.png"
            paths.append(_plot_trace(tokens_S, values_SxL, label, path))
    return paths


def _plot_trace(tokens_S: np.ndarray, values_SxL: np.ndarray, label: str, path: Path) -> Path:
    figure, (map_axis, line_axis) = new_figure((12, 4), columns=2)
    n_steps, n_layers = values_SxL.shape
    image = map_axis.pcolormesh(
        np.arange(n_steps + 1), np.arange(n_layers + 1) - 0.5, values_SxL.T, cmap="viridis"
    )
    ticks = np.unique(np.linspace(0, n_steps - 1, 6).astype(int))
    map_axis.set_xticks(ticks + 0.5, [f"{tokens_S[i]:.3g}" for i in ticks])
    map_axis.set(xlabel="tokens", ylabel="block", title=label)
    figure.colorbar(image)
    for layer in sorted({0, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers - 1}):
        line_axis.plot(tokens_S, values_SxL[:, layer], lw=1.2, label=f"block {layer}")
    line_axis.plot(tokens_S, np.nanmean(values_SxL, axis=1), "k--", lw=1, label="mean")
    line_axis.set(xlabel="tokens", xscale="log" if tokens_S.min() > 0 else "linear")
    line_axis.legend()
    return save(figure, path)


def losses(arms: dict[str, list[Run]], folder: Path) -> Path:
    """Plots the held-out loss of every run over training, and the final perplexity by pair."""
    figure, (loss_axis, final_axis) = new_figure((11, 4), columns=2, width_ratios=(2, 1))
    for (arm, runs), colour in zip(arms.items(), ARM_COLOURS, strict=False):
        for i, run in enumerate(runs):
            lines = [line for line in run.lines if line.get("val_loss") is not None]
            tokens, loss = ([line[k] for line in lines] for k in ("tokens", "val_loss"))
            loss_axis.plot(tokens, loss, "-", lw=1, color=colour, label=None if i else arm)
        perplexities = [run.scores["perplexity"] for run in runs]
        final_axis.plot(np.arange(len(runs)), perplexities, "o", color=colour, label=arm)
    loss_axis.set(xlabel="tokens", ylabel="held-out loss, nats per token")
    final_axis.set(xlabel="pair", ylabel="perplexity")
    final_axis.xaxis.get_major_locator().set_params(integer=True)
    loss_axis.legend()
    return save(figure, folder / "ppl_comparison.png")


def scaling(arms: dict[str, list[Run]], folder: Path) -> Path:
    """Plots the final perplexity of every run over its parameters."""
    figure, axis = new_figure((6, 4))
    for (arm, runs), colour in zip(arms.items(), ARM_COLOURS, strict=False):
        n = [run.record["counts"]["total"] for run in runs]
        perplexities = [run.scores["perplexity"] for run in runs]
        axis.plot(n, perplexities, "o", color=colour, label=arm, ms=4)
    axis.set(xlabel="parameters", ylabel="perplexity", xscale="log", yscale="log")
    axis.legend()
    return save(figure, folder / "scaling_plot.png")
