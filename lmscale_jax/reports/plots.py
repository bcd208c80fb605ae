"""Plots a run, the profiles of its blocks, and the losses of two arms, from records.

Also holds the style that all figures share.
"""

import json
import logging
from pathlib import Path

import numpy as np

from lmscale_jax.reports.pairs import EvaluatedRun
from lmscale_jax.train.metrics import read_metrics

# One colour for each arm that is compared.
ARM_COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown")
STYLE = {"legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 120}


def draw_run(workdir: Path, folder: Path | None = None) -> list[Path]:
    """Plots a run directory as PNG files in `folder`, by default its plots/; returns the paths."""
    lines = read_metrics(workdir / "metrics.jsonl")
    record = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    folder = folder or workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths = [_plot_training(lines, record, folder / "loss.png")]
    if any("grad_norm_layers" in line for line in lines):
        paths.append(_plot_layer_norms(lines, folder / "layers.png"))
    if any("spectral/" in name for line in lines for name in line):
        paths.append(_plot_spectra(lines, folder / "spectral.png"))
    return paths


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1, **layout):
    """Creates a figure in our style; returns (figure, axes) as `pyplot.subplots` does.

    Args:
      size: width and height in inches.
      layout: further arguments of `pyplot.subplots`.
    """
    # It warns of a home directory that it cannot write, and goes on without one.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")  # draws files; needs no display
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=size, **layout)


def save_figure(figure, path: Path) -> Path:
    """Writes a figure as PNG, closes it and returns the path."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def graded_colours(n: int) -> np.ndarray:
    """Returns n colours from dark to light, [n, 4], for lines that have an order."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, n))


def fill_band(axis, x, low, high, colour: str, label: str | None = None) -> None:
    """Shades the interval from low to high around a line."""
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0, label=label)


def plot_gain(axis, gain: list[dict], colour: str, label: str, band: str | None = None) -> None:
    """Plots k(C), the compute factor at equal loss, with its interval.

    Args:
      gain: rows with "c" (FLOPs), "k", "low" and "high", in any order.
      label, band: names of the line and of the interval in the legend.
    """
    rows = sorted(gain, key=lambda row: row["c"])
    c, k, low, high = (np.array([row[x] for row in rows]) for x in ("c", "k", "low", "high"))
    axis.plot(c, k, color=colour, label=label)
    fill_band(axis, c, low, high, colour, band)
    axis.set(xscale="log", yscale="log")


def plain_ticks(axis) -> None:
    """Labels logarithmic axes with few plain numbers: losses span less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    bottom, top = axis.get_ylim()
    narrow = top < 4 * bottom
    locator = MaxNLocator(6) if narrow else LogLocator(10, subs=(1.0, 2.0, 5.0))
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    decade_ticks(axis)


def decade_ticks(axis) -> None:
    """Labels a logarithmic x axis at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _series(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and values of the lines that have a value under this name."""
    with_value = [line for line in lines if line.get(name) is not None]
    return (
        np.array([line["tokens"] for line in with_value], float),
        np.array([line[name] for line in with_value], float),
    )


def _plot_training(lines: list[dict], record: dict, path: Path) -> Path:
    """Plots training and held-out loss with the baselines; learning rate and gradient norm."""
    figure, (loss_axis, rate_axis) = new_figure((11, 4), columns=2, width_ratios=(2, 1))
    loss_axis.plot(*_series(lines, "train_loss"), lw=1, color="tab:blue", label="training")
    tokens, loss = _series(lines, "val_loss")
    _, sem = _series(lines, "val_loss_sem")
    if len(loss):
        error = sem if len(sem) == len(loss) else None
        loss_axis.errorbar(tokens, loss, error, fmt="o-", ms=4, color="tab:red", label="held out")
    for name, value in (record.get("baselines") or {}).items():
        loss_axis.axhline(value, ls=":", color="0.4")
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        loss_axis.annotate(name, (1, value), **place)
    loss_axis.set(xlabel="tokens", ylabel="loss, nats per token", title=record["name"])
    loss_axis.legend()
    rate_axis.plot(*_series(lines, "lr"), color="tab:green")
    rate_axis.set(xlabel="tokens", ylabel="learning rate")
    norm_axis = rate_axis.twinx()
    norm_axis.plot(*_series(lines, "grad_norm"), lw=0.6, color="0.5")
    norm_axis.set(ylabel="gradient norm", yscale="log")
    return save_figure(figure, path)


def _plot_layer_norms(lines: list[dict], path: Path) -> Path:
    """Plots norms of every block over training: gradient, parameters, update, their ratio."""
    tokens, grad_SxL = _series(lines, "grad_norm_layers")
    _, param_SxL = _series(lines, "param_norm_layers")
    _, update_SxL = _series(lines, "update_norm_layers")
    values = {
        "grad": grad_SxL,
        "param": param_SxL,
        "update": update_SxL,
        "update / param": update_SxL / np.maximum(param_SxL, 1e-30),
    }
    figure, axes = new_figure((16, 3.6), columns=len(values))
    colours = graded_colours(grad_SxL.shape[1])
    for axis, (name, series_SxL) in zip(axes, values.items(), strict=True):
        for layer, colour in enumerate(colours):
            axis.plot(tokens, series_SxL[:, layer], lw=1, color=colour, label=f"block {layer}")
        positive = bool((series_SxL > 0).any())
        axis.set(xlabel="tokens", title=f"{name} norm", yscale="log" if positive else "linear")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    if len(colours) <= 12:
        axes[-1].legend()
    return save_figure(figure, path)


def _plot_spectra(lines: list[dict], path: Path) -> Path:
    """Plots the spectral norm of every matrix, that of its update, and its stable rank."""
    prefix = "spectral/weight/"
    matrices = sorted({n[len(prefix) :] for line in lines for n in line if n.startswith(prefix)})
    quantities = {
        "weight": "σ₁(W) √(in/out)",
        "update": "σ₁(ΔW) √(in/out)",
        "stable_rank": "stable rank of W",
    }
    size = (2.6 * len(matrices), 2.4 * len(quantities))
    figure, axes = new_figure(size, len(quantities), len(matrices), sharex=True, squeeze=False)
    for row, (quantity, label) in zip(axes, quantities.items(), strict=True):
        for axis, matrix in zip(row, matrices, strict=True):
            tokens, series_SxL = _series(lines, f"spectral/{quantity}/{matrix}")
            for layer, colour in enumerate(graded_colours(series_SxL.shape[1])):
                axis.plot(tokens, series_SxL[:, layer], lw=1, color=colour)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(label, fontsize=8)
    for axis, matrix in zip(axes[0], matrices, strict=True):
        axis.set_title(matrix.removeprefix("blocks/").removesuffix("/weight"), fontsize=8)
    return save_figure(figure, path)


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


def plot_profiles(arms: dict[str, list[EvaluatedRun]], folder: Path) -> list[Path]:
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


def _stack_layers(runs: list[EvaluatedRun], keys: tuple[str, ...]) -> np.ndarray:
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
    return save_figure(figure, path)


def plot_over_training(run: EvaluatedRun, folder: Path, prefix: str) -> list[Path]:
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
    return save_figure(figure, path)


def plot_losses(arms: dict[str, list[EvaluatedRun]], folder: Path) -> Path:
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
    return save_figure(figure, folder / "ppl_comparison.png")


def plot_perplexity(arms: dict[str, list[EvaluatedRun]], folder: Path) -> Path:
    """Plots the final perplexity of every run over its parameters."""
    figure, axis = new_figure((6, 4))
    for (arm, runs), colour in zip(arms.items(), ARM_COLOURS, strict=False):
        n = [run.record["counts"]["total"] for run in runs]
        perplexities = [run.scores["perplexity"] for run in runs]
        axis.plot(n, perplexities, "o", color=colour, label=arm, ms=4)
    axis.set(xlabel="parameters", ylabel="perplexity", xscale="log", yscale="log")
    axis.legend()
    return save_figure(figure, folder / "scaling_plot.png")
