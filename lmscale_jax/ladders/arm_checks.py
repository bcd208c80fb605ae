"""Runs the guards over the arms of a ladder before its first run, and one while it trains."""

from collections.abc import Callable
from pathlib import Path

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_keys import code_values
from lmscale_jax.guards import record, table
from lmscale_jax.guards.held_out import suspect_arm
from lmscale_jax.guards.record import Judgement
from lmscale_jax.ladders import results
from lmscale_jax.ladders.grid import ANCHOR, TRUNK, Cell
from lmscale_jax.ladders.plan import LadderPlan

# FLOPs of a step that a CPU takes in about a tenth of a second.
MOMENTS = 1e9


def _has_code(plan: LadderPlan) -> bool:
    return any(code_values(plan.config(cell, Path())) for cell in plan.cells[:1])


# plan -> whether the guards run before the first run.
GUARD_MODES = Modes(
    "guards.mode",
    {
        "auto": lambda plan: len(plan.ladder["arms"]) > 1 or _has_code(plan),
        "always": lambda plan: True,
        "never": lambda plan: False,
    },
)


def guard_settings(plan: LadderPlan) -> dict:
    """Returns the ladder's `guards` group; plans of before have none, and no guards."""
    never = dict.fromkeys(table.ACTIONS, "skip") | {"mode": "never"}
    return plan.ladder.get("guards", never)


def check_plan_arms(plan: LadderPlan, workdir: Path, say: Callable[[str], None]) -> list[Judgement]:
    """Runs the guards, writes guards.json, and returns what they say.

    Raises InputError where a guard refuses an arm.
    """
    settings, arms = guard_settings(plan), list(plan.ladder["arms"])
    smallest = {arm: _cells(plan, arm)[0] for arm in arms}
    judged = record.check_arms(
        {arm: plan.config(cell, workdir) for arm, cell in smallest.items()},
        {arm: _timed(plan, _cells(plan, arm), workdir) for arm in arms},
        plan.ladder["baseline"],
        plan.vocab_size,
        settings,
        workdir / record.NAME,
        say,
    )
    record.report(judged, say)
    return judged


def check_before(plan: LadderPlan, cells: list[Cell], workdir: Path, say) -> None:
    """Runs the guards where `guards.mode` says so and one of the cells is still to be trained."""
    done = ("finished", "diverged")
    waiting = any(results.cell_status(workdir, cell) not in done for cell in cells)
    if waiting and GUARD_MODES[guard_settings(plan)["mode"]](plan):
        check_plan_arms(plan, workdir, say)


def _cells(plan: LadderPlan, arm: str) -> list[Cell]:
    """Returns an arm's cells, the smallest first."""
    return sorted((c for c in plan.cells if c.arm == arm), key=lambda c: (c.size, c.flops))


def _timed(plan: LadderPlan, cells: list[Cell], workdir: Path):
    """Returns the config of the largest anchor that takes moments, in batches of fewer rows."""
    anchors = [c for c in cells if c.role in (ANCHOR, TRUNK)] or cells
    length = plan.ladder["run"]["data"]["seq_len"]
    fit = [c for c in anchors if c.flops_per_token * length <= MOMENTS] or anchors[:1]
    config = plan.config(fit[-1], workdir)
    rows = max(1, int(MOMENTS / (fit[-1].flops_per_token * length)))
    config.train.batch_size = min(config.train.batch_size, rows)
    config.train.accum = 1
    return config


def held_out_fault(plan: LadderPlan, workdir: Path) -> str | None:
    """Returns what is wrong where an arm's held-out loss is too good to be true; None: nothing.

    A rung is looked at once all its anchors have ended, so that every arm has its best rate.
    """
    rungs: dict[tuple, list[Cell]] = {}
    for cell in plan.cells:
        if cell.role != TRUNK:
            rungs.setdefault((cell.role, cell.size, cell.budget), []).append(cell)
    for (role, _, _), cells in rungs.items():
        losses: dict[str, float] = {}
        waiting = False
        for cell in cells:
            fields = results.cell_record(workdir, cell) or {"status": "planned"}
            waiting |= role == ANCHOR and fields["status"] in ("planned", "running")
            if fields["status"] == "finished" and fields["final"]["val_loss"] is not None:
                loss = fields["final"]["val_loss"]
                losses[cell.arm] = min(loss, losses.get(cell.arm, loss))
        if not waiting and (pair := suspect_arm(losses)):
            best, second = pair
            return (
                f"arm {best} reaches {losses[best]:.3g} nats at {cells[0].label.split()[1]} where "
                f"{second}, the next, has {losses[second]:.3g}: it probably sees its targets, look "
                f"again; or --config.guards.held_out=warn"
            )
    return None
