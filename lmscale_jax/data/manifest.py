"""What prepared shards are: manifest.json, and whether the files are still those it lists."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from lmscale_jax.errors import InputError

FORMAT = 1
SIDES = ("train", "val")


def read(directory: Path) -> dict:
    """The manifest of a prepared directory.

    Raises:
        InputError: it is missing, not JSON, or of another format version.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); prepare the data again") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, not {FORMAT}; prepare the data again")
    return manifest


def verify(directory: Path, manifest: dict, notes: Path) -> None:
    """Compares every shard with the hash that the manifest has of it.

    Once, for as long as the files keep their sizes and times: that is noted under `notes`.

    Raises:
        InputError: a shard is another than it was.
    """
    shards = [shard for side in SIDES for shard in manifest["splits"][side]["shards"]]
    files = [directory / shard["name"] for shard in shards]
    now = key([state(file, str(file.absolute())) for file in files])
    note = notes / ".verified" / now
    if note.exists():
        return
    for file, shard in zip(files, shards, strict=True):
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != shard["sha256"]:
            raise InputError(
                f"{file}: changed since its manifest was written; prepare the data again"
            )
    if notes.is_dir():
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
            note.parent.mkdir(exist_ok=True)
            note.touch()


def state(path: Path, name: str) -> list:
    """What changes when a file does, without reading it."""
    stat = path.stat()
    return [name, stat.st_size, stat.st_mtime_ns]


def key(content: dict | list) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def write_json(path: Path, content: dict) -> None:
    """Atomic: a file of that name is whole and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
