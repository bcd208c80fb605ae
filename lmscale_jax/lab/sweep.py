"""Grids as lists of overrides, and the algebra that makes them.

A cell is {dotted config key: value}. Every function takes and returns lists of cells, so they nest:

    product(axis("optim.lr", [1e-3, 2e-3]), zipped(axis("seed", [0, 1]), axis("data.seed", [0, 1])))
"""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from lmscale_jax.config.keys import keys
from lmscale_jax.config.resolve import hint, validate
from lmscale_jax.errors import InputError

Cell = dict


def axis(key: str, values: Iterable) -> list[Cell]:
    """One cell a value of one key."""
    return [{key: value} for value in values]


def prefix(name: str, cells: list[Cell]) -> list[Cell]:
    """The same cells with every key put under a group: prefix("optim", axis("lr", ...))."""
    return [{f"{name}.{key}": value for key, value in cell.items()} for cell in cells]


def product(*grids: list[Cell]) -> list[Cell]:
    """Every combination, the last grid changing fastest.

    Raises InputError where two grids give one key different values.
    """
    cells: list[Cell] = [{}]
    for grid in grids:
        cells = [_merged(one, other) for one in cells for other in grid]
    return cells


def zipped(*grids: list[Cell]) -> list[Cell]:
    """Cell i of each grid together. Raises InputError where the lengths differ."""
    if len({len(grid) for grid in grids}) > 1:
        raise InputError(
            f"zipped grids have {', '.join(str(len(grid)) for grid in grids)} cells; "
            f"equal lengths, or product, would work"
        )
    cells: list[Cell] = [{}] * len(grids[0]) if grids else []
    for grid in grids:
        cells = [_merged(one, other) for one, other in zip(cells, grid, strict=True)]
    return cells


def chain(*grids: list[Cell]) -> list[Cell]:
    """One grid after the other; a cell that came before is left out."""
    cells: list[Cell] = []
    for grid in grids:
        cells += [cell for cell in grid if cell not in cells]
    return cells


def where(keep: Callable[[Cell], bool], cells: list[Cell]) -> list[Cell]:
    """The cells for which `keep(cell)` holds."""
    return [cell for cell in cells if keep(cell)]


def _merged(one: Cell, other: Cell) -> Cell:
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            raise InputError(
                f"config.{key} is given as {one[key]!r} and as {other[key]!r} in one cell; give it "
                f"in one grid only"
            )
    return one | other


def apply(config: ConfigDict, cell: Cell) -> ConfigDict:
    """A copy of an unresolved config with the cell's overrides.

    Raises InputError where a key does not exist.
    """
    config = ConfigDict(config.to_dict())
    known = dict(keys())
    for key, value in cell.items():
        if key not in known:
            raise InputError(f"config.{key} is not a key; {hint(key, list(known))}")
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
    validate(config)
    return config
