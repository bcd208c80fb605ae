"""Measures utilities in one backward pass, and adds the exact gradient of their hinges to it.

The gradient g of the loss by a block's output exists only inside the backward pass. `UtilityProbe`
puts an identity there whose backward rule sees g. Its statistics leave as the "gradient" of a
buffer of zeros, an input that the forward pass ignores. `HingeGradient` also adds the gradient of
the hinges, without a second backward pass.

Both carry a side stream, a zero for each token. Its "gradient" brings the tokens' weights, which
depend on their losses, down to the blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmscale_jax.model.remat import REMAT
from lmscale_jax.mur.utility import (
    FLOAT,
    Measure,
    hinge,
    token_utilities,
    token_weights,
    utility_statistics,
)


class BackwardInputs(NamedTuple):
    """What a backward rule needs besides the gradient that it is given.

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
    """Which statistics to collect in the backward pass, and how tokens are averaged.

    Attributes:
      measure: how utilities are measured.
      names: of `utility.STATISTICS`, the buffer's last axis. With () three values of each token
        are collected instead: utility, |δ| and |g|.
      reduce, k, share: see `utility.token_weights`.
    """

    measure: Measure
    names: tuple[str, ...]
    reduce: str = "mean"
    k: int = 1
    share: float = 1.0

    def stat_buffers(self, n_layers: int, parts: int, n_tokens: int) -> jax.Array:
        """Returns zeros [L, P, statistics] or [L, P, 3, N]; their gradient is what is collected."""
        last = (len(self.names),) if self.names else (3, n_tokens)
        return jnp.zeros((n_layers, parts, *last))

    def collect(self, g_NxD, delta_NxD, weight_N, inputs: BackwardInputs, tau) -> jax.Array:
        """Returns the gradient of one buffer, [statistics] or [3, N]."""
        measure, labelled_BxT = self.measure, inputs.labelled_BxT
        if self.names:
            return utility_statistics(
                self.names, measure, g_NxD, delta_NxD, labelled_BxT, weight_N, tau
            )
        norms = (jnp.linalg.norm(x, axis=-1) for x in (delta_NxD, g_NxD))
        return jnp.stack(
            [token_utilities(measure, g_NxD, delta_NxD, labelled_BxT.reshape(-1)), *norms]
        )


class UtilityProbe:
    """Measures the blocks first..stop-1 and changes no gradient; a `model.stack.BlockWrapper`.

    The statistics are the gradient by `stat_buffers`, [layers, parts, ...], as
    `UtilitySpec.stat_buffers` makes them. They are right where the differentiated value is the
    loss alone: the sum over tokens, divided by `inputs.n_targets`.
    """

    def __init__(
        self,
        spec: UtilitySpec,
        stat_buffers: jax.Array,
        inputs: BackwardInputs,
        layers: range,
        part_names: tuple,
    ):
        self.spec, self.stat_buffers, self.inputs = spec, stat_buffers, inputs
        self.first, self.stop, self.part_names = layers.start, layers.stop, part_names

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros(len(h_NxD), FLOAT)

    def wrap(self, part, number: int, remat: str):
        run, spec = REMAT[remat].wrap(part), self.spec

        def probed(shared, carry, layer):
            x_NxD, side_N = carry
            y_NxD, index = run(shared, x_NxD, layer), layer[1]
            buffer, tau = self.stat_buffers[index, number], self.inputs.tau_LxP[index, number]
            return _probe(spec, y_NxD, x_NxD, side_N, buffer, self.inputs, tau)

        return probed

    def end(self, carry):
        return carry

    def close(self, nll_BxT, side_N):
        return _send_weights(self.spec, nll_BxT, side_N, self.inputs)


class HingeGradient(UtilityProbe):
    """Measures as `UtilityProbe` and adds the gradient of gain * sum of hinges, g held constant.

    A second stream of zeros, the shadow, is joined to the residual stream above the chosen blocks.
    It passes back the gradient of the loss alone; the residual stream also collects that of the
    hinges. So each block is pulled back twice from one forward pass, the second time to its input
    only: the gradient by its weights is computed once.
    """

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros_like(h_NxD), jnp.zeros(len(h_NxD), FLOAT)

    def wrap(self, part, number: int, remat: str):
        paired = _paired(part, self.spec, remat)

        def run(shared, carry, layer):
            (params, index), inputs = layer, self.inputs
            buffer, tau = self.stat_buffers[index, number], inputs.tau_LxP[index, number]
            return paired(shared, carry, params, index, buffer, inputs, tau)

        return run

    def end(self, carry):
        x_NxD, shadow_NxD, side_N = carry
        return _join_streams(x_NxD, shadow_NxD), side_N


def _delta(y_NxD, x_NxD):
    return y_NxD.astype(FLOAT) - x_NxD.astype(FLOAT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(spec, y_NxD, x_NxD, side_N, buffer, inputs, tau):
    return y_NxD, side_N


def _probe_forward(spec, y_NxD, x_NxD, side_N, buffer, inputs, tau):
    return (y_NxD, side_N), (y_NxD, x_NxD, inputs, tau)


def _probe_backward(spec, saved, cotangents):
    (y_NxD, x_NxD, inputs, tau), (c_NxD, weight_N) = saved, cotangents
    stats = spec.collect(c_NxD * inputs.n_targets, _delta(y_NxD, x_NxD), weight_N, inputs, tau)
    return c_NxD, None, weight_N, stats, None, None


_probe.defvjp(_probe_forward, _probe_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_weights(spec, nll_BxT, side_N, inputs):
    return nll_BxT


def _send_weights_forward(spec, nll_BxT, side_N, inputs):
    return nll_BxT, (nll_BxT, inputs)


def _send_weights_backward(spec, saved, grad_BxT):
    nll_BxT, inputs = saved
    weight_BxT = token_weights(
        spec.reduce, nll_BxT, inputs.labelled_BxT, inputs.key, spec.k, spec.share
    )
    return grad_BxT, weight_BxT.reshape(-1), None


_send_weights.defvjp(_send_weights_forward, _send_weights_backward)


@jax.custom_vjp
def _join_streams(x_NxD, shadow_NxD):
    return x_NxD


_join_streams.defvjp(lambda x_NxD, shadow_NxD: (x_NxD, None), lambda _, g_NxD: (g_NxD, g_NxD))


def _paired(part, spec: UtilitySpec, remat: str):
    """Returns `part` on the carry of `HingeGradient`, with its backward rule.

    With c and g the gradients of everything and of the loss by the output, e that of the hinge by
    δ, and J the part's Jacobian, weights' J^T(c + e), input's J^T(c + e) - e, shadow's J^T g.
    """

    def pull_back(remat, shared, x_NxD, params, index):
        run = REMAT[remat].wrap(lambda params, x_NxD: part(shared, x_NxD, (params, index)))
        return jax.vjp(run, params, x_NxD)

    @jax.custom_vjp
    def run(shared, carry, params, index, buffer, inputs, tau):
        x_NxD, *side_streams = carry
        return part(shared, x_NxD, (params, index)), *side_streams

    def forward(shared, carry, params, index, buffer, inputs, tau):
        x_NxD, *side_streams = carry
        if remat == "block":
            y_NxD, pull = part(shared, x_NxD, (params, index)), None
            recompute = (shared, params, index)
        else:
            y_NxD, pull = pull_back(remat, shared, x_NxD, params, index)
            recompute = None
        return (y_NxD, *side_streams), (x_NxD, y_NxD, pull, recompute, inputs, tau)

    def backward(saved, cotangents):
        x_NxD, y_NxD, pull, recompute, inputs, tau = saved
        c_NxD, g_NxD, weight_N = cotangents
        if remat == "block":
            # jax.checkpoint would recompute the block for each pull-back; here it is done once.
            # Without the barrier the compiler would keep the forward pass's activations.
            shared, params, index = recompute
            primals = jax.lax.optimization_barrier((x_NxD, params))
            _, pull = pull_back("none", shared, *primals, index)
        sum_g_NxD, delta_NxD = g_NxD * inputs.n_targets, _delta(y_NxD, x_NxD)
        e_NxD = inputs.gain * jax.grad(hinge, argnums=2)(
            spec.measure, sum_g_NxD, delta_NxD, inputs.labelled_BxT.reshape(-1), weight_N, tau
        )
        params_grad, x_grad_NxD = pull((c_NxD + e_NxD).astype(c_NxD.dtype))
        _, shadow_grad_NxD = pull(g_NxD)
        stats = spec.collect(sum_g_NxD, delta_NxD, weight_N, inputs, tau)
        carry_grad = ((x_grad_NxD - e_NxD).astype(x_NxD.dtype), shadow_grad_NxD, weight_N)
        return None, carry_grad, params_grad, None, stats, None, None

    run.defvjp(forward, backward)
    return run
