"""Selects the blocks of a model that a config names."""


def mur_layers(config) -> range:
    """Returns the blocks that mur.* acts on.

    A fraction v of L blocks is round(v L), half to even.
    """
    mur, n = config.mur, config.model.n_layers
    first = mur.first_block if mur.first_block >= 0 else min(n - 1, round(n * mur.start))
    stop = mur.last_block + 1 if mur.last_block >= 0 else round(n * mur.end)
    return range(first, min(n, max(first + 1, stop)))


def attention_blocks(model) -> tuple[int, ...]:
    """Returns the blocks with attention: all but those of model.attention_skip."""
    skipped = block_numbers(model.attention_skip) if model.attention_skip else []
    return tuple(block for block in range(model.n_layers) if block not in skipped)


def block_numbers(text: str) -> list[int]:
    """Converts "0,3" into [0, 3]. Raises ValueError."""
    return [int(part) for part in text.split(",")]
