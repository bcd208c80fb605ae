"""Figures of one run, from its run.json and metrics.jsonl alone."""

import json
from pathlib import Path

import numpy as np

from lmscale_jax.run.writers import read_metrics


def draw(workdir: Path, folder: Path | None = None) -> list[Path]:
    """Writes *.png of a run directory into `folder`, by default its plots/; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    lines = read_metrics(workdir / "metrics.jsonl")
    record = json.loads((workdir / "run.json").read_text())
    folder = folder or workdir / "plots"
    folder.mkdir(exist_ok=True)
    made = [_loss(lines, record, folder / "loss.png")]
    if any("grad_norm_layers" in line for line in lines):
        made.append(_layers(lines, folder / "layers.png"))
    if any("spectral/" in name for line in lines for name in line):
        made.append(_spectra(lines, folder / "spectral.png"))
    return made


def _series(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the lines that have a number under this name."""
    chosen = [line for line in lines if line.get(name) is not None]
    return (
        np.array([line["tokens"] for line in chosen], float),
        np.array([line[name] for line in chosen], float),
    )


def _loss(lines: list[dict], record: dict, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    left.plot(*_series(lines, "train_loss"), lw=1, color="tab:blue", label="training")
    tokens, loss = _series(lines, "val_loss")
    _, sem = _series(lines, "val_loss_sem")
    if len(loss):
        error = sem if len(sem) == len(loss) else None
        left.errorbar(tokens, loss, error, fmt="o-", ms=4, color="tab:red", label="held out")
    for name, value in (record.get("baselines") or {}).items():
        left.axhline(value, ls=":", color="0.4")
        left.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    left.set(xlabel="tokens", ylabel="loss, nats per token", title=record["name"])
    left.legend(frameon=False)
    right.plot(*_series(lines, "lr"), color="tab:green")
    right.set(xlabel="tokens", ylabel="learning rate")
    twin = right.twinx()
    twin.plot(*_series(lines, "grad_norm"), lw=0.6, color="0.5")
    twin.set(ylabel="gradient norm", yscale="log")
    return save(figure, path)


def _layers(lines: list[dict], path: Path) -> Path:
    """Norms of every block over training: gradient, parameters, update, update over parameters."""
    from matplotlib import pyplot as plt

    chosen = [line for line in lines if "grad_norm_layers" in line]
    tokens = np.array([line["tokens"] for line in chosen], float)
    values = {
        name: np.array([line[f"{name}_norm_layers"] for line in chosen], float)
        for name in ("grad", "param", "update")
    }
    values["update / param"] = values["update"] / np.maximum(values["param"], 1e-30)
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    colours = plt.cm.viridis(np.linspace(0, 0.9, values["grad"].shape[1]))
    for axis, (name, series_SxL) in zip(axes, values.items(), strict=True):
        for layer, colour in enumerate(colours):
            axis.plot(tokens, series_SxL[:, layer], lw=1, color=colour, label=f"block {layer}")
        positive = bool((series_SxL > 0).any())
        axis.set(xlabel="tokens", title=f"{name} norm", yscale="log" if positive else "linear")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    if len(colours) <= 12:
        axes[-1].legend(frameon=False, fontsize=7)
    return save(figure, path)


def _spectra(lines: list[dict], path: Path) -> Path:
    """For every matrix its spectral norm, that of its update, and its stable rank, by layer."""
    from matplotlib import pyplot as plt

    first = "spectral/weight/"
    paths = sorted({n[len(first) :] for line in lines for n in line if n.startswith(first)})
    rows = {
        "weight": "σ₁(W) √(in/out)",
        "update": "σ₁(ΔW) √(in/out)",
        "stable_rank": "stable rank of W",
    }
    figure, axes = plt.subplots(
        len(rows), len(paths), figsize=(2.6 * len(paths), 2.4 * len(rows)),
        sharex=True, squeeze=False,
    )  # fmt: skip
    for row, (quantity, label) in zip(axes, rows.items(), strict=True):
        for axis, matrix in zip(row, paths, strict=True):
            tokens, series_SxL = _series(lines, f"spectral/{quantity}/{matrix}")
            for layer, colour in enumerate(
                plt.cm.viridis(np.linspace(0, 0.9, series_SxL.shape[1]))
            ):
                axis.plot(tokens, series_SxL[:, layer], lw=1, color=colour)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(label, fontsize=8)
    for axis, matrix in zip(axes[0], paths, strict=True):
        axis.set_title(matrix.removeprefix("blocks/").removesuffix("/weight"), fontsize=8)
    return save(figure, path)


def save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
