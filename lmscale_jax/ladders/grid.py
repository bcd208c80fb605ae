"""Expands a ladder's config into cells: the runs to train, with exact parameter and FLOP counts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.durations import in_steps, steps_of, tokens_per_step
from lmscale_jax.config.key import Modes
from lmscale_jax.config.keys import get
from lmscale_jax.config.ladder_keys import FREE, LADDER
from lmscale_jax.config.optim_keys import SCHEDULE
from lmscale_jax.config.resolve import (
    apply_overrides,
    check_keys,
    derived,
    differences,
    fingerprint,
    validate,
)
from lmscale_jax.errors import InputError
from lmscale_jax.ladders.rungs import SIZES, TOKEN_RULES, arm_shape, measure_size, token_budget
from lmscale_jax.model import sizes
from lmscale_jax.optim import schedules

ANCHOR, HELD_OUT, TRUNK = "anchor", "held_out", "trunk"
SHAPE = ("n_layers", "d_model", "n_heads", "head_dim", "n_kv_heads", "d_ff")
# The name in config.tune that stands for every arm.
ALL_ARMS = "all"
# Fraction of a run's steps before its cooldown. Branches leave a shared trunk there.
STABLE_FRACTION = 0.8


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a ladder.

    Attributes:
      id: hash of the resolved config without keys of machine and logging; names the run directory.
      arm: name in config.arms.
      role: ANCHOR, HELD_OUT or TRUNK.
      seed: number added to both seeds of the ladder's `run`.
      size, budget: the rung's, as the ladder's config states them.
      tune: {dotted key: value} from config.tune.
      shape: {key of config.model: value}, resolved, for the keys in SHAPE.
      counts: parameter counts, as in run.json.
      tokens, flops_per_token: of the whole run, including the part that its trunk trained.
      needs: id of the trunk that the run branches off, or "".
      overrides: {dotted key: value} of every key that differs from the ladder's `run`.
    """

    id: str
    arm: str
    role: str
    seed: int
    size: float
    budget: float
    tune: dict
    shape: dict
    counts: dict
    tokens: int
    flops_per_token: float
    needs: str
    overrides: dict

    @property
    def flops(self) -> float:
        """Returns the training FLOPs of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def label(self) -> str:
        """Describes the cell to a reader: arm, size, budget, tuned values, seed."""
        tuned = "".join(f" {k.rpartition('.')[2]}={v:g}" for k, v in self.tune.items())
        rung = f"{short_count(self.size)} x {short_count(self.budget)}"
        return f"{self.arm} {rung}{tuned} seed {self.seed}"


def short_count(number: float) -> str:
    """Formats a number with a suffix: 1.2e6 as "1.2M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if scale <= abs(number) < 1e15:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def check_ladder(ladder: ConfigDict) -> None:
    """Raises InputError where a ladder's config cannot lead to a fair comparison or a forecast."""
    for name in FREE:
        if not isinstance(ladder.get(name), ConfigDict):
            raise InputError(
                f"config.{name} is missing; start from "
                f"lmscale_jax.configs.laddering.get_config(run)"
            )
    fixed = {k: v for k, v in ladder.items() if k not in FREE}
    check_keys(ConfigDict(fixed), LADDER)
    validate(ladder.run)
    _check_arms(ladder)
    _check_rungs(ladder)
    _check_numbers("tokens.amounts", ladder.tokens.amounts)
    if TRUNKS[ladder.tokens.trunk].branches and schedules.cooldown_steps(ladder.run) is None:
        raise InputError(
            f"config.tokens.trunk='shared' with run.schedule.name={ladder.run.schedule.name!r}: "
            f"a branch needs a trunk at constant learning rate; use 'wsd'"
        )


def _check_arms(ladder) -> None:
    arms = list(ladder.arms)
    if not arms or ladder.baseline not in arms:
        example = arms[0] if arms else "gelu, with config.arms.gelu = {}"
        raise InputError(
            f"config.baseline={ladder.baseline!r} is not an arm ({', '.join(arms) or 'none'}); "
            f"use {example}"
        )
    switch = tuple(s for s in ladder.switch if s)
    for arm in arms:
        for key in flat_overrides(ladder.arms[arm]):
            if not any(key == s or key.startswith(f"{s}.") for s in switch):
                raise InputError(
                    f"config.arms.{arm} sets {key}, so the arms differ in more than config.switch="
                    f"{switch}; use switch={(*switch, key)}, or set config.run.{key} for all arms"
                )
    for name in ladder.tune:
        if name not in (*arms, ALL_ARMS):
            raise InputError(
                f"config.tune.{name} is neither an arm ({', '.join(arms)}) nor {ALL_ARMS!r}; "
                f"use config.tune.{ALL_ARMS}.{name} to try it in every arm"
            )
    groups = [(f"tune.{name}", flat_overrides(ladder.tune[name])) for name in ladder.tune]
    groups += [("per_rung", flat_overrides(ladder.per_rung))]
    groups += [(f"arms.{arm}", flat_overrides(ladder.arms[arm])) for arm in arms]
    for where, settings in groups:
        for key in settings:
            if key.startswith(("data.", "eval.", "train.")) or key == "seed":
                raise InputError(
                    f"config.{where} sets {key}, which must be equal in all runs (the ladder sets "
                    f"tokens and seeds itself); use config.run.{key}"
                )


def _check_rungs(ladder) -> None:
    rungs, anchors = ladder.rungs, ladder.rungs.sizes
    _check_numbers("rungs.sizes", anchors)
    if rungs.held_out and rungs.held_out <= max(anchors):
        raise InputError(
            f"config.rungs.held_out={rungs.held_out:g} is not beyond the anchors, which reach "
            f"{max(anchors):g}; use {4 * max(anchors):g}, or 0 for no held-out rung"
        )
    n_rungs = len(anchors) + bool(rungs.held_out)
    for key, values in flat_overrides(ladder.per_rung).items():
        if not isinstance(values, (tuple, list)) or len(values) != n_rungs:
            raise InputError(
                f"config.per_rung.{key}={values!r} must have one value for each of {n_rungs} "
                f"rungs; use a tuple of {n_rungs}, the held-out rung last"
            )
    for key, values in flat_overrides(ladder.tune).items():
        if not isinstance(values, (tuple, list)) or not values:
            raise InputError(
                f"config.tune.{key}={values!r} must be a tuple of values; use (1e-3, 2e-3)"
            )


def _check_numbers(name: str, values: tuple) -> None:
    numbers = [v for v in values if isinstance(v, (int, float)) and v > 0]
    if not values or len(numbers) < len(values) or list(values) != sorted(set(values)):
        raise InputError(
            f"config.{name}={tuple(values)} must be positive numbers, smallest first; "
            f"use (1e5, 2e5, 4e5)"
        )


def flat_overrides(group, prefix: str = "") -> dict:
    """Flattens nested groups to {dotted key: value}."""
    flattened = {}
    for name, value in group.items():
        if isinstance(value, (ConfigDict, dict)):
            flattened |= flat_overrides(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = value
    return flattened


def make_cells(ladder: ConfigDict, vocab_size: int) -> list[Cell]:
    """Makes all cells: trunks, anchors, held-out rung; the cheapest first within each role.

    Args:
      ladder: as config/ladder_keys.py describes it.
      vocab_size: the tokenizer's.

    Raises InputError where the config is invalid or no shape has a size's parameters.
    """
    check_ladder(ladder)
    cells: dict[str, Cell] = {}
    rungs = [*ladder.rungs.sizes, *([ladder.rungs.held_out] if ladder.rungs.held_out else [])]
    for index, size in enumerate(rungs):
        role = HELD_OUT if index == len(ladder.rungs.sizes) else ANCHOR
        for cell in _rung(ladder, index, size, role, vocab_size):
            other = cells.setdefault(cell.id, cell)
            if other.arm != cell.arm:
                raise InputError(
                    f"config.arms.{other.arm} and config.arms.{cell.arm} are the same run; use "
                    f"another value of a key under config.switch in one of them"
                )
    _check_extrapolation(list(cells.values()))
    order = {TRUNK: 0, ANCHOR: 1, HELD_OUT: 2}
    return sorted(cells.values(), key=lambda c: (order[c.role], c.flops, c.arm, c.seed))


def _check_extrapolation(cells: list[Cell]) -> None:
    anchors = [c.flops for c in cells if c.role == ANCHOR]
    for cell in cells:
        if cell.role == HELD_OUT and cell.flops <= max(anchors):
            raise InputError(
                f"config.rungs.held_out={cell.size:g} with {cell.tokens:,} tokens spends "
                f"{cell.flops:.3g} FLOPs, within the anchors' range, which reaches "
                f"{max(anchors):.3g}; use a larger config.tokens.held_out"
            )


def _rung(ladder, index: int, size: float, role: str, vocab_size: int) -> Iterator[Cell]:
    """Makes the cells of one size."""
    rung_keys = {key: values[index] for key, values in flat_overrides(ladder.per_rung).items()}
    arms = _arms_at(ladder, size, rung_keys, vocab_size)
    values = ladder.tokens.amounts
    if role == HELD_OUT:
        values = (ladder.tokens.held_out or max(values),)
    for arm, sized in arms.items():
        by_arm = TOKEN_RULES[ladder.tokens.rule].by_arm
        reference = sized if by_arm else arms[ladder.baseline]
        tokens = [token_budget(ladder, size, value, reference, vocab_size) for value in values]
        tried = flat_overrides(ladder.tune.get(ALL_ARMS, {})) | flat_overrides(
            ladder.tune.get(arm, {})
        )
        for combination in itertools.product(*tried.values()):
            tune = dict(zip(tried, combination, strict=True))
            for seed in range(ladder.seeds):
                make_cell = functools.partial(
                    _make_cell,
                    ladder,
                    sized,
                    arm,
                    size=size,
                    tune=tune,
                    seed=seed,
                    vocab=vocab_size,
                )
                if role == HELD_OUT:
                    yield from _separate(ladder, make_cell, tokens, values, HELD_OUT)
                else:
                    yield from TRUNKS[ladder.tokens.trunk].cells(ladder, make_cell, tokens, values)


def _separate(ladder, make_cell, tokens: list[float], values, role: str = ANCHOR) -> Iterator[Cell]:
    """Makes a separate run for each budget."""
    for value, n_tokens in zip(values, tokens, strict=True):
        changes = {"train.steps": _steps(ladder, n_tokens)}
        yield make_cell(role=role, budget=value, changes=changes)


def _arms_at(ladder, size: float, rung_keys: dict, vocab_size: int) -> dict[str, ConfigDict]:
    """Returns {arm: unresolved config}; all arms have the baseline's depth, width and heads."""
    rungs = ladder.rungs
    names = [ladder.baseline, *(a for a in ladder.arms if a != ladder.baseline)]
    at = {
        name: apply_overrides(ladder.run, flat_overrides(ladder.arms[name]) | rung_keys)
        for name in names
    }
    base, solve = at[ladder.baseline], SIZES[rungs.by].solve
    if solve is None:
        at = {name: sizes.at_size(config, rungs.by, int(size)) for name, config in at.items()}
    else:
        shape = solve(ladder, base, size, vocab_size)
        at = {name: arm_shape(config, base, shape, vocab_size) for name, config in at.items()}
    if sizes.MEASURES[rungs.match]:
        target = measure_size(at[ladder.baseline], rungs.match, vocab_size)
        for name in names[1:]:
            if measure_size(at[name], rungs.match, vocab_size) != target:
                at[name] = sizes.match_parameters(at[name], target, rungs.match, vocab_size)
    return at


def _steps(ladder, tokens: float) -> int:
    return max(1, round(tokens / tokens_per_step(ladder.run)))


def _branches(ladder, make_cell, tokens: list[float], values: tuple) -> Iterator[Cell]:
    """Makes a trunk at constant learning rate and a branch for each budget.

    Branches leave at multiples of `quantum` steps, where the trunk keeps its checkpoints.
    """
    ends = [_steps(ladder, n) for n in tokens]
    quantum = max(1, round(STABLE_FRACTION * ends[0] / 4))
    leaves = [max(1, round(STABLE_FRACTION * end / quantum)) * quantum for end in ends]
    shortest = ConfigDict(ladder.run.to_dict())
    shortest.train.steps, shortest.train.tokens = ends[0], 0.0
    warmup = str(steps_of(shortest)["schedule.warmup"])
    trunk = make_cell(
        role=TRUNK,
        budget=values[-1],
        changes={
            "schedule.name": "constant", "schedule.warmup": warmup,
            "schedule.cooldown": SCHEDULE["cooldown"].default,
            "schedule.final": SCHEDULE["final"].default,
            "train.steps": leaves[-1],
            "checkpoint.every": quantum, "checkpoint.keep_every": quantum,
        },
    )  # fmt: skip
    yield trunk
    for value, leave in zip(values, leaves, strict=True):
        end = round(leave / STABLE_FRACTION)
        changes = {
            "schedule.warmup": warmup, "schedule.cooldown": str(end - leave), "train.steps": end,
            "train.parent": trunk.id, "train.parent_step": leave,
        }  # fmt: skip
        yield make_cell(role=ANCHOR, budget=value, changes=changes)


def _make_cell(ladder, sized, arm, *, role, size, budget, tune, seed, changes, vocab) -> Cell:
    run = ladder.run
    seeds = {"seed": run.seed + seed, "data.seed": run.data.seed + seed, "train.tokens": 0.0}
    config = apply_overrides(sized, tune | seeds | changes)
    recorded = derived(config, vocab)
    resolved = in_steps(recorded)
    counts, flops_per_token = sizes.describe_shape(resolved)
    overrides = {path: get(config, path) for path in differences(run.to_dict(), config.to_dict())}
    return Cell(
        id=fingerprint(recorded),
        arm=arm,
        role=role,
        seed=seed,
        size=float(size),
        budget=float(budget),
        tune=dict(tune),
        shape={name: resolved.model[name] for name in SHAPE},
        counts=counts,
        tokens=resolved.train.steps * tokens_per_step(resolved),
        flops_per_token=flops_per_token,
        needs=changes.get("train.parent", ""),
        overrides=overrides,
    )


class Trunk(NamedTuple):
    """How the budgets of one size are trained.

    Attributes:
      cells: (ladder, make_one, tokens, amounts) -> the cells.
      branches: runs leave a shared one before its rate falls.
    """

    cells: Callable
    branches: bool


TRUNKS = Modes("tokens.trunk", {"own": Trunk(_separate, False), "shared": Trunk(_branches, True)})
