"""The validated table of runs that every fit uses.

Columns: `n` parameters, `d` training tokens, `c` training FLOPs, `loss` nats/token, `weight`,
`unique` distinct tokens; and the texts `run_id`, `variant`, `seed`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError

NUMBERS = ("n", "d", "c", "loss", "weight", "unique")
TEXTS = ("run_id", "variant", "seed")
# For the smallest models FLOPs with attention and a large readout reach about ten times 6 n d; a
# wrong unit makes a factor of a thousand or more.
MAX_FLOPS_RATIO = 100.0
# Rows of a table: see `as_table`.
POINTS = ("final", "curve", "best")
# Below these no language model is trained, and above that none trained has so high a loss: it is
# that of a uniform guess among 440,000 tokens.
MIN_PARAMETERS, MIN_TOKENS, MAX_LOSS = 1e3, 1e5, 13.0
MAX_TOKENS_PER_PARAMETER = 1e5
# FLOPs per parameter and token: 2 forward, 4 backward (Kaplan et al. 2020).
FLOPS_FACTOR = 6.0
FLOPS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Table:
    """Validated columns of equal length R; `n`, `d` and `unique` may be None.

    `notes` are warnings {code, message} about omitted rows and suspicious values.
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
        """Selects rows by a mask or by indices and keeps the notes."""
        arrays = {
            f.name: getattr(self, f.name)[rows]
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays)

    def arm(self, variant: str) -> "Table":
        """Selects the rows of one variant. Raises InputError if there are none."""
        rows = self.variant == variant
        if not rows.any():
            names = ", ".join(sorted(set(self.variant)))
            raise InputError(f"variant {variant!r} is not in {self.name}, which has {names}")
        return self.take(rows)

    def variants(self) -> list[str]:
        """Lists the variants in alphabetical order."""
        return sorted(set(self.variant))

    def cells(self) -> np.ndarray:
        """Numbers runs [R] by variant and by n, d or c, so that seeds of one cell share a number.

        Runs with other numbers of distinct tokens are in other cells.
        """
        columns = [x for x in (self.n, self.d) if x is not None] or [self.c]
        columns += [] if self.unique is None else [self.unique]
        _, cell = np.unique(self.variant.astype(str), return_inverse=True)
        for x in columns:
            _, step = np.unique(np.round(np.log(x), 6), return_inverse=True)
            _, cell = np.unique(cell * (int(step.max()) + 1) + step, return_inverse=True)
        return cell

    @property
    def flops_factor(self) -> float:
        """Returns FLOPs per parameter and token: the median of c / (n d), or 6 without n or d."""
        if self.n is None or self.d is None:
            return FLOPS_FACTOR
        return float(np.median(self.c / (self.n * self.d)))

    def flops(self, n, d):
        """Estimates the FLOPs of runs with n parameters and d tokens by the table's own factor."""
        return n * d * self.flops_factor

    def column(self, name: str) -> np.ndarray:
        """Returns a column that a law needs. Raises InputError if the table lacks it."""
        values = getattr(self, name)
        if values is None:
            raise InputError(
                f"column {name!r} is missing in {self.name}; map it with --columns={name}:NAME"
            )
        return values


def fit_warning(code: str, message: str) -> dict:
    """Builds one warning of a table or a fit."""
    return {"code": code, "message": message}


def as_table(source, points: str = "final", skip: float = 0.0, name: str = "table") -> Table:
    """Builds a Table from a Table, a mapping of columns, or a sequence of rows (mappings).

    Args:
        source: see above; unknown columns are ignored.
        points: "final" keeps the last row of each run, "curve" keeps all rows, "best" keeps the
            lowest of the last rows at each variant, n and d (or c), as of sweeps.
        skip: with "curve", the percentage of rows to omit at the start of each run.

    Raises:
        InputError: a column is missing or differs in length, a value is not positive, `c` and
            6 n d disagree in units, or no row remains.
    """
    if isinstance(source, Table):
        return source
    if not isinstance(source, Mapping):
        rows = list(source)
        names = {k for row in rows for k in row}
        source = {k: [row.get(k) for row in rows] for k in names}
    columns = {k: _column(k, v) for k, v in source.items() if k in (*NUMBERS, *TEXTS)}
    if not columns:
        names = f"only the columns {', '.join(map(str, source))}" if source else "no rows"
        raise InputError(f"{name} has {names}; a row has n, d and loss (see --columns)")
    _check_shape(columns, name)
    notes: list[dict] = []
    columns = _keep_points(columns, points, skip, notes)
    columns = _drop_missing(columns, name, notes)
    _check_signs(columns, name)
    _check_magnitudes(columns, name)
    columns = _drop_copies(columns, notes)
    return _finish(columns, notes, name, points)


def _column(name: str, values: Iterable) -> np.ndarray:
    if name in TEXTS:
        return np.array(["" if v is None else str(v) for v in values], dtype=object)
    values = values if isinstance(values, np.ndarray) else list(values)
    try:
        return np.array([np.nan if v is None or v == "" else v for v in values]).astype(float)
    except (TypeError, ValueError):
        bad = next(v for v in values if not _holds_number(v))
        raise InputError(f"column {name!r} holds {bad!r}; it must hold numbers") from None


def _holds_number(value) -> bool:
    try:
        float(value or 0)
    except (TypeError, ValueError):
        return False
    return True


def _check_shape(columns: dict, name: str) -> None:
    if "loss" not in columns:
        raise InputError(f"column 'loss' is missing in {name}; map it with --columns=loss:NAME")
    if "c" not in columns and not {"n", "d"} <= set(columns):
        lacks = "n" if "n" not in columns else "d"
        raise InputError(
            f"column {lacks!r} is missing in {name}; map it with --columns={lacks}:NAME"
        )
    lengths = {k: len(v) for k, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns of {name} differ in length: {lengths}")
    if "run_id" not in columns or not any(columns["run_id"]):
        rows = range(1, len(columns["loss"]) + 1)
        columns["run_id"] = np.array([f"row {i}" for i in rows], dtype=object)


def _keep_points(columns: dict, points: str, skip: float, notes: list) -> dict:
    """Selects the last row of each run, or all rows after the first `skip` per cent."""
    if points not in POINTS:
        raise InputError(f"--points={points} is unknown; use {', '.join(POINTS)}")
    if not 0.0 <= skip < 100.0:
        raise InputError(f"--skip={skip} must be a percentage from 0 to below 100; use 10")
    progress = columns.get("d", columns.get("c"))
    run = number_labels(columns["run_id"])
    length = np.bincount(run)
    if points == "curve":
        # The rows' places within their runs, in the order of the table.
        place = np.empty(len(run), int)
        order = np.argsort(run, kind="stable")
        place[order] = np.arange(len(run)) - np.repeat(np.cumsum(length) - length, length)
        rows = np.flatnonzero(place >= (length * skip / 100).astype(int)[run])
        message = (
            f"{len(progress)} curve points of {len(length)} runs are not independent: "
            "intervals resample whole runs, and losses before the learning rate has "
            "decayed depend on the schedule too; --points=final uses one point per run"
        )
    else:
        # The last rows by progress, of equal ones by place.
        order = np.lexsort((np.arange(len(run)), np.nan_to_num(progress), run))
        rows = np.sort(order[np.cumsum(length) - 1])
        message = (
            f"only the last of up to {length.max()} rows of each of {len(length)} runs is used; "
            "--points=curve uses all rows"
        )
    if length.max() > 1:
        notes.append(fit_warning("curve_points" if points == "curve" else "final_points", message))
    selected = {k: v[rows] for k, v in columns.items()}
    return _keep_best(selected, notes) if points == "best" else selected


def _keep_best(columns: dict, notes: list) -> dict:
    """Selects the lowest loss of each variant, n and d (or c), and says what that does."""
    names = [k for k in ("variant", "n", "d", "c") if k in columns][:3]
    group = number_labels(list(zip(*(columns[k] for k in names), strict=True)))
    loss = np.where(np.isfinite(columns["loss"]), columns["loss"], np.inf)
    first = np.unique(group[order := np.lexsort((loss, group))], return_index=True)[1]
    rows, most = np.sort(order[first]), np.bincount(group).max()
    if most > 1:
        notes.append(
            fit_warning(
                "best_points",
                f"the lowest of up to {most} losses of each {' and '.join(names)} is used, "
                f"{len(rows)} of {len(loss)} runs: a lowest one is low by luck too, so repeat "
                "the best settings with other seeds for an unbiased law",
            )
        )
    return {k: v[rows] for k, v in columns.items()}


def number_labels(labels) -> np.ndarray:
    """Numbers equal labels [R], in order of first appearance."""
    numbers: dict = {}
    return np.fromiter((numbers.setdefault(x, len(numbers)) for x in labels), int, len(labels))


def _drop_missing(columns: dict, name: str, notes: list) -> dict:
    """Omits rows with a missing or non-finite number and names them in a note."""
    numbers = [v for k, v in columns.items() if k in NUMBERS]
    good = np.all([np.isfinite(v) for v in numbers], axis=0)
    if not good.all():
        names = _first_names(columns["run_id"][~good])
        notes.append(
            fit_warning(
                "dropped_rows",
                f"{int((~good).sum())} of {len(good)} rows are omitted because a value is missing, "
                f"NaN or infinite: {names}; a diverged run does not measure the law",
            )
        )
    if not good.any():
        raise InputError(f"{name} has no row in which every value is finite; check n, d and loss")
    return {k: v[good] for k, v in columns.items()}


def _first_names(names: np.ndarray, count: int = 4) -> str:
    """Joins the first distinct names and counts the others."""
    distinct = list(dict.fromkeys(str(n) for n in names))
    suffix = f" and {len(distinct) - count} more" if len(distinct) > count else ""
    return ", ".join(distinct[:count]) + suffix


def _check_signs(columns: dict, name: str) -> None:
    for key in NUMBERS:
        if key in columns and (columns[key] <= 0).any():
            i = int(np.argmax(columns[key] <= 0))
            raise InputError(
                f"column {key!r} of {name} is {columns[key][i]:g} at {columns['run_id'][i]!r}; "
                "it must be positive because the law takes its logarithm; delete a failed row"
            )


def _check_magnitudes(columns: dict, name: str) -> None:
    """Raises InputError where values can only be of other units."""
    loss = float(np.median(columns["loss"]))
    if loss > MAX_LOSS:
        raise InputError(
            f"column 'loss' of {name} is typically {loss:.4g} nats per token, more than a uniform "
            f"guess; if it holds perplexities, name the column perplexity and use "
            "--columns=loss:perplexity, which takes logarithms"
        )
    if "c" in columns:
        return  # it tells the units of n and d
    n, d = columns["n"], columns["d"]
    for key, values, least in (("n", n, MIN_PARAMETERS), ("d", d, MIN_TOKENS)):
        if values.max() < least:
            raise InputError(
                f"column {key!r} of {name} is at most {values.max():.4g}; is it in millions or "
                "billions? It must be a number of parameters or tokens, such as 1.2e8"
            )
    if (ratio := float(np.median(d) / np.median(n))) > MAX_TOKENS_PER_PARAMETER:
        raise InputError(
            f"column 'd' of {name} is typically {ratio:.3g} times n; is n in millions or "
            "billions? It must be a number of parameters, such as 1.2e8"
        )


def _drop_copies(columns: dict, notes: list) -> dict:
    """Omits runs whose numbers all equal those of another run of the same variant."""
    keys = [k for k in ("n", "d", "c", "loss") if k in columns]
    run = number_labels(columns["run_id"])
    order = np.argsort(run, kind="stable")
    numbers = np.stack([columns[k][order] for k in keys], axis=1)
    ends = np.cumsum(np.bincount(run))
    variant = columns.get("variant", np.full(len(run), ""))
    # The bytes of each run's numbers, row by row.
    raw, width = numbers.tobytes(), numbers.itemsize * len(keys)
    first_run: dict = {}
    copies = []
    for k, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        content = (variant[order[start]], raw[start * width : end * width])
        original = first_run.setdefault(content, k)
        if original != k:
            copies.append((k, original))
    if not copies:
        return columns
    names = columns["run_id"][order[ends - 1]]
    first, original = copies[0]
    notes.append(
        fit_warning(
            "duplicate_runs",
            f"{len(copies)} runs equal another in every number and are omitted, first "
            f"{names[first]!r}, a copy of {names[original]!r}; two seeds always differ",
        )
    )
    retained = ~np.isin(run, [k for k, _ in copies])
    return {k: v[retained] for k, v in columns.items()}


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
            "and tokens, c FLOPs (or ignore c with --columns=c:)"
        )
    if np.abs(ratio - 1).max() <= FLOPS_TOLERANCE:
        return []
    return [
        fit_warning(
            "flops_convention",
            f"c is {ratio.min():.3g} to {ratio.max():.3g} times 6 n d: n and c follow different "
            "conventions, so exponents in n and in c cannot be converted into each other; "
            "--columns=c: ignores c and uses 6 n d",
        )
    ]


def _copied_arms(columns: dict, c: np.ndarray) -> list[dict]:
    """Warns if two variants share a measurement to the last digit."""
    if "variant" not in columns:
        return []
    first_row: dict = {}
    shared = []
    numbers = zip(c.tolist(), columns["loss"].tolist(), strict=True)
    for key, variant, run in zip(numbers, columns["variant"], columns["run_id"], strict=True):
        earlier = first_row.setdefault(key, (variant, run))
        if earlier[0] != variant:
            shared.append((run, earlier[1]))
    if not shared:
        return []
    return [
        fit_warning(
            "copied_runs",
            f"{len(shared)} runs have the FLOPs and the loss of a run of another variant, first "
            f"{shared[0][0]!r} and {shared[0][1]!r}: one of the two is a copy; train it anew",
        )
    ]
