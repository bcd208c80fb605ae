"""Documents to token shards: drop duplicates, split, train the tokenizer, encode, write.

The source is streamed several times instead of being held, so memory stays bounded by the largest
file. Each pass sees the same documents in the same order.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.data import overlap, pretrained, sources, tokenizers
from lmscale_jax.data.manifest import SIDES
from lmscale_jax.data.shards import Shards, ShardWriter
from lmscale_jax.errors import InputError
from lmscale_jax.modes import Modes

_BLOCK_CHARACTERS = 2_000_000
# Characters that a BPE is trained on: more change few merges, and the trainer holds their words.
_TRAINED_ON = 300_000_000
_SECONDS_BETWEEN_LINES = 5.0

Log = Callable[[str], object]


def pack(directory: Path, data_cfg, log: Log) -> dict:
    """Writes shards and tokenizer of the source into a directory.

    The directory is empty, or holds what a process left that was killed here; then the work goes on
    from what it had written, and ends with the same bytes.

    Returns:
        What the manifest says of them: `source`, `tokenizer`, and for each side in `splits` its
        documents, tokens, bytes (UTF-8), fingerprint and shards.

    Raises:
        InputError: bad source, or one side of the split would be empty.
    """
    journal = Journal(directory)
    counts = journal.get("source") or journal.put("source", _count(data_cfg, log))
    if journal.get("tokenizer") is None:
        started = time.monotonic()
        tokenizer = TOKENIZER_KINDS[data_cfg.tokenizer].make(data_cfg, counts["characters"])
        tokenizer.save(directory)
        journal.put("tokenizer", tokenizer.name)
        log(f"data: {tokenizer.name} tokenizer ready, {time.monotonic() - started:.1f} s")
    tokenizer = tokenizers.load(directory)
    splits = _encode(directory, data_cfg, tokenizer, counts["characters"], journal, log)
    shared = _overlap(directory, data_cfg, tokenizer, splits, log)
    journal.remove()
    return shared | {
        "source": {
            "name": data_cfg.source,
            "path": data_cfg.path,
            "documents": counts["documents"],
            "duplicates_dropped": counts["duplicates"],
            "files_skipped": counts["skipped"],
        },
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "boundary": tokenizer.boundary,
            "fingerprint": tokenizer.fingerprint,
        },
        "splits": splits,
    }


def _overlap(directory: Path, data_cfg, tokenizer, splits: dict, log: Log) -> dict:
    """{"overlap": what `overlap.measure` found}, or {} where it is not asked for."""
    if not data_cfg.overlap:
        return {}
    train, val = (
        Shards([directory / s["name"] for s in splits[side]["shards"]], tokenizer.vocab_size)
        for side in SIDES
    )
    found = overlap.measure(train, val, data_cfg.overlap, tokenizer.boundary)
    log(
        f"data: of the validation side's {found['runs']:,} runs of {found['length']} tokens "
        f"{found['shared']:.2%} stand in the training side too; they cover {found['tokens']:.2%} "
        f"of its tokens"
    )
    return {"overlap": found}


class Journal:
    """What is done of the work in a directory, so that it can go on after a kill."""

    def __init__(self, directory: Path):
        self._path = directory / "journal.json"
        try:
            self._done = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._done = {}

    def get(self, name: str):
        return self._done.get(name)

    def put(self, name: str, value):
        """Notes a value and returns it. Atomic."""
        self._done[name] = value
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._done), encoding="utf-8")
        os.replace(temporary, self._path)
        return value

    def remove(self) -> None:
        self._path.unlink()


def _count(data_cfg, log: Log) -> dict:
    """{"characters", "documents", "duplicates", "skipped"} of the source. Raises InputError."""
    skipped, counts = [], Counter(characters=0, documents=0, duplicates=0)
    sides, rate = set(), Rate(log)
    for text in _unique_documents(data_cfg, counts, skipped.append):
        counts["characters"] += len(text)
        counts["documents"] += 1
        if SPLITS[data_cfg.split].by_content:
            sides.add(_side(text, data_cfg))
        rate.say(f"read {counts['documents']:,} documents", counts["characters"])
    if not counts["characters"]:
        raise InputError(f"data.path={data_cfg.path}: no text there; name files that hold some")
    log(
        f"data: {data_cfg.source} has {counts['documents']:,} documents, "
        f"{counts['characters']:,} characters; {counts['duplicates']:,} duplicates dropped, "
        f"{len(skipped)} files skipped"
    )
    if not SPLITS[data_cfg.split].by_content:
        sides = {side for side, _ in split_documents(data_cfg, counts["characters"])}
    if set(SIDES) - sides:
        _refuse_split(data_cfg, counts, min(set(SIDES) - sides))
    return dict(counts) | {"skipped": [path.name for path in skipped]}


class Rate:
    """Progress as a line every few seconds: characters a second, and the time left."""

    def __init__(self, log: Log, total: int = 0, done: int = 0):
        self._log, self._total, self._first = log, total, done
        self._begin = time.monotonic()
        self._next = self._begin + _SECONDS_BETWEEN_LINES

    def say(self, what: str, done: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_LINES
        rate = (done - self._first) / (now - self._begin)
        line = f"data: {what}, {rate / 1e6:.1f} million characters a second"
        if self._total and rate:
            line += f", {(self._total - done) / rate:.0f} s left"
        self._log(line)


def char_tokenizer(data_cfg) -> tokenizers.Chars:
    """The characters of the whole source, both sides, as nanoGPT takes them."""
    characters = set()
    for text in sources.documents(data_cfg):
        characters.update(text)
    return tokenizers.Chars(characters)


def split_documents(data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    """Yields (side, text) for every document once, duplicates dropped.

    By hash, a document's side depends on its own content alone: not on order, nor on what else is
    in the source. By tail, the one document that lies across the cut is cut in two.

    Args:
        data_cfg: the config group `data`.
        n_characters: of all unique documents together; decides where the tail begins.
    """
    return SPLITS[data_cfg.split].divide(_unique_documents(data_cfg), data_cfg, n_characters)


def _by_hash(texts: Iterator[str], data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    for text in texts:
        yield _side(text, data_cfg), text


def _by_tail(texts: Iterator[str], data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    # In this form 0.1 gives nanoGPT's int(n * 0.9), rounded as it rounds.
    before_tail = int(n_characters * (1 - data_cfg.val_fraction))
    for text in texts:
        if head := text[: max(0, before_tail)]:
            yield "train", head
        if tail := text[len(head) :]:
            yield "val", tail
        before_tail -= len(text)


class Split(NamedTuple):
    """How documents are divided into training and validation.

    Attributes:
      divide: (texts, data_cfg, characters of all texts) -> (side, text) of each.
      by_content: a document's side depends on its own content alone.
      remedy: (data_cfg) -> what helps where one side stays empty.
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
            remedy=lambda data_cfg: "give more text or set data.val_fraction=0.1",
        ),
    },
)


def _side(text: str, data_cfg) -> str:
    place = int.from_bytes(_digest(text)[:8], "big") / 2**64
    return "val" if place < data_cfg.val_fraction else "train"


def _unique_documents(
    data_cfg, counts: Counter | None = None, on_skip: Callable[[Path], object] = lambda path: None
) -> Iterator[str]:
    """Documents without exact repetitions, which are counted in `counts["duplicates"]`."""
    seen = set()
    for text in sources.documents(data_cfg, on_skip):
        digest = _digest(text)
        if digest not in seen:
            seen.add(digest)
            yield text
        elif counts is not None:
            counts["duplicates"] += 1


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _refuse_split(data_cfg, counts: Counter, empty: str) -> None:
    remedy = SPLITS[data_cfg.split].remedy(data_cfg)
    raise InputError(
        f"data.split={data_cfg.split}: nothing falls on the {empty} side (documents: "
        f"{counts['documents']}, characters: {counts['characters']}); {remedy}"
    )


def _trained(data_cfg, n_characters: int) -> tokenizers.Tokenizer:
    split = split_documents(data_cfg, n_characters)
    train = (text for side, text in split if side == "train")
    texts = _first((p for text in train for p in tokenizers.pieces(text)), _TRAINED_ON)
    return tokenizers.BytePairs.train(texts, data_cfg.vocab_size)


def _published(data_cfg) -> tokenizers.Tokenizer:
    return pretrained.load(Path(data_cfg.tokenizer_path).expanduser())


def _published_files(data_cfg) -> list[Path]:
    files = sorted(Path(data_cfg.tokenizer_path).expanduser().glob("*.*"))
    return [path for path in files if path.is_file()]


class TokenizerKind(NamedTuple):
    """A way to a tokenizer.

    Attributes:
      make: (data_cfg, characters of the source) -> the tokenizer.
      vocab_size: data_cfg -> its ids, before anything is prepared.
      keys: of `data` that decide it.
      files: data_cfg -> files that decide it, or None where it has none.
    """

    make: Callable
    vocab_size: Callable
    keys: tuple[str, ...] = ()
    files: Callable = lambda data_cfg: None


TOKENIZER_KINDS = Modes(
    "data.tokenizer",
    {
        "bytes": TokenizerKind(
            lambda data_cfg, n: tokenizers.Bytes(), lambda data_cfg: tokenizers.Bytes.vocab_size
        ),
        "char": TokenizerKind(
            lambda data_cfg, n: char_tokenizer(data_cfg),
            lambda data_cfg: char_tokenizer(data_cfg).vocab_size,
        ),
        "bpe": TokenizerKind(_trained, lambda data_cfg: data_cfg.vocab_size, keys=("vocab_size",)),
        "hf": TokenizerKind(
            lambda data_cfg, n: _published(data_cfg),
            lambda data_cfg: _published(data_cfg).vocab_size,
            files=_published_files,
        ),
    },
)


def _first(texts: Iterator[str], n_characters: int) -> Iterator[str]:
    """Texts up to so many characters, the last one whole."""
    for text in texts:
        if n_characters <= 0:
            return
        n_characters -= len(text)
        yield text


def _encode(
    directory: Path, data_cfg, tokenizer, n_characters: int, journal: Journal, log: Log
) -> dict:
    """Writes the shards of both sides; returns the manifest's `splits`.

    After each block of documents the journal notes how far the shards go. What was written beyond
    that by a process that was killed is cut off, and the blocks it had finished are skipped.
    """
    before = journal.get("blocks") or {"number": 0, "characters": 0, "sides": {}}
    writers, totals = {}, {}
    for side in SIDES:
        noted = before["sides"].get(side, {"tokens": 0, "documents": 0, "bytes": 0})
        writers[side] = ShardWriter(directory, side, tokenizer.vocab_size, data_cfg.shard_tokens)
        writers[side].go_on(noted["tokens"])
        totals[side] = Counter(documents=noted["documents"], bytes=noted["bytes"])
    mark = [] if tokenizer.boundary is None else [tokenizer.boundary]
    done = before["characters"]
    if done:
        log(f"data: going on after {done:,} characters that are encoded already")
    rate = Rate(log, n_characters, done)
    for number, block in enumerate(_blocks(split_documents(data_cfg, n_characters))):
        if number < before["number"]:
            continue
        _write_block(block, tokenizer, mark, writers, totals)
        done += sum(len(text) for _, text in block)
        sides = {side: {"tokens": writers[side].n_tokens} | totals[side] for side in SIDES}
        for writer in writers.values():
            writer.flush()
        journal.put("blocks", {"number": number + 1, "characters": done, "sides": sides})
        rate.say(f"encoded {done / n_characters:.0%}", done)
    splits = {}
    for side, writer in writers.items():
        writer.close()
        splits[side] = dict(totals[side]) | {
            "tokens": writer.n_tokens,
            "fingerprint": writer.fingerprint,
            "shards": writer.shards,
        }
    return splits


def _write_block(block, tokenizer, mark: list[int], writers: dict, totals: dict) -> None:
    """Encodes the documents of a block, many at once, and adds them to the shards of their side."""
    texts, opens = [], []
    for side, document in block:
        for index, text in enumerate(
            tokenizers.pieces(document) if tokenizer.cuttable else [document]
        ):
            texts.append(text)
            opens.append((side, index == 0))
    parts = {side: [] for side in SIDES}
    for ids, (side, first) in zip(tokenizer.encode_batch(texts), opens, strict=True):
        parts[side] += [mark, ids] if first else [ids]
        totals[side]["documents"] += first
    for side, several in parts.items():
        if several:
            tokens = np.concatenate(several).astype(np.int64)
            writers[side].add(tokens)
            totals[side]["bytes"] += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))


def _blocks(split: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The documents in order, in blocks big enough to encode in parallel."""
    block, size = [], 0
    for side, document in split:
        block.append((side, document))
        size += len(document)
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block
