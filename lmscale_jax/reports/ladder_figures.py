"""Figures of a ladder: losses with laws and forecasts, compute factors, curves, residuals."""

from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.reports.plots import save
from lmscale_jax.run.writers import read_metrics

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown")
POINTS = 80
CURVE_POINTS = 300
WIDEST = 10.0


def colours(arms: list[str]) -> dict[str, str]:
    return {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}


def losses(
    arms: list[str], rows: list[dict], fits: dict, forecast: dict | None, path: Path
) -> Path:
    """All runs over compute, log-log; laws with bands; what was forecast beside what came.

    `rows` are finished rows of `study.results`, `fits` the laws of the anchors by arm.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    for arm, colour in colours(arms).items():
        own = [r for r in rows if r["variant"] == arm]
        anchors, held = (
            np.array(
                [(r["flops"], r["val_loss"]) for r in own if (r["role"] == "held_out") is late]
            )
            for late in (False, True)
        )
        axis.plot(*anchors.reshape(-1, 2).T, "o", ms=4, color=colour, label=arm)
        if len(held):
            axis.plot(*held.T, "D", ms=6, color=colour, mfc="none", label=f"{arm}, held out")
        if arm in fits:
            _law(axis, fits[arm], max(r["flops"] for r in rows), colour)
        if forecast and arm in forecast["arms"]:
            one = forecast["arms"][arm]
            error = [[one["loss"] - one["low"]], [one["high"] - one["loss"]]]
            # Beside the runs, where both can be seen.
            shift = 1.12 if arm == arms[0] else 1.2
            axis.errorbar(
                one["c"] * shift, one["loss"], yerr=error, fmt="_", color=colour, capsize=4, lw=1.2
            )
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs")
    axis.set_ylabel("held-out loss, nats per token")
    _plain(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def _law(axis, result, largest: float, colour: str) -> None:
    """A law in c by itself; a law in n and d along the runs' own n and d."""
    table = result.table
    c = np.geomspace(table.c.min(), max(largest, table.c.max()), POINTS)
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
        axis.fill_between(c, low, high, color=colour, alpha=0.15, lw=0)


def factors(comparisons: list[dict], path: Path) -> Path | None:
    """k(C): the compute that the baseline needs over that of each arm, at equal loss."""
    known = [one for one in comparisons if one["gain"]]
    if not known:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for one, colour in zip(known, COLOURS[1:], strict=False):
        gain = sorted(one["gain"], key=lambda row: row["c"])
        c, k, low, high = (np.array([row[x] for row in gain]) for x in ("c", "k", "low", "high"))
        axis.plot(c, k, color=colour, label=one["arms"][1])
        axis.fill_between(c, low, high, alpha=0.2, color=colour, lw=0)
    axis.axhline(1, color="0.5", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs")
    # A band that says nothing is cut off, so that the middle stays legible.
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, 1 / WIDEST), min(top, WIDEST))
    axis.set_ylabel(f"compute of {known[0]['arms'][0]} / compute of the arm")
    _plain(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def curves(arms: list[str], rows: list[dict], workdir: Path, path: Path) -> Path:
    """Training loss over tokens, a line a run; larger sizes are darker."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    sizes = sorted({row["size"] for row in rows})
    for arm, colour in colours(arms).items():
        for row in (r for r in rows if r["variant"] == arm):
            lines = read_metrics(workdir / "runs" / row["run_id"] / "metrics.jsonl")
            points = [(x["tokens"], x["train_loss"]) for x in lines if x.get("train_loss")]
            points = points[:: max(1, len(points) // CURVE_POINTS)]
            if points:
                strength = 0.3 + 0.7 * (sizes.index(row["size"]) + 1) / len(sizes)
                axis.plot(*np.array(points).T, color=colour, alpha=strength, lw=0.8)
        axis.plot([], [], color=colour, label=arm)
    axis.set(xscale="log", xlabel="tokens", ylabel="training loss, nats per token")
    _few_decades(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def residuals(arms: list[str], fits: dict, path: Path) -> Path | None:
    """What the laws of the anchors leave over, in per cent of the loss."""
    if not fits:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.0))
    axis.axhline(0, color="0.5", lw=0.8)
    for arm, colour in colours(arms).items():
        if arm in fits:
            axis.plot(fits[arm].table.c, 100 * fits[arm].residuals(), "o", ms=4, color=colour,
                      label=arm)  # fmt: skip
    axis.set(xscale="log", xlabel="training FLOPs", ylabel="residual, % of the loss")
    _few_decades(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def fits_of(arms: list[str], rows: list[dict], n: str) -> tuple[dict, dict[str, str]]:
    """({arm: the law of its finished anchors}, {arm: why it has none})."""
    from lmscale_jax import science
    from lmscale_jax.science.forecast import suited
    from lmscale_jax.study import results

    found, without = {}, {}
    for arm in arms:
        own = [r for r in rows if r["variant"] == arm and r["role"] != "held_out"]
        try:
            table = science.as_table(results.table(own, n), name=arm)
            found[arm] = science.fit(table, law=suited(table), bootstrap=500)
        except InputError as error:
            without[arm] = str(error)
    return found, without


def _plain(axis) -> None:
    """Few plain numbers on a logarithmic axis of less than a decade or two."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    bottom, top = axis.get_ylim()
    few = MaxNLocator(6) if top < 4 * bottom else LogLocator(10, subs=(1.0, 2.0, 5.0))
    axis.yaxis.set_major_locator(few)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    _few_decades(axis)


def _few_decades(axis) -> None:
    """Numbers at 1, 2 and 5 of each decade of x, and nowhere else."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
