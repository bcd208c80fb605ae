"""From a source to token shards on disk, made once and then reused.

    cache/<source>-<tokenizer>-<key>/
        manifest.json        what the shards are, and everything that decided it
        tokenizer.json       the tokenizer's definition
        train_000000.bin ... val_000000.bin ...

The key is a hash of the settings and of the source files' names, sizes and times, so a change to
either prepares again. A directory appears under its name only when it is complete.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.data import corpora, encode, mixtures, sources
from lmscale_jax.data import shards as manifests
from lmscale_jax.data.open_shards import (
    Prepared,
    bin_manifest,
    manifest_in,
    open_bin,
    open_directory,
)
from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json

Log = Callable[[str], object]


def prepare_data(data_cfg, vocab_size: int = 0, log: Log = print) -> Prepared:
    """The data that the config names; made in the cache, or found there.

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
    """The manifest of the config's data if it was prepared before; looks, and prepares nothing.

    Raises:
        InputError: nothing is found under data.path.
    """
    cache = cache_root(data_cfg)
    data_cfg = corpora.plain_source(data_cfg, cache)
    return PREPARATIONS[data_cfg.source].find_manifest(data_cfg, cache)


def prepare_directory(data_cfg, out_dir: Path, log: Log = print) -> Prepared:
    """As `prepare`, into a directory of the user's choice instead of the cache.

    Raises:
        InputError: also if `out_dir` holds anything but exactly this data.
    """
    cache = cache_root(data_cfg)
    corpora.fetch_tokenizer(data_cfg, cache, log)
    data_cfg = corpora.plain_source(data_cfg, cache)
    if sources.SOURCES[data_cfg.source].documents is None:
        raise InputError(
            f"data.source={data_cfg.source}: shards are prepared already; name stdlib, text or "
            f"jsonl"
        )
    out_dir, settings = Path(out_dir).absolute(), _prepared_settings(data_cfg)
    occupied = out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()))
    if occupied and not _find(out_dir, manifests.short_hash(settings), cache):
        raise InputError(f"--out={out_dir}: holds something else; name a new or empty directory")
    return _find_or_build(out_dir, data_cfg, settings, cache, log)


def vocab_size_of(data_cfg) -> int:
    """Ids of the tokenizer that the config leads to, before anything is prepared; 0: not known.

    Raises:
        InputError: the source that must be read for this (char, prepared shards) is bad.
    """
    if known := corpora.corpus_vocab_size(data_cfg):
        return known
    cache = cache_root(data_cfg)
    corpora.fetch_tokenizer(data_cfg, cache, lambda line: None)
    data_cfg = corpora.plain_source(data_cfg, cache)
    return PREPARATIONS[data_cfg.source].vocab_size(data_cfg, cache)


def cache_root(data_cfg) -> Path:
    """Returns the directory that prepared data is kept in; each way into this module asks once."""
    named = data_cfg.cache or os.environ.get("LMSCALE_CACHE") or "~/.cache/lmscale_jax"
    return Path(named).expanduser().absolute()


def _cache_directory(cache: Path, data_cfg, settings: dict) -> Path:
    """Where in the cache the data of these settings belongs."""
    return cache / f"{data_cfg.source}-{data_cfg.tokenizer}-{manifests.short_hash(settings)}"


def _prepared_settings(data_cfg) -> dict:
    """Everything that decides the content of the shards."""
    keys = ["source", "tokenizer", "split", "val_fraction", "shard_tokens", "overlap"]
    keys += sources.SOURCES[data_cfg.source].keys
    keys += encode.TOKENIZER_KINDS[data_cfg.tokenizer].keys
    paths = sources.source_files(data_cfg)
    base = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return {
        "format": manifests.FORMAT,
        "data": {key: data_cfg[key] for key in keys},
        "python": sources.SOURCES[data_cfg.source].version(),
        "files": len(paths),
        "files_state": manifests.short_hash(
            [manifests.file_state(path, os.path.relpath(path, base)) for path in paths]
        ),
    } | _tokenizer_files(data_cfg)


def _tokenizer_files(data_cfg) -> dict:
    """What changes when a published tokenizer does."""
    files = encode.TOKENIZER_KINDS[data_cfg.tokenizer].files(data_cfg)
    if files is None:
        return {}
    return {"tokenizer_files": [manifests.file_state(path, path.name) for path in files]}


def _find(directory: Path, key: str, notes: Path) -> Prepared | None:
    """The data of that key in `directory`, if it is there and whole."""
    try:
        return (
            open_directory(directory, notes)
            if manifests.read_manifest(directory)["key"] == key
            else None
        )
    except (InputError, KeyError):
        return None


def _find_or_build(directory: Path, data_cfg, settings: dict, cache: Path, log: Log) -> Prepared:
    key = manifests.short_hash(settings)
    if found := _find(directory, key, cache):
        return found
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock"), log):
            if found := _find(directory, key, cache):  # another process was faster
                return found
            _build(directory, data_cfg, settings, log)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}); set data.cache (or "
            f"--out) to a place that is writable and has room"
        ) from None
    return open_directory(directory, cache)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Holds a lock among processes, which ends with the process even if it is killed."""
    while True:
        with open(path, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("data: another process is preparing this data; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            except FileNotFoundError:
                ours = False
            if not ours:  # whoever held it has removed it meanwhile: lock the new file
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _build(directory: Path, data_cfg, settings: dict, log: Log) -> None:
    """Writes the shards beside `directory`, then gives them its name.

    What a process leaves that is killed meanwhile is gone on from; after an error nothing is left.
    """
    key = manifests.short_hash(settings)
    temporary = directory.with_name(f".{directory.name}.tmp")
    if not (temporary / key).exists():  # nothing, or the beginning of something else
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / key).touch()
    try:
        manifest = {"format": manifests.FORMAT, "key": key, "settings": settings}
        manifest |= encode.write_shards(temporary, data_cfg, log)
        write_json(temporary / "manifest.json", manifest)
        (temporary / key).unlink()
        if directory.exists():
            shutil.rmtree(directory)  # empty, or damaged since it was made
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


def _bin_vocab_size(data_cfg, cache: Path) -> int:
    manifest = bin_manifest(data_cfg, cache)
    return manifest["tokenizer"]["vocab_size"] if manifest else 0


class Preparation(NamedTuple):
    """How a source becomes shards of tokens.

    Attributes:
      open: (data_cfg, vocab_size, cache, log) -> Prepared.
      find_manifest: (data_cfg, cache) -> the manifest of what was prepared before, or None.
      vocab_size: (data_cfg, cache) -> ids of its tokenizer before preparing; 0: unknown.
    """

    open: Callable
    find_manifest: Callable
    vocab_size: Callable


_TEXT = Preparation(
    _open_text,
    lambda data_cfg, cache: manifest_in(
        _cache_directory(cache, data_cfg, _prepared_settings(data_cfg))
    ),
    lambda data_cfg, cache: encode.TOKENIZER_KINDS[data_cfg.tokenizer].vocab_size(data_cfg),
)
_SHARDS = Preparation(
    open_bin,
    bin_manifest,
    _bin_vocab_size,
)
PREPARATIONS = Modes(
    "data.source",
    {name: _TEXT for name, source in sources.SOURCES.items() if source.documents}
    | {
        "bin": _SHARDS,
        corpora.SHARDS: _SHARDS,
        "mixture": Preparation(
            lambda data_cfg, vocab_size, cache, log: _open_mixture(data_cfg, cache),
            lambda data_cfg, cache: _open_mixture(data_cfg, cache).manifest,
            lambda data_cfg, cache: _open_mixture(data_cfg, cache).vocab_size,
        ),
    },
)
