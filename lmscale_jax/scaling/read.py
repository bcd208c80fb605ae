"""Reads tables from files, directories of runs, bundled tables and named data sets."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import diagnostics
from lmscale_jax.scaling.table import FLOPS_FACTOR, NUMBERS, TEXTS, Table, as_table, fit_warning
from lmscale_jax.scaling.table_file import parse_columns, read_columns

# Accepted column names in files, in order of preference; case is ignored.
ALIASES = {
    "n": ("n", "n_non_embedding", "params", "parameters", "model size", "n_params", "n_total"),
    "d": ("d", "tokens", "n_tokens", "training tokens"),
    "c": ("c", "flops", "training flop", "flops_total", "budget"),
    "loss": ("loss", "val_loss", "validation_loss", "final_val_loss"),
    "run_id": ("run_id", "run", "id"),
    "variant": ("variant", "arm"),
    "seed": ("seed",),
    "weight": ("weight",),
    "unique": ("unique", "unique_tokens"),
}
# Dotted paths of the columns in run.json.
RECORD_PATHS = {
    "n": "counts.non_embedding",
    "d": "tokens",
    "c": "flops_total",
    "loss": "final.val_loss",
    "variant": "variant",
    "seed": "seed",
}
# A column of such a name holds exp(loss).
PERPLEXITY = re.compile(r"ppl|perplexity", re.IGNORECASE)
# Names of tables in a directory, also with .gz behind.
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
# Columns that identify a curve file of the original scaling analysis, one file per run.
CURVE_COLUMNS = ("tokens", "theoretical_flops")


@dataclass(frozen=True)
class BundledTable:
    """A table shipped in tables/: its file, its columns, and name parts of omitted runs."""

    file: str
    columns: dict
    without: tuple[str, ...] = ()


def _olmo(loss: str) -> BundledTable:
    columns = {"n": "N", "d": "tokens", "loss": loss, "run_id": "run"}
    # The reference values exclude the shortest runs and the reruns with other seeds.
    return BundledTable("olmo_ladder.csv", columns, ("-0.5xC", "-rerun"))


BUNDLED = {
    "kyo_takano": BundledTable("kyo_takano.csv", {"n": "N", "d": "D", "c": "C", "loss": "loss"}),
    "olmo_ladder_c4": _olmo("c4_en_ce"),
    "olmo_ladder_pile": _olmo("pile_ce"),
    "olmo_ladder_wikitext": _olmo("wikitext103_ce"),
}


@dataclass(frozen=True)
class NamedData:
    """A data set of the original analysis: possible folders, and a file for each width."""

    folders: tuple[str, ...]
    pattern: str
    widths: tuple[int, ...] = ()


WIDTHS = (32, 40, 48, 56, 64)
DATASETS = {
    "optimal_lr_sgd_scaling": NamedData(
        ("optimal_lr_sgd_scaling",), "optimal_lr_sgd_{}d.csv", WIDTHS
    ),
    "vanilla_scaling_optimal_lr": NamedData(
        ("vanilla_scaling_optimal_lr",), "vanilla_{}d.csv", WIDTHS
    ),
    "mup_scaling_experiments": NamedData(("mup_scaling_experiments",), "mup_{}d.csv", WIDTHS),
    "vanilla_scaling": NamedData(("vanilla_scaling",), "*.csv"),
    "generated_experiments": NamedData(
        ("generated_experiments", "generated_experiments_v100"), "*.csv"
    ),
}


def read_table(
    source: str,
    columns: dict | None = None,
    where: dict | None = None,
    points: str = "final",
    skip: float = 0.0,
) -> Table:
    """Reads the table of a CSV file, a directory, or a bundled name.

    Args:
        source: FILE.csv; a directory of runs (run.json), of curves (one CSV per run) or with a
            results.csv; or a name in BUNDLED.
        columns: maps our column names to the file's, or for run records to a dotted path such as
            "counts.total" or "config.model.mlp"; an empty name omits an optional column.
        where: maps columns of the file to the value that a row must have.
        points, skip: see `as_table`.

    Raises:
        InputError: the source or a column does not exist, or the table is unusable.
    """
    columns, where = columns or {}, where or {}
    _check_columns(columns)
    path = Path(source)
    if source in BUNDLED and not path.exists():
        return _bundled(source, columns, where, points, skip)
    if not path.exists():
        raise InputError(
            f"--input={source} is no file or directory; use a CSV, a directory of runs or a "
            f"bundled table ({', '.join(BUNDLED)})"
        )
    if path.is_file():
        return read_curves([path], columns, where, points, skip, path.name)
    if (path / "results.csv").exists():
        return read_curves([path / "results.csv"], columns, where, points, skip, str(path))
    records = sorted(path.rglob("run.json"))
    if records:
        return as_table(_records(records, path, columns), points, skip, str(path))
    files = sorted(f for f in path.iterdir() if f.name.removesuffix(".gz").endswith(TABLE_ENDINGS))
    if not files:
        raise InputError(
            f"--input={source} has no run.json and no table ({', '.join(TABLE_ENDINGS)}); use a "
            "directory of runs"
        )
    return read_curves(files, columns, where, points, skip, str(path))


def read_named(name: str, folder: Path, points: str = "curve", skip: float = 0.0) -> Table:
    """Reads a named data set of the original analysis from the user's copy of its data.

    Raises:
        InputError: the name is unknown or its files are not under `folder`.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset={name} is unknown; use one of {', '.join(DATASETS)}")
    named, files = DATASETS[name], locate_named(name, folder)
    if not files:
        raise InputError(
            f"--datasets={folder} has no {named.folders[0]}/{named.pattern.format('32')}; use the "
            "directory that contains the data sets' folders"
        )
    return read_curves(files, {}, {}, points, skip, name)


def locate_named(name: str, folder: Path) -> list[Path]:
    """Lists the files of a named data set under a directory; [] if it is absent."""
    named = DATASETS[name]
    for inner in named.folders:
        for directory in (folder / inner, *sorted(folder.glob(f"*/{inner}"))):
            patterns = [named.pattern.format(w) for w in named.widths] or [named.pattern]
            files = [f for pattern in patterns for f in sorted(directory.glob(pattern))]
            if files:
                return files
    return []


def _check_columns(columns: dict) -> None:
    """Raises InputError if a mapped column is not one of ours."""
    for ours in columns:
        if ours not in (*NUMBERS, *TEXTS):
            mappable = ", ".join((*NUMBERS, *TEXTS))
            raise InputError(f"--columns={ours}:... is unknown; use one of {mappable}")


def _bundled(name: str, columns: dict, where: dict, points: str, skip: float) -> Table:
    bundled = BUNDLED[name]
    file = resources.files("lmscale_jax.scaling") / "tables" / bundled.file
    content = parse_columns(file.read_text(encoding="utf-8"), bundled.file)
    if bundled.without:
        rows = [not any(part in run for part in bundled.without) for run in content["run"]]
        content = {k: list(compress(values, rows)) for k, values in content.items()}
    content = _select_rows(content, where, name)
    picked = _pick_columns(content, bundled.columns | columns, name)
    return as_table(picked, points, skip, name)


def read_curves(
    files: Sequence[Path], columns: dict, where: dict, points: str, skip: float, name: str
) -> Table:
    """Merges table files into one table; without a run column each file is one run."""
    parts: list[dict] = []
    empty = []
    unused: dict[str, list] = {}
    for file in files:
        content = read_columns(file)
        if not any(map(len, content.values())):
            empty.append(file.name)
            continue
        if set(CURVE_COLUMNS) <= set(content):
            part = _curve(content, columns, file)
        else:
            content = _select_rows(content, where, file.name)
            part = _pick_columns(content, columns, file.name)
            for column, values in content.items():
                if not any(values is used for used in part.values()):
                    unused.setdefault(column, []).extend(values)
        if len(files) > 1 and "run_id" not in part:
            part["run_id"] = [file.stem] * len(part["loss"])
        parts.append(part)
    if not parts:
        raise InputError(f"{name} has no rows; a table needs a header and one row per run")
    common = set.intersection(*(set(p) for p in parts))
    if not common:
        # Without one of ours the table's own names say what there is to map.
        return as_table(unused, points, skip, name)
    merged = {k: [x for p in parts for x in p[k]] for k in common}
    table = as_table(merged, points, skip, name)
    notes = [] if points == "best" else diagnostics.pooled_settings(unused, merged, points, name)
    if empty:
        names = ", ".join(empty[:4])
        notes.append(
            fit_warning(
                "empty_files",
                f"{len(empty)} files without rows are omitted: {names}; those runs never logged a "
                "loss",
            )
        )
    return replace(table, notes=(*table.notes, *notes))


def _curve(content: dict[str, list], columns: dict, file: Path) -> dict:
    """Reads the columns of a curve file: n follows from FLOPs, rows of equal step are averaged.

    The file's FLOPs are 6 n tokens with n all parameters, rounded to three digits; the median over
    rows reduces the rounding error.
    """
    loss_name = columns.get("loss") or "validation_loss"
    if loss_name not in content:
        raise InputError(
            f"column {loss_name!r} is missing in {file}; use --columns=loss:training_loss"
        )
    names = ("step", "tokens", "theoretical_flops", loss_name)
    try:
        # A missing value becomes NaN; `as_table` omits the row and names it.
        read_R = np.array([[float(x or "nan") for x in content[k]] for k in names]).T
    except ValueError as error:
        raise InputError(f"--input={file}: {error}; its columns must hold numbers") from None
    read_R = read_R[~(read_R[:, 1] <= 0)]
    if not len(read_R):
        raise InputError(f"--input={file} has no row with tokens above 0; check its column tokens")
    _, first, group = np.unique(read_R[:, 0], return_index=True, return_inverse=True)
    count = np.bincount(group)
    mean = [np.bincount(group, read_R[:, k]) / count for k in range(1, 4)]
    order = np.argsort(first)
    d, c, loss = (x[order] for x in mean)
    n = np.full(len(d), np.nanmedian(read_R[:, 2] / (FLOPS_FACTOR * read_R[:, 1])))
    run = [file.stem] * len(d)
    return {"n": n.tolist(), "d": d.tolist(), "c": c.tolist(), "loss": loss.tolist(), "run_id": run}


def _select_rows(content: dict[str, list], where: dict, name: str) -> dict[str, list]:
    """Selects the rows that `where` asks for and whose status is not that of an unfinished run."""
    for column in where:
        if column not in content:
            raise InputError(
                f"--where={column}:... is no column of {name}; use {_list(list(content))}"
            )
    rows = np.ones(len(next(iter(content.values()))), bool)
    for column, value in where.items():
        rows &= [str(x) == value for x in content[column]]
    if "status" in content:
        rows &= [x in ("finished", "success", "", None) for x in content["status"]]
    if not rows.any():
        raise InputError(f"--where matches no row of {name}; check the values")
    return {k: list(compress(values, rows)) for k, values in content.items()}


def _pick_columns(content: dict[str, list], columns: dict, name: str) -> dict:
    """Picks our columns from a file's, by the mapping first and by ALIASES second."""
    header = list(content)
    lower = {h.strip().lower(): h for h in header if h}
    picked = {}
    for ours, aliases in ALIASES.items():
        if ours in columns:
            theirs = columns[ours]
            if theirs and theirs not in header:
                raise InputError(
                    f"--columns={ours}:{theirs} is no column of {name}; use {_list(header)}"
                )
        else:
            theirs = next((lower[a] for a in aliases if a in lower), "")
        if theirs:
            picked[ours] = content[theirs]
        if ours == "loss" and PERPLEXITY.search(theirs):
            picked[ours] = [_log(x) for x in content[theirs]]
    # A missing d follows from the FLOPs, as in tables digitised from figures.
    if "d" not in picked and {"n", "c"} <= set(picked) and "d" not in columns:
        picked["d"] = [_token_column(c, n) for c, n in zip(picked["c"], picked["n"], strict=True)]
    # A budget is only nominal; the runs' FLOPs follow from n and d.
    if "c" not in columns and lower.get("budget") and not {"c", "flops"} & set(lower):
        picked.pop("c")
    return picked


def _log(value) -> float:
    """Takes the logarithm of a perplexity; NaN where that is impossible."""
    try:
        return math.log(float(value))
    except (TypeError, ValueError):
        return math.nan


def _token_column(c, n) -> float:
    """Computes d = c / (6 n); NaN where that is impossible."""
    try:
        return float(c) / (FLOPS_FACTOR * float(n))
    except (TypeError, ValueError, ZeroDivisionError):
        return float("nan")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")


def _records(paths: list[Path], root: Path, columns: dict) -> dict:
    """Reads the columns of all finished runs from their run records."""
    mapping = RECORD_PATHS | columns
    rows = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no run record ({error}); move it away") from None
        if not isinstance(record, dict) or record.get("status") != "finished":
            continue
        row = {k: _value_at(record, where) for k, where in mapping.items() if where}
        row["run_id"] = path.parent.relative_to(root).as_posix()
        rows.append(row)
    if not rows:
        raise InputError(f"--input={root} has {len(paths)} run.json, none of a finished run")
    if mapping["loss"] == RECORD_PATHS["loss"] and all(row["loss"] is None for row in rows):
        raise InputError(
            f"--input={root} has {len(rows)} finished run{'s' * (len(rows) > 1)} without a "
            "validation loss, such as one imported without data; import with --config=C, which "
            "evaluates"
        )
    for name, where in columns.items():
        if where and all(row.get(name) is None for row in rows):
            raise InputError(
                f"--columns={name}:{where} is in no run.json under {root}; use a path such as "
                f"{RECORD_PATHS.get(name, 'config.model.mlp')}"
            )
    present = [k for k in rows[0] if k == "run_id" or any(r.get(k) is not None for r in rows)]
    return {k: [r[k] for r in rows] for k in present}


def _value_at(record: dict, path: str):
    value = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
