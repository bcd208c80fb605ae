"""Writes files whole or not at all, and JSON that every reader accepts; checks paths beforehand."""

import glob
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError

_WRITES = itertools.count()


def user_path(text: str) -> Path:
    """Replaces a leading ~ or ~NAME by that home directory. Raises InputError where there is none.

    In a container, a user without HOME and without an entry in /etc/passwd has none.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{text}: there is no home directory of that name (is HOME set?); use a path without ~"
        ) from None


def matching_paths(pattern: str) -> list[str]:
    """Lists the paths that match a glob, sorted; ** matches any number of directories.

    Leading directories that exist under the name in the pattern are taken as they are, so that
    a directory "[v2]" can be named.
    """
    literal = Path(pattern)
    while not literal.exists():
        literal = literal.parent
    rest = Path(pattern).relative_to(literal)
    return sorted(glob.glob(str(Path(glob.escape(str(literal)), rest)), recursive=True))


def comma_separated(text: str, is_item: Callable[[str], object]) -> list[str]:
    """Splits a text at its commas, but not at those within an item, such as a directory "a, b".

    The longest text up to a comma that is an item comes first; where there is none, the shortest.
    """
    parts, items = text.split(","), []
    while parts:
        texts = [",".join(parts[: n + 1]).strip() for n in range(len(parts))]
        items.append(next((item for item in reversed(texts) if is_item(item)), texts[0]))
        del parts[: texts.index(items[-1]) + 1]
    return items


def check_writable(folder: Path, flag: str, remedy_flag: str = "") -> None:
    """Checks that files can be written in a directory, which need not exist yet. Writes nothing.

    Raises:
        InputError: they cannot. The message names the flag, and `remedy_flag`, by default the same,
            with a directory that can be written.
    """
    remedy = f"use {remedy_flag or flag}={tempfile.gettempdir()}/{folder.name[:50]}"
    for path in (folder, *folder.absolute().parents):
        try:
            str(path).encode()
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(
                f"{flag}={folder} cannot be written ({error.strerror}); {remedy}"
            ) from None
        except UnicodeEncodeError:
            raise InputError(
                f"{flag}={str(folder)!a} is no text in the encoding of this terminal; set "
                f"PYTHONUTF8=1, or use another name"
            ) from None
        if not path.is_dir():
            raise InputError(f"{flag}={folder}: {path} is a file; name a directory")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{flag}={folder} cannot be written; {remedy}")
        return


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a file of that name is always complete and on disk.

    Args:
        path: the file; its directory exists.
        content: text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: nothing was written; an earlier file of that name is as it was.
    """
    path = Path(path)
    # Shorter than the 255 bytes that a name may have; another one for a write in a signal handler.
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.{next(_WRITES)}")
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
