"""Groups cells of equal shape into packs, which train as one program."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.resolve import resolve
from lmscale_jax.fleet import executors
from lmscale_jax.modes import Modes
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import Plan

# Largest d_model and number of runs at which packs were measured to be faster on CPU
# (benchmarks/README.md, "Populations"): one larger model already keeps a core busy.
CPU_WIDTH, CPU_MOST = 32, 4
# Not measured: smaller models are assumed to leave an accelerator idle for most of a step.
ACCELERATOR_PARAMETERS = 3e7


def jobs(plan: Plan, cells: list[Cell], slots: int) -> list[list[str]]:
    """Groups cells into jobs, lists of ids, in the order of `cells`; the ids of a job form a pack.

    Packs are small enough to give each of `slots` processes a job.
    """
    settings = plan.ladder["pack"]
    mode = PACK_MODES[settings["mode"]]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        alone = cell.needs or not mode.takes(cell)
        groups.setdefault(cell.id if alone else key(plan, cell), []).append(cell)
    size = max(1, min(mode.most(settings["most"]), len(cells) // slots))
    packs = []
    for group in groups.values():
        packs += [[c.id for c in group[i : i + size]] for i in range(0, len(group), size)]
    return packs


def key(plan: Plan, cell: Cell) -> str:
    """Returns a string that is equal for cells that can train as one program."""
    from lmscale_jax.lab import pack

    config = plan.config(cell, Path())
    return f"{cell.role} {pack.signature(resolve(config))}"


def faster(cell: Cell) -> bool:
    """Returns whether packs of such models are faster than single runs on this kind of machine."""
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
