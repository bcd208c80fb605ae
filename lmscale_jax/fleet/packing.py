"""Which cells train together in one program."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.resolve import resolve
from lmscale_jax.fleet import executors
from lmscale_jax.modes import Modes
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import Plan

# On CPU where it was measured to pay: benchmarks/README.md, "Populations". A core is busy with one
# model already, but for the smallest.
CPU_WIDTH, CPU_MOST = 32, 4
# Not measured: an accelerator is idle for most of the step of a model this small.
ACCELERATOR_PARAMETERS = 3e7


def jobs(plan: Plan, cells: list[Cell], slots: int) -> list[list[str]]:
    """Cells as jobs, lists of ids, in the order given; several in a list are packed.

    Never so many that one of `slots` processes would have nothing to do.
    """
    settings = plan.ladder["pack"]
    mode = PACK_MODES[settings["mode"]]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        alone = cell.needs or not mode.takes(cell)
        groups.setdefault(cell.id if alone else key(plan, cell), []).append(cell)
    most = max(1, min(mode.most(settings["most"]), len(cells) // slots))
    found = []
    for group in groups.values():
        found += [[c.id for c in group[i : i + most]] for i in range(0, len(group), most)]
    return found


def key(plan: Plan, cell: Cell) -> str:
    """Equal for cells that can be members of one population."""
    from lmscale_jax.lab import pack

    config = plan.config(cell, Path())
    return f"{cell.role} {pack.signature(resolve(config))}"


def faster(cell: Cell) -> bool:
    """Whether packing was measured to be faster for models of this size on such a machine."""
    if executors.on_cpu():
        return cell.shape["d_model"] <= CPU_WIDTH
    return cell.counts["total"] <= ACCELERATOR_PARAMETERS


class PackMode(NamedTuple):
    """Which cells share a program.

    Attributes:
      takes: cell -> whether it may be packed.
      most: pack.most -> the runs in one program.
    """

    takes: Callable
    most: Callable = lambda most: most


PACK_MODES = Modes(
    "pack.mode",
    {
        "auto": PackMode(
            lambda cell: faster(cell),
            lambda most: min(most, CPU_MOST) if executors.on_cpu() else most,
        ),
        "always": PackMode(lambda cell: True),
        "never": PackMode(lambda cell: False),
    },
)
