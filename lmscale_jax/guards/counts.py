"""Guard: the FLOPs that an arm declares are those of the products in its gradient.

Products, and not the compiler's count: that includes what is elementwise, a tenth of all at this
size, and the erf of a GELU alone moves it by 8 %.
"""

from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import Finding, SmallArm
from lmscale_jax.model import flops
from lmscale_jax.mur.settings import MODES

# Attention computes all pairs of positions and declares the visible ones, so a mask moves the ratio
# by 2 % at this size.
TOLERANCE = 0.05


def check_counts(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Compares computed over declared FLOPs with the baseline's same ratio."""
    if baseline is None:
        return Finding(skipped="there is no baseline; a ladder has one")
    ours, theirs = (flops_ratio(each) for each in (arm, baseline))
    ratio, counts = ours / theirs, flops.parameter_counts(arm.setup.model.specs)
    says = f"it spends {ratio:.2f} x the FLOPs that it declares, relative to the baseline"
    if MODES[arm.exact.mur.mode].acts:
        why = f"mur.mode={arm.exact.mur.mode!r} computes {ratio:.2f} x what the model alone does"
        return Finding(skipped=f"{why}, and FLOPs count the model alone")
    if ratio > 1 + TOLERANCE:
        return Finding(f"{says}: flops() is missing or too small; count products that are no Dense")
    if ratio < 1 - TOLERANCE:
        return Finding(f"{says}: some declared products are not computed, or flops() is too large")
    return Finding(note=f"{ratio:.3f} x declared; {counts['total']:,} parameters")


def flops_ratio(arm: SmallArm) -> float:
    """Returns the FLOPs of a gradient's products over those of `flops.flops_per_token`."""
    config, specs = arm.setup.config, arm.setup.model.specs
    tokens = shrink.ROWS * shrink.LENGTH
    return arm.gradient().flops / (tokens * flops.flops_per_token(config, specs)["model"])
