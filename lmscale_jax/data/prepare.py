"""Prepares token shards from a source, once, and finds them again.

    cache/<source>-<tokenizer>-<key>/
        manifest.json        the shards, and the settings that decided them
        tokenizer.json       the tokenizer's definition
        train_000000.bin ... val_000000.bin ...

The key is a hash of the settings and of the source files' names, sizes and times, so a change to
either prepares again. A directory appears under its name only when it is complete.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.data import corpora, encode, mixtures, sources
from lmscale_jax.data.open_shards import (
    Prepared,
    bin_manifest,
    manifest_in,
    mark_of,
    open_bin,
    open_directory,
    open_nothing,
)
from lmscale_jax.data.shards import FORMAT, MANIFEST, file_state, read_manifest, short_hash
from lmscale_jax.data.tokenizer_base import TokenIds, token_ids_of
from lmscale_jax.errors import InputError
from lmscale_jax.files import user_path, write_json

Log = Callable[[str], object]


def prepare_data(data_cfg, vocab_size: int, log: Log = print) -> Prepared:
    """Opens the data that the config names, after preparing it in the cache if necessary.

    Args:
        data_cfg: the config group `data`.
        vocab_size: `model.vocab_size`; 0: the tokenizer's. Bare .bin shards need it.
        log: takes progress as lines of text.

    Raises:
        InputError: missing, empty, binary or damaged input; one side of the split would be empty.
    """
    cache = cache_root(data_cfg)
    corpora.fetch_shards(data_cfg, cache, log)
    corpora.fetch_tokenizer(data_cfg, cache, log)
    vocab_size = vocab_size or corpora.corpus_vocab_size(data_cfg)
    data_cfg = corpora.plain_source(data_cfg, cache)
    prepared = PREPARATIONS[data_cfg.source].open(data_cfg, vocab_size, cache, log)
    if 0 < vocab_size < prepared.vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size}: the tokenizer has {prepared.vocab_size} ids; set "
            f"model.vocab_size={prepared.vocab_size}, or 0 to take the tokenizer's"
        )
    return prepared


def find_manifest(data_cfg) -> dict | None:
    """Reads the manifest of the config's data; None if it is not prepared yet.

    Raises:
        InputError: data.path does not exist.
    """
    cache = cache_root(data_cfg)
    if corpora.missing_shards(data_cfg, cache):
        return None
    data_cfg = corpora.plain_source(data_cfg, cache)
    return PREPARATIONS[data_cfg.source].find_manifest(data_cfg, cache)


def prepare_directory(data_cfg, out_dir: Path, log: Log = print) -> Prepared:
    """Prepares data in a directory of the user's choice instead of the cache.

    Raises:
        InputError: as `prepare_data`, or `out_dir` holds anything but exactly this data.
    """
    cache = cache_root(data_cfg)
    corpora.fetch_tokenizer(data_cfg, cache, log)
    data_cfg = corpora.plain_source(data_cfg, cache)
    if sources.SOURCES[data_cfg.source].documents is None:
        raise InputError(
            f"data.source={data_cfg.source}: shards are prepared already; use stdlib, text or jsonl"
        )
    out_dir, settings = Path(out_dir).absolute(), _prepared_settings(data_cfg)
    occupied = out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()))
    if occupied and not _open_existing(out_dir, short_hash(settings), cache):
        raise InputError(f"--out={out_dir}: holds something else; use a new or empty directory")
    return _find_or_build(out_dir, data_cfg, settings, cache, log)


def find_token_ids(data_cfg) -> TokenIds:
    """Returns vocabulary size and document mark before data are prepared, as far as known.

    Raises:
        InputError: the source that must be read for this (char, prepared shards) is bad.
    """
    if vocab_size := corpora.corpus_vocab_size(data_cfg):
        return TokenIds(vocab_size, corpora.SHARDS_MARK)
    cache = cache_root(data_cfg)
    corpora.fetch_tokenizer(data_cfg, cache, lambda line: None)
    data_cfg = corpora.plain_source(data_cfg, cache)
    return PREPARATIONS[data_cfg.source].token_ids(data_cfg, cache)


def cache_root(data_cfg) -> Path:
    """Returns the directory of prepared data. Raises InputError where it would be in no home."""
    path = data_cfg.cache or os.environ.get("LMSCALE_CACHE")
    try:
        return user_path(path or "~/.cache/lmscale_jax").absolute()
    except InputError:
        raise InputError(
            f"config.data.cache={path or ''!r}: there is no home directory for the cache (is HOME "
            f"set?); set data.cache or LMSCALE_CACHE to a directory such as "
            f"{tempfile.gettempdir()}/lmscale_jax"
        ) from None


def _cache_directory(cache: Path, data_cfg, settings: dict) -> Path:
    """Returns the directory in the cache for data of these settings."""
    return cache / f"{data_cfg.source}-{data_cfg.tokenizer}-{short_hash(settings)}"


def _prepared_settings(data_cfg) -> dict:
    """Returns the settings and source files that decide the content of the shards."""
    keys = ["source", "tokenizer", "split", "val_fraction", "shard_tokens", "overlap"]
    keys += sources.SOURCES[data_cfg.source].keys
    keys += encode.TOKENIZER_KINDS[data_cfg.tokenizer].keys
    paths = sources.source_files(data_cfg)
    base = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return {
        "format": FORMAT,
        "data": {key: data_cfg[key] for key in keys},
        "python": sources.SOURCES[data_cfg.source].version(),
        "files": len(paths),
        "files_state": short_hash(
            [file_state(path, os.path.relpath(path, base)) for path in paths]
        ),
    } | _tokenizer_files(data_cfg)


def _tokenizer_files(data_cfg) -> dict:
    """Returns the state of a published tokenizer's files; {} for other tokenizers."""
    files = encode.TOKENIZER_KINDS[data_cfg.tokenizer].files(data_cfg)
    if files is None:
        return {}
    return {"tokenizer_files": [file_state(path, path.name) for path in files]}


def _open_existing(directory: Path, key: str, notes: Path) -> Prepared | None:
    """Opens the data of that key in `directory`; None if it is absent or incomplete."""
    try:
        return open_directory(directory, notes) if read_manifest(directory)["key"] == key else None
    except (InputError, KeyError):
        return None


def _find_or_build(directory: Path, data_cfg, settings: dict, cache: Path, log: Log) -> Prepared:
    """Opens the data in `directory`, after building it under a lock where it is not complete."""
    key = short_hash(settings)
    if prepared := _open_existing(directory, key, cache):
        return prepared
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock"), log):
            if prepared := _open_existing(directory, key, cache):  # another process was faster
                return prepared
            _build(directory, data_cfg, settings, log)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}); set data.cache (or "
            f"--out) to a writable directory with enough space"
        ) from None
    return open_directory(directory, cache)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Holds a lock between processes, which the system releases if the process is killed."""
    while True:
        with open(path, "a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("data: another process is preparing this data; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            except FileNotFoundError:
                is_current = False
            if not is_current:  # the last holder has removed the file: lock the new one
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _build(directory: Path, data_cfg, settings: dict, log: Log) -> None:
    """Writes the shards in a temporary directory, then renames it to `directory`.

    A build that was killed is continued. After an error the temporary directory is removed.
    """
    key = short_hash(settings)
    temporary = directory.with_name(f".{directory.name}.tmp")
    if not (temporary / key).exists():  # absent, or part of other data
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / key).touch()
    try:
        manifest = {"format": FORMAT, "key": key, "settings": settings}
        manifest |= encode.write_shards(temporary, data_cfg, log)
        write_json(temporary / MANIFEST, manifest)
        (temporary / key).unlink()
        if directory.exists():
            shutil.rmtree(directory)  # empty or damaged
        temporary.rename(directory)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    log(f"data: prepared in {directory}")


def _open_mixture(data_cfg, cache: Path) -> Prepared:
    return mixtures.open_mixture(data_cfg.path, lambda path: open_directory(path, cache))


def _open_text(data_cfg, vocab_size: int, cache: Path, log: Log) -> Prepared:
    settings = _prepared_settings(data_cfg)
    return _find_or_build(
        _cache_directory(cache, data_cfg, settings), data_cfg, settings, cache, log
    )


def _find_bin_manifest(data_cfg, cache: Path) -> dict | None:
    """Returns None where no shards are there, so that --explain has a page without data."""
    return bin_manifest(data_cfg, cache) if sources.has_files(data_cfg.path, (".bin",)) else None


def _bin_token_ids(data_cfg, cache: Path) -> TokenIds:
    if tokenizer := (_find_bin_manifest(data_cfg, cache) or {}).get("tokenizer"):
        return TokenIds(tokenizer["vocab_size"], tokenizer["boundary"])
    return TokenIds(0, mark_of(data_cfg))


class Preparation(NamedTuple):
    """One choice of data.source: how it becomes shards of tokens.

    Attributes:
      open: (data_cfg, vocab_size, cache, log) -> Prepared.
      find_manifest: (data_cfg, cache) -> manifest of the prepared data, or None.
      token_ids: (data_cfg, cache) -> `TokenIds` before preparing.
    """

    open: Callable
    find_manifest: Callable
    token_ids: Callable


_TEXT = Preparation(
    _open_text,
    lambda data_cfg, cache: manifest_in(
        _cache_directory(cache, data_cfg, _prepared_settings(data_cfg))
    ),
    lambda data_cfg, cache: encode.TOKENIZER_KINDS[data_cfg.tokenizer].token_ids(data_cfg),
)
_SHARDS = Preparation(
    open_bin,
    _find_bin_manifest,
    _bin_token_ids,
)
PREPARATIONS = Modes(
    "data.source",
    {name: _TEXT for name, source in sources.SOURCES.items() if source.documents}
    | {
        "bin": _SHARDS,
        corpora.SHARDS: _SHARDS,
        "none": Preparation(
            lambda data_cfg, vocab_size, cache, log: open_nothing(data_cfg, vocab_size),
            lambda data_cfg, cache: None,
            lambda data_cfg, cache: TokenIds(0, None),
        ),
        "mixture": Preparation(
            lambda data_cfg, vocab_size, cache, log: _open_mixture(data_cfg, cache),
            lambda data_cfg, cache: _open_mixture(data_cfg, cache).manifest,
            lambda data_cfg, cache: token_ids_of(_open_mixture(data_cfg, cache)),
        ),
    },
)
