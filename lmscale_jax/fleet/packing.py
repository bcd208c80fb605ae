"""Groups cells of equal shape into packs, which train as one program."""

from pathlib import Path

from lmscale_jax import config as configs
from lmscale_jax.fleet import executors
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
    if settings["mode"] == "never":
        return [[cell.id] for cell in cells]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        single = settings["mode"] == "auto" and not faster(cell)
        groups.setdefault(cell.id if single or cell.needs else key(plan, cell), []).append(cell)
    size = settings["most"]
    if settings["mode"] == "auto" and executors.on_cpu():
        size = min(size, CPU_MOST)
    size = max(1, min(size, len(cells) // slots))
    packs = []
    for group in groups.values():
        packs += [[c.id for c in group[i : i + size]] for i in range(0, len(group), size)]
    return packs


def key(plan: Plan, cell: Cell) -> str:
    """Returns a string that is equal for cells that can train as one program."""
    from lmscale_jax.lab import pack

    config = plan.config(cell, Path())
    return f"{cell.role} {pack.signature(configs.resolve(config))}"


def faster(cell: Cell) -> bool:
    """Returns whether packs of such models are faster than single runs on this kind of machine."""
    if executors.on_cpu():
        return cell.shape["d_model"] <= CPU_WIDTH
    return cell.counts["total"] <= ACCELERATOR_PARAMETERS
