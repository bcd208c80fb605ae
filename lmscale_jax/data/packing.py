"""Turns documents into token shards: drops duplicates, splits, trains the tokenizer, encodes.

The source is streamed several times instead of being held, so memory stays bounded by the largest
file. Each pass reads the same documents in the same order.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.data import overlap, pretrained, sources, tokenizers
from lmscale_jax.data.manifest import SIDES
from lmscale_jax.data.shards import Shards, ShardWriter
from lmscale_jax.data.tokenizer_base import Tokenizer
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json, write_json

_BLOCK_CHARACTERS = 2_000_000
# Longer texts change few merges of a BPE, and its trainer holds all their words.
_BPE_TRAINING_CHARACTERS = 300_000_000
_SECONDS_BETWEEN_LINES = 5.0

Log = Callable[[str], object]


def pack(directory: Path, data_cfg, log: Log) -> dict:
    """Writes shards and tokenizer of the source into a directory.

    The directory is empty, or holds the files of a process that was killed. Then the work continues
    from them and ends with the same bytes.

    Returns:
        Fields of the manifest: `source`, `tokenizer`, and in `splits` the documents, tokens, bytes
        (UTF-8), fingerprint and shards of each side.

    Raises:
        InputError: bad source, or one side of the split would be empty.
    """
    journal = Journal(directory)
    counts = journal.get("source") or journal.put("source", _count(data_cfg, log))
    if journal.get("tokenizer") is None:
        started = time.monotonic()
        tokenizer = _make_tokenizer(data_cfg, counts["characters"])
        tokenizer.save(directory)
        journal.put("tokenizer", tokenizer.name)
        log(f"data: {tokenizer.name} tokenizer ready, {time.monotonic() - started:.1f} s")
    tokenizer = tokenizers.load(directory)
    splits = _encode(directory, data_cfg, tokenizer, counts["characters"], journal, log)
    fields = _report_overlap(directory, data_cfg, tokenizer, splits, log)
    journal.remove()
    return fields | {
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


def _report_overlap(directory: Path, data_cfg, tokenizer, splits: dict, log: Log) -> dict:
    """Returns {"overlap": shared runs of tokens}, or {} where data.overlap is 0."""
    if not data_cfg.overlap:
        return {}
    train, val = (
        Shards([directory / s["name"] for s in splits[side]["shards"]], tokenizer.vocab_size)
        for side in SIDES
    )
    runs = overlap.measure(train, val, data_cfg.overlap, tokenizer.boundary)
    log(
        f"data: {runs['shared']:.2%} of the {runs['runs']:,} validation runs of {runs['length']} "
        f"tokens are in training too; they cover {runs['tokens']:.2%} of the validation tokens"
    )
    return {"overlap": runs}


class Journal:
    """The finished parts of the work in a directory, so that a killed process can be continued."""

    def __init__(self, directory: Path):
        self._path = directory / "journal.json"
        for unfinished in directory.glob(".*.json.*"):  # a process was killed while writing it
            unfinished.unlink()
        try:
            self._entries = read_json(self._path)
        except (OSError, ValueError):
            self._entries = {}

    def get(self, name: str):
        return self._entries.get(name)

    def put(self, name: str, value):
        """Stores a value atomically and returns it."""
        self._entries[name] = value
        write_json(self._path, self._entries)
        return value

    def remove(self) -> None:
        self._path.unlink()


def _count(data_cfg, log: Log) -> dict:
    """Counts {"characters", "documents", "duplicates", "skipped"} of the source.

    Raises:
        InputError: there is no text, or one side of the split would be empty.
    """
    skipped, counts = [], Counter(characters=0, documents=0, duplicates=0)
    sides, progress = set(), Rate(log)
    for text in _unique_documents(data_cfg, counts, skipped.append):
        counts["characters"] += len(text)
        counts["documents"] += 1
        if data_cfg.split == "hash":
            sides.add(_side(text, data_cfg))
        progress.report(f"read {counts['documents']:,} documents", counts["characters"])
    if not counts["characters"]:
        raise InputError(f"data.path={data_cfg.path}: no text there; name files with text")
    log(
        f"data: {data_cfg.source} has {counts['documents']:,} documents, "
        f"{counts['characters']:,} characters; {counts['duplicates']:,} duplicates dropped, "
        f"{len(skipped)} files skipped"
    )
    if data_cfg.split == "tail":
        sides = {side for side, _ in split_documents(data_cfg, counts["characters"])}
    if set(SIDES) - sides:
        _refuse_split(data_cfg, counts, min(set(SIDES) - sides))
    return dict(counts) | {"skipped": [path.name for path in skipped]}


class Rate:
    """Logs a line every few seconds: characters per second, and the time left.

    Args:
        log: takes each line.
        total: characters of the whole work; 0: unknown.
        done: characters that an earlier process finished.
    """

    def __init__(self, log: Log, total: int = 0, done: int = 0):
        self._log, self._total, self._done_before = log, total, done
        self._start = time.monotonic()
        self._next_line = self._start + _SECONDS_BETWEEN_LINES

    def report(self, activity: str, done: int) -> None:
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _SECONDS_BETWEEN_LINES
        rate = (done - self._done_before) / (now - self._start)
        line = f"data: {activity}, {rate / 1e6:.1f} million characters a second"
        if self._total and rate:
            line += f", {(self._total - done) / rate:.0f} s left"
        self._log(line)


def char_tokenizer(data_cfg) -> tokenizers.Chars:
    """Makes a tokenizer of the characters of both sides, as nanoGPT does."""
    characters = set()
    for text in sources.documents(data_cfg):
        characters.update(text)
    return tokenizers.Chars(characters)


def split_documents(data_cfg, n_characters: int) -> Iterator[tuple[str, str]]:
    """Yields (side, text) for every document once, duplicates dropped.

    With data.split=hash, a document's side depends on its own content alone, neither on order nor
    on other documents. With tail, the last data.val_fraction of the characters are for validation,
    and the document across that point is divided.

    Args:
        data_cfg: the config group `data`.
        n_characters: characters of all unique documents; decides where the tail begins.
    """
    # This form rounds as nanoGPT's int(n * 0.9) does.
    before_tail = int(n_characters * (1 - data_cfg.val_fraction))
    for text in _unique_documents(data_cfg):
        if data_cfg.split == "hash":
            yield _side(text, data_cfg), text
            continue
        if head := text[: max(0, before_tail)]:
            yield "train", head
        if tail := text[len(head) :]:
            yield "val", tail
        before_tail -= len(text)


def _side(text: str, data_cfg) -> str:
    fraction = int.from_bytes(_digest(text)[:8], "big") / 2**64  # in [0, 1)
    return "val" if fraction < data_cfg.val_fraction else "train"


def _unique_documents(
    data_cfg, counts: Counter | None = None, on_skip: Callable[[Path], object] = lambda path: None
) -> Iterator[str]:
    """Yields documents without exact repetitions, which it counts in `counts["duplicates"]`."""
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


def _refuse_split(data_cfg, counts: Counter, empty: str) -> None:
    remedy = "set data.split=tail"
    if data_cfg.split == "tail":
        remedy = "give more text or set data.val_fraction=0.1"
    elif data_cfg.source == "text" and data_cfg.document == "file":
        remedy += " or data.document=paragraph"
    raise InputError(
        f"data.split={data_cfg.split}: nothing falls on the {empty} side (documents: "
        f"{counts['documents']}, characters: {counts['characters']}); {remedy}"
    )


def _make_tokenizer(data_cfg, n_characters: int) -> Tokenizer:
    """Makes the tokenizer that data.tokenizer names; a BPE is trained on the training side."""
    match data_cfg.tokenizer:
        case "bytes":
            return tokenizers.Bytes()
        case "char":
            return char_tokenizer(data_cfg)
        case "bpe":
            split = split_documents(data_cfg, n_characters)
            train = (text for side, text in split if side == "train")
            pieces = (piece for text in train for piece in tokenizers.pieces(text))
            texts = _take(pieces, _BPE_TRAINING_CHARACTERS)
            return tokenizers.BytePairs.train(texts, data_cfg.vocab_size)
        case "hf":
            return pretrained.load(Path(data_cfg.tokenizer_path).expanduser())


def _take(texts: Iterator[str], n_characters: int) -> Iterator[str]:
    """Yields texts up to n_characters in all; the last one is not cut."""
    for text in texts:
        if n_characters <= 0:
            return
        n_characters -= len(text)
        yield text


def _encode(
    directory: Path, data_cfg, tokenizer, n_characters: int, journal: Journal, log: Log
) -> dict:
    """Writes the shards of both sides; returns the manifest's `splits`.

    After each block of documents the journal notes the length of the shards. Tokens that a killed
    process wrote beyond that are cut off, and the blocks that it finished are skipped.
    """
    before = journal.get("blocks") or {"number": 0, "characters": 0, "sides": {}}
    writers, totals = {}, {}
    for side in SIDES:
        written = before["sides"].get(side, {"tokens": 0, "documents": 0, "bytes": 0})
        writers[side] = ShardWriter(directory, side, tokenizer.vocab_size, data_cfg.shard_tokens)
        writers[side].resume(written["tokens"])
        totals[side] = Counter(documents=written["documents"], bytes=written["bytes"])
    done = before["characters"]
    if done:
        log(f"data: resuming after {done:,} characters that are already encoded")
    progress = Rate(log, n_characters, done)
    for number, block in enumerate(_text_blocks(split_documents(data_cfg, n_characters))):
        if number < before["number"]:
            continue
        _write_block(block, tokenizer, writers, totals)
        done += sum(len(text) for _, text in block)
        sides = {side: {"tokens": writers[side].n_tokens} | totals[side] for side in SIDES}
        for writer in writers.values():
            writer.flush()
        journal.put("blocks", {"number": number + 1, "characters": done, "sides": sides})
        progress.report(f"encoded {done / n_characters:.0%}", done)
    splits = {}
    for side, writer in writers.items():
        writer.close()
        splits[side] = dict(totals[side]) | {
            "tokens": writer.n_tokens,
            "fingerprint": writer.fingerprint,
            "shards": writer.shards,
        }
    return splits


def _write_block(block, tokenizer: Tokenizer, writers: dict, totals: dict) -> None:
    """Encodes the documents of a block in parallel and adds them to the shards of their side."""
    boundary = [] if tokenizer.boundary is None else [tokenizer.boundary]
    texts, origins = [], []  # origins: (side, whether the text begins a document)
    for side, document in block:
        pieces = tokenizers.pieces(document) if tokenizer.piecewise else [document]
        for index, text in enumerate(pieces):
            texts.append(text)
            origins.append((side, index == 0))
    ids_of_side = {side: [] for side in SIDES}
    for ids, (side, is_first) in zip(tokenizer.encode_batch(texts), origins, strict=True):
        ids_of_side[side] += [boundary, ids] if is_first else [ids]
        totals[side]["documents"] += is_first
    for side, arrays in ids_of_side.items():
        if arrays:
            tokens = np.concatenate(arrays).astype(np.int64)
            writers[side].add(tokens)
            totals[side]["bytes"] += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))


def _text_blocks(split: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yields the documents in order, in blocks big enough to encode in parallel."""
    block, size = [], 0
    for side, document in split:
        block.append((side, document))
        size += len(document)
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block
