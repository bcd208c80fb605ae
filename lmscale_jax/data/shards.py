"""Writes token shards atomically, reads them by memory map, and verifies them by manifest.json.

Shards are the `.bin` files of nanoGPT speedruns.

A shard is a header of 256 int32 (magic, version, number of tokens, zeros) and then the tokens,
little-endian. Version 1, of the speedruns, has uint16 tokens. Version 2 is ours, for vocabularies
of more than 65,536 entries, and differs only in its uint32 tokens.
"""

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json

MAGIC = 20240520
TOKEN_TYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
_HEADER_BYTES = 256 * 4
_SCAN_TOKENS = 1 << 22


class ShardWriter:
    """Writes one stream of tokens as `prefix_000000.bin`, `prefix_000001.bin`, ...

    A shard gets its name only when it is complete and on disk, so every `.bin` file is complete.

    Args:
        directory: an existing directory.
        prefix: of the file names, for example "train".
        vocab_size: tokens are uint16 up to 65,536 entries, uint32 beyond.
        shard_tokens: tokens in every shard but the last.

    Attributes:
        n_tokens: tokens so far.
        shards: {"name", "tokens", "sha256"} of every complete file.
    """

    def __init__(
        self, directory: Path, prefix: str, vocab_size: int, shard_tokens: int = 100_000_000
    ):
        self.directory, self.prefix, self.shard_tokens = Path(directory), prefix, shard_tokens
        self.version = 1 if vocab_size <= 65_536 else 2
        self.n_tokens = 0
        self.shards: list[dict] = []
        self._hash = hashlib.sha256()
        self._file = None
        self._space = 0  # tokens until the open shard is full

    def resume(self, n_tokens: int) -> None:
        """Continues after the first n_tokens in the directory and deletes those beyond."""
        while self.n_tokens < n_tokens:
            count = min(self.shard_tokens, n_tokens - self.n_tokens)
            path = self.directory / f"{self.prefix}_{len(self.shards):06d}.bin"
            temporary = path.with_suffix(".tmp")
            if path.exists():  # completed after the last journal entry
                os.replace(path, temporary)
            item = TOKEN_TYPES[self.version].itemsize
            self._path, self._file = path, open(temporary, "r+b")
            self._file.truncate(_HEADER_BYTES + count * item)
            self._file.seek(_HEADER_BYTES)
            while chunk := self._file.read(_SCAN_TOKENS):
                self._hash.update(chunk)
            self._space = self.shard_tokens - count
            self.n_tokens += count
            if self._space == 0:
                self._finish_shard()
        for path in self.directory.glob(f"{self.prefix}_*"):
            if int(path.stem.rpartition("_")[2]) > len(self.shards) - (self._file is None):
                path.unlink()

    def flush(self) -> None:
        """Passes all tokens to the operating system, so that killing the process loses none."""
        if self._file is not None:
            self._file.flush()

    def add(self, tokens: np.ndarray) -> None:
        """Appends integer tokens [n], each below vocab_size."""
        tokens = np.asarray(tokens).astype(TOKEN_TYPES[self.version])
        self._hash.update(tokens)
        self.n_tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._open_next()
            piece, tokens = tokens[: self._space], tokens[self._space :]
            self._file.write(piece.data)
            self._space -= len(piece)
            if self._space == 0:
                self._finish_shard()

    def close(self) -> None:
        """Completes the last shard."""
        if self._file is not None:
            self._finish_shard()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all tokens so far; the sizes of the shards do not change it."""
        return self._hash.hexdigest()

    def _open_next(self) -> None:
        self._path = self.directory / f"{self.prefix}_{len(self.shards):06d}.bin"
        self._file = open(self._path.with_suffix(".tmp"), "w+b")
        self._file.write(bytes(_HEADER_BYTES))
        self._space = self.shard_tokens

    def _finish_shard(self) -> None:
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, self.version, self.shard_tokens - self._space
        with self._file as file:
            file.seek(0)
            file.write(header.data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(file.name, self._path)
        self._file = None
        self.shards.append({"name": self._path.name, "tokens": int(header[2]), "sha256": digest})


class Shards:
    """Several shard files, read as one stream of tokens.

    Opening reads the headers only, so it is instant at any size; `scan` reads every token. An
    instance is pickled as its paths.

    Args:
        paths: shard files, in stream order.
        vocab_size: number of token ids that may occur.

    Raises:
        InputError: a file is missing, is not a shard, or is shorter than its header says.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = [Path(path) for path in paths], vocab_size
        self._arrays = [_open(path) for path in self.paths]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64).tolist()
        self.n_tokens = self._ends[-1] if self._ends else 0

    def __reduce__(self):
        return Shards, (self.paths, self.vocab_size)

    def read(self, start: int, length: int) -> np.ndarray:
        """Reads tokens start .. start + length - 1 as int32 [length], across shards."""
        return self.gather(np.array([start]), length)[0]

    def gather(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Reads the windows that begin at `starts_B`: int32 [B, length].

        Raises:
            IndexError: a window extends beyond the stream.
        """
        tokens_BxT = np.empty((len(starts_B), length), np.int32)
        for row_T, start in zip(tokens_BxT, np.asarray(starts_B).tolist(), strict=True):
            if start < 0 or start + length > self.n_tokens:
                raise IndexError(f"tokens {start}..{start + length} of {self.n_tokens}")
            self._copy(start, row_T)
        return tokens_BxT

    def scan(self) -> str:
        """Reads every token and returns their SHA-256 (hex), as `ShardWriter.fingerprint`.

        Raises:
            InputError: a token id is beyond the vocabulary.
        """
        digest = hashlib.sha256()
        for path, array in zip(self.paths, self._arrays, strict=True):
            for start in range(0, len(array), _SCAN_TOKENS):
                chunk = array[start : start + _SCAN_TOKENS]
                self._check_ids(path, start, chunk)
                digest.update(chunk)
        return digest.hexdigest()

    def find(self, token: int) -> np.ndarray:
        """Returns the positions of a token in the stream: int64, ascending."""
        positions = [np.zeros(0, np.int64)]
        for end, array in zip(self._ends, self._arrays, strict=True):
            for start in range(0, len(array), _SCAN_TOKENS):
                matches = np.flatnonzero(array[start : start + _SCAN_TOKENS] == token)
                positions.append(matches + (end - len(array) + start))
        return np.concatenate(positions)

    def _copy(self, start: int, out_T: np.ndarray) -> None:
        """Copies tokens from `start` on into `out_T`, across shards."""
        shard = bisect.bisect_right(self._ends, start)
        while len(out_T):
            array = self._arrays[shard]
            offset = start - (self._ends[shard] - len(array))
            piece = array[offset : offset + len(out_T)]
            out_T[: len(piece)] = piece
            start, out_T, shard = start + len(piece), out_T[len(piece) :], shard + 1

    def _check_ids(self, path: Path, start: int, chunk: np.ndarray) -> None:
        if chunk.max() >= self.vocab_size:
            index = int(np.argmax(chunk >= self.vocab_size))
            raise InputError(
                f"{path}: token {start + index} has id {chunk[index]}, beyond the vocabulary of "
                f"{self.vocab_size}; set model.vocab_size to that of the shards' tokenizer"
            )


def _open(path: Path) -> np.ndarray:
    """Maps the tokens of one shard from disk: uint16 or uint32 [tokens]. Raises InputError."""
    header, size = np.zeros(0, "<i4"), 0
    with contextlib.suppress(OSError):
        header, size = np.fromfile(path, "<i4", count=256), path.stat().st_size
    if not path.is_file():
        raise InputError(f"{path}: no such shard; data.path names .bin files or their directory")
    if len(header) < 256 or header[0] != MAGIC:
        start = f"magic {header[0]}" if len(header) else "no header"
        raise InputError(
            f"{path}: not a token shard: {start} instead of {MAGIC}; prepare or fetch token shards"
        )
    if header[1] not in TOKEN_TYPES:
        raise InputError(f"{path}: unknown shard version {header[1]}; use 1 (uint16) or 2 (uint32)")
    token_type, n_tokens = TOKEN_TYPES[int(header[1])], int(header[2])
    present = (size - _HEADER_BYTES) // token_type.itemsize
    if n_tokens <= 0 or size != _HEADER_BYTES + n_tokens * token_type.itemsize:
        raise InputError(
            f"{path}: the header says {n_tokens} tokens and the file has {present}; it is "
            f"truncated or damaged, fetch or prepare it again"
        )
    # A plain array over the map: each slice of an np.memmap itself costs microseconds.
    return np.asarray(np.memmap(path, token_type, "r", _HEADER_BYTES, (n_tokens,)))


FORMAT, MANIFEST = 1, "manifest.json"
SIDES = ("train", "val")


def read_manifest(directory: Path) -> dict:
    """Reads the manifest of a prepared directory.

    Raises:
        InputError: it is missing, not JSON, or of another format version.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); prepare the data again") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, not {FORMAT}; prepare the data again")
    return manifest


def verify_shards(directory: Path, manifest: dict, notes: Path) -> None:
    """Compares every shard with its hash in the manifest.

    A successful check is noted under `notes` and not repeated while the files keep their sizes and
    modification times.

    Raises:
        InputError: a shard has changed.
    """
    shards = [shard for side in SIDES for shard in manifest["splits"][side]["shards"]]
    paths = [directory / shard["name"] for shard in shards]
    note = (
        notes / ".verified" / short_hash([file_state(path, str(path.absolute())) for path in paths])
    )
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


def file_state(path: Path, name: str) -> list:
    """Returns [name, bytes, modification time in ns]: changes with the file, without reading it."""
    stat = path.stat()
    return [name, stat.st_size, stat.st_mtime_ns]


def short_hash(content: dict | list) -> str:
    """Hashes a JSON value to twelve hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
