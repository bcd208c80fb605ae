"""A parametrization rule; `parametrization.rule = here(__file__) + "fan_in_init.py:fan_in"`.

Matrices inside blocks begin with a standard deviation of gain / sqrt(fan-in) instead of
parametrization.init_std, and readouts learn at another rate.
"""

from lmscale_jax.api import Key

KEYS = {
    "gain": Key(1.0, "of initial matrices", above=0.0),
    "init_std": Key(0.02, "parametrization.init_std of the run, which this replaces", above=0.0),
    "readout_lr": Key(1.0, "learning-rate factor of an untied readout", above=0.0),
}


def fan_in(spec, base, settings):
    """Returns the factors of one parameter, on top of those of parametrization.name.

    `spec` and `base` are its Specs in this model and at the base size.
    """
    if spec.role == "hidden":
        # At the base size: parametrization.name decides how the rest follows the width.
        return {"init_std": settings.gain * base.fan_in**-0.5 / settings.init_std}
    if spec.is_head:
        return {"lr": settings.readout_lr}
    return {}
