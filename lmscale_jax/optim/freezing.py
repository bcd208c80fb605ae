"""Which blocks learn from which step on. Imports no JAX: configs are checked without it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmscale_jax.derived import block_numbers, duration, total_steps
from lmscale_jax.errors import InputError
from lmscale_jax.modes import Modes

NEVER = np.iinfo(np.int32).max

# (number of blocks, generator) -> the blocks in the order in which they begin to learn.
ORDERS = Modes(
    "freeze.order",
    {
        "input": lambda n, chance: np.arange(n),
        "output": lambda n, chance: np.arange(n)[::-1],
        "random": lambda n, chance: chance.permutation(n),
    },
)


class Freezing(NamedTuple):
    """A rule of what is frozen.

    Attributes:
      thaw_steps: (config, generator) -> [layers] int32, the step from which each block learns,
        NEVER if none; None where all learn from the first.
      check: raises InputError where a config's other keys do not go with it.
      draws: the frozen blocks are drawn.
    """

    thaw_steps: Callable
    check: Callable = lambda config: None
    draws: bool = False


def thaw_steps(config) -> np.ndarray | None:
    """[layers] int32, the step from which each block learns, NEVER if none; None: all from 0."""
    chance = np.random.default_rng(config.freeze.seed)
    return FREEZING[config.freeze.mode].thaw_steps(config, chance)


def _without(config, frozen) -> np.ndarray:
    begins = np.zeros(config.model.n_layers, np.int32)
    begins[list(frozen)] = NEVER
    return begins


def _named(config, chance) -> np.ndarray:
    return _without(config, block_numbers(config.freeze.blocks))


def _drawn_of_all(config, chance) -> np.ndarray:
    n = config.model.n_layers
    return _without(config, chance.choice(n, config.freeze.count, replace=False))


def _drawn_near_input(config, chance) -> np.ndarray:
    near = _near_input(config)
    return _without(config, chance.choice(near, config.freeze.count, replace=False))


def _one_by_one(config, chance) -> np.ndarray:
    freeze, n = config.freeze, config.model.n_layers
    begins = np.zeros(n, np.int32)
    begins[ORDERS[freeze.order](n, chance)] = np.arange(n) * duration(freeze.every, config)
    return begins


def _near_input(config) -> int:
    return max(1, round(config.model.n_layers * config.freeze.near_input))


def _check_named(config) -> None:
    freeze, n = config.freeze, config.model.n_layers
    try:
        numbers = block_numbers(freeze.blocks)
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= b < n for b in numbers):
        raise InputError(
            f"config.freeze.blocks={freeze.blocks!r} must name different blocks from 0 to "
            f"{n - 1}; '0' would work"
        )


def _check_count(config, candidates: int) -> None:
    if config.freeze.count > candidates:
        raise InputError(
            f"config.freeze.count={config.freeze.count} is more than the {candidates} block(s) to "
            f"draw from; {candidates} would work"
        )


def _check_one_by_one(config) -> None:
    freeze, n = config.freeze, config.model.n_layers
    last = (n - 1) * duration(freeze.every, config)
    if last >= total_steps(config):
        raise InputError(
            f"config.freeze.every={freeze.every!r} lets the last of {n} blocks begin at step "
            f"{last} of {total_steps(config)}; '{(total_steps(config) - 1) // n}' would work"
        )


FREEZING = Modes(
    "freeze.mode",
    {
        "none": Freezing(lambda config, chance: None),
        "fixed": Freezing(_named, _check_named),
        "random": Freezing(
            _drawn_of_all, lambda config: _check_count(config, config.model.n_layers), draws=True
        ),
        "random_near_input": Freezing(
            _drawn_near_input, lambda config: _check_count(config, _near_input(config)), draws=True
        ),
        "unfreeze": Freezing(_one_by_one, _check_one_by_one),
    },
)
