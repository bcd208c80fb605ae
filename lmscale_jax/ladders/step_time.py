"""Converts a compute factor from FLOPs to seconds, by the measured speed of both arms' steps.

A change that costs no FLOPs may cost time. Only runs on one kind of device and in packs of one size
are compared, size by size. The standard deviation of ln(speed) is the larger one of two: that among
seeds, pooled over sizes and arms, and that by which the arms' difference varies among sizes. On a
machine that others use, the seeds of an arm are slow together, and only the second shows it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lmscale_jax.ladders.grid import short_count


class TimedSize(NamedTuple):
    """The runs of one size that were timed in both arms.

    Attributes:
      c: geometric mean of their FLOPs.
      per_token, per_flop: mean ln(speed) of the second arm less that of the first, in tokens and in
        FLOPs a second.
      weight: variance of these differences over that of one run's ln(speed).
      scatter: (sum of squares, degrees of freedom) of ln(speed) within the arms. Runs of one pack
        have one clock and count once.
    """

    size: float
    c: float
    per_token: float
    per_flop: float
    weight: float
    scatter: tuple[float, int]
    runs: int


def compare_seconds(rows: list[dict], arms: list[str], gain: list[dict], level: float) -> dict:
    """Compares the time that two arms take.

    Args:
      rows: finished runs, as `results.result_rows` makes them.
      arms: the baseline and the other one.
      gain: k(C) of the comparison in FLOPs, as `scaling.compare_arms` returns it.
      level: of the intervals.

    Returns:
      A dict with `gain`, as the argument, but k in seconds; `steps`, for each size its `ratio`, the
      second arm's seconds per token over the first's, with `low` and `high` (None: unknown) and the
      number of `runs`; `devices` and `packed` of the runs compared; and `reason`: None, or why
      nothing can be told, and then the others are empty.
    """
    timed = [row for row in rows if row["variant"] in arms and row["tokens_per_second"]]
    devices, groups = _comparable(timed, arms)
    if not groups:
        return {"gain": [], "steps": [], "devices": None, "packed": None,
                "reason": _reason(timed, arms)}  # fmt: skip
    sizes = sorted((_timed_size(group, arms) for group in groups), key=lambda size: size.c)
    half = _half_widths(sizes, level)
    steps = [
        {"size": s.size, "c": s.c, **_interval("ratio", -s.per_token, half(np.eye(len(sizes))[i])),
         "runs": s.runs}
        for i, s in enumerate(sizes)
    ]  # fmt: skip
    return {
        "gain": [_in_seconds(row, sizes, half) for row in gain],
        "steps": steps,
        "devices": devices,
        "packed": sorted({row["packed"] for group in groups for row in group}),
        "reason": None,
    }


def seconds_sentence(comparison: dict) -> str:
    """Words what `compare_seconds` found, in one sentence."""
    seconds, (first, second) = comparison["seconds"], comparison["arms"]
    if seconds["reason"]:
        return f"What it is in seconds cannot be told: {seconds['reason']}."
    last = seconds["steps"][-1]
    text = (
        f"At {short_count(last['size'])}, a token takes {second} {_shown(last, 'ratio')} times as "
        f"long as {first} on {seconds['devices']}"
    )
    if not seconds["gain"]:
        return f"{text}."
    k = max(seconds["gain"], key=lambda row: row["c"])
    return f"{text}: in seconds, {first} needs {_shown(k, 'k')} times what {second} needs."


def _shown(row: dict, name: str) -> str:
    spread = "spread unknown" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    return f"{row[name]:.2f} ({spread})"


def _comparable(timed: list[dict], arms: list[str]) -> tuple[str, list[list[dict]]]:
    """Returns the device on which most runs can be compared, and their groups, one for each size.

    A group has runs of both arms, and of packs that are equally large.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in timed:
        groups.setdefault((row["devices"], row["size"], row["packed"]), []).append(row)
    of_both = {k: g for k, g in groups.items() if {row["variant"] for row in g} == set(arms)}
    largest: dict[str, dict[float, list[dict]]] = {}
    for (devices, size, _), group in of_both.items():
        sizes = largest.setdefault(devices, {})
        sizes[size] = max(sizes.get(size, []), group, key=len)
    if not largest:
        return "", []
    devices = max(largest, key=lambda d: sum(map(len, largest[d].values())))
    return devices, list(largest[devices].values())


def _reason(timed: list[dict], arms: list[str]) -> str:
    first, second = ([row for row in timed if row["variant"] == arm] for arm in arms)
    if not first or not second:
        return f"no run of {arms[1] if first else arms[0]} took enough steps to be timed"

    def of(rows: Iterable[dict], name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows}))

    if not {row["devices"] for row in first} & {row["devices"] for row in second}:
        return f"{arms[0]} ran on {of(first, 'devices')} and {arms[1]} on {of(second, 'devices')}"
    if not {row["size"] for row in first} & {row["size"] for row in second}:
        return "no size was timed in both arms"
    return (
        f"the runs of a size were trained on other devices or in packs of other sizes "
        f"({of(first, 'packed')} for {arms[0]}, {of(second, 'packed')} for {arms[1]})"
    )


def _timed_size(group: list[dict], arms: list[str]) -> TimedSize:
    sides = [[row for row in group if row["variant"] == arm] for arm in arms]
    tokens = [np.log(sorted({row["tokens_per_second"] for row in side})) for side in sides]
    flops = [np.mean(np.log([row["flops_per_token"] for row in side])) for side in sides]
    per_token = float(tokens[1].mean() - tokens[0].mean())
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in tokens)
    return TimedSize(
        size=group[0]["size"],
        c=math.exp(np.mean([math.log(row["flops"]) for row in group])),
        per_token=per_token,
        per_flop=per_token + float(flops[1] - flops[0]),
        weight=sum(1 / len(side) for side in tokens),
        scatter=(squares, sum(map(len, tokens)) - 2),
        runs=len(group),
    )


def _half_widths(sizes: list[TimedSize], level: float):
    """Returns weights of the sizes -> half width of the interval of their mean difference; or None.

    None means that nothing was repeated. Two sizes tell their scatter only where no seeds do.
    """
    from scipy.stats import t

    weights = np.array([size.weight for size in sizes])
    differences = np.array([size.per_flop for size in sizes])
    of_sizes = float(((differences - differences.mean()) ** 2 / weights).sum()), len(sizes) - 1
    of_seeds = tuple(map(sum, zip(*(size.scatter for size in sizes), strict=True)))
    scatters = [of_seeds] if of_seeds[1] else []
    if of_sizes[1] >= (2 if scatters else 1):
        scatters.append(of_sizes)
    if not scatters:
        return lambda shares: None
    half = max(
        float(t.ppf((1 + level) / 2, degrees)) * math.sqrt(squares / degrees)
        for squares, degrees in scatters
    )
    return lambda shares: half * math.sqrt((np.square(shares) * weights).sum())


def _in_seconds(row: dict, sizes: list[TimedSize], half) -> dict:
    """Converts a row of k(C), with the difference of speed interpolated between sizes in ln C."""
    x, places = math.log(row["c"]), [math.log(size.c) for size in sizes]
    shares = np.array([np.interp(x, places, unit) for unit in np.eye(len(sizes))])
    difference = float(shares @ [size.per_flop for size in sizes])
    of_speed, of_k = half(shares), math.log(row["high"] / row["low"]) / 2
    both = None if of_speed is None else math.hypot(of_speed, of_k)
    return {"c": row["c"], **_interval("k", math.log(row["k"]) + difference, both)}


def _interval(name: str, value: float, half: float | None) -> dict:
    low, high = (None, None) if half is None else (math.exp(value - half), math.exp(value + half))
    return {name: math.exp(value), "low": low, "high": high}
