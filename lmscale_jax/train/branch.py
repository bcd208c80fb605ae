"""Checks runs that branch off another run's checkpoint, and splits their costs."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.durations import in_steps, steps_of, tokens_per_step
from lmscale_jax.config.keys import get, keys
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import InputError
from lmscale_jax.optim import schedules
from lmscale_jax.train.checkpoint import Checkpoints

# Keys that a branch may change: its length, its later learning rates and its reports.
BRANCH_KEYS = (
    "train.steps",
    "train.tokens",
    "train.parent",
    "train.parent_step",
    "eval.every",
    "eval.redundancy_every",
    "eval.redundancy_early",
    "eval.redundancy_until",
    "eval.redundancy_tokens",
)
BRANCH_GROUPS = ("schedule", "log")
# Except keys that decide which arrays a checkpoint holds.
STATE_KEYS = ("log.spectral_every",)


def find_parent(config) -> dict | None:
    """Reads the parent of a `derived` config, for run.json; None where there is none.

    Returns {"workdir", "name", "config_hash", "step", "data_fingerprint"}. Raises InputError where
    the parent is no run, has no such checkpoint, or would have another state under this config.
    """
    workdir, step = Path(config.train.parent), config.train.parent_step
    if not config.train.parent:
        return None
    try:
        record = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        parent = ConfigDict(record["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"config.train.parent={str(workdir)!r} holds no run.json; use the --workdir of a run"
        ) from None
    saved = Checkpoints(workdir).steps()
    if step not in saved:
        remedy = f"use {saved[-1]}" if saved else "train it first"
        raise InputError(
            f"config.train.parent_step={step} is no checkpoint of {workdir}, which has "
            f"{saved or 'none'}; {remedy} (checkpoint.keep_every keeps more)"
        )
    if step >= config.train.steps:
        raise InputError(
            f"config.train.steps={config.train.steps} counts from the parent's first step and "
            f"must be above train.parent_step={step}; use {2 * step}"
        )
    _check_same(config, parent, workdir)
    _check_rates(config, parent, step)
    return {
        "workdir": str(workdir),
        "name": record["name"],
        "config_hash": record["config_hash"],
        "step": step,
        "data_fingerprint": record["data"]["fingerprint"],
    }


def _check_same(config, parent, workdir: Path) -> None:
    """Raises InputError where a key that decided the parent's state differs, durations in steps."""
    for path in differences(parent.to_dict(), config.to_dict(), identity_only=True):
        if path in BRANCH_KEYS or (path.split(".")[0] in BRANCH_GROUPS and path not in STATE_KEYS):
            continue
        raise InputError(
            f"config.{path}={get(config, path)!r} differs from the parent's; use "
            f"{_value(parent, path)!r} as in {workdir} (a branch may change schedule.* and "
            f"train.steps)"
        )
    steps, parent_steps = steps_of(config), steps_of(parent)
    for path, key in keys():
        if not key.duration or path in BRANCH_KEYS or path.split(".")[0] in BRANCH_GROUPS:
            continue
        length, parent_length = steps[path], parent_steps[path]
        if length != parent_length and not _unused(config, key):
            raise InputError(
                f"config.{path}={get(config, path)!r} is {length} steps here and {parent_length} "
                f"in the parent, which ran for another number of steps; use steps in both, as "
                f"'{parent_length}'"
            )


def _check_rates(config, parent, step: int) -> None:
    """Raises InputError where the schedule before the branch differs from the parent's."""
    steps = np.arange(step)
    both = in_steps(config), in_steps(parent)
    rates, parent_rates = (np.atleast_1d(schedules.make_schedule(c, np)(steps)) for c in both)
    wrong = np.flatnonzero(np.abs(rates - parent_rates) > 1e-6)
    if len(wrong):
        first, schedule = int(wrong[0]), config.schedule
        remedy = _rates_remedy(both[1], parent_rates, config.train.steps)
        raise InputError(
            f"config.schedule.name={schedule.name!r} with warmup={schedule.warmup!r} has another "
            f"rate at step {first} ({rates[first]:.4g} of the peak) than the parent "
            f"({parent_rates[first]:.4g}), before train.parent_step={step}; {remedy}"
        )


def _rates_remedy(parent, rates: np.ndarray, steps: int) -> str:
    """Says how a branch of `steps` steps goes on from the rates of its parent, if one can."""
    warmup, step = parent.schedule.warmup, len(rates)
    if np.all(rates[warmup:] == 1.0):
        return f"use schedule.name='wsd' with warmup='{warmup}' and cooldown='{steps - step}'"
    return (
        f"the parent has decayed ({parent.schedule.name}), so no schedule goes on from there; use "
        f"train.parent='' with schedule.name='wsd', whose runs can be branched before the cooldown"
    )


def branch_costs(config, flops_per_token: float) -> dict[str, float]:
    """Counts tokens and FLOPs of a resolved config's run, and those that its parent spent."""
    per_step = tokens_per_step(config)
    shared, total = config.train.parent_step * per_step, config.train.steps * per_step
    tokens = {"tokens": total, "tokens_own": total - shared, "tokens_shared": shared}
    flops = {k.replace("tokens", "flops"): flops_per_token * n for k, n in tokens.items()}
    return tokens | {"flops_total": flops.pop("flops")} | flops


def _value(config, path: str):
    try:
        return get(config, path)
    except (KeyError, AttributeError, TypeError):
        return "absent"


def _unused(config, key) -> bool:
    return any(get(config, other) not in allowed for other, allowed in key.when.items())
