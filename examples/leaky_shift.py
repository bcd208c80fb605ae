"""An idea with a mistake on purpose: a token shift whose sign lets a token see the next one.

`model.mlp = here(__file__) + "leaky_shift.py:LeakyShift"`. Its loss falls far below that of any
honest model, and no curve says why. `lmscale check` and every ladder refuse it.
"""

import jax.numpy as jnp

from lmscale_jax.api import Dense, nnx, pointwise


class LeakyShift(nnx.Module):
    """A relu2 MLP of each token and its neighbour; with +1 in place of -1 it would be causal."""

    def __init__(self, model, settings):
        self.up = Dense({"embed": model.d_model}, {"mlp": model.d_ff}, model.bias)
        self.down = Dense({"mlp": model.d_ff}, {"embed": model.d_model}, model.bias, residual=True)
        self.activation = pointwise(lambda up: jnp.square(jnp.maximum(up, 0)))

    def __call__(self, x_NxD, context):
        x_BxTxD = context.unflatten(x_NxD)
        x_BxTxD = x_BxTxD + jnp.roll(x_BxTxD, -1, axis=1)
        return self.down(self.activation(self.up(context.flatten(x_BxTxD), context)), context)
