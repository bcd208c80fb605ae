"""From a source to token shards on disk, made once and then reused.

    cache/<source>-<tokenizer>-<key>/
        manifest.json        what the shards are, and everything that decided it
        tokenizer.json       the tokenizer's definition
        train_000000.bin ... val_000000.bin ...

The key is a hash of the settings and of the source files' names, sizes and times, so a change to
either prepares again. A directory appears under its name only when it is complete.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.data import manifest as manifests
from lmscale_jax.data import mixtures, packing, presets, pretrained, sources, tokenizers
from lmscale_jax.data.shards import Shards
from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json

Log = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Training and validation tokens, and what is known of them.

    `tokenizer`, `token_bytes` (int32 [vocab_size], UTF-8 bytes of each id) and `boundary` (id of
    the document mark) are None where they are not known: for bare shards, and `boundary` for
    characters. The fingerprints are SHA-256 (hex): `val_fingerprint` of the validation tokens,
    `fingerprint` of the training tokens, the validation tokens and the tokenizer. `mixture` holds
    the training shards of each part with its weight, where there are several.
    """

    train: Shards
    val: Shards
    manifest: dict
    tokenizer: tokenizers.Tokenizer | None
    vocab_size: int
    mixture: tuple[tuple[Shards, float], ...] = ()

    @property
    def token_bytes(self) -> np.ndarray | None:
        return self.tokenizer and self.tokenizer.token_bytes

    @property
    def boundary(self) -> int | None:
        return self.tokenizer and self.tokenizer.boundary

    @property
    def val_fingerprint(self) -> str:
        return self.manifest["splits"]["val"]["fingerprint"]

    @property
    def fingerprint(self) -> str:
        parts = [self.manifest["splits"][side]["fingerprint"] for side in manifests.SIDES]
        parts.append(self.tokenizer.fingerprint if self.tokenizer else "")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def prepare(data_cfg, vocab_size: int = 0, log: Log = print) -> Prepared:
    """The data that the config names; made in the cache, or found there.

    Args:
        data_cfg: the config group `data`.
        vocab_size: `model.vocab_size`; 0: the tokenizer's. Bare .bin shards need it.
        log: takes progress as lines of text.

    Raises:
        InputError: missing, empty, binary or damaged input; one side of the split would be empty.
    """
    presets.fetch(data_cfg, cache_root(data_cfg), log)
    presets.fetch_tokenizer(data_cfg, cache_root(data_cfg), log)
    vocab_size = vocab_size or presets.vocab_size(data_cfg)
    data_cfg = presets.plain(data_cfg, cache_root(data_cfg))
    if data_cfg.source == "mixture":
        prepared = _open_mixture(data_cfg)
    elif data_cfg.source == "bin":
        prepared = _open_bin(data_cfg, vocab_size, log)
    else:
        settings = _settings(data_cfg)
        prepared = _find_or_build(_place(data_cfg, settings), data_cfg, settings, log)
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
    data_cfg = presets.plain(data_cfg, cache_root(data_cfg))
    if data_cfg.source == "mixture":
        return _open_mixture(data_cfg).manifest
    if data_cfg.source == "bin":
        directory = Path(data_cfg.path).expanduser()
    else:
        directory = _place(data_cfg, _settings(data_cfg))
    return manifests.read(directory) if (directory / "manifest.json").is_file() else None


def prepare_to(data_cfg, out_dir: Path, log: Log = print) -> Prepared:
    """As `prepare`, into a directory of the user's choice instead of the cache.

    Raises:
        InputError: also if `out_dir` holds anything but exactly this data.
    """
    presets.fetch_tokenizer(data_cfg, cache_root(data_cfg), log)
    data_cfg = presets.plain(data_cfg, cache_root(data_cfg))
    if data_cfg.source in ("bin", "mixture"):
        raise InputError(
            f"data.source={data_cfg.source}: shards are prepared already; name stdlib, text or "
            f"jsonl"
        )
    out_dir, settings = Path(out_dir).absolute(), _settings(data_cfg)
    occupied = out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()))
    if occupied and not _find(out_dir, manifests.key(settings), cache_root(data_cfg)):
        raise InputError(f"--out={out_dir}: holds something else; name a new or empty directory")
    return _find_or_build(out_dir, data_cfg, settings, log)


def open_directory(directory: Path, notes: Path) -> Prepared:
    """A directory that `prepare` or `prepare_to` completed.

    Args:
        directory: it.
        notes: the cache, where it is noted that the shards were compared with their hashes.

    Raises:
        InputError: the manifest is unreadable, or tokenizer or shards are not those it lists.
    """
    manifest = manifests.read(directory)
    tokenizer = tokenizers.load(directory)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise InputError(f"{directory}: tokenizer.json is not the manifest's; prepare again")
    sides = {}
    for side in manifests.SIDES:
        listed = manifest["splits"][side]["shards"]
        sides[side] = Shards([directory / shard["name"] for shard in listed], tokenizer.vocab_size)
        if sides[side].n_tokens != manifest["splits"][side]["tokens"]:
            raise InputError(f"{directory}: {side} shards are not the manifest's; prepare again")
    manifests.verify(directory, manifest, notes)
    return Prepared(sides["train"], sides["val"], manifest, tokenizer, tokenizer.vocab_size)


def vocab_size_of(data_cfg) -> int:
    """Ids of the tokenizer that the config leads to, before anything is prepared; 0: not known.

    Raises:
        InputError: the source that must be read for this (char, prepared shards) is bad.
    """
    if known := presets.vocab_size(data_cfg):
        return known
    presets.fetch_tokenizer(data_cfg, cache_root(data_cfg), lambda line: None)
    data_cfg = presets.plain(data_cfg, cache_root(data_cfg))
    if data_cfg.source == "mixture":
        return _open_mixture(data_cfg).vocab_size
    if data_cfg.source == "bin":
        directory = Path(data_cfg.path).expanduser()
        if (directory / "manifest.json").is_file():
            return manifests.read(directory)["tokenizer"]["vocab_size"]
        return 0
    match data_cfg.tokenizer:
        case "bytes":
            return tokenizers.Bytes.vocab_size
        case "bpe":
            return data_cfg.vocab_size
        case "char":
            return packing.char_tokenizer(data_cfg).vocab_size
        case "hf":
            return pretrained.load(Path(data_cfg.tokenizer_path).expanduser()).vocab_size


def cache_root(data_cfg) -> Path:
    """The directory that prepared data is kept in."""
    named = data_cfg.cache or os.environ.get("LMSCALE_CACHE") or "~/.cache/lmscale_jax"
    return Path(named).expanduser().absolute()


def _place(data_cfg, settings: dict) -> Path:
    """Where in the cache the data of these settings belongs."""
    return (
        cache_root(data_cfg) / f"{data_cfg.source}-{data_cfg.tokenizer}-{manifests.key(settings)}"
    )


# What else decides which documents a source has.
_OWN_KEYS = {
    "stdlib": [],
    "text": ["document"],
    "jsonl": ["field", "limit"],
    "parquet": ["field", "limit"],
    "hf": ["path", "subset", "rows", "revision", "field", "limit"],
    "tfds": ["path", "rows", "field", "limit"],
}


def _settings(data_cfg) -> dict:
    """Everything that decides the content of the shards."""
    keys = ["source", "tokenizer", "split", "val_fraction", "shard_tokens", "overlap"]
    keys += _OWN_KEYS[data_cfg.source]
    keys += ["vocab_size"] if data_cfg.tokenizer == "bpe" else []
    paths = sources.files(data_cfg)
    base = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return {
        "format": manifests.FORMAT,
        "data": {key: data_cfg[key] for key in keys},
        "python": platform.python_version() if data_cfg.source == "stdlib" else None,
        "files": len(paths),
        "files_state": manifests.key(
            [manifests.state(path, os.path.relpath(path, base)) for path in paths]
        ),
    } | _tokenizer_files(data_cfg)


def _tokenizer_files(data_cfg) -> dict:
    """What changes when a published tokenizer does."""
    if data_cfg.tokenizer != "hf":
        return {}
    files = sorted(Path(data_cfg.tokenizer_path).expanduser().glob("*.*"))
    return {
        "tokenizer_files": [manifests.state(path, path.name) for path in files if path.is_file()]
    }


def _find(directory: Path, key: str, notes: Path) -> Prepared | None:
    """The data of that key in `directory`, if it is there and whole."""
    try:
        return open_directory(directory, notes) if manifests.read(directory)["key"] == key else None
    except (InputError, KeyError):
        return None


def _find_or_build(directory: Path, data_cfg, settings: dict, log: Log) -> Prepared:
    key, notes = manifests.key(settings), cache_root(data_cfg)
    if found := _find(directory, key, notes):
        return found
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock"), log):
            if found := _find(directory, key, notes):  # another process was faster
                return found
            _build(directory, data_cfg, settings, log)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}); set data.cache (or "
            f"--out) to a place that is writable and has room"
        ) from None
    return open_directory(directory, notes)


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
    key = manifests.key(settings)
    temporary = directory.with_name(f".{directory.name}.tmp")
    if not (temporary / key).exists():  # nothing, or the beginning of something else
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / key).touch()
    try:
        manifest = {"format": manifests.FORMAT, "key": key, "settings": settings}
        manifest |= packing.pack(temporary, data_cfg, log)
        write_json(temporary / "manifest.json", manifest)
        (temporary / key).unlink()
        if directory.exists():
            shutil.rmtree(directory)  # empty, or damaged since it was made
        temporary.rename(directory)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    log(f"data: prepared in {directory}")


def _open_mixture(data_cfg) -> Prepared:
    notes = cache_root(data_cfg)
    return mixtures.open_mixture(data_cfg.path, lambda path: open_directory(path, notes))


def _open_bin(data_cfg, vocab_size: int, log: Log) -> Prepared:
    """Shards used where they lie: a prepared directory, or bare .bin files."""
    directory = Path(data_cfg.path).expanduser()
    if (directory / "manifest.json").is_file():
        if data_cfg.val_path:
            raise InputError(
                f"data.val_path={data_cfg.val_path}: the prepared data.path={data_cfg.path} has "
                f"its own validation shards; leave data.val_path empty"
            )
        return open_directory(directory, cache_root(data_cfg))
    if vocab_size <= 0:
        raise InputError(
            f"model.vocab_size={vocab_size}: bare shards (data.path={data_cfg.path}) do not say "
            f"how many ids they use; set model.vocab_size, for example 50257 for GPT-2's tokenizer"
        )
    sides = {side: Shards(paths, vocab_size) for side, paths in _bin_paths(data_cfg).items()}
    splits = {
        side: {"tokens": shards.n_tokens, "fingerprint": _scanned(shards, data_cfg, log)}
        for side, shards in sides.items()
    }
    manifest = {
        "format": manifests.FORMAT,
        "source": data_cfg.path,
        "tokenizer": None,
        "splits": splits,
    }
    return Prepared(sides["train"], sides["val"], manifest, None, vocab_size)


def _bin_paths(data_cfg) -> dict[str, list[Path]]:
    train = sources.find(data_cfg.path, "data.path", (".bin",))
    if data_cfg.val_path:
        val = sources.find(data_cfg.val_path, "data.val_path", (".bin",))
    else:
        val = [path for path in train if "val" in path.name]
    held_out = {path.resolve() for path in val}
    train = [path for path in train if path.resolve() not in held_out]
    if not val:
        raise InputError(
            f"data.val_path='': none of the {len(train)} shards of data.path={data_cfg.path} has "
            f"'val' in its name; set data.val_path to the shards to hold out"
        )
    if not train:
        raise InputError(
            f"data.path={data_cfg.path}: all {len(val)} shards are for validation, none is left "
            f"for training; name training shards too"
        )
    return {"train": train, "val": val}


def _scanned(shards: Shards, data_cfg, log: Log) -> str:
    """`shards.scan()`, remembered in the cache for as long as the files stay as they are."""
    files = [manifests.state(path, str(path.absolute())) for path in shards.paths]
    note = (
        cache_root(data_cfg)
        / f"bin-{manifests.key([manifests.FORMAT, shards.vocab_size, files])}.json"
    )
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(note.read_text(encoding="utf-8"))["fingerprint"]
    log(f"data: checking {shards.n_tokens:,} tokens in {len(shards.paths)} shards, once")
    fingerprint = shards.scan()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"fingerprint": fingerprint, "files": files})
    return fingerprint
