"""Runs that branch off another one's checkpoint: which they may be, and what they share."""

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

# What a branch may have of its own: how long it is, its rates from there on, and what it reports.
OWN = (
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
OWN_GROUPS = ("schedule", "log")
# But not what decides which arrays a checkpoint holds.
STATE = ("log.spectral_every",)


def find_parent(config) -> dict | None:
    """The parent of a `derived` config as run.json names it, or None where there is none.

    {"workdir", "name", "config_hash", "step", "data_fingerprint"}. Raises InputError where it is no
    run, has no such checkpoint, or would not have come to the same state under this config.
    """
    workdir, step = Path(config.train.parent), config.train.parent_step
    if not config.train.parent:
        return None
    try:
        record = json.loads((workdir / "run.json").read_text())
        parent = ConfigDict(record["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"config.train.parent={str(workdir)!r} holds no run.json; the --workdir of a run would "
            f"work"
        ) from None
    saved = Checkpoints(workdir).steps()
    if step not in saved:
        work = f"{saved[-1]} would work" if saved else "it has none; train it first"
        raise InputError(
            f"config.train.parent_step={step} is no checkpoint of {workdir}, which has "
            f"{saved}; {work} (checkpoint.keep_every keeps more)"
        )
    if step >= config.train.steps:
        raise InputError(
            f"config.train.steps={config.train.steps} counts from the beginning of the parent and "
            f"must be above train.parent_step={step}; {2 * step} would work"
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
    """All that decides what was trained must be the same, durations in steps."""
    for path in differences(parent.to_dict(), config.to_dict(), identity_only=True):
        if path in OWN or (path.split(".")[0] in OWN_GROUPS and path not in STATE):
            continue
        raise InputError(
            f"config.{path}={get(config, path)!r} differs from the parent's: it must be "
            f"{_value(parent, path)!r} as in {workdir}; a branch may change schedule.* and "
            f"train.steps"
        )
    lengths, theirs = steps_of(config), steps_of(parent)
    for path, key in keys():
        if not key.duration or path in OWN or path.split(".")[0] in OWN_GROUPS:
            continue
        here, there = lengths[path], theirs[path]
        if here != there and not _unused(config, key):
            raise InputError(
                f"config.{path}={get(config, path)!r} is {here} steps here and {there} in the "
                f"parent, which ran for another number of steps; name it in steps in both, as "
                f"'{there}'"
            )


def _check_rates(config, parent, step: int) -> None:
    """The schedule up to the branch must be the one that the parent followed."""
    steps = np.arange(step)
    both = in_steps(config), in_steps(parent)
    ours, theirs = (np.atleast_1d(schedules.make_schedule(c, np)(steps)) for c in both)
    wrong = np.flatnonzero(np.abs(ours - theirs) > 1e-6)
    if len(wrong):
        at, schedule = int(wrong[0]), config.schedule
        raise InputError(
            f"config.schedule.name={schedule.name!r} with warmup={schedule.warmup!r} has another "
            f"rate at step {at} ({ours[at]:.4g} of the peak) than the parent had "
            f"({theirs[at]:.4g}), before train.parent_step={step}; name='wsd' with "
            f"warmup='{both[1].schedule.warmup}' and "
            f"cooldown='{config.train.steps - step}' would work off a parent still at its peak"
        )


def branch_costs(config, flops_per_token: float) -> dict[str, float]:
    """Tokens and FLOPs of a resolved config's run, and which of them were spent by its parent."""
    each = tokens_per_step(config)
    shared, total = config.train.parent_step * each, config.train.steps * each
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
