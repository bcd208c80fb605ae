"""Runs to be compared: read from their records, matched by seed, refused where more than the
studied switch differs."""

import glob
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.keys import get
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import InputError
from lmscale_jax.run.record import read_record
from lmscale_jax.run.writers import read_metrics

SEEDS = ("seed", "data.seed")


class Run(NamedTuple):
    """Attributes:
    path: the run directory.
    record, scores: run.json and eval.json; `scores` is {} where it was not evaluated.
    lines: of metrics.jsonl.
    """

    path: Path
    record: dict
    scores: dict
    lines: list[dict]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(get(self.record["config"], name) for name in SEEDS)


class Pair(NamedTuple):
    baseline: Run
    variant: Run


def read(workdir: Path) -> Run:
    """Raises InputError where it holds no run record."""
    path = workdir / "eval.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    return Run(workdir, read_record(workdir), scores, read_metrics(workdir / "metrics.jsonl"))


def read_all(flag: str, value: str) -> list[Run]:
    """Runs named by directories or globs, joined by commas; each must have been evaluated."""
    paths = [Path(p) for part in value.split(",") for p in sorted(glob.glob(part)) or [part]]
    runs = [read(path) for path in dict.fromkeys(paths)]
    for run in runs:
        if "val_loss" not in run.scores:
            raise InputError(
                f"--{flag}={run.path} holds no evaluation; "
                f"python -m lmscale_jax.evaluate --workdir={run.path} makes it"
            )
    return runs


def match(
    baselines: list[Run], variants: list[Run], switch: str, allow_differences: bool
) -> list[Pair]:
    """Pairs runs of the same seeds and size; there may be several sizes.

    Raises InputError where a run has no partner or several, or where the configs of two partners
    differ in anything but `switch`, a key or a group of keys, unless that is allowed.
    """
    found, rest = [], list(baselines)
    for variant in variants:
        partners = [b for b in rest if _place(b) == _place(variant)]
        if not partners and len(baselines) == len(variants) == 1:
            partners = baselines
        if len(partners) != 1:
            raise InputError(
                f"--variant={variant.path} has {len(partners) or 'no'} partner(s) among "
                f"--baseline with its {_told(variant)}; exactly one of each seed would work"
            )
        pair = Pair(partners[0], variant)
        if not allow_differences:
            _check(pair, switch)
        found.append(pair)
        rest.remove(pair.baseline)
    if rest:
        raise InputError(
            f"--baseline={rest[0].path} has no partner with its {_told(rest[0])}; leave it out"
        )
    return found


def _place(run: Run) -> tuple:
    sizes = ("model.n_layers", "model.d_model")
    return (*run.seeds, *(get(run.record["config"], name) for name in sizes))


def _told(run: Run) -> str:
    return " and ".join(f"{n}={v}" for n, v in zip(SEEDS, run.seeds, strict=True)) + " and size"


def _check(pair: Pair, switch: str) -> None:
    one, two = (run.record["config"] for run in pair)
    changed = differences(one, two, identity_only=True)
    other = [p for p in changed if p != switch and not p.startswith(f"{switch}.")]
    said = [f"{path} ({get(one, path)!r}, {get(two, path)!r})" for path in other]
    for name in ("fingerprint", "val_fingerprint"):
        if pair.baseline.record["data"][name] != pair.variant.record["data"][name]:
            said.append(f"the data's {name}")
    if said:
        raise InputError(
            f"--baseline={pair.baseline.path} and --variant={pair.variant.path} differ in more "
            f"than {switch}: {', '.join(said)}; --allow_differences compares them all the same"
        )
    if not changed:
        raise InputError(
            f"--baseline={pair.baseline.path} and --variant={pair.variant.path} have the same "
            f"config, {switch} included; --switch names the group that is studied"
        )


def difference(pairs: list[Pair]) -> dict:
    """Variant minus baseline in held-out loss, nats a token, paired by seed.

    {"mean", "low", "high", "p", "n"}: the 95 % interval and two-sided p of Student's t over pairs;
    None with a single pair, whose own noise is not known.
    """
    d = np.array([v.scores["val_loss"] - b.scores["val_loss"] for b, v in pairs])
    found = {"mean": float(d.mean()), "low": None, "high": None, "p": None, "n": len(d)}
    if len(d) > 1:
        from scipy import stats

        se = d.std(ddof=1) / np.sqrt(len(d))
        half = stats.t.ppf(0.975, len(d) - 1) * se
        p = 2 * stats.t.sf(abs(d.mean()) / max(se, 1e-300), len(d) - 1)
        found |= {"low": d.mean() - half, "high": d.mean() + half, "p": p}
        found = {k: float(v) if isinstance(v, np.floating) else v for k, v in found.items()}
    return found
