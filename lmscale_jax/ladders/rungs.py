"""Derives the shapes of a rung from its size, and the tokens of a run from the amounts."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.key import Modes
from lmscale_jax.config.resolve import resolve
from lmscale_jax.errors import InputError
from lmscale_jax.model import sizes


def arm_shape(config, base, shape: sizes.Shape, vocab_size: int) -> ConfigDict:
    """Gives an arm the baseline's shape, with d_ff as far from its default as the baseline's."""
    default, base_default = (
        resolve(sizes.with_shape(arm, shape._replace(d_ff=0)), vocab_size).model.d_ff
        for arm in (config, base)
    )
    d_ff = round(shape.d_ff * default / base_default)
    return sizes.with_shape(config, shape._replace(d_ff=d_ff))


def _solve_parameters(ladder, config, size: float, vocab_size: int) -> sizes.Shape:
    return _nearest(ladder, config, size, ladder.rungs.by, vocab_size)


def _nearest(ladder, config, n: float, convention: str, vocab_size: int) -> sizes.Shape:
    rungs = ladder.rungs
    return sizes.solve_shape(config, n, convention, rungs.aspect, rungs.head_dim, vocab_size)


def _solve_flops(ladder, config, size: float, vocab_size: int) -> sizes.Shape:
    if not TOKEN_RULES[ladder.tokens.rule].is_ratio or len(ladder.tokens.amounts) > 1:
        raise InputError(
            f"config.rungs.by='flops' takes one ratio of tokens to parameters, not tokens.rule="
            f"{ladder.tokens.rule!r} with {len(ladder.tokens.amounts)} values; 'ratio' with "
            f"(20.0,) would work"
        )
    # C is nearly 6 n d, with d in proportion to n; what else costs FLOPs is found by iteration.
    n = math.sqrt(size / (6 * ladder.tokens.amounts[0]))
    for _ in range(4):
        shape = _nearest(ladder, config, n, "non_embedding", vocab_size)
        each = spent_per_run(sizes.with_shape(config, shape), "flops", vocab_size)
        n *= math.sqrt(size / (each * ladder.tokens.amounts[0] * shape.n))
    return shape


def spent_per_run(config, measure: str, vocab_size: int) -> float:
    counts, flops_per_token = sizes.describe_shape(resolve(config, vocab_size))
    return sizes.MEASURES[measure](counts, flops_per_token)


def token_budget(ladder, size: float, value: float, config, vocab_size: int) -> float:
    return TOKEN_RULES[ladder.tokens.rule].tokens(ladder, size, value, config, vocab_size)


def _by_ratio(ladder, size: float, value: float, config, vocab_size: int) -> float:
    if SIZES[ladder.rungs.by].is_budget:
        return size / spent_per_run(config, "flops", vocab_size)
    return value * spent_per_run(config, "parameters", vocab_size)


def _by_budget(ladder, size: float, value: float, config, vocab_size: int) -> float:
    return value


def _by_flops(ladder, size: float, value: float, config, vocab_size: int) -> float:
    return value / spent_per_run(config, "flops", vocab_size)


class TokenRule(NamedTuple):
    """What tokens.amounts are.

    Attributes:
      tokens: (ladder, size, amount, config, vocab_size) -> tokens of a run.
      by_arm: each arm gets what its own config makes of the amount, not what the baseline's does.
      is_ratio: amounts are ratios to a size's parameters.
    """

    tokens: Callable
    by_arm: bool = False
    is_ratio: bool = False


TOKEN_RULES = Modes(
    "tokens.rule",
    {
        "ratio": TokenRule(_by_ratio, is_ratio=True),
        "budgets": TokenRule(_by_budget),
        "flops": TokenRule(_by_flops, by_arm=True),
    },
)


class Size(NamedTuple):
    """What a rung's size is.

    Attributes:
      solve: (ladder, config, size, vocab_size) -> Shape; None: a dimension of the model itself.
      is_budget: the size is the FLOPs of a run, so that it decides its tokens.
    """

    solve: Callable | None
    is_budget: bool = False


SIZES = Modes(
    "rungs.by",
    {
        "non_embedding": Size(_solve_parameters),
        "total": Size(_solve_parameters),
        "width": Size(None),
        "depth": Size(None),
        "flops": Size(_solve_flops, is_budget=True),
    },
)
