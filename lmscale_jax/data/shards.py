"""Token shards: the `.bin` files of nanoGPT speedruns, written atomically and read by memory map.

A shard is 256 int32 of header (magic, version, number of tokens, zeros) and then the tokens,
little-endian. Version 1 is the speedruns' own: uint16 tokens. Version 2 is ours and differs only in
that tokens are uint32; it is written when the vocabulary has more than 65,536 entries.
"""

import bisect
import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError

MAGIC = 20240520
TOKEN_TYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
_HEADER_BYTES = 256 * 4
_SCAN_TOKENS = 1 << 22


class ShardWriter:
    """Writes one stream of tokens as `prefix_000000.bin`, `prefix_000001.bin`, ...

    A shard gets its name only when it is complete and on disk, so a file called `.bin` is whole.

    Args:
        directory: exists already.
        prefix: of the file names, for example "train".
        vocab_size: decides between uint16 and uint32.
        shard_tokens: tokens in every shard but the last.
    """

    def __init__(
        self, directory: Path, prefix: str, vocab_size: int, shard_tokens: int = 100_000_000
    ):
        self.directory, self.prefix, self.shard_tokens = Path(directory), prefix, shard_tokens
        self.version = 1 if vocab_size <= 65_536 else 2
        self.n_tokens = 0
        self.shards: list[dict] = []
        self._content = hashlib.sha256()
        self._file = None
        self._room = 0

    def go_on(self, n_tokens: int) -> None:
        """Takes up a stream of which so many tokens are in the directory; the rest is cut off."""
        while self.n_tokens < n_tokens:
            count = min(self.shard_tokens, n_tokens - self.n_tokens)
            path = self.directory / f"{self.prefix}_{len(self.shards):06d}.bin"
            temporary = path.with_suffix(".tmp")
            if path.exists():  # finished after the last note
                os.replace(path, temporary)
            item = TOKEN_TYPES[self.version].itemsize
            self._path, self._file = path, open(temporary, "r+b")
            self._file.truncate(_HEADER_BYTES + count * item)
            self._file.seek(_HEADER_BYTES)
            while chunk := self._file.read(_SCAN_TOKENS):
                self._content.update(chunk)
            self._room = self.shard_tokens - count
            self.n_tokens += count
            if self._room == 0:
                self._finish_shard()
        for path in self.directory.glob(f"{self.prefix}_*"):
            if int(path.stem.rpartition("_")[2]) > len(self.shards) - (self._file is None):
                path.unlink()

    def flush(self) -> None:
        """Hands everything to the operating system, so that a kill loses none of it."""
        if self._file is not None:
            self._file.flush()

    def add(self, tokens: np.ndarray) -> None:
        """Appends integer tokens [any length], each below vocab_size."""
        tokens = np.asarray(tokens).astype(TOKEN_TYPES[self.version])
        self._content.update(tokens)
        self.n_tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._open_next()
            now, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(now.data)
            self._room -= len(now)
            if self._room == 0:
                self._finish_shard()

    def close(self) -> None:
        """Completes the last shard; `shards` then lists `{name, tokens, sha256}` of every file."""
        if self._file is not None:
            self._finish_shard()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all tokens so far, however they are cut into shards."""
        return self._content.hexdigest()

    def _open_next(self) -> None:
        self._path = self.directory / f"{self.prefix}_{len(self.shards):06d}.bin"
        self._file = open(self._path.with_suffix(".tmp"), "w+b")
        self._file.write(bytes(_HEADER_BYTES))
        self._room = self.shard_tokens

    def _finish_shard(self) -> None:
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, self.version, self.shard_tokens - self._room
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

    Opening reads the headers only, so it is instant at any size; `scan` looks at every token. An
    instance travels to other processes as its paths.

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
        """Tokens start .. start + length - 1 as int32 [length]; they may span several shards."""
        return self.gather(np.array([start]), length)[0]

    def gather(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """The windows that begin at `starts_B`: int32 [B, length].

        Raises:
            IndexError: a window reaches beyond the stream.
        """
        tokens_BxT = np.empty((len(starts_B), length), np.int32)
        for row_T, start in zip(tokens_BxT, np.asarray(starts_B).tolist(), strict=True):
            if start < 0 or start + length > self.n_tokens:
                raise IndexError(f"tokens {start}..{start + length} of {self.n_tokens}")
            self._copy(start, row_T)
        return tokens_BxT

    def scan(self) -> str:
        """Reads every token once: SHA-256 (hex) of the contents, as `ShardWriter.fingerprint`.

        Raises:
            InputError: a token id is beyond the vocabulary.
        """
        content = hashlib.sha256()
        for path, array in zip(self.paths, self._arrays, strict=True):
            for start in range(0, len(array), _SCAN_TOKENS):
                chunk = array[start : start + _SCAN_TOKENS]
                self._check_ids(path, start, chunk)
                content.update(chunk)
        return content.hexdigest()

    def _copy(self, start: int, out_T: np.ndarray) -> None:
        """Fills `out_T` from `start` on, shard after shard; nearly always it is one."""
        shard = bisect.bisect_right(self._ends, start)
        while len(out_T):
            array = self._arrays[shard]
            offset = start - (self._ends[shard] - len(array))
            piece = array[offset : offset + len(out_T)]
            out_T[: len(piece)] = piece
            start, out_T, shard = start + len(piece), out_T[len(piece) :], shard + 1

    def _check_ids(self, path: Path, start: int, chunk: np.ndarray) -> None:
        if chunk.max() >= self.vocab_size:
            place = int(np.argmax(chunk >= self.vocab_size))
            raise InputError(
                f"{path}: token {start + place} has id {chunk[place]}, beyond the vocabulary of "
                f"{self.vocab_size}; set model.vocab_size to that of the shards' tokenizer"
            )


def _open(path: Path) -> np.ndarray:
    """The tokens of one shard, mapped from disk: uint16 or uint32 [tokens]."""
    header, size = np.zeros(0, "<i4"), 0
    with contextlib.suppress(OSError):
        header, size = np.fromfile(path, "<i4", count=256), path.stat().st_size
    if not path.is_file():
        raise InputError(f"{path}: no such shard; data.path names .bin files or their directory")
    if len(header) < 256 or header[0] != MAGIC:
        found = f"magic {header[0]}" if len(header) else "no header"
        raise InputError(f"{path}: not a token shard: {found} where {MAGIC} belongs")
    if header[1] not in TOKEN_TYPES:
        raise InputError(
            f"{path}: shard version {header[1]}; 1 (uint16) and 2 (uint32) can be read"
        )
    token_type, n_tokens = TOKEN_TYPES[int(header[1])], int(header[2])
    present = (size - _HEADER_BYTES) // token_type.itemsize
    if n_tokens <= 0 or size != _HEADER_BYTES + n_tokens * token_type.itemsize:
        raise InputError(
            f"{path}: the header promises {n_tokens} tokens and the body holds {present}; "
            f"the file is truncated or damaged, fetch or prepare it again"
        )
    # A plain array over the map: slicing np.memmap itself costs microseconds each time.
    return np.asarray(np.memmap(path, token_type, "r", _HEADER_BYTES, (n_tokens,)))
