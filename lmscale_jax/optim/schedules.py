"""Learning-rate schedules as functions of the step, with values in [0, 1]."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np


def make(config, xp=jnp) -> Callable:
    """Step (from 0) -> factor of the peak. `xp` is jax.numpy inside the step, numpy to explain it.

    Warm-up rises linearly and reaches 1 at its last step, so the first update is not empty; the
    last step of a run uses `schedule.final` plus at most one step's descent. The lengths may be
    traced.
    """
    schedule, total = config.schedule, config.train.steps
    warmup = schedule.warmup
    cooldown = schedule.cooldown if schedule.name == "wsd" else total - warmup
    shape = {
        "cosine": lambda x: (1 + xp.cos(np.pi * x)) / 2,
        "linear": lambda x: 1 - x,
        "wsd": lambda x: 1 - x,
        "constant": lambda x: xp.ones_like(x),
    }[schedule.name]
    final = 1.0 if schedule.name == "constant" else schedule.final

    def factor(step):
        step = xp.asarray(step, xp.float32)
        rise = xp.minimum(1.0, (step + 1) / xp.maximum(1, warmup))
        descent = xp.clip((step - (total - cooldown)) / xp.maximum(1, cooldown), 0.0, 1.0)
        # In this form a rate that has not begun to fall is the peak to the bit.
        return rise * (1 - (1 - final) * (1 - shape(descent)))

    return factor


def momentum(config) -> Callable:
    """Step -> decay of Muon's momentum, rising linearly to optim.momentum."""
    optim, length = config.optim, config.optim.momentum_warmup

    def decay(step):
        share = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / jnp.maximum(1, length))
        share = jnp.where(length > 0, share, 1.0)
        return optim.momentum_start + (optim.momentum - optim.momentum_start) * share

    return decay
