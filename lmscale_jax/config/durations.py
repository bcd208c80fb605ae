"""Converts durations of a config from the user's texts to whole optimizer steps.

A user gives a duration as a text: "200" (steps), "5%" (of the run) or "50M tokens". There are two
forms of a config:

- with the user's texts: `resolve.derived`, the identity of a run. run.json records it,
  `resolve.fingerprint` hashes it, and a resumed run or a branch is compared by it.
- with ints in steps: `resolve.resolve`, which applies `in_steps`. Schedules, optimizers, freezing,
  marginal utility, windows and evaluation read this form.

Only `steps_of` parses the texts.
"""

import math
import re
from fractions import Fraction

from ml_collections import ConfigDict

from lmscale_jax.config.keys import get, has, keys

SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|(?:([kmbt]?)\s*(steps?|tokens?))?)")


def steps_of(config) -> dict[str, int]:
    """Converts every duration of a config with texts: {dotted path: optimizer steps}.

    A key that the config lacks is omitted: older runs were recorded without it.
    """
    paths = [path for path, key in keys() if key.duration and has(config, path)]
    return {path: _steps(get(config, path), config) for path in paths}


def in_steps(config) -> ConfigDict:
    """Copies a config with texts and locks it; the copy's durations are ints, optimizer steps."""
    copy = ConfigDict(config.to_dict())
    with copy.ignore_type():
        copy.update_from_flattened_dict(steps_of(config))
    return copy.lock()


def tokens_per_step(config) -> int:
    """Returns the tokens of one optimizer step."""
    return config.train.batch_size * config.data.seq_len


def total_steps(config) -> int:
    """Returns the optimizer steps of the run."""
    return config.train.steps or int(-(-config.train.tokens // tokens_per_step(config)))


def _steps(text: str, config) -> int:
    """Converts one duration into whole optimizer steps, rounded up.

    Fractions, because 7 / 100 * 100 is above 7 in floating point, and would be 8 steps.
    """
    number, percent, scale, unit = DURATION.fullmatch(text.strip().lower()).groups()
    amount = Fraction(number)
    if percent:
        amount *= Fraction(total_steps(config), 100)
    else:
        amount *= SCALES[scale or ""]
        if unit and unit.startswith("token"):
            amount /= tokens_per_step(config)
    return math.ceil(amount)
