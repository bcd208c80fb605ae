"""Guard: an arm differs from the baseline, and equals it where its code is switched off."""

import jax
import numpy as np

from lmscale_jax.config import own_code
from lmscale_jax.config.keys import keys
from lmscale_jax.config.own_keys import code_values
from lmscale_jax.config.resolve import apply_overrides, differences
from lmscale_jax.errors import InputError
from lmscale_jax.guards.arm import Finding, SmallArm, norm_ratio
from lmscale_jax.guards.variants import GRADIENT

# Keys that choose how something is computed, not what: on one machine two choices may be one
# program.
HOW = ("model.attention", "model.matmul", "optim.muon_dtype")


def check_difference(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Trains both for some steps; they must differ by a bit.

    With the settings that the arm's code calls OFF, loss and gradients must be the baseline's, or
    those of another choice that we ship.
    """
    if baseline is None or arm is baseline:
        return Finding(skipped="it is the baseline" if baseline else "there is no baseline")
    changed = differences(arm.trained.to_dict(), baseline.trained.to_dict())
    if all(path in HOW for path in changed):
        return Finding(skipped=f"{', '.join(changed) or 'no key'} changes how, not what")
    if "mur.mode" in changed and arm.trained.mur.mode == "diagnose":
        return Finding(skipped="mur.mode='diagnose' measures and changes nothing")
    if _equal(arm, baseline):
        return Finding(
            f"it equals the baseline to the bit after {len(arm.trajectory.losses)} steps: "
            f"{', '.join(changed)} has no effect; use a value that has one, or leave the arm out"
        )
    return _check_off(arm, baseline)


def _equal(arm: SmallArm, baseline: SmallArm) -> bool:
    ours, theirs = (jax.tree.leaves(each.trajectory.end.params) for each in (arm, baseline))
    return (
        arm.trajectory.losses == baseline.trajectory.losses
        and len(ours) == len(theirs)
        and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    )


def _check_off(arm: SmallArm, baseline: SmallArm) -> Finding:
    """Compares the arm, its code switched off, with the baseline and then with other choices."""
    ours, theirs = (each.trajectory.losses[-1] for each in (arm, baseline))
    note = f"loss {ours:.4f}, the baseline's {theirs:.4f}"
    codes = [
        (path, own_code.load(part))
        for path, value in code_values(arm.exact).items()
        for part in own_code.split_code(value)
    ]
    for path, code in codes:
        if getattr(code.entry, "OFF", None) is None:
            continue
        values = {f"own.{code.group}.{name}": setting for name, setting in code.entry.OFF.items()}
        values["model.d_ff"] = baseline.exact.model.d_ff
        off = SmallArm("off", apply_overrides(arm.exact, values))
        fault = _difference_when_off(off, baseline)
        if not fault:
            note += "; OFF equals the baseline"
            continue
        for choice in dict(keys())[path].choices or ():
            other = _with_choice(baseline, path, choice)
            if other and not _difference_when_off(off, other):
                note += f"; OFF equals {path}={choice!r}, which is not the baseline"
                break
        else:
            return Finding(f"{code.where} with its OFF, {code.entry.OFF}: {fault}", note)
    return Finding(note=note)


def _with_choice(baseline: SmallArm, path: str, choice: str) -> SmallArm | None:
    """Returns the baseline with another choice of a key; None where that needs other keys."""
    try:
        return SmallArm(choice, apply_overrides(baseline.exact, {path: choice}))
    except InputError:
        return None


def _difference_when_off(off: SmallArm, baseline: SmallArm) -> str | None:
    """Returns in words how an arm that is switched off differs; None: it does not.

    Parameters of one path and shape are drawn alike.
    """
    ours, theirs = off.drawn, baseline.drawn
    missing = [p for p in theirs if p not in ours or ours[p].shape != theirs[p].shape]
    if missing:
        return f"it has no parameter like the baseline's {missing[0]}; give its parts these names"
    a, b = off.gradient(), baseline.gradient()
    if abs(a.loss / b.loss - 1) > 1e-6:
        return f"its loss is {a.loss:.6g}, the baseline's {b.loss:.6g}, at equal parameters"
    for path in theirs:
        ratio = norm_ratio(a.grads[path], b.grads[path])
        if ratio > GRADIENT:
            return f"the gradient of {path} differs by {ratio:.2g} of its size"
    return None
