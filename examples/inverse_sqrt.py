"""A schedule; `schedule.name = here(__file__) + "inverse_sqrt.py:inverse_sqrt"`."""

import jax.numpy as jnp

from lmscale_jax.api import Key

KEYS = {"flat": Key(0.1, "fraction of the run at the peak", above=0.0, high=1.0)}


def inverse_sqrt(step, n_steps, settings):
    """Returns the factor of the peak at a step, from 0; the warm-up's rise multiplies it."""
    flat = settings.flat * n_steps
    return jnp.sqrt(flat / jnp.maximum(flat, step))
