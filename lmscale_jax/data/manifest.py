"""Reads manifest.json and checks that prepared shards are still the files that it lists."""

import contextlib
import hashlib
import json
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json

FORMAT = 1
SIDES = ("train", "val")


def read(directory: Path) -> dict:
    """Reads the manifest of a prepared directory.

    Raises:
        InputError: it is missing, not JSON, or of another format version.
    """
    path = directory / "manifest.json"
    try:
        manifest = read_json(path)
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); prepare the data again") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, not {FORMAT}; prepare the data again")
    return manifest


def verify(directory: Path, manifest: dict, notes: Path) -> None:
    """Compares every shard with its hash in the manifest.

    A successful check is noted under `notes` and not repeated while the files keep their sizes and
    modification times.

    Raises:
        InputError: a shard has changed.
    """
    shards = [shard for side in SIDES for shard in manifest["splits"][side]["shards"]]
    paths = [directory / shard["name"] for shard in shards]
    note = notes / ".verified" / key([state(path, str(path.absolute())) for path in paths])
    if note.exists():
        return
    for path, shard in zip(paths, shards, strict=True):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            raise InputError(
                f"{path}: changed since its manifest was written; prepare the data again"
            )
    if notes.is_dir():
        with contextlib.suppress(OSError):  # a read-only cache costs time, nothing else
            note.parent.mkdir(exist_ok=True)
            note.touch()


def state(path: Path, name: str) -> list:
    """Returns [name, bytes, modification time in ns]: changes with the file, without reading it."""
    stat = path.stat()
    return [name, stat.st_size, stat.st_mtime_ns]


def key(content: dict | list) -> str:
    """Hashes a JSON value to twelve hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
