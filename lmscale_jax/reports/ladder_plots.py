"""Plots a ladder: losses with laws and forecasts, compute factors, curves, residuals."""

from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.reports.plots import (
    ARM_COLOURS,
    decade_ticks,
    fill_band,
    new_figure,
    plain_ticks,
    plot_gain,
    save_figure,
)
from lmscale_jax.train.metrics import read_metrics

LAW_POINTS = 80
# Points of one learning curve at most.
MAX_POINTS = 300
# Largest compute factor that is shown, and the inverse of the smallest.
MAX_FACTOR = 10.0


def arm_colours(arms: list[str]) -> dict[str, str]:
    """Returns a colour for each arm."""
    return {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(arms)}


def plot_ladder_losses(
    arms: list[str], rows: list[dict], fits: dict, forecast: dict | None, path: Path
) -> Path:
    """Plots the losses of all runs over compute, laws with bands, and forecasts with intervals.

    Args:
      rows: finished rows of `ladders.results`.
      fits: the laws of the anchors by arm.
      forecast: forecast.json, or None without a held-out rung.
    """
    figure, axis = new_figure((5.2, 4.2))
    largest = max((row["flops"] for row in rows), default=0.0)
    for arm, colour in arm_colours(arms).items():
        anchors = _points(row for row in rows if row["variant"] == arm and not _is_held_out(row))
        held_out = _points(row for row in rows if row["variant"] == arm and _is_held_out(row))
        axis.plot(*anchors.T, "o", ms=4, color=colour, label=arm)
        if len(held_out):
            axis.plot(*held_out.T, "D", ms=6, color=colour, mfc="none", label=f"{arm}, held out")
        if arm in fits:
            _plot_law(axis, fits[arm], largest, colour)
        if forecast and arm in forecast["arms"]:
            # To the right of the runs, each arm at its own place, so that both can be seen.
            shift = 1.12 if arm == arms[0] else 1.2
            _plot_forecast(axis, forecast["arms"][arm], shift, colour)
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs")
    axis.set_ylabel("held-out loss, nats per token")
    plain_ticks(axis)
    axis.legend()
    return save_figure(figure, path)


def _is_held_out(row: dict) -> bool:
    return row["role"] == "held_out"


def _points(rows) -> np.ndarray:
    """Returns FLOPs and held-out losses of runs, [runs, 2]."""
    return np.array([(row["flops"], row["val_loss"]) for row in rows], float).reshape(-1, 2)


def _plot_forecast(axis, forecast: dict, shift: float, colour: str) -> None:
    loss = forecast["loss"]
    error = [[loss - forecast["low"]], [forecast["high"] - loss]]
    axis.errorbar(forecast["c"] * shift, loss, yerr=error, fmt="_", color=colour, capsize=4, lw=1.2)


def _plot_law(axis, result, largest: float, colour: str) -> None:
    """Plots a law in c directly, and a law in n and d along the n and d of the runs."""
    table = result.table
    c = np.geomspace(table.c.min(), max(largest, table.c.max()), LAW_POINTS)
    if result.law.columns == ("c",):
        columns = {"c": c}
    else:
        order = np.argsort(table.c)
        x, y = np.log(table.c[order]), np.log(table.n[order])
        slope, level = np.polyfit(x, y, 1)
        n = np.exp(level + slope * np.log(c))
        columns = {"n": n, "d": c / np.exp(np.mean(np.log(table.c / table.n / table.d))) / n}
    axis.plot(c, result.predict(**columns), color=colour, lw=1)
    if result.draws is not None:
        low, high = np.nanpercentile(result.predict_draws(**columns), [2.5, 97.5], axis=0)
        fill_band(axis, c, low, high, colour)


def plot_compute_factors(comparisons: list[dict], path: Path) -> Path | None:
    """Plots k(C): the compute of the baseline over that of each arm, at equal loss.

    Dashed, where the runs were timed: the same in seconds. Returns None without writing a figure
    if no comparison has a compute factor.
    """
    with_gain = [comparison for comparison in comparisons if comparison["gain"]]
    if not with_gain:
        return None
    figure, axis = new_figure((5.2, 3.4))
    for comparison, colour in zip(with_gain, ARM_COLOURS[1:], strict=False):
        arm = comparison["arms"][1]
        plot_gain(axis, comparison["gain"], colour, arm)
        if seconds := comparison["seconds"]["gain"]:
            points = [(row["c"], row["k"]) for row in seconds]
            axis.plot(*np.array(points).T, "--", color=colour, label=f"{arm}, in seconds")
    axis.axhline(1, color="0.5", lw=0.8)
    axis.set(xlabel="training FLOPs")
    # An interval that says nothing is cut off, so that the middle stays legible.
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, 1 / MAX_FACTOR), min(top, MAX_FACTOR))
    axis.set_ylabel(f"compute of {with_gain[0]['arms'][0]} / compute of the arm")
    plain_ticks(axis)
    axis.legend()
    return save_figure(figure, path)


def plot_training_curves(arms: list[str], rows: list[dict], workdir: Path, path: Path) -> Path:
    """Plots the training loss of every run over tokens; larger sizes are darker."""
    figure, axis = new_figure((5.2, 3.6))
    sizes = sorted({row["size"] for row in rows})
    for arm, colour in arm_colours(arms).items():
        for row in (r for r in rows if r["variant"] == arm):
            lines = read_metrics(workdir / "runs" / row["run_id"] / "metrics.jsonl")
            points = [(x["tokens"], x["train_loss"]) for x in lines if x.get("train_loss")]
            points = points[:: max(1, len(points) // MAX_POINTS)]
            if points:
                strength = 0.3 + 0.7 * (sizes.index(row["size"]) + 1) / len(sizes)
                axis.plot(*np.array(points).T, color=colour, alpha=strength, lw=0.8)
        axis.plot([], [], color=colour, label=arm)
    axis.set(xscale="log", xlabel="tokens", ylabel="training loss, nats per token")
    decade_ticks(axis)
    axis.legend()
    return save_figure(figure, path)


def plot_residuals(arms: list[str], fits: dict, path: Path) -> Path | None:
    """Plots the residuals of the laws in per cent of the loss; None if no arm has a law."""
    if not fits:
        return None
    figure, axis = new_figure((5.2, 3.0))
    axis.axhline(0, color="0.5", lw=0.8)
    for arm, colour in arm_colours(arms).items():
        if arm in fits:
            residual = 100 * fits[arm].residuals()
            axis.plot(fits[arm].table.c, residual, "o", ms=4, color=colour, label=arm)
    axis.set(xscale="log", xlabel="training FLOPs", ylabel="residual, % of the loss")
    decade_ticks(axis)
    axis.legend()
    return save_figure(figure, path)


def fit_arms(arms: list[str], rows: list[dict], n: str) -> tuple[dict, dict[str, str]]:
    """Fits a law to the finished anchors of each arm.

    Args:
      n: the count of parameters that laws are in: "non_embedding" or "total".

    Returns:
      ({arm: the law}, {arm: why it has none}).
    """
    from lmscale_jax import scaling
    from lmscale_jax.ladders import results
    from lmscale_jax.scaling.forecast import richest_law

    fits, reasons = {}, {}
    for arm in arms:
        anchors = [row for row in rows if row["variant"] == arm and not _is_held_out(row)]
        try:
            table = scaling.as_table(results.fit_table(anchors, n), name=arm)
            fits[arm] = scaling.fit_law(table, law=richest_law(table), bootstrap=500)
        except InputError as error:
            reasons[arm] = str(error)
    return fits, reasons
