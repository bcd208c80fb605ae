"""Opens several prepared directories as one data set, each with a weight."""

import dataclasses
import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from lmscale_jax.data.shards import SIDES, Shards
from lmscale_jax.data.shares import MixturePattern
from lmscale_jax.errors import InputError
from lmscale_jax.files import comma_separated, user_path


def parse_parts(text: str) -> list[tuple[Path, Fraction]]:
    """Parses "web=3,code=1" to [(directory, weight)]; a weight left out is 1.

    Weights are whole or decimal numbers, taken as they are written.

    Raises:
        InputError: a weight is not a positive number, there are fewer than two parts, or the
            weights have more digits than an exact order can keep.
    """
    parsed = []
    for item in comma_separated(text, _is_part):
        name, equals, weight = item.strip().rpartition("=")
        name, weight = (name, weight) if equals else (weight, "1")
        try:
            value = Fraction(weight if 0 < float(weight) < float("inf") else 0)
        except ValueError:
            value = Fraction(0)
        if not name or not value:
            raise InputError(
                f"data.path={text}: {item.strip()!r} is no directory with a positive weight; "
                f"use for example 'shards/web=3,shards/code=1'"
            )
        parsed.append((user_path(name), value))
    if len(parsed) < 2:
        raise InputError(
            f"data.path={text}: a mixture has two parts or more; use data.source='bin' for one"
        )
    try:
        MixturePattern([weight for _, weight in parsed])
    except ValueError as error:
        raise InputError(
            f"data.path={text}: {error}, which is too fine for exact shares; use weights with "
            f"fewer digits, such as 3 and 0.25"
        ) from None
    return parsed


def _is_part(item: str) -> bool:
    name, equals, weight = item.rpartition("=")
    return user_path(name if equals and "," not in weight else item).is_dir()


def open_mixture(text: str, open_part: Callable):
    """Opens all parts of a mixture as one `Prepared`.

    Training shards keep their weights. Validation tokens are those of all parts, one part after the
    other; weights do not change them.

    Args:
        text: data.path, as `parts` reads it.
        open_part: opens a prepared directory.

    Raises:
        InputError: a part cannot be opened, or has another tokenizer than the first.
    """
    weighted = parse_parts(text)
    opened = [open_part(directory) for directory, _ in weighted]
    first = opened[0]
    for (directory, _), part in zip(weighted, opened, strict=True):
        if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise InputError(
                f"data.path={text}: {directory} has another tokenizer than {weighted[0][0]}; "
                f"prepare both with the same one, for example by data.tokenizer='hf'"
            )
    weights = [weight for _, weight in weighted]
    splits = {side: _join_split(side, opened, weights) for side in SIDES}
    joined = {
        side: Shards([p for part in opened for p in getattr(part, side).paths], first.vocab_size)
        for side in SIDES
    }
    directories = [str(directory) for directory, _ in weighted]
    manifest = first.manifest | {"splits": splits, "mixture": directories}
    mixture = tuple(zip([part.train for part in opened], weights, strict=True))
    return dataclasses.replace(
        first, train=joined["train"], val=joined["val"], manifest=manifest, mixture=mixture
    )


def _join_split(side: str, opened: list, weights: list[Fraction]) -> dict:
    """Sums what the manifests say of one side; the training fingerprint covers the weights too."""
    splits = [part.manifest["splits"][side] for part in opened]
    text = " ".join(
        f"{split['fingerprint']} {float(weight) if side == 'train' else ''}"
        for split, weight in zip(splits, weights, strict=True)
    )
    totals = {
        name: sum(split[name] for split in splits) for name in ("tokens", "documents", "bytes")
    }
    return totals | {"fingerprint": hashlib.sha256(text.encode()).hexdigest()}
