"""From a ladder's config to its cells: every run that is to be trained, exactly counted."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.durations import in_steps, steps_of, tokens_per_step
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
from lmscale_jax.lab import family, sizes
from lmscale_jax.modes import Modes
from lmscale_jax.optim import schedules
from lmscale_jax.study.rungs import SIZES, TOKEN_RULES, shaped, spent, tokens_of

ANCHOR, HELD_OUT, TRUNK = "anchor", "held_out", "trunk"
SHAPE = ("n_layers", "d_model", "n_heads", "head_dim", "n_kv_heads", "d_ff")
# In config.tune, beside the arms.
ALL = "all"
# Share of a run's steps before its cooldown, where branches leave a shared trunk.
STABLE = 0.8


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a ladder.

    Attributes:
      id: hash of its resolved config without keys of machine and logging; its directory's name.
      arm, role, seed: role is ANCHOR, HELD_OUT or TRUNK.
      size, budget: of the rung, as the ladder's config names them.
      tune: {key: value} of config.tune.
      shape: SHAPE of the model, resolved.
      counts: as in run.json.
      tokens, flops_per_token: of the whole run, its trunk's part included.
      needs: id of the trunk it branches off, or "".
      overrides: {dotted key: value}: all that differs from the ladder's `run`.
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
        """Of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def label(self) -> str:
        """For people: arm, size, what was tuned, seed."""
        tuned = "".join(f" {k.rpartition('.')[2]}={v:g}" for k, v in self.tune.items())
        return f"{self.arm} {short(self.size)} x {short(self.budget)}{tuned} seed {self.seed}"


def short(number: float) -> str:
    """1.2e6 as "1.2M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if scale <= abs(number) < 1e15:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def check(ladder: ConfigDict) -> None:
    """Raises InputError where a ladder's config asks for something that cannot be answered."""
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
            f"only a rate that has not begun to fall can be branched off; 'wsd' would work"
        )


def _check_arms(ladder) -> None:
    arms = list(ladder.arms)
    if not arms or ladder.baseline not in arms:
        works = arms[0] if arms else "gelu, with config.arms.gelu = {}"
        raise InputError(
            f"config.baseline={ladder.baseline!r} is no arm ({', '.join(arms) or 'there is none'}"
            f"); {works} would work"
        )
    switch = tuple(s for s in ladder.switch if s)
    for arm in arms:
        for key in flat(ladder.arms[arm]):
            if not any(key == s or key.startswith(f"{s}.") for s in switch):
                raise InputError(
                    f"config.arms.{arm} sets {key}, so the arms differ in more than the switch "
                    f"{switch}; switch={(*switch, key)} would say so, or put it into config.run "
                    f"for all"
                )
    for name in ladder.tune:
        if name not in (*arms, ALL):
            raise InputError(
                f"config.tune.{name} is no arm ({', '.join(arms)}) and not {ALL!r}; "
                f"config.tune.{ALL}.{name} would be tried in every arm"
            )
    groups = [(f"tune.{name}", flat(ladder.tune[name])) for name in ladder.tune]
    groups += [("per_rung", flat(ladder.per_rung))]
    groups += [(f"arms.{arm}", flat(ladder.arms[arm])) for arm in arms]
    for where, cell in groups:
        for key in cell:
            if key.startswith(("data.", "eval.", "train.")) or key == "seed":
                raise InputError(
                    f"config.{where} sets {key}, which must be one for all runs (tokens, held-out "
                    f"text and seeds are the ladder's own); config.run.{key} would work"
                )


def _check_rungs(ladder) -> None:
    rungs, anchors = ladder.rungs, ladder.rungs.sizes
    _check_numbers("rungs.sizes", anchors)
    if rungs.held_out and rungs.held_out <= max(anchors):
        raise InputError(
            f"config.rungs.held_out={rungs.held_out:g} is not beyond the anchors, which reach "
            f"{max(anchors):g}; a forecast goes beyond what was seen: {4 * max(anchors):g} would "
            f"work, or 0 for none"
        )
    values = len(anchors) + bool(rungs.held_out)
    for key, several in flat(ladder.per_rung).items():
        if not isinstance(several, (tuple, list)) or len(several) != values:
            raise InputError(
                f"config.per_rung.{key}={several!r} must have a value for each of {values} rungs, "
                f"the held-out one last"
            )
    for key, several in flat(ladder.tune).items():
        if not isinstance(several, (tuple, list)) or not several:
            raise InputError(
                f"config.tune.{key}={several!r} must be several values; (1e-3, 2e-3) would work"
            )


def _check_numbers(name: str, values: tuple) -> None:
    numbers = [v for v in values if isinstance(v, (int, float)) and v > 0]
    if not values or len(numbers) < len(values) or list(values) != sorted(set(values)):
        raise InputError(
            f"config.{name}={tuple(values)} must be positive numbers, smallest first; "
            f"(1e5, 2e5, 4e5) would work"
        )


def flat(group, prefix: str = "") -> dict:
    """{dotted key: value} of nested groups."""
    found = {}
    for name, value in group.items():
        if isinstance(value, (ConfigDict, dict)):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def make(ladder: ConfigDict, vocab_size: int) -> list[Cell]:
    """All cells, cheapest first within each role.

    Args:
      ladder: as config/ladder_keys.py describes it.
      vocab_size: the tokenizer's.

    Raises InputError where the config is bad or a size cannot be met.
    """
    check(ladder)
    cells: dict[str, Cell] = {}
    rungs = [*ladder.rungs.sizes, *([ladder.rungs.held_out] if ladder.rungs.held_out else [])]
    for index, size in enumerate(rungs):
        beyond = index == len(ladder.rungs.sizes)
        for cell in _rung(ladder, index, size, beyond, vocab_size):
            other = cells.setdefault(cell.id, cell)
            if other.arm != cell.arm:
                raise InputError(
                    f"config.arms.{other.arm} and config.arms.{cell.arm} are the same run; an arm "
                    f"must change something under config.switch"
                )
    _check_beyond(list(cells.values()))
    order = {TRUNK: 0, ANCHOR: 1, HELD_OUT: 2}
    return sorted(cells.values(), key=lambda c: (order[c.role], c.flops, c.arm, c.seed))


def _check_beyond(cells: list[Cell]) -> None:
    anchors = [c.flops for c in cells if c.role == ANCHOR]
    held = [c for c in cells if c.role == HELD_OUT]
    for cell in held:
        if cell.flops <= max(anchors):
            raise InputError(
                f"config.rungs.held_out={cell.size:g} with {cell.tokens:,} tokens spends "
                f"{cell.flops:.3g} FLOPs, within the anchors' range, which reaches "
                f"{max(anchors):.3g}; more tokens.held_out would work"
            )


def _rung(ladder, index: int, size: float, beyond: bool, vocab_size: int) -> Iterator[Cell]:
    """The cells of one size."""
    own = {key: values[index] for key, values in flat(ladder.per_rung).items()}
    arms = _arms_at(ladder, size, own, vocab_size)
    values = ladder.tokens.amounts
    if beyond:
        values = (ladder.tokens.held_out or max(values),)
    for arm, sized in arms.items():
        by_arm = TOKEN_RULES[ladder.tokens.rule].by_arm
        reference = sized if by_arm else arms[ladder.baseline]
        tokens = [tokens_of(ladder, size, value, reference, vocab_size) for value in values]
        tried = flat(ladder.tune.get(ALL, {})) | flat(ladder.tune.get(arm, {}))
        for combination in itertools.product(*tried.values()):
            tune = dict(zip(tried, combination, strict=True))
            for seed in range(ladder.seeds):
                make_one = functools.partial(
                    _cell, ladder, sized, arm, size=size, tune=tune, seed=seed, vocab=vocab_size
                )
                if beyond:
                    yield from _separate(ladder, make_one, tokens, values, HELD_OUT)
                else:
                    yield from TRUNKS[ladder.tokens.trunk].cells(ladder, make_one, tokens, values)


def _separate(ladder, make_one, tokens: list[float], values, role: str = ANCHOR) -> Iterator[Cell]:
    """A run of its own for each budget."""
    for value, n_tokens in zip(values, tokens, strict=True):
        changes = {"train.steps": _steps(ladder, n_tokens)}
        yield make_one(role=role, budget=value, changes=changes)


def _arms_at(ladder, size: float, own: dict, vocab_size: int) -> dict[str, ConfigDict]:
    """{arm: unresolved config of the size}; all have the baseline's depth, width and heads."""
    rungs = ladder.rungs
    names = [ladder.baseline, *(a for a in ladder.arms if a != ladder.baseline)]
    at = {name: apply_overrides(ladder.run, flat(ladder.arms[name]) | own) for name in names}
    base, solve = at[ladder.baseline], SIZES[rungs.by].solve
    if solve is None:
        at = {name: family.resized(config, rungs.by, int(size)) for name, config in at.items()}
    else:
        shape = solve(ladder, base, size, vocab_size)
        at = {name: shaped(config, base, shape, vocab_size) for name, config in at.items()}
    if sizes.MEASURES[rungs.match]:
        target = spent(at[ladder.baseline], rungs.match, vocab_size)
        for name in names[1:]:
            if spent(at[name], rungs.match, vocab_size) != target:
                at[name] = sizes.matched(at[name], target, rungs.match, vocab_size)
    return at


def _steps(ladder, tokens: float) -> int:
    return max(1, round(tokens / tokens_per_step(ladder.run)))


def _branches(ladder, make_one, tokens: list[float], values: tuple) -> Iterator[Cell]:
    """A trunk at constant rate and a branch for each budget, which leave it at multiples of a step
    of which the trunk keeps every checkpoint."""
    ends = [_steps(ladder, n) for n in tokens]
    quantum = max(1, round(STABLE * ends[0] / 4))
    leaves = [max(1, round(STABLE * end / quantum)) * quantum for end in ends]
    shortest = ConfigDict(ladder.run.to_dict())
    shortest.train.steps, shortest.train.tokens = ends[0], 0.0
    warmup = str(steps_of(shortest)["schedule.warmup"])
    trunk = make_one(
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
        end = round(leave / STABLE)
        changes = {
            "schedule.warmup": warmup, "schedule.cooldown": str(end - leave), "train.steps": end,
            "train.parent": trunk.id, "train.parent_step": leave,
        }  # fmt: skip
        yield make_one(role=ANCHOR, budget=value, changes=changes)


def _cell(ladder, sized, arm, *, role, size, budget, tune, seed, changes, vocab) -> Cell:
    run = ladder.run
    seeds = {"seed": run.seed + seed, "data.seed": run.data.seed + seed, "train.tokens": 0.0}
    config = apply_overrides(sized, tune | seeds | changes)
    recorded = derived(config, vocab)
    resolved = in_steps(recorded)
    counts, flops_per_token = sizes.described(resolved)
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
