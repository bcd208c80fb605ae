"""Utilities out of one backward pass, and the exact gradient of their hinge without a second one.

The gradient g of the loss by a block's output exists only inside the backward pass. `Watch` puts a
probe there, an identity whose backward rule sees g; what it measures leaves as the "gradient" of a
slot, an input that the forward pass ignores. `Paired` also adds the gradient of the hinge.

Both carry a third stream, a zero for each token. Its "gradient" runs from the losses, where the
weights of the tokens are known, down through the blocks, where they are needed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmscale_jax.model.stack import REMAT
from lmscale_jax.mur.utility import (
    FLOAT,
    Measure,
    hinge,
    token_utilities,
    token_weights,
    utility_statistics,
)


class BackwardInputs(NamedTuple):
    """What a backward rule must know beside what reaches it.

    Attributes:
      labelled_BxT: which tokens have a label.
      n_targets: factor from the gradient of the loss that is differentiated to that of the sum.
      tau_LxP: the hinge's threshold, for each layer and part of it.
      gain: factor of each hinge in the objective.
      key: for reductions that draw; None otherwise.
    """

    labelled_BxT: jax.Array
    n_targets: jax.Array
    tau_LxP: jax.Array
    gain: jax.Array
    key: jax.Array | None


class UtilitySpec(NamedTuple):
    """What to take out of the backward pass, and over which tokens a layer's utility is a mean.

    Attributes:
      measure: how utilities are measured.
      names: of `utility.STATISTICS`, the slot's last axis; () takes, instead of statistics, three
        values of each token: utility, |δ| and |g|.
      reduce, k, share: see `utility.token_weights`.
    """

    measure: Measure
    names: tuple[str, ...]
    reduce: str = "mean"
    k: int = 1
    share: float = 1.0

    def slots(self, n_layers: int, parts: int, n_tokens: int) -> jax.Array:
        """Zeros, whose gradient will be what is taken: [L, P, statistics] or [L, P, 3, N]."""
        last = (len(self.names),) if self.names else (3, n_tokens)
        return jnp.zeros((n_layers, parts, *last))

    def take(self, g_NxD, delta_NxD, weight_N, known: BackwardInputs, tau) -> jax.Array:
        """The gradient of one slot."""
        how, labelled_BxT = self.measure, known.labelled_BxT
        if self.names:
            return utility_statistics(
                self.names, how, g_NxD, delta_NxD, labelled_BxT, weight_N, tau
            )
        lengths = (jnp.linalg.norm(x, axis=-1) for x in (delta_NxD, g_NxD))
        return jnp.stack(
            [token_utilities(how, g_NxD, delta_NxD, labelled_BxT.reshape(-1)), *lengths]
        )


class UtilityProbe:
    """Measures the blocks first..stop-1 and changes no gradient; a `model.stack.BlockWrapper`.

    The gradient by `slots`, [layers, parts, ...] as `Taking.slots` makes them, is what was taken.
    Every number is right where the differentiated value is the loss alone: the sum over tokens,
    divided by `known.n_targets`.
    """

    def __init__(
        self,
        taking: UtilitySpec,
        slots: jax.Array,
        known: BackwardInputs,
        layers: range,
        part_names: tuple,
    ):
        self.taking, self.slots, self.known = taking, slots, known
        self.first, self.stop, self.part_names = layers.start, layers.stop, part_names

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros(len(h_NxD), FLOAT)

    def wrap(self, part, number: int, remat: str):
        run, taking = REMAT[remat].wrap(part), self.taking

        def watched(shared, carry, layer):
            x_NxD, side_N = carry
            y_NxD, index = run(shared, x_NxD, layer), layer[1]
            slot, tau = self.slots[index, number], self.known.tau_LxP[index, number]
            return _probe(taking, y_NxD, x_NxD, side_N, slot, self.known, tau)

        return watched

    def end(self, carry):
        return carry

    def close(self, nll_BxT, side_N):
        return _send_weights(self.taking, nll_BxT, side_N, self.known)


class HingeGradient(UtilityProbe):
    """As `Watch`, and adds the gradient of gain * sum of hinges, g held constant.

    The shadow is a stream of zeros beside the true one. It is joined to it above the chosen blocks
    and passes back the gradient of the loss alone, while the true stream's own collects that of the
    hinges. So a block is pulled back twice with what one forward pass saved, the second time to its
    input only: its weights' part is never computed.
    """

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros_like(h_NxD), jnp.zeros(len(h_NxD), FLOAT)

    def wrap(self, part, number: int, remat: str):
        paired = _paired(part, self.taking, remat)

        def run(shared, carry, layer):
            (params, index), known = layer, self.known
            slot, tau = self.slots[index, number], known.tau_LxP[index, number]
            return paired(shared, carry, params, index, slot, known, tau)

        return run

    def end(self, carry):
        x_NxD, shadow_NxD, side_N = carry
        return _join_streams(x_NxD, shadow_NxD), side_N


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(taking, y_NxD, x_NxD, side_N, slot, known, tau):
    return y_NxD, side_N


def _probe_forward(taking, y_NxD, x_NxD, side_N, slot, known, tau):
    return (y_NxD, side_N), (y_NxD, x_NxD, known, tau)


def _probe_backward(taking, saved, bars):
    (y_NxD, x_NxD, known, tau), (c_NxD, weight_N) = saved, bars
    taken = taking.take(c_NxD * known.n_targets, y_NxD - x_NxD, weight_N, known, tau)
    return c_NxD, None, weight_N, taken, None, None


_probe.defvjp(_probe_forward, _probe_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_weights(taking, nll_BxT, side_N, known):
    return nll_BxT


def _send_weights_forward(taking, nll_BxT, side_N, known):
    return nll_BxT, (nll_BxT, known)


def _send_weights_backward(taking, saved, bar_BxT):
    nll_BxT, known = saved
    weight_BxT = token_weights(
        taking.reduce, nll_BxT, known.labelled_BxT, known.key, taking.k, taking.share
    )
    return bar_BxT, weight_BxT.reshape(-1), None


_send_weights.defvjp(_send_weights_forward, _send_weights_backward)


@jax.custom_vjp
def _join_streams(x_NxD, shadow_NxD):
    return x_NxD


_join_streams.defvjp(lambda x_NxD, shadow_NxD: (x_NxD, None), lambda _, bar_NxD: (bar_NxD, bar_NxD))


def _paired(part, taking: UtilitySpec, remat: str):
    """`part` on the carry of `Paired`.

    With c and g the gradients of everything and of the loss by the output, e that of the hinge by
    δ, and J the part's Jacobian, weights' J^T(c + e), input's J^T(c + e) - e, shadow's J^T g.
    """

    def pull_back(remat, shared, x_NxD, params, index):
        run = REMAT[remat].wrap(lambda params, x_NxD: part(shared, x_NxD, (params, index)))
        return jax.vjp(run, params, x_NxD)

    @jax.custom_vjp
    def run(shared, carry, params, index, slot, known, tau):
        x_NxD, *beside = carry
        return part(shared, x_NxD, (params, index)), *beside

    def forward(shared, carry, params, index, slot, known, tau):
        x_NxD, *beside = carry
        if remat == "block":
            y_NxD, pull = part(shared, x_NxD, (params, index)), None
            again = (shared, params, index)
        else:
            y_NxD, pull = pull_back(remat, shared, x_NxD, params, index)
            again = None
        return (y_NxD, *beside), (x_NxD, y_NxD, pull, again, known, tau)

    def backward(saved, bars):
        x_NxD, y_NxD, pull, again, known, tau = saved
        c_NxD, g_NxD, weight_N = bars
        if remat == "block":
            # Recomputed once for both pull-backs, which jax.checkpoint would do for each. Without
            # the barrier the compiler would keep what the forward pass computed.
            shared, params, index = again
            inputs = jax.lax.optimization_barrier((x_NxD, params))
            _, pull = pull_back("none", shared, *inputs, index)
        sum_g_NxD, delta_NxD = g_NxD * known.n_targets, y_NxD - x_NxD
        e_NxD = known.gain * jax.grad(hinge, argnums=2)(
            taking.measure, sum_g_NxD, delta_NxD, known.labelled_BxT.reshape(-1), weight_N, tau
        )
        params_bar, x_bar_NxD = pull(c_NxD + e_NxD)
        _, shadow_bar_NxD = pull(g_NxD)
        taken = taking.take(sum_g_NxD, delta_NxD, weight_N, known, tau)
        carry_bar = (x_bar_NxD - e_NxD, shadow_bar_NxD, weight_N)
        return None, carry_bar, params_bar, None, taken, None, None

    run.defvjp(forward, backward)
    return run
