"""Learning-rate schedules as functions of the step, with values in [0, 1].

Imports no JAX, so that a config can be checked without it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.key import Modes


class Schedule(NamedTuple):
    """One choice of schedule.name: the descent from the peak.

    Attributes:
      shape: (array module, x from 0 to 1 over the descent) -> from 1 to 0.
      descent: config -> its length in steps, or None where it takes all steps after warm-up.
      final: config -> the last learning rate as a fraction of the peak.
    """

    shape: Callable
    descent: Callable = lambda config: None
    final: Callable = lambda config: config.schedule.final


SCHEDULES = Modes(
    "schedule.name",
    {
        "cosine": Schedule(lambda xp, x: (1 + xp.cos(np.pi * x)) / 2),
        "linear": Schedule(lambda xp, x: 1 - x),
        "wsd": Schedule(lambda xp, x: 1 - x, descent=lambda config: config.schedule.cooldown),
        "constant": Schedule(lambda xp, x: xp.ones_like(x), final=lambda config: 1.0),
    },
)


def cooldown_steps(config) -> int | None:
    """Returns the steps of a schedule's cooldown; None where it descends from warm-up on."""
    return SCHEDULES[config.schedule.name].descent(config)


def make_schedule(config, xp=None) -> Callable:
    """Returns step (from 0) -> factor of the peak, computed by `xp`, numpy or (None) jax.numpy.

    Warm-up rises linearly and reaches 1 at its last step, so the first update is not zero; the
    last step of a run uses `schedule.final` plus at most one step's descent. The lengths may be
    traced.
    """
    xp = xp or _jax_numpy()
    schedule, total = SCHEDULES[config.schedule.name], config.train.steps
    warmup = config.schedule.warmup
    cooldown = cooldown_steps(config)
    cooldown = total - warmup if cooldown is None else cooldown
    final = schedule.final(config)

    def factor(step):
        step = xp.asarray(step, xp.float32)
        rise = xp.minimum(1.0, (step + 1) / xp.maximum(1, warmup))
        descent = xp.clip((step - (total - cooldown)) / xp.maximum(1, cooldown), 0.0, 1.0)
        # In this form the rate before the descent is the peak to the bit.
        return rise * (1 - (1 - final) * (1 - schedule.shape(xp, descent)))

    return factor


def momentum_schedule(config) -> Callable:
    """Returns step -> decay of Muon's momentum, rising linearly to optim.momentum."""
    xp = _jax_numpy()
    optim, length = config.optim, config.optim.momentum_warmup

    def decay(step):
        share = xp.minimum(1.0, xp.asarray(step, xp.float32) / xp.maximum(1, length))
        share = xp.where(length > 0, share, 1.0)
        return optim.momentum_start + (optim.momentum - optim.momentum_start) * share

    return decay


def _jax_numpy():
    import jax.numpy

    return jax.numpy
