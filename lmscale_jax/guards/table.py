"""The guards by name, and what follows from a fault."""

from collections.abc import Callable
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError
from lmscale_jax.guards.arm import Finding, SmallArm
from lmscale_jax.guards.causality import check_causality
from lmscale_jax.guards.coordinates import check_widths
from lmscale_jax.guards.cost import check_cost
from lmscale_jax.guards.counts import check_counts
from lmscale_jax.guards.difference import check_difference
from lmscale_jax.guards.gradients import check_gradients
from lmscale_jax.guards.repeat import check_repeat
from lmscale_jax.guards.variants import check_accumulation, check_devices, check_stack

# In the order in which they run: the cheapest that say most first.
GUARDS: dict[str, Callable[[SmallArm, SmallArm | None], Finding]] = {
    "causality": check_causality,
    "gradients": check_gradients,
    "stack": check_stack,
    "accumulation": check_accumulation,
    "devices": check_devices,
    "counts": check_counts,
    "difference": check_difference,
    "repeat": check_repeat,
    "coordinates": check_widths,
    "cost": check_cost,
}


class Action(NamedTuple):
    """What a fault that a guard sees does.

    Attributes:
      runs: the guard looks at all.
      stops: nothing is trained.
    """

    runs: bool
    stops: bool


_ACTIONS = {"refuse": Action(True, True), "warn": Action(True, False), "skip": Action(False, False)}
# Also of the guard that looks while a ladder trains, `held_out.suspect_arm`.
ACTIONS = {name: Modes(f"guards.{name}", _ACTIONS) for name in (*GUARDS, "held_out")}


def action_of(settings, name: str) -> Action:
    """Returns the action of a ladder's `guards` group for a guard."""
    return ACTIONS[name][settings[name]]


def run_guard(name: str, arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Runs a guard; an error in the arm's program is its fault."""
    try:
        return GUARDS[name](arm, baseline)
    except InputError as error:
        return Finding(skipped=str(error))
    except Exception as error:
        return Finding(f"its program fails: {arm.describe_error(error)}")
