"""Guard: a run repeats to the bit, and continues from its middle as if it had not stopped."""

import jax
import numpy as np

from lmscale_jax.config import own_code
from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import Finding, SmallArm


def check_repeat(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Builds and trains the run a second time, its own code executed anew."""
    first, half = arm.trajectory, shrink.STEPS // 2
    own_code.forget_modules()
    setup = arm.build(arm.trained)
    lowered = arm.lower(setup)
    if lowered.as_text() != first.text:
        return Finding(
            f"built a second time it is another program{_where(arm, setup)}: numbers are drawn, or "
            f"the time is read, where the code is imported or built; draw them from a fixed seed"
        )
    end, losses = first.run(arm.start, 0, shrink.STEPS)
    for step, (a, b) in enumerate(zip(losses, first.losses, strict=True)):
        if a != b:
            return Finding(
                f"a second run differs at step {step}: {b!r} and then {a!r}; keep what a step "
                f"remembers in the optimizer's state, not in Python"
            )
    again, _ = first.run(first.half, half, shrink.STEPS)
    if not _same(again, first.end) or not _same(end, first.end):
        return Finding(
            f"continued from step {half} it ends elsewhere; keep all that a step remembers in the "
            f"optimizer's state"
        )
    return Finding(note=f"{shrink.STEPS} steps, restarted at {half}")


def _where(arm: SmallArm, setup) -> str:
    """Returns the step at which the second program's loss differs."""
    losses = arm.train(setup).losses
    pairs = zip(losses, arm.trajectory.losses, strict=True)
    step = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
    return "" if step is None else f", whose loss differs at step {step}"


def _same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)
