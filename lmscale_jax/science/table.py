"""The table that every fit starts from: one row a run, checked before any number comes out of it.

Columns: `n` parameters, `d` training tokens, `c` training FLOPs, `loss` nats/token, `weight`,
`unique` tokens without repetition; and the texts `run_id`, `variant`, `seed`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError

NUMBERS = ("n", "d", "c", "loss", "weight", "unique")
TEXTS = ("run_id", "variant", "seed")
# FLOPs counted with attention and a large readout are some ten times 6 n d for the smallest
# models; a slip of units is a thousand times and more.
MAX_FLOPS_RATIO = 100.0
# FLOPs per parameter and token: 2 forward, 4 backward (Kaplan et al. 2020).
FLOPS_FACTOR = 6.0
FLOPS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Table:
    """Checked columns of equal length R. `n`, `d` or `unique` is None where the table has none.

    `notes` are warnings, {code, message}, of what was left out or looks odd.
    """

    loss: np.ndarray
    c: np.ndarray
    n: np.ndarray | None
    d: np.ndarray | None
    unique: np.ndarray | None
    weight: np.ndarray
    run_id: np.ndarray
    variant: np.ndarray
    seed: np.ndarray
    notes: tuple[dict, ...] = ()
    name: str = "table"
    points: str = "final"

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "Table":
        """The rows of a mask or of indices, with the same notes."""
        arrays = {
            f.name: getattr(self, f.name)[rows]
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays)

    def arm(self, variant: str) -> "Table":
        """The rows of one variant. Raises InputError where there are none."""
        rows = self.variant == variant
        if not rows.any():
            names = ", ".join(sorted(set(self.variant)))
            raise InputError(f"variant {variant!r} is not in {self.name}, which has {names}")
        return self.take(rows)

    def variants(self) -> list[str]:
        return sorted(set(self.variant))

    @property
    def flops_factor(self) -> float:
        """FLOPs per parameter and token: the median of c / (n d); 6 where n or d is missing."""
        if self.n is None or self.d is None:
            return FLOPS_FACTOR
        return float(np.median(self.c / (self.n * self.d)))

    def flops(self, n, d):
        """Estimates the FLOPs of runs with n parameters and d tokens by the table's own factor."""
        return n * d * self.flops_factor

    def column(self, name: str) -> np.ndarray:
        """A column that a law needs. Raises InputError where the table has none."""
        values = getattr(self, name)
        if values is None:
            raise InputError(
                f"column {name!r} is missing in {self.name}; --columns={name}:NAME says which it is"
            )
        return values


def warning(code: str, message: str) -> dict:
    return {"code": code, "message": message}


def as_table(source, points: str = "final", skip: float = 0.0, name: str = "table") -> Table:
    """A Table from a Table, a mapping of columns, or a sequence of mappings, one a row.

    Args:
        source: see above; unknown columns are ignored.
        points: "final" keeps the last row of every run; "curve" keeps all of them.
        skip: with "curve", per cent of every run's rows left out at its start.

    Raises:
        InputError: a column is missing or has another length, a value is zero or negative, units
            disagree (`c` against 6 n d), or too few rows are left.
    """
    if isinstance(source, Table):
        return source
    if not isinstance(source, Mapping):
        rows = list(source)
        names = {k for row in rows for k in row}
        source = {k: [row.get(k) for row in rows] for k in names}
    columns = {k: _column(k, v) for k, v in source.items() if k in (*NUMBERS, *TEXTS)}
    if not columns:
        raise InputError(f"{name} has no rows; a row has n, d and loss")
    _check_shape(columns, name)
    notes: list[dict] = []
    columns = _keep_points(columns, points, skip, notes)
    columns = _drop_missing(columns, name, notes)
    _check_signs(columns, name)
    columns = _drop_copies(columns, notes)
    return _finish(columns, notes, name, points)


def _column(name: str, values: Iterable) -> np.ndarray:
    values = list(values)
    if name in TEXTS:
        return np.array(["" if v is None else str(v) for v in values], dtype=object)
    try:
        return np.array([np.nan if v in (None, "") else float(v) for v in values], float)
    except (TypeError, ValueError):
        bad = next(v for v in values if not _number(v))
        raise InputError(f"column {name!r} holds {bad!r}; it must hold numbers") from None


def _number(value) -> bool:
    try:
        float(value or 0)
    except (TypeError, ValueError):
        return False
    return True


def _check_shape(columns: dict, name: str) -> None:
    if "loss" not in columns:
        raise InputError(
            f"column 'loss' is missing in {name}; --columns=loss:NAME says which column it is"
        )
    if "c" not in columns and not {"n", "d"} <= set(columns):
        lacks = "n" if "n" not in columns else "d"
        raise InputError(
            f"column {lacks!r} is missing in {name}; --columns={lacks}:NAME says which column it is"
        )
    lengths = {k: len(v) for k, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns of {name} differ in length: {lengths}")
    if "run_id" not in columns or not any(columns["run_id"]):
        rows = range(1, len(columns["loss"]) + 1)
        columns["run_id"] = np.array([f"row {i}" for i in rows], dtype=object)


def _keep_points(columns: dict, points: str, skip: float, notes: list) -> dict:
    """The last row of every run, or all rows but the first `skip` per cent of each."""
    if points not in ("final", "curve"):
        raise InputError(f"--points={points} is unknown; final or curve would work")
    if not 0.0 <= skip < 100.0:
        raise InputError(f"--skip={skip} must be a percentage from 0 to below 100; 10 would work")
    progress = columns.get("d", columns.get("c"))
    groups = _groups(columns["run_id"])
    longest = max((len(rows) for rows in groups), default=1)
    if points == "curve":
        kept = [rows[int(len(rows) * skip / 100) :] for rows in groups]
        if longest > 1:
            notes.append(
                warning(
                    "curve_points",
                    f"{len(progress)} curve points of {len(groups)} runs are not {len(progress)} "
                    "data: intervals resample whole runs, and losses before the learning rate has "
                    "come down measure the schedule too; --points=final uses one point a run",
                )
            )
    else:
        kept = [[max(rows, key=lambda i: (np.nan_to_num(progress[i]), i))] for rows in groups]
        if longest > 1:
            notes.append(
                warning(
                    "final_points",
                    f"the last of up to {longest} rows of each of {len(groups)} runs is used; "
                    "--points=curve uses all rows",
                )
            )
    rows = np.sort(np.concatenate([np.asarray(k, int) for k in kept])) if kept else []
    return {k: v[rows] for k, v in columns.items()}


def _groups(labels: np.ndarray) -> list[list[int]]:
    found: dict = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return list(found.values())


def _drop_missing(columns: dict, name: str, notes: list) -> dict:
    """Leaves out rows that hold NaN or infinity, by name."""
    numbers = [v for k, v in columns.items() if k in NUMBERS]
    good = np.all([np.isfinite(v) for v in numbers], axis=0)
    if not good.all():
        who = _some(columns["run_id"][~good])
        notes.append(
            warning(
                "dropped_rows",
                f"{int((~good).sum())} of {len(good)} rows left out because a value is missing, "
                f"NaN or infinite: {who}; a diverged run is no measurement of the law",
            )
        )
    if not good.any():
        raise InputError(f"{name} has no row in which every value is finite")
    return {k: v[good] for k, v in columns.items()}


def _some(names: np.ndarray, most: int = 4) -> str:
    distinct = list(dict.fromkeys(str(n) for n in names))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def _check_signs(columns: dict, name: str) -> None:
    for key in NUMBERS:
        if key in columns and (columns[key] <= 0).any():
            i = int(np.argmax(columns[key] <= 0))
            raise InputError(
                f"column {key!r} of {name} is {columns[key][i]:g} at {columns['run_id'][i]!r}; "
                "it must be positive, as the law takes its logarithm (delete the row if it failed)"
            )


def _drop_copies(columns: dict, notes: list) -> dict:
    """Leaves out runs whose every number equals another run's of the same variant."""
    keys = [k for k in ("n", "d", "c", "loss") if k in columns]
    groups, seen, copies = _groups(columns["run_id"]), {}, []
    for rows in groups:
        variant = columns["variant"][rows[0]] if "variant" in columns else ""
        content = (variant, np.stack([columns[k][rows] for k in keys]).tobytes())
        if content in seen:
            copies.append((rows, seen[content]))
        else:
            seen[content] = columns["run_id"][rows[0]]
    if not copies:
        return columns
    kept = np.ones(len(columns["loss"]), bool)
    kept[[i for rows, _ in copies for i in rows]] = False
    first, original = copies[0]
    notes.append(
        warning(
            "duplicate_runs",
            f"{len(copies)} runs equal another in every number and are left out, first "
            f"{columns['run_id'][first[0]]!r}, a copy of {original!r}; two seeds never agree so",
        )
    )
    return {k: v[kept] for k, v in columns.items()}


def _finish(columns: dict, notes: list, name: str, points: str) -> Table:
    size = len(columns["loss"])
    n, d = columns.get("n"), columns.get("d")
    c = columns.get("c")
    if c is None:
        c = FLOPS_FACTOR * n * d
    elif n is not None and d is not None:
        notes += _check_units(n, d, c, columns["run_id"], name)
    notes += _copied_arms(columns, c)
    blank = np.full(size, "", dtype=object)
    return Table(
        loss=columns["loss"],
        c=c,
        n=n,
        d=d,
        unique=columns.get("unique"),
        weight=columns.get("weight", np.ones(size)),
        run_id=columns["run_id"],
        variant=columns.get("variant", blank),
        seed=columns.get("seed", blank),
        notes=tuple(notes),
        name=name,
        points=points,
    )


def _check_units(n, d, c, run_id, name: str) -> list[dict]:
    ratio = c / (FLOPS_FACTOR * n * d)
    worst = int(np.argmax(np.abs(np.log(ratio))))
    if not 1 / MAX_FLOPS_RATIO < ratio[worst] < MAX_FLOPS_RATIO:
        raise InputError(
            f"column 'c' of {name} is {c[worst]:.3g} at {run_id[worst]!r}, {ratio[worst]:.3g} "
            "times 6 n d; are n or d in millions or billions? They must be numbers of parameters "
            "and tokens, c FLOPs (or leave c out with --columns=c:)"
        )
    if np.abs(ratio - 1).max() <= FLOPS_TOLERANCE:
        return []
    return [
        warning(
            "flops_convention",
            f"c is {ratio.min():.3g} to {ratio.max():.3g} times 6 n d: n and c follow different "
            "conventions, so exponents in n and in c cannot be converted into each other; "
            "--columns=c: leaves c out and takes 6 n d",
        )
    ]


def _copied_arms(columns: dict, c: np.ndarray) -> list[dict]:
    """A warning where two variants share a measurement to the last digit."""
    if "variant" not in columns:
        return []
    seen: dict = {}
    shared = []
    for i, variant in enumerate(columns["variant"]):
        other = seen.setdefault((c[i], columns["loss"][i]), (variant, columns["run_id"][i]))
        if other[0] != variant:
            shared.append((columns["run_id"][i], other[1]))
    if not shared:
        return []
    return [
        warning(
            "copied_runs",
            f"{len(shared)} runs have the FLOPs and the loss of a run of another variant, first "
            f"{shared[0][0]!r} and {shared[0][1]!r}: one of the two was copied; train it anew",
        )
    ]
