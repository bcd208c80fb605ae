"""Opens token shards where they lie: a prepared directory, or bare .bin files."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmscale_jax.data import shards as manifests
from lmscale_jax.data import sources, tokenizers
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


def open_directory(directory: Path, notes: Path) -> Prepared:
    """A directory that `prepare` or `prepare_to` completed.

    Args:
        directory: it.
        notes: the cache, where it is noted that the shards were compared with their hashes.

    Raises:
        InputError: the manifest is unreadable, or tokenizer or shards are not those it lists.
    """
    manifest = manifests.read_manifest(directory)
    tokenizer = tokenizers.load_tokenizer(directory)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise InputError(f"{directory}: tokenizer.json is not the manifest's; prepare again")
    sides = {}
    for side in manifests.SIDES:
        listed = manifest["splits"][side]["shards"]
        sides[side] = Shards([directory / shard["name"] for shard in listed], tokenizer.vocab_size)
        if sides[side].n_tokens != manifest["splits"][side]["tokens"]:
            raise InputError(f"{directory}: {side} shards are not the manifest's; prepare again")
    manifests.verify_shards(directory, manifest, notes)
    return Prepared(sides["train"], sides["val"], manifest, tokenizer, tokenizer.vocab_size)


def open_bin(data_cfg, vocab_size: int, cache: Path, log: Log) -> Prepared:
    """Shards used where they lie: a prepared directory, or bare .bin files."""
    directory = Path(data_cfg.path).expanduser()
    if (directory / "manifest.json").is_file():
        if data_cfg.val_path:
            raise InputError(
                f"data.val_path={data_cfg.val_path}: the prepared data.path={data_cfg.path} has "
                f"its own validation shards; leave data.val_path empty"
            )
        return open_directory(directory, cache)
    if vocab_size <= 0:
        raise InputError(
            f"model.vocab_size={vocab_size}: bare shards (data.path={data_cfg.path}) do not say "
            f"how many ids they use; set model.vocab_size, for example 50257 for GPT-2's tokenizer"
        )
    sides = {side: Shards(paths, vocab_size) for side, paths in _bin_paths(data_cfg).items()}
    splits = {
        side: {"tokens": shards.n_tokens, "fingerprint": _scanned(shards, cache, log)}
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
            f"for training; name training shards too"
        )
    return {"train": train, "val": val}


def _scanned(shards: Shards, cache: Path, log: Log) -> str:
    """`shards.scan()`, remembered in the cache for as long as the files stay as they are."""
    files = [manifests.file_state(path, str(path.absolute())) for path in shards.paths]
    note = cache / f"bin-{manifests.short_hash([manifests.FORMAT, shards.vocab_size, files])}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(note.read_text(encoding="utf-8"))["fingerprint"]
    log(f"data: checking {shards.n_tokens:,} tokens in {len(shards.paths)} shards, once")
    fingerprint = shards.scan()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"fingerprint": fingerprint, "files": files})
    return fingerprint


def manifest_in(directory: Path) -> dict | None:
    return manifests.read_manifest(directory) if (directory / "manifest.json").is_file() else None


def bin_manifest(data_cfg, cache: Path) -> dict | None:
    return manifest_in(Path(data_cfg.path).expanduser())
