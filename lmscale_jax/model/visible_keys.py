"""Counts the keys that a query attends to: those that windows and document masks leave."""

import numpy as np

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.config.key import Modes
from lmscale_jax.data import documents
from lmscale_jax.model.skip_connections import attention_windows, full_window_blocks

# config -> distribution of the ages of tokens in their documents; None: documents do not matter,
# or are not prepared yet.
AGES = Modes("model.mask", {"causal": lambda config: None, "document": documents.token_ages})


def mean_visible(config) -> float:
    """Returns the keys that a query attends to, the mean over a run.

    The mean is over the positions of a window of data.seq_len tokens, over the blocks with
    attention, and over the steps in which attention windows grow. With model.mask="document" it is
    the expectation for windows that begin anywhere in the training tokens; while these are not
    prepared, documents do not count.

    Args:
      config: resolved.
    """
    model, length = config.model, config.data.seq_len
    ages = AGES[model.mask](config)
    # Entry m: of the last m keys, how many are in the query's document.
    seen = np.arange(length + 1) if ages is None else np.concatenate([[0.0], np.cumsum(ages)])
    sums = np.cumsum(seen)
    full_blocks = full_window_blocks(model)
    if full_blocks is None:
        return float(sums[-1] / length)
    steps = np.arange(config.train.steps if model.window_growth else 1, dtype=np.float32)
    full, half = attention_windows(config, steps if model.window_growth else None)
    means = [float(np.mean(_window_sums(sums, w, model.window_block))) for w in (full, half)]
    attending = attention_blocks(model)
    share = len(set(full_blocks).intersection(attending)) / len(attending)
    return (share * means[0] + (1 - share) * means[1]) / length


def _window_sums(sums: np.ndarray, window, block: int) -> np.ndarray:
    """Sums the visible keys over the queries of a sequence, for windows of some units.

    A query sees its own unit as far as itself, and window - 1 units before it.

    Args:
      sums: [length + 1], entry n for the first n queries of a sequence without windows.
      window: units, a number or an array.
      block: tokens of a unit.
    """
    length = len(sums) - 1
    # The first queries see all that is before them; those of every later unit see alike.
    reach = np.minimum(length, window * block)
    before = np.maximum(0, reach - block)
    units, rest = np.divmod(length - reach, block)
    in_unit = sums[reach] - sums[before]
    return sums[reach] + units * in_unit + sums[before + rest] - sums[before]


def describe_visible(config) -> str:
    """Describes the mean in words: the number, and over what it is taken."""
    parts = [f"{mean_visible(config):,.1f} of {(config.data.seq_len + 1) / 2:,.1f} keys a query"]
    if config.model.window_growth:
        parts.append("mean over the steps in which windows grow")
    if config.model.mask == "document":
        unprepared = AGES[config.model.mask](config) is None
        parts.append(
            "documents not counted: the data is not prepared yet"
            if unprepared
            else "expected from the documents of the training tokens"
        )
    return "; ".join(parts)
