"""Writes files whole or not at all, and JSON that every reader accepts."""

import json
import math
import os
from pathlib import Path

import numpy as np


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a file of that name is always complete and on disk.

    Args:
        path: the file; its directory exists.
        content: text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: nothing was written; an earlier file of that name is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Writes `plain_values(value)` as indented JSON, atomically."""
    atomic_write(path, json.dumps(plain_values(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """Reads a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not UTF-8.
    """
    return json.loads(Path(path).read_text(encoding="utf-8"))


def plain_values(value):
    """Returns the value as JSON can hold it.

    Non-finite floats become None (JSON has no NaN), numpy's scalars and arrays Python's numbers
    and lists, keys text, tuples lists.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
