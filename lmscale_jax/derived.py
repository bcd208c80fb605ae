"""What follows from a config alone: durations in steps, and which blocks it means."""

import re

SCALES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|(?:([kmbt]?)\s*(steps?|tokens?))?)")


def duration(text: str | int, config) -> int:
    """A duration ("200", "5%", "50M tokens") in whole optimizer steps, rounded up.

    What is no text is in steps already, and may be traced.
    """
    if not isinstance(text, str):
        return text
    number, percent, scale, unit = DURATION.fullmatch(text.strip().lower()).groups()
    if percent:
        amount = float(number) / 100 * total_steps(config)
    else:
        amount = float(number) * SCALES[scale or ""]
        if unit and unit.startswith("token"):
            amount /= tokens_per_step(config)
    return int(-(-amount // 1))


def tokens_per_step(config) -> int:
    return config.train.batch_size * config.data.seq_len


def total_steps(config) -> int:
    return config.train.steps or int(-(-config.train.tokens // tokens_per_step(config)))


def mur_layers(config) -> range:
    """The blocks that mur.* acts on. A fraction v of L blocks is round(v L), half to even."""
    mur, n = config.mur, config.model.n_layers
    first = mur.first_block if mur.first_block >= 0 else min(n - 1, round(n * mur.start))
    stop = mur.last_block + 1 if mur.last_block >= 0 else round(n * mur.end)
    return range(first, min(n, max(first + 1, stop)))


def block_numbers(text: str) -> list[int]:
    """ "0,3" as [0, 3]. Raises ValueError."""
    return [int(part) for part in text.split(",")]
