"""An optimizer; `optim.name = here(__file__) + "signum.py:signum"`, with `optim.lr` as for lion.

The sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434). The function gives the direction
alone: learning rate, schedule, decay, clipping, freezing and the factors of muP come after it.
"""

import jax
import jax.numpy as jnp
import optax

from lmscale_jax.api import Key

KEYS = {"beta": Key(0.95, "decay of the momentum", low=0.0, high=0.9999)}


def signum(settings, rules):
    """Returns the transformation; `rules` are {path: UpdateRule} of the parameters it updates."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients, momentum, params=None, **_):
        beta = settings.beta
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, gradients)
        return jax.tree.map(jnp.sign, momentum), momentum

    return optax.GradientTransformation(init, update)


# Updates are of size 1 an entry, as Adam's: its learning-rate factors apply.
signum.NORMALIZED = True
# Of these roles; adamw updates the other parameters.
signum.ROLES = ("hidden",)
