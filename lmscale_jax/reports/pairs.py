"""Reads evaluated runs and pairs them by seed and size; checks that only the switch differs."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.keys import get
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import InputError
from lmscale_jax.files import comma_separated, matching_paths
from lmscale_jax.train.metrics import read_metrics
from lmscale_jax.train.run_dir import read_record

SEEDS = ("seed", "data.seed")


class EvaluatedRun(NamedTuple):
    """A run as its files describe it.

    Attributes:
      path: the run directory.
      record: run.json.
      scores: eval.json; {} if the run was not evaluated.
      lines: the lines of metrics.jsonl.
    """

    path: Path
    record: dict
    scores: dict
    lines: list[dict]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of the initial parameters, and of the data order."""
        return tuple(get(self.record["config"], name) for name in SEEDS)


class RunPair(NamedTuple):
    """Two runs of the same seeds and size, without and with the switch."""

    baseline: EvaluatedRun
    variant: EvaluatedRun


def read_run(workdir: Path) -> EvaluatedRun:
    """Reads a run directory. Raises InputError if it holds no run.json."""
    path = workdir / "eval.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return EvaluatedRun(
        workdir, read_record(workdir), scores, read_metrics(workdir / "metrics.jsonl")
    )


def read_runs(flag: str, value: str) -> list[EvaluatedRun]:
    """Reads runs named by directories or globs, joined by commas.

    Raises InputError, with the name of the flag, for a run that was not evaluated.
    """
    items = comma_separated(value, matching_paths)
    paths = [Path(path) for item in items for path in matching_paths(item) or [item]]
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    for run in runs:
        if "val_loss" not in run.scores:
            raise InputError(
                f"--{flag}={run.path} has no evaluation; "
                f"run python -m lmscale_jax.evaluate --workdir={run.path}"
            )
    return runs


def match_runs(
    baselines: list[EvaluatedRun],
    variants: list[EvaluatedRun],
    switch: str,
    allow_differences: bool,
) -> list[RunPair]:
    """Pairs runs of the same seeds and size; there may be several sizes.

    Args:
      switch: the key, or the group of keys, in which partners may differ.
      allow_differences: accept partners that differ in other keys, too.

    Raises:
      InputError: a run has no partner or several, or partners differ in more than the switch.
    """
    matched, unmatched = [], list(baselines)
    for variant in variants:
        partners = [b for b in unmatched if _seeds_and_size(b) == _seeds_and_size(variant)]
        if not partners and len(baselines) == len(variants) == 1:
            partners = baselines
        if len(partners) != 1:
            raise InputError(
                f"--variant={variant.path}: {len(partners)} runs of --baseline have its "
                f"{_seeds_text(variant)}; name exactly one"
            )
        pair = RunPair(partners[0], variant)
        if not allow_differences:
            _check_comparable(pair, switch)
        matched.append(pair)
        unmatched.remove(pair.baseline)
    if unmatched:
        raise InputError(
            f"--baseline={unmatched[0].path}: no run of --variant has its "
            f"{_seeds_text(unmatched[0])}; leave it out"
        )
    return matched


def keys_outside(keys: list[str], switch: str) -> list[str]:
    """Returns the config keys that are neither `switch` nor in the group of that name."""
    return [key for key in keys if key != switch and not key.startswith(f"{switch}.")]


def _seeds_and_size(run: EvaluatedRun) -> tuple:
    sizes = ("model.n_layers", "model.d_model")
    return (*run.seeds, *(get(run.record["config"], name) for name in sizes))


def _seeds_text(run: EvaluatedRun) -> str:
    return " and ".join(f"{n}={v}" for n, v in zip(SEEDS, run.seeds, strict=True)) + " and size"


def _check_comparable(pair: RunPair, switch: str) -> None:
    baseline, variant = (run.record["config"] for run in pair)
    changed = differences(baseline, variant, identity_only=True)
    others = [
        f"{key} ({get(baseline, key)!r}, {get(variant, key)!r})"
        for key in keys_outside(changed, switch)
    ]
    for name in ("fingerprint", "val_fingerprint"):
        if pair.baseline.record["data"][name] != pair.variant.record["data"][name]:
            others.append(f"the data's {name}")
    if others:
        raise InputError(
            f"--baseline={pair.baseline.path} and --variant={pair.variant.path} differ in more "
            f"than {switch}: {', '.join(others)}; use --allow_differences to compare them anyway"
        )
    if not changed:
        raise InputError(
            f"--baseline={pair.baseline.path} and --variant={pair.variant.path} have the same "
            f"config, {switch} included; name the studied key or group by --switch"
        )


def paired_difference(pairs: list[RunPair]) -> dict:
    """Computes variant minus baseline in held-out loss, nats per token, paired by seed.

    Returns:
      {"mean", "low", "high", "p", "n"}: 95 % interval and two-sided p of Student's t over n pairs;
      None for a single pair, whose noise is unknown.
    """
    d = np.array([v.scores["val_loss"] - b.scores["val_loss"] for b, v in pairs])
    result = {"mean": float(d.mean()), "low": None, "high": None, "p": None, "n": len(d)}
    if len(d) > 1:
        from scipy import stats

        se = d.std(ddof=1) / np.sqrt(len(d))
        half = stats.t.ppf(0.975, len(d) - 1) * se
        p = 2 * stats.t.sf(abs(d.mean()) / max(se, 1e-300), len(d) - 1)
        result |= {"low": float(d.mean() - half), "high": float(d.mean() + half), "p": float(p)}
    return result
