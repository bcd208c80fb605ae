"""Figures by layer: utility, Block Influence, layer drop; at the end and over training."""

from pathlib import Path

import numpy as np

from lmscale_jax.reports.pairs import Run
from lmscale_jax.reports.plots import save

# File name, path in eval.json, label.
PROFILES = (
    ("mur_mean", ("mur", "mean"), "mean utility"),
    ("mur_frac_below_tau", ("mur", "frac_below_tau"), "share of tokens below tau"),
    ("mur_delta_norm", ("mur", "delta_norm"), "mean |δ|"),
    ("mur_grad_norm", ("mur", "grad_norm"), "mean |g|, summed loss"),
    ("bi_curve", ("block_influence",), "Block Influence, 1 - cos(h in, h out)"),
    ("layer_drop", ("layer_drop",), "rise of the loss without the block, nats"),
)
# What metrics.jsonl may hold by layer over training.
TRACED = (
    ("bi", "block_influence", "Block Influence"),
    ("layer_drop", "layer_drop", "rise of the loss without the block, nats"),
    ("mur", "mur/mean", "mean utility, training batch"),
)
COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:orange")


def profiles(arms: dict[str, list[Run]], folder: Path) -> list[Path]:
    """A figure for each of PROFILES that some run has: every run thin, the mean of an arm thick.

    `arms` are the runs by what they are called in the legend.
    """
    made = []
    for name, path, label in PROFILES:
        values = {arm: _stack(runs, path) for arm, runs in arms.items()}
        if any(len(v) for v in values.values()):
            made.append(_profile(values, label, folder / f"{name}.png"))
    return made


def _stack(runs: list[Run], path: tuple[str, ...]) -> np.ndarray:
    """[runs, L] of those that have it; those of another depth than the first are left out."""
    found = [value for run in runs if (value := _get(run.scores, path)) is not None]
    found = [v for v in found if len(v) == len(found[0])]
    return np.array(found, float)


def _get(scores: dict, path: tuple[str, ...]):
    for name in path:
        scores = (scores or {}).get(name)
    return scores


def _profile(values: dict[str, np.ndarray], label: str, path: Path) -> Path:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for (arm, value_RxL), colour in zip(values.items(), COLOURS, strict=False):
        for value_L in value_RxL:
            axis.plot(value_L, "-", lw=0.6, color=colour, alpha=0.4)
        if len(value_RxL):
            axis.plot(value_RxL.mean(axis=0), "o-", ms=4, lw=2, color=colour, label=arm)
    axis.set(xlabel="block", ylabel=label)
    # The first block is often worth a thousand times the others.
    every = np.concatenate([v.ravel() for v in values.values()])
    if (every > 0).all() and every.max() > 30 * np.median(every):
        axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return save(figure, path)


def over_training(run: Run, folder: Path, prefix: str) -> list[Path]:
    """For each of TRACED that a run's metrics hold: a heat map, traces of some blocks, the mean."""
    made = []
    for name, field, label in TRACED:
        lines = [line for line in run.lines if line.get(field)]
        if len(lines) > 1:
            tokens = np.array([line["tokens"] for line in lines], float)
            values_SxL = np.array([line[field] for line in lines], float)
            path = folder / f"{prefix}{name}_over_training.png"
            made.append(_over_training(tokens, values_SxL, label, path))
    return made


def _over_training(tokens: np.ndarray, values_SxL: np.ndarray, label: str, path: Path) -> Path:
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    n = values_SxL.shape[1]
    image = left.pcolormesh(
        np.arange(len(tokens) + 1), np.arange(n + 1) - 0.5, values_SxL.T, cmap="viridis"
    )
    shown = np.unique(np.linspace(0, len(tokens) - 1, 6).astype(int))
    left.set_xticks(shown + 0.5, [f"{tokens[i]:.3g}" for i in shown])
    left.set(xlabel="tokens", ylabel="block", title=label)
    figure.colorbar(image)
    for layer in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1}):
        right.plot(tokens, values_SxL[:, layer], lw=1.2, label=f"block {layer}")
    right.plot(tokens, np.nanmean(values_SxL, axis=1), "k--", lw=1, label="mean")
    right.set(xlabel="tokens", xscale="log" if tokens.min() > 0 else "linear")
    right.legend(frameon=False, fontsize=8)
    return save(figure, path)


def losses(arms: dict[str, list[Run]], folder: Path) -> Path:
    """Held-out loss over training of every run, and perplexity at the end, run by run."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    for (arm, runs), colour in zip(arms.items(), COLOURS, strict=False):
        for i, run in enumerate(runs):
            lines = [line for line in run.lines if line.get("val_loss") is not None]
            tokens, loss = ([line[k] for line in lines] for k in ("tokens", "val_loss"))
            left.plot(tokens, loss, "-", lw=1, color=colour, label=None if i else arm)
        seeds = np.arange(len(runs))
        right.plot(seeds, [r.scores["perplexity"] for r in runs], "o", color=colour, label=arm)
    left.set(xlabel="tokens", ylabel="held-out loss, nats per token")
    right.set(xlabel="pair", ylabel="perplexity")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    return save(figure, folder / "ppl_comparison.png")


def scaling(arms: dict[str, list[Run]], folder: Path) -> Path:
    """Perplexity over parameters, of every run."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    for (arm, runs), colour in zip(arms.items(), COLOURS, strict=False):
        n = [run.record["counts"]["total"] for run in runs]
        axis.plot(n, [r.scores["perplexity"] for r in runs], "o", color=colour, label=arm, ms=4)
    axis.set(xlabel="parameters", ylabel="perplexity", xscale="log", yscale="log")
    axis.legend(frameon=False)
    return save(figure, folder / "scaling_plot.png")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
