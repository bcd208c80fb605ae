"""Turns documents into token shards: drops duplicates, splits, trains the tokenizer, encodes.

The source is streamed several times instead of being held, so memory stays bounded by the largest
file. Each pass reads the same documents in the same order.

`measure_overlap` measures how much of the validation text is in the training text too, by runs of
tokens. Exact repetitions of whole documents are dropped before; pages that quote each other,
boilerplate, and copies with small changes remain. Runs are compared by 64-bit hashes: of n tokens
t_0 ... t_n-1 the sum of (t_i + 1) b^i modulo 2^64, then mixed (SplitMix64's last step).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.key import Modes
from lmscale_jax.data import hf_tokenizers, sources, tokenizers
from lmscale_jax.data.shards import SIDES, Shards, ShardWriter
from lmscale_jax.data.split import SPLITS, side_of, split_documents, unique_documents
from lmscale_jax.data.tokenizer_base import TokenIds, Tokenizer, token_ids_of
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json, user_path, write_json

_BLOCK_CHARACTERS = 2_000_000
# Longer texts change few merges of a BPE, and its trainer holds all their words.
_BPE_TRAINING_CHARACTERS = 300_000_000
_SECONDS_BETWEEN_LINES = 5.0

Log = Callable[[str], object]


def write_shards(directory: Path, data_cfg, log: Log) -> dict:
    """Writes shards and tokenizer of the source into a directory.

    The directory is empty, or holds the files of a process that was killed. Then the work continues
    from them and ends with the same bytes.

    Returns:
        Fields of the manifest: `source`, `tokenizer`, and in `splits` the documents, tokens, bytes
        (UTF-8), fingerprint and shards of each side.

    Raises:
        InputError: bad source, or one side of the split would be empty.
    """
    journal = PrepareJournal(directory)
    counts = journal.get("source") or journal.put("source", _count(data_cfg, log))
    if journal.get("tokenizer") is None:
        started = time.monotonic()
        tokenizer = TOKENIZER_KINDS[data_cfg.tokenizer].make(data_cfg, counts["characters"])
        tokenizer.save(directory)
        journal.put("tokenizer", tokenizer.name)
        log(f"data: {tokenizer.name} tokenizer ready, {time.monotonic() - started:.1f} s")
    tokenizer = tokenizers.load_tokenizer(directory)
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
    runs = measure_overlap(train, val, data_cfg.overlap, tokenizer.boundary)
    log(
        f"data: {runs['shared']:.2%} of the {runs['runs']:,} validation runs of {runs['length']} "
        f"tokens are in training too; they cover {runs['tokens']:.2%} of the validation tokens"
    )
    return {"overlap": runs}


class PrepareJournal:
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
    sides, progress = set(), ProgressLines(log)
    for text in unique_documents(data_cfg, counts, skipped.append):
        counts["characters"] += len(text)
        counts["documents"] += 1
        if SPLITS[data_cfg.split].by_content:
            sides.add(side_of(text, data_cfg))
        progress.report(f"read {counts['documents']:,} documents", counts["characters"])
    if not counts["characters"]:
        raise InputError(f"data.path={data_cfg.path}: no text there; name files with text")
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


class ProgressLines:
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


def _refuse_split(data_cfg, counts: Counter, empty: str) -> None:
    remedy = SPLITS[data_cfg.split].remedy(data_cfg)
    raise InputError(
        f"data.split={data_cfg.split}: nothing falls on the {empty} side (documents: "
        f"{counts['documents']}, characters: {counts['characters']}); {remedy}"
    )


def _trained(data_cfg, n_characters: int) -> tokenizers.Tokenizer:
    split = split_documents(data_cfg, n_characters)
    train = (text for side, text in split if side == "train")
    texts = _take((p for text in train for p in tokenizers.pieces(text)), _BPE_TRAINING_CHARACTERS)
    return tokenizers.BytePairs.train(texts, data_cfg.vocab_size)


def _published(data_cfg) -> tokenizers.Tokenizer:
    return hf_tokenizers.load_pretrained(user_path(data_cfg.tokenizer_path))


def _published_files(data_cfg) -> list[Path]:
    files = sorted(user_path(data_cfg.tokenizer_path).glob("*.*"))
    return [path for path in files if path.is_file()]


class TokenizerKind(NamedTuple):
    """A way to a tokenizer.

    Attributes:
      make: (data_cfg, characters of the source) -> the tokenizer.
      token_ids: data_cfg -> its `TokenIds`, before anything is prepared.
      keys: of `data` that decide it.
      files: data_cfg -> files that decide it, or None where it has none.
    """

    make: Callable
    token_ids: Callable
    keys: tuple[str, ...] = ()
    files: Callable = lambda data_cfg: None


TOKENIZER_KINDS = Modes(
    "data.tokenizer",
    {
        "bytes": TokenizerKind(
            lambda data_cfg, n: tokenizers.Bytes(),
            lambda data_cfg: token_ids_of(tokenizers.Bytes),
        ),
        "char": TokenizerKind(
            lambda data_cfg, n: char_tokenizer(data_cfg),
            lambda data_cfg: token_ids_of(char_tokenizer(data_cfg)),
        ),
        "bpe": TokenizerKind(
            _trained,
            lambda data_cfg: TokenIds(data_cfg.vocab_size, data_cfg.vocab_size - 1),
            keys=("vocab_size",),
        ),
        "hf": TokenizerKind(
            lambda data_cfg, n: _published(data_cfg),
            lambda data_cfg: token_ids_of(_published(data_cfg)),
            files=_published_files,
        ),
    },
)


def _take(texts: Iterator[str], n_characters: int) -> Iterator[str]:
    """Yields texts up to n_characters in all; the last one is not cut."""
    for text in texts:
        if n_characters <= 0:
            return
        n_characters -= len(text)
        yield text


def _encode(
    directory: Path, data_cfg, tokenizer, n_characters: int, journal: PrepareJournal, log: Log
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
    progress = ProgressLines(log, n_characters, done)
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


_CHUNK = 1 << 22
_BASE = 0x9E3779B97F4A7C15


def measure_overlap(train: Shards, val: Shards, length: int, boundary: int | None) -> dict:
    """Looks up every run of `length` validation tokens in training; runs across documents are out.

    Returns:
        {"length", "runs": number of validation runs, "shared": share of them that training has too,
        "tokens": share of validation tokens that lie in a shared run}.
    """
    hashes, in_document = _hash_runs(val.read(0, val.n_tokens), length, boundary)
    distinct = np.unique(hashes[in_document])
    in_training = np.zeros(len(distinct), bool)
    for start in range(0, max(0, train.n_tokens - length + 1), _CHUNK):
        n_tokens = min(_CHUNK + length - 1, train.n_tokens - start)
        train_hashes, _ = _hash_runs(train.read(start, n_tokens), length, boundary)
        place = np.searchsorted(distinct, train_hashes)
        place[place == len(distinct)] = 0
        if len(distinct):
            in_training[place[distinct[place] == train_hashes]] = True
    shared = np.zeros(len(hashes), bool)
    shared[in_document] = in_training[np.searchsorted(distinct, hashes[in_document])]
    # A token is covered by the runs that begin up to length - 1 tokens before it.
    steps = np.zeros(val.n_tokens + 1, np.int64)
    starts = np.flatnonzero(shared)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + length, -1)
    covered = np.cumsum(steps[:-1]) > 0
    n_runs = int(in_document.sum())
    return {
        "length": length,
        "runs": n_runs,
        "shared": float(shared.sum() / n_runs) if n_runs else 0.0,
        "tokens": float(covered.mean()) if val.n_tokens else 0.0,
    }


def _hash_runs(
    tokens: np.ndarray, length: int, boundary: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hash of the run that begins at each token, and whether one document holds it."""
    n = max(0, len(tokens) - length + 1)
    total, power = np.zeros(n, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for i in range(length):
            total += (tokens[i : i + n].astype(np.uint64) + np.uint64(1)) * power
            power *= np.uint64(_BASE)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            total = (total ^ (total >> np.uint64(shift))) * np.uint64(factor)
    in_document = np.ones(n, bool)
    if boundary is not None and n:
        n_boundaries = np.concatenate([[0], np.cumsum(tokens == boundary)])
        in_document = n_boundaries[length : length + n] == n_boundaries[:n]
    return total ^ (total >> np.uint64(31)), in_document
