"""Divides documents into training and validation sides, each document once."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.data import sources


def split_documents(data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    """Yields (side, text) for every document once, duplicates dropped.

    With data.split=hash, a document's side depends on its own content alone, neither on order nor
    on other documents. With tail, the last data.val_fraction of the characters are for validation,
    and the document across that point is divided.

    Args:
        data_cfg: the config group `data`.
        n_characters: characters of all unique documents; decides where the tail begins.
    """
    return SPLITS[data_cfg.split].divide(unique_documents(data_cfg), data_cfg, n_characters)


def _by_hash(texts: Iterator[str], data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    for text in texts:
        yield side_of(text, data_cfg), text


def _by_tail(texts: Iterator[str], data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    # This form rounds as nanoGPT's int(n * 0.9) does.
    before_tail = int(n_characters * (1 - data_cfg.val_fraction))
    for text in texts:
        if head := text[: max(0, before_tail)]:
            yield "train", head
        if tail := text[len(head) :]:
            yield "val", tail
        before_tail -= len(text)


class Split(NamedTuple):
    """One choice of data.split: how documents become training and validation.

    Attributes:
      divide: (texts, data_cfg, characters of all texts) -> (side, text) of each.
      by_content: a document's side depends on its own content alone.
      remedy: (data_cfg) -> advice for an error where one side stays empty.
    """

    divide: Callable
    by_content: bool
    remedy: Callable


def _hash_remedy(data_cfg) -> str:
    cuts_files = "document" in sources.SOURCES[data_cfg.source].keys
    whole_files = cuts_files and data_cfg.document == "file"
    return "set data.split=tail" + (" or data.document=paragraph" if whole_files else "")


SPLITS = Modes(
    "data.split",
    {
        "hash": Split(_by_hash, by_content=True, remedy=_hash_remedy),
        "tail": Split(
            _by_tail,
            by_content=False,
            remedy=lambda data_cfg: "use more text or set data.val_fraction=0.1",
        ),
    },
)


def side_of(text: str, data_cfg) -> str:
    """Returns the side of a document by its hash, "train" or "val"."""
    fraction = int.from_bytes(_digest(text)[:8], "big") / 2**64  # in [0, 1)
    return "val" if fraction < data_cfg.val_fraction else "train"


def unique_documents(
    data_cfg, counts: Counter | None = None, on_skip: Callable[[Path], object] = lambda path: None
) -> Iterator[str]:
    """Yields documents without exact duplicates; counts those in `counts["duplicates"]`."""
    digests = set()
    for text in sources.documents(data_cfg, on_skip):
        digest = _digest(text)
        if digest not in digests:
            digests.add(digest)
            yield text
        elif counts is not None:
            counts["duplicates"] += 1


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
