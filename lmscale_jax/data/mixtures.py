"""Several prepared directories as one source, each with a weight."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from lmscale_jax.data.manifest import SIDES
from lmscale_jax.data.shards import Shards
from lmscale_jax.errors import InputError


def parts(text: str) -> list[tuple[Path, float]]:
    """ "web=3,code=1" as [(directory, weight)]; a weight left out is 1.

    Raises:
        InputError: a weight is no positive number, or there are fewer than two parts.
    """
    found = []
    for item in text.split(","):
        name, equals, weight = item.strip().rpartition("=")
        name, weight = (name, weight) if equals else (weight, "1")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise InputError(
                f"data.path={text}: {item.strip()!r} is no directory with a positive weight; "
                f"'shards/web=3,shards/code=1' would work"
            )
        found.append((Path(name).expanduser(), value))
    if len(found) < 2:
        raise InputError(
            f"data.path={text}: a mixture has two parts or more; data.source='bin' takes one"
        )
    return found


def open_mixture(text: str, open_one: Callable):
    """The `Prepared` of all parts: training shards with weights, and validation tokens of all parts
    one after the other, however they are weighted.

    Args:
        text: of data.path, as `parts` reads it.
        open_one: opens a prepared directory.

    Raises:
        InputError: a part cannot be opened, or has another tokenizer than the first.
    """
    named = parts(text)
    opened = [open_one(directory) for directory, _ in named]
    first = opened[0]
    for (directory, _), one in zip(named, opened, strict=True):
        if one.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise InputError(
                f"data.path={text}: {directory} has another tokenizer than {named[0][0]}; prepare "
                f"both with one, as data.tokenizer='hf' names it"
            )
    weights = [weight for _, weight in named]
    splits = {}
    for side in SIDES:
        sides = [one.manifest["splits"][side] for one in opened]
        said = " ".join(
            f"{one['fingerprint']} {weight if side == 'train' else ''}"
            for one, weight in zip(sides, weights, strict=True)
        )
        splits[side] = {
            name: sum(one[name] for one in sides) for name in ("tokens", "documents", "bytes")
        } | {"fingerprint": hashlib.sha256(said.encode()).hexdigest()}
    whole = {
        side: Shards([p for one in opened for p in getattr(one, side).paths], first.vocab_size)
        for side in SIDES
    }
    manifest = first.manifest | {"splits": splits, "mixture": [str(d) for d, _ in named]}
    mixture = tuple(zip([one.train for one in opened], weights, strict=True))
    return dataclasses.replace(
        first, train=whole["train"], val=whole["val"], manifest=manifest, mixture=mixture
    )
