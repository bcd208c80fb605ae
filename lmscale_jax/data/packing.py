"""Documents to token shards: drop duplicates, split, train the tokenizer, encode, write.

The source is streamed several times instead of being held, so memory stays bounded by the largest
file. Each pass sees the same documents in the same order.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.data import pretrained, sources, tokenizers
from lmscale_jax.data.shards import ShardWriter
from lmscale_jax.errors import InputError

SIDES = ("train", "val")
_BATCH_CHARACTERS = 2_000_000
_SECONDS_BETWEEN_LINES = 5.0

Log = Callable[[str], object]


def pack(directory: Path, data_cfg, log: Log) -> dict:
    """Writes shards and tokenizer of the source into an empty directory.

    Returns:
        What the manifest says of them: `source`, `tokenizer`, and for each side in `splits` its
        documents, tokens, bytes (UTF-8), fingerprint and shards.

    Raises:
        InputError: bad source, or one side of the split would be empty.
    """
    started = time.monotonic()
    skipped = []
    counts = Counter(characters=0, documents=0)
    for text in _unique_documents(data_cfg, counts, skipped.append):
        counts["characters"] += len(text)
        counts["documents"] += 1
    if not counts["characters"]:
        raise InputError(f"data.path={data_cfg.path}: no text there; name files that hold some")
    log(
        f"data: {data_cfg.source} has {counts['documents']:,} documents, "
        f"{counts['characters']:,} characters; {counts['duplicates']:,} duplicates dropped, "
        f"{len(skipped)} files skipped"
    )
    _check_split(data_cfg, counts)
    tokenizer = _make_tokenizer(data_cfg, counts["characters"])
    log(f"data: {tokenizer.name} tokenizer ready, {time.monotonic() - started:.1f} s")
    tokenizer.save(directory)
    splits = _encode(directory, data_cfg, tokenizer, counts["characters"], log)
    return {
        "source": {
            "name": data_cfg.source,
            "path": data_cfg.path,
            "documents": counts["documents"],
            "duplicates_dropped": counts["duplicates"],
            "files_skipped": [path.name for path in skipped],
        },
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "boundary": tokenizer.boundary,
            "fingerprint": tokenizer.fingerprint,
        },
        "splits": splits,
    }


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
    # In this form 0.1 gives nanoGPT's int(n * 0.9), rounded as it rounds.
    before_tail = int(n_characters * (1 - data_cfg.val_fraction))
    for text in _unique_documents(data_cfg):
        if data_cfg.split == "hash":
            place = int.from_bytes(_digest(text)[:8], "big") / 2**64
            yield ("val" if place < data_cfg.val_fraction else "train"), text
            continue
        if head := text[: max(0, before_tail)]:
            yield "train", head
        if tail := text[len(head) :]:
            yield "val", tail
        before_tail -= len(text)


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


def _check_split(data_cfg, counts: Counter) -> None:
    empty = set(SIDES)
    for side, _ in split_documents(data_cfg, counts["characters"]):
        empty.discard(side)
        if not empty:
            return
    remedy = "set data.split=tail"
    if data_cfg.split == "tail":
        remedy = "give more text or set data.val_fraction=0.1"
    elif data_cfg.source == "text" and data_cfg.document == "file":
        remedy += " or data.document=paragraph"
    raise InputError(
        f"data.split={data_cfg.split}: nothing falls on the {min(empty)} side (documents: "
        f"{counts['documents']}, characters: {counts['characters']}); {remedy}"
    )


def _make_tokenizer(data_cfg, n_characters: int) -> tokenizers.Tokenizer:
    match data_cfg.tokenizer:
        case "bytes":
            return tokenizers.Bytes()
        case "char":
            return char_tokenizer(data_cfg)
        case "bpe":
            split = split_documents(data_cfg, n_characters)
            train = (text for side, text in split if side == "train")
            texts = (piece for text in train for piece in tokenizers.pieces(text))
            return tokenizers.BytePairs.train(texts, data_cfg.vocab_size)
        case "hf":
            return pretrained.load(Path(data_cfg.tokenizer_path).expanduser())


def _encode(
    directory: Path, data_cfg, tokenizer: tokenizers.Tokenizer, n_characters: int, log: Log
) -> dict:
    """Writes the shards of both sides; returns the manifest's `splits`."""
    writers = {side: ShardWriter(directory, side, tokenizer.vocab_size) for side in SIDES}
    totals = {side: Counter(documents=0, bytes=0) for side in SIDES}
    mark = [] if tokenizer.boundary is None else [tokenizer.boundary]
    documents = split_documents(data_cfg, n_characters)
    done, next_line = 0, time.monotonic() + _SECONDS_BETWEEN_LINES
    for side, texts, opens_document in _batches(documents, tokenizer.cuttable):
        parts = []
        for ids, opens in zip(tokenizer.encode_batch(texts), opens_document, strict=True):
            parts += [mark, ids] if opens else [ids]
        tokens = np.concatenate(parts).astype(np.int64)
        writers[side].add(tokens)
        totals[side]["documents"] += sum(opens_document)
        totals[side]["bytes"] += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))
        done += sum(map(len, texts))
        if time.monotonic() > next_line:
            next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            log(f"data: encoded {done / n_characters:.0%}")
    splits = {}
    for side, writer in writers.items():
        writer.close()
        splits[side] = dict(totals[side]) | {
            "tokens": writer.n_tokens,
            "fingerprint": writer.fingerprint,
            "shards": writer.shards,
        }
    return splits


def _batches(
    split: Iterator[tuple[str, str]], cuttable: bool
) -> Iterator[tuple[str, list[str], list[bool]]]:
    """Cuts each side's documents, in order, into batches big enough to encode in parallel.

    Yields:
        (side, texts, opens_document): pieces of documents, and which of them begin one.
    """
    waiting = {side: ([], []) for side in SIDES}
    size = Counter()
    for side, document in split:
        parts = tokenizers.pieces(document) if cuttable else [document]
        for index, text in enumerate(parts):
            texts, opens_document = waiting[side]
            texts.append(text)
            opens_document.append(index == 0)
            size[side] += len(text)
            if size[side] >= _BATCH_CHARACTERS:
                yield side, texts, opens_document
                waiting[side], size[side] = ([], []), 0
    yield from ((side, *batch) for side, batch in waiting.items() if batch[0])
