"""Guard: under mup and completep, an arm's activations keep their size as the width grows."""

import numpy as np

from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import Finding, SmallArm
from lmscale_jax.model.mesh import one_device_mesh
from lmscale_jax.model.parametrization import scheme_of
from lmscale_jax.model.sizes import at_size
from lmscale_jax.sweeps import coord_check
from lmscale_jax.sweeps import slopes as slopes_of
from lmscale_jax.train.setup import build_setup

WIDTHS, SEEDS, STEPS = (64, 128, 256), 2, 6
# Slopes at so few sizes and seeds; a wrong exponent is 0.5 or 1.
BEYOND = 0.15


def check_widths(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Compares the slopes of all activations over the width with their bounds, and the baseline's.

    A slope that is out of its bounds in the baseline too, or has moved by less than BEYOND from
    the baseline's, is none of the arm's doing.
    """
    if not scheme_of(arm.exact).has_base:
        return Finding(skipped="parametrization.name='sp' does not follow the width")
    slopes = _slopes(arm)
    failures = [f for f in slopes_of.slope_failures(slopes) if f["certain"]]
    compared = baseline is not None and baseline is not arm and scheme_of(baseline.exact).has_base
    theirs = _slopes(baseline) if compared else {}
    for failure in failures:
        tensor, step = failure["tensor"], str(failure["step"])
        if failure["slope"] is None:
            return Finding(f"{tensor} has no size at step {step}: it is 0 or not finite")
        usual = theirs.get(tensor, {}).get(step, {}).get("slope")
        low, high = failure["bounds"]
        beyond = max(low - failure["slope"], failure["slope"] - high)
        if beyond > BEYOND and (usual is None or abs(failure["slope"] - usual) > BEYOND):
            return Finding(
                f"{tensor} grows as width^{failure['slope']:+.2f} at step {step} (allowed "
                f"{low:+.2f} to {high:+.2f}): declare its weights with their fan-in first, as "
                f"weight({{'embed': d}}, {{'mlp': f}}, 'hidden'), and multiply by no width"
            )
    return Finding(note=f"{len(slopes)} activations at widths {', '.join(map(str, WIDTHS))}")


def _slopes(arm: SmallArm) -> dict:
    if "slopes" not in arm.memory:
        tensors: dict[str, list] = {}
        for width in WIDTHS:
            config = apply_overrides(at_size(arm.exact, "width", width), {"model.stack": "scan"})
            setup = build_setup(resolve(config, shrink.VOCAB), shrink.MARK, one_device_mesh())
            batch = shrink.shrunk_batch(setup.config, 0)
            sizes = coord_check.measure_coordinates(setup, batch, list(range(SEEDS)), STEPS)
            for name, values in sizes.items():
                tensors.setdefault(name, []).append(values)
        tensors.pop("loss")
        stacked = {name: np.stack(values) for name, values in tensors.items()}
        arm.memory["slopes"] = slopes_of.slope_table(WIDTHS, stacked)
    return arm.memory["slopes"]
