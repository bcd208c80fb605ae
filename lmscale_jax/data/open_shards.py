"""Opens token shards: a prepared directory, or bare .bin files."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from lmscale_jax.data import hf_tokenizers, sources, tokenizers
from lmscale_jax.data.shards import (
    FORMAT,
    MANIFEST,
    SIDES,
    Shards,
    file_state,
    read_manifest,
    short_hash,
    verify_shards,
)
from lmscale_jax.errors import InputError
from lmscale_jax.files import user_path, write_json

Log = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Training and validation tokens with their manifest and tokenizer.

    Attributes:
      tokenizer, token_bytes: the tokenizer and the UTF-8 bytes of each id (int32 [vocab_size]);
        None for bare shards.
      boundary: the id of the document mark, the tokenizer's or that of bare shards
        (data.document_mark); None where documents have none.
      val_fingerprint: SHA-256 (hex) of the validation tokens.
      fingerprint: SHA-256 (hex) of training tokens, validation tokens and tokenizer.
      mixture: training shards and weight of each part of a mixture.
    """

    train: Shards
    val: Shards
    manifest: dict
    tokenizer: tokenizers.Tokenizer | None
    vocab_size: int
    mixture: tuple[tuple[Shards, Fraction], ...] = ()
    boundary: int | None = None

    @property
    def token_bytes(self) -> np.ndarray | None:
        return self.tokenizer and self.tokenizer.token_bytes

    @property
    def val_fingerprint(self) -> str:
        return self.manifest["splits"]["val"]["fingerprint"]

    @property
    def fingerprint(self) -> str:
        parts = [self.manifest["splits"][side]["fingerprint"] for side in SIDES]
        parts.append(self.tokenizer.fingerprint if self.tokenizer else "")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_directory(directory: Path, notes: Path) -> Prepared:
    """Opens a directory that `prepare_data` or `prepare_directory` completed.

    Args:
        directory: of the manifest, tokenizer and shards.
        notes: the cache, which records that the shards were compared with their hashes.

    Raises:
        InputError: the manifest is unreadable, or tokenizer or shards are not those it lists.
    """
    manifest = read_manifest(directory)
    tokenizer = tokenizers.load_tokenizer(directory)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise InputError(f"{directory}: tokenizer.json is not the manifest's; prepare again")
    shards = {}
    for side in SIDES:
        listed = manifest["splits"][side]["shards"]
        paths = [directory / shard["name"] for shard in listed]
        shards[side] = Shards(paths, tokenizer.vocab_size)
        if shards[side].n_tokens != manifest["splits"][side]["tokens"]:
            raise InputError(f"{directory}: {side} shards are not the manifest's; prepare again")
    verify_shards(directory, manifest, notes)
    return Prepared(
        shards["train"], shards["val"], manifest, tokenizer, tokenizer.vocab_size,
        boundary=tokenizer.boundary,
    )  # fmt: skip


def open_bin(data_cfg, vocab_size: int, cache: Path, log: Log) -> Prepared:
    """Opens data.path in place: a prepared directory, or bare .bin files.

    Raises InputError where they are damaged, or vocab_size is missing for bare files.
    """
    if directory := _prepared_directory(data_cfg):
        prepared = open_directory(directory, cache)
        if data_cfg.document_mark not in (-1, prepared.boundary):
            raise InputError(
                f"data.document_mark={data_cfg.document_mark}: in the prepared data.path="
                f"{data_cfg.path} documents begin with {prepared.boundary}; use -1"
            )
        return prepared
    if vocab_size <= 0:
        raise InputError(
            f"model.vocab_size={vocab_size}: bare shards (data.path={data_cfg.path}) do not say "
            f"how many ids they use; set model.vocab_size, for example 50257 for GPT-2's tokenizer"
        )
    mark = mark_of(data_cfg)
    if mark is not None and mark >= vocab_size:
        raise InputError(
            f"data.document_mark={mark} is not below model.vocab_size={vocab_size}; use the id "
            f"with which every document begins, for example 50256 for GPT-2's tokenizer, or -1"
        )
    sides, manifest = _bare_shards(data_cfg, vocab_size)
    for side, shards in sides.items():
        manifest["splits"][side]["fingerprint"] = _scan_cached(shards, cache, log)
    return Prepared(sides["train"], sides["val"], manifest, None, vocab_size, boundary=mark)


def mark_of(data_cfg) -> int | None:
    """Returns the id of the document mark of bare shards; None: they have none."""
    return None if data_cfg.document_mark < 0 else data_cfg.document_mark


def _prepared_directory(data_cfg) -> Path | None:
    """Finds the prepared directory that data.path names, as such or by its shards; None: bare ones.

    Raises:
        InputError: some of its shards are named and others are not, or data.val_path is set.
    """
    directory = user_path(data_cfg.path)
    if not (directory / MANIFEST).is_file():
        paths = sources.find_files(data_cfg.path, "data.path", (".bin",))
        if data_cfg.val_path:
            paths += sources.find_files(data_cfg.val_path, "data.val_path", (".bin",))
        paths = {path.resolve() for path in paths}
        directory = next((p.parent for p in sorted(paths) if (p.parent / MANIFEST).is_file()), None)
        if directory is None:
            return None
        splits = read_manifest(directory)["splits"].values()
        listed = {directory / shard["name"] for split in splits for shard in split["shards"]}
        if paths != listed:
            raise InputError(
                f"data.path={data_cfg.path} names {len(paths & listed)} of the {len(listed)} "
                f"shards of the prepared directory {directory} and {len(paths - listed)} other "
                f"files, so its manifest does not hold; use data.path={directory}"
            )
    if data_cfg.val_path:
        raise InputError(
            f"data.val_path={data_cfg.val_path}: the prepared data.path={data_cfg.path} has "
            f"its own validation shards; leave data.val_path empty"
        )
    return directory


def _bare_shards(data_cfg, vocab_size: int) -> tuple[dict[str, Shards], dict]:
    """Opens bare .bin files. Returns the shards of each side, and a manifest without hashes."""
    sides = {side: Shards(paths, vocab_size) for side, paths in _bin_paths(data_cfg).items()}
    splits = {side: {"tokens": shards.n_tokens} for side, shards in sides.items()}
    return sides, {
        "format": FORMAT, "source": data_cfg.path, "tokenizer": None, "splits": splits,
    }  # fmt: skip


def _bin_paths(data_cfg) -> dict[str, list[Path]]:
    train = sources.find_files(data_cfg.path, "data.path", (".bin",))
    if data_cfg.val_path:
        val = sources.find_files(data_cfg.val_path, "data.val_path", (".bin",))
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
            f"for training; add training shards"
        )
    return {"train": train, "val": val}


def open_nothing(data_cfg, vocab_size: int) -> Prepared:
    """Returns data without tokens; with the tokenizer of data.tokenizer="hf".

    Raises:
        InputError: the number of ids is unknown, or the tokenizer cannot be read.
    """
    path = Path(data_cfg.tokenizer_path).expanduser()
    tokenizer = hf_tokenizers.load_pretrained(path) if data_cfg.tokenizer == "hf" else None
    if not (vocab_size or tokenizer):
        raise InputError(
            f"model.vocab_size={vocab_size}: data.source='none' has no tokens to train on; use for "
            f"example data.source='stdlib'"
        )
    splits = {side: {"tokens": 0, "fingerprint": ""} for side in SIDES}
    manifest = {"format": FORMAT, "source": "", "tokenizer": None, "splits": splits}
    n_ids = tokenizer.vocab_size if tokenizer else vocab_size
    boundary = tokenizer and tokenizer.boundary
    sides = Shards([], n_ids), Shards([], n_ids)
    return Prepared(*sides, manifest, tokenizer, n_ids, boundary=boundary)


def _scan_cached(shards: Shards, cache: Path, log: Log) -> str:
    """Returns `shards.scan()`, cached until the files change."""

    def scan() -> str:
        log(f"data: checking {shards.n_tokens:,} tokens in {len(shards.paths)} shards, once")
        return shards.scan()

    return note_of_shards("fingerprint", shards, cache, [shards.vocab_size], scan)


def note_of_shards(name: str, shards: Shards, cache: Path, settings: list, compute: Callable):
    """Returns `compute()`, a JSON value, noted in the cache until files or settings change."""
    files = [file_state(path, str(path.absolute())) for path in shards.paths]
    note = cache / f"bin-{short_hash([FORMAT, *settings, files])}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(note.read_text(encoding="utf-8"))[name]
    value = compute()
    with contextlib.suppress(OSError):  # without a writable cache the next run computes again
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {name: value, "files": files})
    return value


def manifest_in(directory: Path) -> dict | None:
    """Reads the manifest in a directory; None if there is none."""
    return read_manifest(directory) if (directory / MANIFEST).is_file() else None


def bin_manifest(data_cfg, cache: Path) -> dict:
    """Reads the manifest of data.path; for bare .bin files only the tokens of each side.

    Raises:
        InputError: there are no shards, or they are damaged.
    """
    directory = _prepared_directory(data_cfg)
    return read_manifest(directory) if directory else _bare_shards(data_cfg, 0)[1]
