"""Which blocks learn from which step on."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.blocks import block_numbers
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
      draws: the frozen blocks are drawn.
    """

    thaw_steps: Callable
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
    begins[ORDERS[freeze.order](n, chance)] = np.arange(n) * freeze.every
    return begins


def _near_input(config) -> int:
    return max(1, round(config.model.n_layers * config.freeze.near_input))


FREEZING = Modes(
    "freeze.mode",
    {
        "none": Freezing(lambda config, chance: None),
        "fixed": Freezing(_named),
        "random": Freezing(_drawn_of_all, draws=True),
        "random_near_input": Freezing(_drawn_near_input, draws=True),
        "unfreeze": Freezing(_one_by_one),
    },
)
