"""Reads the columns of one table file: delimited text, JSON, JSON lines or Parquet, also gzipped.

The form follows from the content, not from the file's name.
"""

import csv
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path

from lmscale_jax.errors import InputError

DELIMITERS = ("\t", ";", ",", "|")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
# As many digits as a group of thousands has.
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")


def read_columns(path: Path) -> dict[str, list]:
    """Reads {header: values [R]}; values are texts, or what JSON and Parquet hold.

    Text without a header has the headers "1", "2", ... Lines that begin with # and blank lines are
    left out. A cell that is absent at the end of a line is "".

    Raises:
        InputError: the file cannot be read in any of the forms, two columns have one name, a line
            has more cells than the header, or a comma may mark decimals or thousands.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise InputError(f"--input={path} cannot be read ({error})") from None
    if content.startswith(b"PAR1"):
        return _parquet_columns(content, path)
    try:
        text = content.decode(
            "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"--input={path} is neither text, Parquet nor gzip ({error}); write a CSV in UTF-8"
        ) from None
    if text.lstrip()[:1] in ("[", "{"):
        return _json_columns(text, path)
    return parse_columns(text, path)


def _parquet_columns(content: bytes, path: Path) -> dict[str, list]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            f"--input={path} is Parquet; pip install pyarrow, or write a CSV"
        ) from None
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (ArrowException, OSError) as error:
        raise InputError(f"--input={path} is not readable Parquet ({error})") from None
    _check_header(table.column_names, path)
    return table.to_pydict()


def _json_columns(text: str, path: Path) -> dict[str, list]:
    """Reads a list of objects, an object of columns, or one object on each line."""
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"--input={path} is neither JSON nor JSON lines ({error})") from None
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {name: len(values) for name, values in value.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"--input={path}: columns differ in length: {lengths}")
        return value
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f'--input={path} must hold objects such as {{"n": 1e8, "d": 2e9, "loss": 3.1}}'
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def parse_columns(text: str, path: Path | str) -> dict[str, list]:
    """Parses delimited text, the delimiter being the commonest in the first line.

    See `read_columns`; `path` names the table in errors.
    """
    # Lines keep their ends because a quoted cell may have several.
    lines = [line for line in text.splitlines(keepends=True) if line.strip() and line[:1] != "#"]
    if not lines:
        return {}
    delimiter = max(DELIMITERS, key=lines[0].count)
    if delimiter not in lines[0]:
        delimiter = " "
        lines = [" ".join(line.split()) for line in lines]
    try:
        rows = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise InputError(f"--input={path} cannot be read as text ({error})") from None
    header = [name.strip() for name in rows[0]]
    if all(_is_number(cell) for cell in header):
        header = [str(i) for i in range(1, len(header) + 1)]
    else:
        rows = rows[1:]
    _check_header(header, path)
    width = len(header)
    for i, row in enumerate(rows):
        if len(row) == width:
            continue
        if any(cell.strip() for cell in row[width:]):
            raise InputError(
                f"--input={path}: {delimiter.join(row)[:80]!r} has {len(row)} cells and the header "
                f"{width}; quote texts that contain {delimiter!r}"
            )
        rows[i] = row[:width] + [""] * (width - len(row))
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
    if delimiter == ",":
        return columns
    return {name: _with_decimal_points(values, name, path) for name, values in columns.items()}


def _check_header(header: list[str], path: Path) -> None:
    name, count = Counter(filter(None, header)).most_common(1)[0] if any(header) else ("", 0)
    if count > 1:
        raise InputError(f"--input={path} has {count} columns named {name!r}; rename all but one")


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _with_decimal_points(values: list[str], name: str, path: Path) -> list[str]:
    """Writes a column's decimal commas as points; texts stay as they are."""
    with_comma = [v.strip() for v in values if "," in v]
    if not with_comma or not all(DECIMAL_COMMA.fullmatch(v) for v in with_comma):
        return values
    if all(THOUSANDS.fullmatch(v) for v in with_comma):
        raise InputError(
            f"--input={path}: column {name!r} holds {with_comma[0]!r}, in which the comma may mark "
            f"decimals or thousands; write {with_comma[0].replace(',', '')} or "
            f"{with_comma[0].replace(',', '.', 1)}"
        )
    return [v.replace(",", ".") for v in values]
