"""Plots fits, isoFLOP minima and comparisons of two arms as PNG files."""

from pathlib import Path

import numpy as np

from lmscale_jax.reports.plots import (
    ARM_COLOURS,
    fill_band,
    graded_colours,
    new_figure,
    plain_ticks,
    plot_gain,
    save_figure,
)
from lmscale_jax.scaling import intervals, laws
from lmscale_jax.scaling.isoflop import DEGREES
from lmscale_jax.scaling.table import FLOPS_FACTOR

# Curves of fixed n, and points of a curve.
N_CURVES = 5
CURVE_POINTS = 80


def plot_fit(result, path: Path) -> Path:
    """Plots the data with the law and its band, the residuals, and the profile of a free floor."""
    panels = 3 if result.profile is not None else 2
    figure, axes = new_figure((5.2 * panels, 4.2), columns=panels)
    _plot_data(axes[0], result)
    _plot_fit_residuals(axes[1], result)
    if result.profile is not None:
        _plot_floor_profile(axes[2], result)
    return save_figure(figure, path)


def plot_isoflop(summary: dict, curves: dict, path: Path) -> Path:
    """Plots loss against size at each budget with the fitted curves, and N* against compute."""
    table, surface = curves["table"], curves["surface"]
    figure, (loss_axis, size_axis) = new_figure((11, 4.4), columns=2)
    colours = graded_colours(len(curves["groups"]))
    for rows, colour in zip(curves["groups"], colours, strict=True):
        n, c = table.n[rows], float(np.exp(np.log(table.c[rows]).mean()))
        loss_axis.plot(n, table.loss[rows], "o", ms=3, color=colour, label=f"{c:.2g} FLOPs")
        x = np.linspace(np.log(n.min()), np.log(n.max()), CURVE_POINTS)
        for degree, style in zip(DEGREES.values(), (":", "--"), strict=True):
            if len(rows) > degree:
                p = np.polyfit(np.log(n) - x.mean(), table.loss[rows], degree)
                loss_axis.plot(np.exp(x), np.polyval(p, x - x.mean()), style, color=colour, lw=1)
        smooth = surface.predict(n=np.exp(x), d=c / FLOPS_FACTOR / np.exp(x))
        loss_axis.plot(np.exp(x), smooth, color=colour, lw=1)
    loss_axis.set(xscale="log", xlabel="parameters", ylabel="loss, nats per token")
    loss_axis.set_title("parabola dotted, cubic dashed, surface solid")
    loss_axis.legend()
    for name, method in summary["methods"].items():
        points = [(b["c"], b["n_star"]) for b in method["budgets"] if b["n_star"]]
        c, n = np.array(points).T
        size_axis.plot(c, n, "o-", ms=4, lw=1, label=f"{name}: a = {method['a']:.3f}")
    size_axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="compute-optimal parameters")
    size_axis.legend()
    return save_figure(figure, path)


def plot_comparison(verdict: dict, table, fits: dict, path: Path) -> Path:
    """Plots both arms' losses with their laws in c, and the compute factor k(C) with its band."""
    figure, (loss_axis, gain_axis) = new_figure((11, 4.4), columns=2)
    for arm, colour in zip(verdict["arms"], ARM_COLOURS, strict=False):
        rows = table.arm(arm)
        loss_axis.plot(rows.c, rows.loss, "o", ms=4, color=colour, label=arm)
        if arm in fits and fits[arm].law.columns == ("c",):
            c = np.geomspace(rows.c.min(), rows.c.max() * 3, CURVE_POINTS)
            loss_axis.plot(c, fits[arm].predict(c=c), lw=1, color=colour)
    loss_axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="loss, nats per token")
    loss_axis.set_title(verdict["verdict"])
    plain_ticks(loss_axis)
    loss_axis.legend()
    first, second = verdict["arms"]
    level = f"{100 * verdict['shift']['level']:g} %"
    plot_gain(gain_axis, verdict["gain"], "tab:green", f"{first} / {second}", level)
    gain_axis.axhline(1, color="0.5", lw=0.8)
    gain_axis.set(xlabel="FLOPs", ylabel=f"compute of {first} / compute of {second}")
    gain_axis.set_title("at equal loss")
    plain_ticks(gain_axis)
    gain_axis.legend()
    return save_figure(figure, path)


def _plot_data(axis, result) -> None:
    """Plots loss against compute: data, law and band; laws in n and d as curves of fixed n."""
    table = result.table
    axis.plot(table.c, table.loss, "o", ms=3, color="0.4", label="runs")
    c = np.geomspace(table.c.min(), table.c.max() * 3, CURVE_POINTS)
    if "n" not in result.law.columns:
        columns = {"c": c}
        axis.plot(c, result.predict(c=c), color="tab:red", label=result.law.name)
    else:
        columns = _optimum(result, c)
        for n in np.quantile(np.unique(table.n), np.linspace(0, 1, N_CURVES)):
            same_size = table.n == table.n[np.abs(np.log(table.n / n)).argmin()]
            d = np.geomspace(
                table.d[same_size].min() / 2, table.d[same_size].max() * 2, CURVE_POINTS
            )
            loss = result.predict(n=n, d=d)
            axis.plot(table.flops(n, d), loss, lw=0.8, color="tab:blue", alpha=0.6)
        if columns:
            label = "compute-optimal"
            axis.plot(c, result.predict(**columns), color="tab:red", label=label)
    if result.draws is not None and columns:
        low, high = intervals.prediction_band(result.predict_draws(**columns), result.level)
        fill_band(axis, c, low, high, "tab:red", f"{100 * result.level:g} %")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="loss, nats per token",
             title=result.table.name)  # fmt: skip
    plain_ticks(axis)
    axis.legend()


def _optimum(result, c: np.ndarray) -> dict | None:
    """Computes n and d of the optimum at budgets c; None if there is no optimum."""
    n, d = laws.compute_optimum(result.params, c / result.table.flops_factor)
    return {"n": n, "d": d} if np.isfinite(n).all() else None


def _plot_fit_residuals(axis, result) -> None:
    """Plots the residuals in per cent of the loss, coloured by size."""
    r = 100 * result.residuals()
    axis.axhline(0, color="0.5", lw=0.8)
    colour = np.log10(result.table.n if result.table.n is not None else result.table.c)
    shown = axis.scatter(result.table.c, r, c=colour, s=9, cmap="viridis")
    label = "log10 parameters" if result.table.n is not None else "log10 FLOPs"
    axis.figure.colorbar(shown, ax=axis, label=label)
    if np.isfinite(result.delta):
        for side in (-1, 1):
            axis.axhline(side * 100 * result.delta, color="tab:orange", ls=":", lw=0.8)
    axis.set(xscale="log", xlabel="FLOPs", ylabel="residual, % of the loss (dotted: delta)")


def _plot_floor_profile(axis, result) -> None:
    """Plots the objective at pinned floors with the interval of E."""
    p = result.profile
    axis.plot(p.E, p.objective, color="tab:purple")
    axis.axvspan(p.low, p.high, color="tab:purple", alpha=0.15, label=f"{100 * result.level:g} %")
    axis.axvline(result.params["E"], color="tab:red", lw=0.8, label="fit")
    top = p.objective.min() + 20 * max(p.objective.min() * 0.02, 1e-300)
    axis.set(xlabel="E, nats per token", ylabel="objective at pinned E", ylim=(None, top))
    axis.legend()
