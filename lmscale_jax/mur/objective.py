"""Marginal Utility Regularization in a training step, as `mur.*` of a config describes it.

"diagnose" measures on logged steps and changes nothing. "loss" adds
λ(t) * mean over the chosen layers (and parts) of max(0, tau - utility) to the objective, g held
constant; the utility is that of a micro-batch, and the objective its mean over micro-batches.
"update" multiplies the update of layer l by 1 + s(t) * max(0, tau - ū_l), where ū_l is a running
mean. λ(t) and s(t) are 0 during mur.warmup and then rise linearly over mur.ramp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmscale_jax.config.blocks import mur_layers
from lmscale_jax.config.key import Modes
from lmscale_jax.mur import streams
from lmscale_jax.mur.settings import GRANULARITIES, MODES, THRESHOLDS
from lmscale_jax.mur.utility import REDUCTIONS, Measure

REPORTED = ("mean", "p10", "p50", "p90", "frac_below_tau", "delta_norm", "grad_norm", "stderr")
_STREAM = 0x6D7572


class Objective:
    """The part of a training step that a resolved config's `mur` group describes."""

    def __init__(self, config):
        mur, n = config.mur, config.model.n_layers
        self._mur, self._n_layers, self.mode = mur, n, MODES[mur.mode]
        self.layers = mur_layers(config)
        self._parts = GRANULARITIES[mur.granularity].prefixes
        self._accum = config.train.accum
        self._warmup, self._ramp = mur.warmup, mur.ramp
        self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
        self._threshold = THRESHOLDS[mur.tau_kind]
        # Statistics that are collected in every step, for their running means.
        utility = ("utility",) if self.mode.scales_updates else ()
        self._averaged = self._threshold.averaged + utility

    def init_means(self) -> dict:
        """Initializes the running means: {"weight", "sums": {statistic: [L, P]}}, or {}."""
        if not self._averaged:
            return {}
        zero = jnp.zeros((self._n_layers, len(self._parts)))
        return {"weight": jnp.zeros(()), "sums": {name: zero for name in self._averaged}}

    def request_stats(
        self, means: dict, step: jax.Array, measure: tuple[str, ...]
    ) -> "StatRequest | None":
        """Returns what to collect in the backward pass of this step; None: nothing."""
        if not self.mode.acts and "mur" not in measure:
            return None
        return StatRequest(self, means, step, REPORTED if "mur" in measure else ())

    def update_means(self, means: dict, stats: dict) -> dict:
        """Returns the running means with this step's statistics."""
        if not means:
            return means
        d = self._mur.decay
        sums = {k: d * v + (1 - d) * stats[k] for k, v in means["sums"].items()}
        return {"weight": d * means["weight"] + 1 - d, "sums": sums}

    def factors(self, means: dict, step: jax.Array) -> jax.Array:
        """Returns the factor of each layer's update, [L]."""
        hinge_L = jnp.maximum(0.0, self.tau(means) - _mean(means, "utility"))[:, 0]
        factor_L = 1 + self._mur.alpha * self.strength(step) * hinge_L
        return jnp.where(self._in_layers(), factor_L, 1.0)

    def scale(self, means: dict, step: jax.Array, grads: dict) -> tuple[dict, dict]:
        """Applies the factors by mur.apply_to; returns (gradients, keywords of the update).

        A factor on gradients is the original's form and does next to nothing: Adam divides by the
        root of the second moment, which has the same factor; Lion and Muon normalise the scale
        away. Only the norm that gradients are clipped by changes.
        """
        if not self.mode.scales_updates:
            return grads, {}
        return TARGETS[self._mur.apply_to].scale(grads, self.factors(means, step))

    def strength(self, step: jax.Array) -> jax.Array:
        """Returns the ramp of λ and s after `step` steps, from 0 to 1."""
        since = step - self._warmup
        rising = jnp.clip(since / jnp.maximum(1, self._ramp), 0.0, 1.0)
        rising = jnp.where(self._ramp > 0, rising, 1.0)
        return jnp.where(since < 0, 0.0, rising)

    def weight(self, step: jax.Array) -> jax.Array:
        """Returns λ(t); 0 in all modes but "loss"."""
        hinge = self.mode.adds_hinge
        return self._mur.lambda_max * self.strength(step) if hinge else jnp.zeros(())

    def tau(self, means: dict) -> jax.Array:
        """Returns the thresholds of this step, [L, P]."""
        return self._threshold.value(self, means)

    def fixed_tau(self) -> jax.Array:
        """Returns mur.tau itself, [L, P]."""
        return jnp.full((self._n_layers, len(self._parts)), self._mur.tau)

    def stderr_tau(self, means: dict) -> jax.Array:
        """Returns mur.tau times the running standard error of each layer's utility, [L, P]."""
        return self._mur.tau * _mean(means, "stderr")

    def quantile_tau(self, means: dict) -> jax.Array:
        """Returns the running quantile, averaged over `layers`, [L, P]."""
        total = jnp.where(self._in_layers()[:, None], _mean(means, "quantile"), 0.0).sum()
        shape = (self._n_layers, len(self._parts))
        return jnp.broadcast_to(total / (len(self.layers) * len(self._parts)), shape)

    def metrics(self, request: "StatRequest", stats: dict, means: dict, step: jax.Array) -> dict:
        """Returns {"mur/STATISTIC" or "mur/BRANCH/STATISTIC": [L]}; nan where not measured."""
        values = {name: stats[name] for name in request.names} | {"tau": request.tau_LxP}
        if self.mode.adds_hinge:
            values["hinge"] = stats["hinge"]
            measured_Lx1 = self._in_layers()[:, None]
            values = {k: jnp.where(measured_Lx1, v, jnp.nan) for k, v in values.items()}
        lines = {
            f"mur/{part}{name}": value_LxP[:, number]
            for number, part in enumerate(self._parts)
            for name, value_LxP in values.items()
        }
        if self.mode.adds_hinge:
            lines["mur/lambda"] = self.weight(step)
        if self.mode.scales_updates:
            lines["mur/multiplier"] = self.factors(means, step)
        return lines

    def _in_layers(self) -> jax.Array:
        """Tells for each layer whether the mode acts on it, [L] bool."""
        index_L = jnp.arange(self._n_layers)
        return (index_L >= self.layers.start) & (index_L < self.layers.stop)


class StatRequest:
    """The statistics that one step collects in its backward pass.

    Attributes:
      names: the statistics that are logged.
      tau_LxP: thresholds of this step.
      stat_buffers: zeros; their gradient is the statistics, summed over micro-batches.
    """

    def __init__(self, objective: Objective, means: dict, step, names: tuple[str, ...]):
        mur, mode = objective._mur, objective.mode
        self._objective, self.names = objective, names
        self.tau_LxP = objective.tau(means)
        self._key = jax.random.fold_in(objective._key, step)
        n_hinges = len(objective.layers) * len(objective._parts) * objective._accum
        self._gain = objective.weight(step) / n_hinges
        level = objective._threshold.level(mur.tau)
        collected = (*names, *objective._averaged, *(("hinge",) if mode.adds_hinge else ()))
        self._spec = streams.UtilitySpec(
            Measure(mur.metric, mur.eps, level),
            tuple(dict.fromkeys(collected)),
            mur.reduce,
            mur.sample_k,
            mur.top_share,
        )
        n_parts = len(objective._parts)
        self.stat_buffers = self._spec.stat_buffers(objective._n_layers, n_parts, 0)

    def wrapper(self, stat_buffers, targets_BxT, n_targets, index) -> streams.UtilityProbe:
        """Returns the wrapper of the blocks for micro-batch `index`."""
        draws = REDUCTIONS[self._spec.reduce].draws
        inputs = streams.BackwardInputs(
            targets_BxT >= 0,
            n_targets,
            self.tau_LxP,
            self._gain,
            jax.random.fold_in(self._key, index) if draws else None,
        )
        objective = self._objective
        adds_hinge = objective.mode.adds_hinge
        layers = objective.layers if adds_hinge else range(objective._n_layers)
        kind = streams.HingeGradient if adds_hinge else streams.UtilityProbe
        part_names = GRANULARITIES[objective._mur.granularity].names
        return kind(self._spec, stat_buffers, inputs, layers, part_names)

    def read_stats(self, buffer_grads) -> dict:
        """Returns {statistic: [L, P]}, means over the micro-batches."""
        values_LxPxS = buffer_grads / self._objective._accum
        return {name: values_LxPxS[..., i] for i, name in enumerate(self._spec.names)}


class Target(NamedTuple):
    """What a layer's factor multiplies.

    Attributes:
      scale: (gradients, factor [L]) -> (gradients, keywords of the optimizer's update).
      remark: text to add to the run's choices; may name {optimizer}.
    """

    scale: Callable
    remark: str = ""


def _scale_updates(grads: dict, factor_L: jax.Array) -> tuple[dict, dict]:
    return grads, {"block_factors": factor_L}


def _scale_gradients(grads: dict, factor_L: jax.Array) -> tuple[dict, dict]:
    def scaled(g):
        return g * factor_L.reshape(-1, *[1] * (g.ndim - 1))

    return grads | {"blocks": jax.tree.map(scaled, grads["blocks"])}, {}


TARGETS = Modes(
    "mur.apply_to",
    {
        "updates": Target(_scale_updates),
        "grads": Target(_scale_gradients, "; {optimizer} cancels a factor of the gradients"),
    },
)


def make_objective(config) -> Objective | None:
    """Builds the objective of a resolved config; None where nothing is measured."""
    return Objective(config) if MODES[config.mur.mode].measures else None


def mur_choices(config) -> dict[str, str]:
    """Describes what is measured and changed, as {"mur": line}; {} where nothing is."""
    mode = MODES[config.mur.mode]
    if not mode.measures:
        return {}
    mur, layers = config.mur, mur_layers(config)
    if not mode.acts:
        return {"mur": f"{mur.mode}: {mur.metric} utility of every block, nothing is changed"}
    begin, ramp = mur.warmup, mur.ramp
    where = f"blocks {layers.start} to {layers.stop - 1} of {config.model.n_layers}"
    strengths = [f"λ {mur.lambda_max:g}"] if mode.adds_hinge else []
    strengths += [f"s {mur.alpha:g} on {mur.apply_to}"] if mode.scales_updates else []
    what = " and ".join(strengths)
    line = f"{mur.mode}: {mur.metric}, {where}, {what} from step {begin} to {begin + ramp}"
    return {"mur": line + TARGETS[mur.apply_to].remark.format(optimizer=config.optim.name)}


def _mean(means: dict, name: str) -> jax.Array:
    """Returns a running mean, [L, P]; 0 before the first step."""
    weight = means["weight"]
    return jnp.where(weight > 0, means["sums"][name] / jnp.where(weight > 0, weight, 1.0), 0.0)
