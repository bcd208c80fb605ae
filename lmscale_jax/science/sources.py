"""Where tables come from: CSV files, directories of runs, bundled tables, named data sets."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.science.table import NUMBERS, TEXTS, Table, as_table, warning

# Names that a column may have in a file, in order of preference; case does not matter.
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
# Where a run.json has them; dots go into groups.
RECORD = {
    "n": "counts.non_embedding",
    "d": "tokens",
    "c": "flops_total",
    "loss": "final.val_loss",
    "variant": "variant",
    "seed": "seed",
}
# The schema of the curves that the scaling-analysis harness logs, one file a run.
CURVE = ("tokens", "theoretical_flops")


@dataclass(frozen=True)
class Bundled:
    """A table in tables/: file, columns, and the runs left out, by a part of their name."""

    file: str
    columns: dict
    without: tuple[str, ...] = ()


def _olmo(loss: str) -> Bundled:
    columns = {"n": "N", "d": "tokens", "loss": loss, "run_id": "run"}
    # The shortest runs lie outside the grid that the reference values are for; reruns are seeds.
    return Bundled("olmo_ladder.csv", columns, ("-0.5xC", "-rerun"))


BUNDLED = {
    "kyo_takano": Bundled("kyo_takano.csv", {"n": "N", "d": "D", "c": "C", "loss": "loss"}),
    "olmo_ladder_c4": _olmo("c4_en_ce"),
    "olmo_ladder_pile": _olmo("pile_ce"),
    "olmo_ladder_wikitext": _olmo("wikitext103_ce"),
}


@dataclass(frozen=True)
class Named:
    """A data set of the original analysis: folders it may lie in, and its files, one a width."""

    folders: tuple[str, ...]
    pattern: str
    widths: tuple[int, ...] = ()


WIDTHS = (32, 40, 48, 56, 64)
DATASETS = {
    "optimal_lr_sgd_scaling": Named(("optimal_lr_sgd_scaling",), "optimal_lr_sgd_{}d.csv", WIDTHS),
    "vanilla_scaling_optimal_lr": Named(("vanilla_scaling_optimal_lr",), "vanilla_{}d.csv", WIDTHS),
    "mup_scaling_experiments": Named(("mup_scaling_experiments",), "mup_{}d.csv", WIDTHS),
    "vanilla_scaling": Named(("vanilla_scaling",), "*.csv"),
    "generated_experiments": Named(
        ("generated_experiments", "generated_experiments_v100"), "*.csv"
    ),
}


def read(
    source: str,
    columns: dict | None = None,
    where: dict | None = None,
    points: str = "final",
    skip: float = 0.0,
) -> Table:
    """The table of a CSV file, a directory, or a bundled name.

    Args:
        source: FILE.csv; a directory of runs (run.json), of curves (CSV, one a run) or with a
            results.csv; or a name in BUNDLED.
        columns: our name to the file's, or for records a dotted path such as "counts.total" or
            "config.model.mlp"; an empty name leaves an optional column out.
        where: file's column to the value that a row must have.
        points, skip: see `table.as_table`.

    Raises:
        InputError: nothing there, no such column, or a table that cannot be used.
    """
    columns, where = columns or {}, where or {}
    _check_names(columns)
    path = Path(source)
    if source in BUNDLED and not path.exists():
        return _bundled(source, columns, where, points, skip)
    if not path.exists():
        raise InputError(
            f"--input={source} is no file or directory; a CSV, a directory of runs or a bundled "
            f"table ({', '.join(BUNDLED)}) would work"
        )
    if path.is_file():
        return curves([path], columns, where, points, skip, path.name)
    if (path / "results.csv").exists():
        return curves([path / "results.csv"], columns, where, points, skip, str(path))
    records = sorted(path.rglob("run.json"))
    if records:
        return as_table(*_records(records, path, columns), points, skip, str(path))
    files = sorted(path.glob("*.csv"))
    if not files:
        raise InputError(f"--input={source} holds no run.json and no CSV; name a directory of runs")
    return curves(files, columns, where, points, skip, str(path))


def dataset(name: str, folder: str, points: str = "curve", skip: float = 0.0) -> Table:
    """A named data set of the original analysis, from the user's copy of its data."""
    if name not in DATASETS:
        raise InputError(f"--dataset={name} is unknown; one of {', '.join(DATASETS)} would work")
    named, files = DATASETS[name], locate(name, folder)
    if not files:
        raise InputError(
            f"--datasets={folder} has no {named.folders[0]}/{named.pattern.format('32')}; name the "
            "directory that holds the data sets' folders"
        )
    return curves(files, {}, {}, points, skip, name)


def locate(name: str, folder: str) -> list[Path]:
    """The files of a named data set under a directory; empty where it is not there."""
    named = DATASETS[name]
    for inner in named.folders:
        for place in (Path(folder) / inner, *sorted(Path(folder).glob(f"*/{inner}"))):
            wanted = [named.pattern.format(w) for w in named.widths] or [named.pattern]
            files = [f for pattern in wanted for f in sorted(place.glob(pattern))]
            if files:
                return files
    return []


def _check_names(columns: dict) -> None:
    for ours in columns:
        if ours not in (*NUMBERS, *TEXTS):
            known = ", ".join((*NUMBERS, *TEXTS))
            raise InputError(f"--columns={ours}:... is unknown; {known} can be mapped")


def _bundled(name: str, columns: dict, where: dict, points: str, skip: float) -> Table:
    bundled = BUNDLED[name]
    text = (resources.files("lmscale_jax.science") / "tables" / bundled.file).read_text()
    rows = [
        row
        for row in csv.DictReader(text.splitlines())
        if not any(part in row.get("run", "") for part in bundled.without)
    ]
    found = _pick(rows, bundled.columns | columns, where, name)
    return as_table(found, points, skip, name)


def curves(
    files: Sequence[Path], columns: dict, where: dict, points: str, skip: float, name: str
) -> Table:
    """One table of CSV files; each of several is a run of its own unless it names its runs."""
    parts: list[dict] = []
    empty = []
    for file in files:
        rows = _rows(file)
        if not rows:
            empty.append(file.name)
            continue
        if set(CURVE) <= set(rows[0]):
            part = _curve(rows, columns, file)
        else:
            part = _pick(rows, columns, where, file.name)
        if len(files) > 1 and "run_id" not in part:
            part["run_id"] = [file.stem] * len(part["loss"])
        parts.append(part)
    if not parts:
        raise InputError(f"{name} holds no rows; a CSV has a header and one row a run")
    common = set.intersection(*(set(p) for p in parts))
    found = {k: [x for p in parts for x in p[k]] for k in common}
    table = as_table(found, points, skip, name)
    if not empty:
        return table
    note = warning(
        "empty_files",
        f"{len(empty)} files without rows are left out: {', '.join(empty[:4])}; those runs never "
        "logged a loss",
    )
    return _with_note(table, note)


def _with_note(table: Table, note: dict) -> Table:
    from dataclasses import replace

    return replace(table, notes=(*table.notes, note))


def _rows(path: Path) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--input={path} cannot be read as CSV ({error})") from None


def _curve(rows: list[dict], columns: dict, file: Path) -> dict:
    """Columns of a curve file: n from its FLOPs, rows of equal step averaged.

    FLOPs are 6 n tokens with n all parameters, to three digits; their median is sharper.
    """
    loss_name = columns.get("loss") or "validation_loss"
    if loss_name not in rows[0]:
        raise InputError(f"column {loss_name!r} is missing in {file}; training_loss would work")
    names = ("step", "tokens", "theoretical_flops", loss_name)
    try:
        # A missing value is NaN, for the table to drop by name.
        read_R = np.array([[float(row.get(k) or "nan") for k in names] for row in rows])
    except ValueError as error:
        raise InputError(f"--input={file}: {error}; its columns must hold numbers") from None
    read_R = read_R[~(read_R[:, 1] <= 0)]
    if not len(read_R):
        raise InputError(f"--input={file} has no row with tokens above 0")
    _, first, group = np.unique(read_R[:, 0], return_index=True, return_inverse=True)
    count = np.bincount(group)
    mean = [np.bincount(group, read_R[:, k]) / count for k in range(1, 4)]
    order = np.argsort(first)
    d, c, loss = (x[order] for x in mean)
    n = np.full(len(d), np.nanmedian(read_R[:, 2] / (6 * read_R[:, 1])))
    run = [file.stem] * len(d)
    return {"n": n.tolist(), "d": d.tolist(), "c": c.tolist(), "loss": loss.tolist(), "run_id": run}


def _pick(rows: list[dict], columns: dict, where: dict, name: str) -> dict:
    """Our columns of a file's rows, by the mapping and then by well-known names."""
    header = list(rows[0])
    for column in where:
        if column not in header:
            raise InputError(f"--where={column}:... is no column of {name}; {_list(header)} are")
    rows = [r for r in rows if all(str(r[k]) == v for k, v in where.items())]
    if "status" in header:
        rows = [r for r in rows if r["status"] in ("finished", "success", "")]
    if not rows:
        raise InputError(f"--where leaves no row of {name}; check the values")
    lower = {h.strip().lower(): h for h in header if h}
    found = {}
    for ours, aliases in ALIASES.items():
        if ours in columns:
            theirs = columns[ours]
            if theirs and theirs not in header:
                raise InputError(
                    f"--columns={ours}:{theirs} is no column of {name}; {_list(header)} are"
                )
        else:
            theirs = next((lower[a] for a in aliases if a in lower), "")
        if theirs:
            found[ours] = [r[theirs] for r in rows]
    # Without d it follows from the FLOPs, as in tables read off a figure.
    if "d" not in found and {"n", "c"} <= set(found) and "d" not in columns:
        found["d"] = [_tokens(c, n) for c, n in zip(found["c"], found["n"], strict=True)]
    # A budget is a nominal figure that groups runs; their own FLOPs follow from n and d.
    if "c" not in columns and lower.get("budget") and not {"c", "flops"} & set(lower):
        found.pop("c")
    return found


def _tokens(c, n) -> float:
    try:
        return float(c) / (6 * float(n))
    except (TypeError, ValueError, ZeroDivisionError):
        return float("nan")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")


def _records(paths: list[Path], root: Path, columns: dict) -> tuple[dict]:
    """Columns of the finished runs among run records."""
    mapping = RECORD | columns
    rows = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no run record ({error})") from None
        if not isinstance(record, dict) or record.get("status") != "finished":
            continue
        row = {k: _at(record, where) for k, where in mapping.items() if where}
        row["run_id"] = path.parent.relative_to(root).as_posix()
        rows.append(row)
    if not rows:
        raise InputError(f"--input={root} holds {len(paths)} run.json, none of a finished run")
    for name, where in columns.items():
        if where and all(row.get(name) is None for row in rows):
            raise InputError(f"--columns={name}:{where} is in no run.json under {root}")
    kept = [k for k in rows[0] if k == "run_id" or any(r.get(k) is not None for r in rows)]
    return ({k: [r[k] for r in rows] for k in kept},)


def _at(record: dict, path: str):
    value = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
