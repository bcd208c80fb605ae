"""Guard: a gradient reaches every parameter, and is finite in bfloat16."""

import numpy as np

from lmscale_jax.guards.arm import Finding, Gradient, SmallArm


def check_gradients(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Takes the gradient at random parameters, where no zero hides a branch.

    A parameter that some blocks do not use, such as the factor of a skip, needs a gradient in one
    of them. In bfloat16 the parameters are the initial ones.
    """
    exact = arm.gradient()
    if unfinite := _unfinite(exact):
        return Finding(f"in float32 {unfinite} is not finite at random parameters of usual size")
    unused = [path for path, grad in exact.grads.items() if not np.any(grad)]
    if unused:
        return Finding(
            f"no gradient reaches {', '.join(unused[:3])}: declared and not used, or used behind a "
            f"stop_gradient or a rounding; remove it, or let the output depend on it"
        )
    rounded = arm.gradient({"model.dtype": "bfloat16"}, drawn=False)
    if unfinite := _unfinite(rounded):
        return Finding(
            f"in bfloat16 {unfinite} is not finite at the initial parameters; compute "
            f"exponentials, sums and roots in float32 (x.astype(jnp.float32)), and add an epsilon "
            f"below a root"
        )
    return Finding(note=f"{len(exact.grads)} parameters")


def _unfinite(gradient: Gradient) -> str | None:
    if not np.isfinite(gradient.loss):
        return "the loss"
    return None if np.isfinite(gradient.norm) else "the gradient"
