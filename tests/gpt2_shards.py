"""Writes small shards as the GPT-2 speedruns publish theirs, by numpy alone.

    python tests/gpt2_shards.py DIRECTORY

A file is 256 int32 (magic 20240520, version 1, number of tokens, zeros), then uint16 tokens. Every
document begins with GPT-2's mark, 50256; its text is that of Python's own modules, a byte an id.
"""

import sys
import sysconfig
from pathlib import Path

import numpy as np

MARK = 50256
VOCAB_SIZE = 50257
MODULES = ("json", "email", "logging")


def documents(modules=MODULES) -> list[np.ndarray]:
    """The tokens of each document, from the standard library's source files."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for name in modules for path in sorted((library / name).rglob("*.py"))]
    texts = [path.read_bytes() for path in files]
    return [np.array([MARK, *text], np.uint16) for text in texts if text]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())


def write_shards(directory: Path) -> Path:
    """Writes two training shards and one for validation; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(documents())
    held_out, half = len(tokens) // 10, len(tokens) // 2
    write_shard(directory / "fineweb_val_000000.bin", tokens[:held_out])
    write_shard(directory / "fineweb_train_000001.bin", tokens[held_out:half])
    write_shard(directory / "fineweb_train_000002.bin", tokens[half:])
    return directory


if __name__ == "__main__":
    write_shards(Path(sys.argv[1]))
