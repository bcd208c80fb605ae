"""Streams the documents of a source, and lists the source's files.

Documents keep every character: the documents of a file, joined, are the file.
"""

import functools
import gzip
import itertools
import json
import os
import platform
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.data import corpora, tables
from lmscale_jax.errors import InputError
from lmscale_jax.files import comma_separated, matching_paths, user_path

DOCUMENT_PATTERNS = Modes(
    "data.document",
    {
        "file": re.compile(r".+", re.DOTALL),
        # The blank lines after a paragraph belong to it.
        "paragraph": re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL),
        "line": re.compile(r"[^\n]*\n|[^\n]+"),
    },
)
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# What to do with files that are no text, by their ending.
_NO_TEXT = dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".lz4", ".tar"), "unpack it first") | {
    ".bin": "set data.source='bin' for token shards",
    ".parquet": "set data.source='parquet'",
}
_JSONL_ENDINGS = (".jsonl", ".jsonl.gz")


def documents(data_cfg, on_skip: Callable[[Path], object] = lambda path: None) -> Iterator[str]:
    """Yields every document of the source that is not empty, in a fixed order.

    Args:
        data_cfg: the config group `data`; its source is one of text, not the name of a corpus.
        on_skip: called with each file of the standard library that cannot be decoded (some of its
            test files are broken on purpose). Other sources raise instead.

    Raises:
        InputError: a path is missing, a file is binary or damaged, a JSON line lacks the field.
    """
    yield from itertools.islice(_documents(data_cfg, on_skip), data_cfg.limit or None)


def _documents(data_cfg, on_skip) -> Iterator[str]:
    yield from SOURCES[data_cfg.source].documents(data_cfg, on_skip)


def _of_library(data_cfg, on_skip) -> Iterator[str]:
    for path in source_files(data_cfg):
        yield from _library_documents(path, on_skip)


def _of_texts(data_cfg, on_skip) -> Iterator[str]:
    for path in source_files(data_cfg):
        yield from DOCUMENT_PATTERNS[data_cfg.document].findall(_read_text(path))


def _of_json(data_cfg, on_skip) -> Iterator[str]:
    for path in source_files(data_cfg):
        yield from _json_documents(path, data_cfg.field)


def _of_rows(values: Callable) -> Callable:
    """`documents` of a table, from data_cfg -> the values of its text field."""

    def documents(data_cfg, on_skip) -> Iterator[str]:
        where = f"data.path={data_cfg.path}: field {data_cfg.field!r}"
        for value in values(data_cfg):
            # Tables of web pages have rows without text.
            if value and (text := _checked_text(value, where)):
                yield text

    return documents


def _parquet_values(data_cfg) -> Iterator:
    for path in source_files(data_cfg):
        yield from tables.parquet_values(path, data_cfg.field)


def source_files(data_cfg) -> list[Path]:
    """Lists the files of a source in the order in which they are read; [] for the hub's.

    Raises:
        InputError: nothing is found under data.path.
    """
    return SOURCES[data_cfg.source].files(data_cfg)


def _library(data_cfg) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(_library_files(root), key=lambda path: path.relative_to(root).as_posix())


def _local_dataset(data_cfg) -> list[Path]:
    local = tables.local_dataset(data_cfg)
    return find_files(str(local), "data.path", ()) if local else []


def _tfds(data_cfg) -> list[Path]:
    folder = user_path(data_cfg.directory or "~/tensorflow_datasets")
    dataset = folder / data_cfg.path.split(":")[0]
    return find_files(str(dataset), "data.path", ()) if dataset.is_dir() else []


def _ending(*endings: str) -> Callable:
    return lambda data_cfg: find_files(data_cfg.path, "data.path", endings)


def find_files(paths: str, field: str, endings: tuple[str, ...]) -> list[Path]:
    """Finds the files of a path, directory or glob, or of several of them joined by commas.

    The files of each item are sorted, items keep their order, and no file is listed twice. A comma
    or bracket in the name of a file or directory that exists is part of the name.

    Args:
        paths: the value of the config key.
        field: the config key, for messages.
        endings: of the files that count in a directory; () for all. Hidden files never count.

    Raises:
        InputError: an item is empty or matches no file.
    """
    matches = {}
    files_of = functools.cache(lambda item: _matches(item, endings))
    for item in comma_separated(paths, files_of):
        if not files_of(item):
            raise InputError(
                f"{field}={item!r}: no {' or '.join(endings) or 'text'} file there; name a "
                f"file, a directory with some, or a glob such as 'texts/**/*.txt'"
            )
        matches.update(dict.fromkeys(files_of(item)))
    return list(matches)


def has_files(paths: str, endings: tuple[str, ...]) -> bool:
    """Tells whether any item of a key's value matches a file; see `find_files`."""
    files_of = functools.cache(lambda item: _matches(item, endings))
    return any(map(files_of, comma_separated(paths, files_of)))


def _matches(item: str, endings: tuple[str, ...]) -> list[Path]:
    item = str(user_path(item)) if item.startswith("~") else item
    if os.path.isdir(item):
        return [
            path
            for path in sorted(Path(item).rglob("*"))
            if path.name.endswith(endings or "")
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(item).parts)
        ]
    names = [item] if os.path.exists(item) else matching_paths(item)
    return [Path(name) for name in names if os.path.isfile(name)]


def _library_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        # Pruned: installed packages can be a hundred times the library.
        subdirectories[:] = set(subdirectories) - _NOT_LIBRARY
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _library_documents(path: Path, on_skip: Callable[[Path], object]) -> Iterator[str]:
    try:
        with tokenize.open(path) as file:  # follows the file's coding line
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        on_skip(path)
        return
    if text:
        yield text


def _json_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"data.path={path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where}: broken JSON ({error}); every line must be one JSON object"
            ) from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object but {line.strip()[:40]}")
        if field not in record:
            names = ", ".join(map(str, record)) or "none"
            raise InputError(f"{where}: no field {field!r}; set data.field to one of: {names}")
        if text := _checked_text(record[field], f"{where}: field {field!r}"):
            yield text


def _checked_text(value, where: str) -> str:
    """Returns the value if it is text that UTF-8 can encode. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{where} holds {type(value).__name__}, not text; set data.field")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair, which is not text") from error
    return value


def _read_text(path: Path) -> str:
    """Reads a file, unpacked if it ends in .gz; line ends stay. Raises InputError."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data.path={path}: cannot be read ({error})") from None
    remedy = _NO_TEXT.get(path.suffix)
    if b"\0" in content:
        remedy = remedy or "name files of UTF-8 text only"
        raise InputError(f"data.path={path}: a binary file (it has NUL bytes); {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.path={path}: not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}); "
            f"{remedy or 're-encode it, as iconv -f latin1 -t utf-8 does, or leave it out'}"
        ) from None


class Source(NamedTuple):
    """Where data come from.

    Attributes:
      documents: (data_cfg, on_skip) -> texts, without `limit`; None for a source of tokens.
      files: data_cfg -> the files behind them, in the order in which they are read.
      keys: of `data` that decide which documents it has, beside those of every source.
      needs_path: data.path must be given.
      version: () -> what else its documents depend on, or None.
    """

    documents: Callable | None
    files: Callable = lambda data_cfg: []
    keys: tuple[str, ...] = ()
    needs_path: bool = True
    version: Callable = lambda: None


_HUB = Source(
    _of_rows(tables.dataset_values),
    _local_dataset,
    ("path", "subset", "rows", "revision", "field", "limit"),
)
SOURCES = Modes(
    "data.source",
    {
        "stdlib": Source(_of_library, _library, needs_path=False, version=platform.python_version),
        "text": Source(_of_texts, _ending(), ("document",)),
        "jsonl": Source(_of_json, _ending(*_JSONL_ENDINGS), ("field", "limit")),
        "parquet": Source(_of_rows(_parquet_values), _ending(".parquet"), ("field", "limit")),
        "hf": _HUB,
        "tfds": Source(_of_rows(tables.tfds_values), _tfds, ("path", "rows", "field", "limit")),
        # Datasets on the hub by name: `corpora.plain_source` fills in which.
        **dict.fromkeys(corpora.CORPORA, _HUB._replace(needs_path=False)),
        "bin": Source(None),
        "mixture": Source(None),
        corpora.SHARDS: Source(None, needs_path=False),
        "none": Source(None, needs_path=False),
    },
)
