"""The gradient of Marginal Utility Regularization's loss mode, written down as it is defined.

`two_pass` differentiates the loss to get g, holds it constant and differentiates loss plus hinges:
the oracle of the tests. `combined` does the second differentiation by pulling back loss and hinges
at once through one forward pass.
"""

import jax
import jax.numpy as jnp

from lmscale_jax.mur import utility
from lmscale_jax.mur.settings import GRANULARITIES


class Collect:
    """Adds `probes` [L, P, N, D] to the outputs of all blocks and returns (nll_BxT, δ_LxPxNxD)."""

    def __init__(self, probes: jax.Array, part_names: tuple[str, ...]):
        self.first, self.stop = 0, len(probes)
        self.probes, self.part_names = probes, part_names

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros_like(self.probes)

    def wrap(self, part, number: int, remat: str):
        def run(shared, carry, layer):
            x_NxD, deltas = carry
            y_NxD = part(shared, x_NxD, layer)
            deltas = deltas.at[layer[1], number].set(y_NxD - x_NxD)
            return y_NxD + self.probes[layer[1], number], deltas

        return run

    def end(self, carry):
        return carry

    def close(self, nll_BxT, deltas):
        return nll_BxT, deltas


def two_pass(config, model, how, lam, layers, weigh):
    """(params, batch, key) -> (mean loss, gradient of it + lam * mean of the hinges).

    `weigh(nll_BxT, labelled_BxT) -> weights` as `utility.token_weights` gives; tau is
    config.mur.tau.
    """
    forward, hinges = _parts(config, model, how, layers, weigh)

    def gradient(params, batch, key=None):
        zeros, n = _zeros(config, batch), jnp.maximum(1, (batch.targets_BxT >= 0).sum())

        def summed(probes):
            nll_BxT, _ = forward(params, probes, batch, key)
            return nll_BxT.sum(), nll_BxT

        g, nll_BxT = jax.grad(summed, has_aux=True)(zeros)

        def objective(params):
            nll_again_BxT, deltas = forward(params, zeros, batch, key)
            loss = nll_again_BxT.sum() / n
            return loss + lam * hinges(g, deltas, nll_BxT, batch), loss

        grads, loss = jax.grad(objective, has_aux=True)(params)
        return loss, grads

    return gradient


def combined(config, model, how, lam, layers, weigh):
    """The same by one forward pass, a pull-back to the probes and one of everything."""
    forward, hinges = _parts(config, model, how, layers, weigh)

    def gradient(params, batch, key=None):
        zeros, n = _zeros(config, batch), jnp.maximum(1, (batch.targets_BxT >= 0).sum())

        def both(params, probes):
            nll_BxT, deltas = forward(params, probes, batch, key)
            return (nll_BxT.sum() / n, deltas), nll_BxT

        (loss, deltas), pull, nll_BxT = jax.vjp(both, params, zeros, has_aux=True)
        unit = jnp.ones(())
        _, g = pull((unit, jnp.zeros_like(deltas)))
        e = lam * jax.grad(hinges, argnums=1)(g * n, deltas, nll_BxT, batch)
        return loss, pull((unit, e))[0]

    return gradient


def _parts(config, model, how, layers, weigh):
    names = GRANULARITIES[config.mur.granularity].names

    def forward(params, probes, batch, key):
        return model.losses(params, *batch, key, Collect(probes, names))

    def hinges(g, deltas, nll_BxT, batch):
        labelled_BxT = batch.targets_BxT >= 0
        weight_N = weigh(nll_BxT, labelled_BxT).reshape(-1)
        terms = [
            utility.hinge(
                how, g[l, p], deltas[l, p], labelled_BxT.reshape(-1), weight_N, config.mur.tau
            )
            for l in layers  # noqa: E741
            for p in range(len(names))
        ]
        return sum(terms) / len(terms)

    return forward, hinges


def _zeros(config, batch):
    parts = len(GRANULARITIES[config.mur.granularity].names)
    return jnp.zeros((config.model.n_layers, parts, batch.tokens_BxT.size, config.model.d_model))
