"""Learning-rate schedules as functions of the step, with values in [0, 1].

Imports no JAX, so that a config can be checked without it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode


class Schedule(NamedTuple):
    """One choice of schedule.name.

    Attributes:
      factor: (array module, step, config) -> factor of the peak, without warm-up.
      descent: config -> the length of the descent in steps, or None where it takes all steps after
        warm-up.
    """

    factor: Callable
    descent: Callable = lambda config: None


def _falling(shape: Callable, descent=lambda config: None, final=None) -> Schedule:
    """Makes a schedule that is at its peak before the descent.

    `shape`: (array module, x from 0 to 1 over the descent) -> from 1 to 0. `final`: the last rate
    as a fraction of the peak; None: schedule.final.
    """

    def factor(xp, step, config):
        total, length = config.train.steps, descent(config)
        length = total - config.schedule.warmup if length is None else length
        x = xp.clip((step - (total - length)) / xp.maximum(1, length), 0.0, 1.0)
        last = config.schedule.final if final is None else final
        # In this form the rate before the descent is the peak to the bit.
        return 1 - (1 - last) * (1 - shape(xp, x))

    return Schedule(factor, descent)


def _own_schedule(code: OwnCode) -> Schedule:
    """Returns the entry of a user's function (step, n_steps), or with KEYS (.., .., settings)."""
    code.require("a function (step, n_steps)", callable(code.entry))

    def factor(xp, step, config):
        settings = [code.settings(config)] if code.keys else []
        return xp.asarray(code.entry(step, config.train.steps, *settings), xp.float32)

    return Schedule(factor)


SCHEDULES = Modes(
    "schedule.name",
    {
        "cosine": _falling(lambda xp, x: (1 + xp.cos(np.pi * x)) / 2),
        "linear": _falling(lambda xp, x: 1 - x),
        "wsd": _falling(lambda xp, x: 1 - x, descent=lambda config: config.schedule.cooldown),
        "constant": _falling(lambda xp, x: xp.ones_like(x), final=1.0),
    },
    _own_schedule,
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
    schedule, warmup = SCHEDULES[config.schedule.name], config.schedule.warmup

    def factor(step):
        step = xp.asarray(step, xp.float32)
        rise = xp.minimum(1.0, (step + 1) / xp.maximum(1, warmup))
        return rise * schedule.factor(xp, step, config)

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
