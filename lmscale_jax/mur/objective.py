"""Marginal Utility Regularization as the training step sees it: what `mur.*` of a config asks for.

"diagnose" measures on the steps that write a line and changes nothing. "loss" adds
λ(t) * mean over the chosen layers (and parts) of max(0, tau - utility) to the objective, g held
constant; the utility is that of a micro-batch, and the objective its mean over micro-batches.
"update" multiplies the update of layer l by 1 + s(t) * max(0, tau - ū_l), where ū_l is a running
mean. λ(t) and s(t) are 0 during mur.warmup and then rise in a line over mur.ramp.
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
        self._mur, self._n, self.mode = mur, n, MODES[mur.mode]
        self.layers = mur_layers(config)
        self._parts = GRANULARITIES[mur.granularity].prefixes
        self._accum = config.train.accum
        self._begin, self._ramp = mur.warmup, mur.ramp
        self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
        # What is taken in every step, and remembered.
        self._threshold = THRESHOLDS[mur.tau_kind]
        self._kept = self._threshold.kept + (("utility",) if self.mode.scales_updates else ())

    def begin(self) -> dict:
        """The running means before the first step: {"weight", "sums": {statistic: [L, P]}}."""
        if not self._kept:
            return {}
        zero = jnp.zeros((self._n, len(self._parts)))
        return {"weight": jnp.zeros(()), "sums": {name: zero for name in self._kept}}

    def ask(self, memory: dict, step: jax.Array, measure: tuple[str, ...]) -> "StatRequest | None":
        """What to take out of the backward pass of this step; None: nothing."""
        if not self.mode.acts and "mur" not in measure:
            return None
        return StatRequest(self, memory, step, REPORTED if "mur" in measure else ())

    def learn(self, memory: dict, taken: dict) -> dict:
        """The running means with this step's statistics."""
        if not memory:
            return memory
        d = self._mur.decay
        sums = {k: d * v + (1 - d) * taken[k] for k, v in memory["sums"].items()}
        return {"weight": d * memory["weight"] + 1 - d, "sums": sums}

    def factors(self, memory: dict, step: jax.Array) -> jax.Array:
        """[L]: what the update of each layer is multiplied by."""
        low_L = jnp.maximum(0.0, self.tau(memory) - _mean(memory, "utility"))[:, 0]
        return jnp.where(self._chosen(), 1 + self._mur.alpha * self.strength(step) * low_L, 1.0)

    def scale(self, memory: dict, step: jax.Array, grads: dict) -> tuple[dict, dict]:
        """(gradients, keywords of the optimizer's update) with the factors where mur.apply_to says.

        A factor on gradients is the original's form and does next to nothing: Adam divides by the
        root of the second moment, which holds the same factor; Lion and Muon drop the scale at
        once. What is left of it is a larger share of the norm that gradients are clipped by.
        """
        if not self.mode.scales_updates:
            return grads, {}
        return TARGETS[self._mur.apply_to].scale(grads, self.factors(memory, step))

    def strength(self, step: jax.Array) -> jax.Array:
        """Share of λ or s in force after `step` steps, from 0 to 1."""
        since = step - self._begin
        rising = jnp.clip(since / jnp.maximum(1, self._ramp), 0.0, 1.0)
        rising = jnp.where(self._ramp > 0, rising, 1.0)
        return jnp.where(since < 0, 0.0, rising)

    def weight(self, step: jax.Array) -> jax.Array:
        """λ(t), 0 but in loss mode."""
        hinge = self.mode.adds_hinge
        return self._mur.lambda_max * self.strength(step) if hinge else jnp.zeros(())

    def tau(self, memory: dict) -> jax.Array:
        """[L, P], the thresholds in force."""
        return self._threshold.value(self, memory)

    def fixed_tau(self) -> jax.Array:
        """[L, P]: mur.tau itself."""
        return jnp.full((self._n, len(self._parts)), self._mur.tau)

    def stderr_tau(self, memory: dict) -> jax.Array:
        """[L, P]: mur.tau times the running standard error of each layer's utility."""
        return self._mur.tau * _mean(memory, "stderr")

    def quantile_tau(self, memory: dict) -> jax.Array:
        """[L, P]: the mean running quantile of the layers acted on."""
        inside = jnp.where(self._chosen()[:, None], _mean(memory, "quantile"), 0.0).sum()
        shape = (self._n, len(self._parts))
        return jnp.broadcast_to(inside / (len(self.layers) * len(self._parts)), shape)

    def metrics(self, asked: "StatRequest", taken: dict, memory: dict, step: jax.Array) -> dict:
        """{"mur/STATISTIC" or "mur/BRANCH/STATISTIC": [L]}; not a number where not measured."""
        values = {name: taken[name] for name in asked.names} | {"tau": asked.tau_LxP}
        if self.mode.adds_hinge:
            values["hinge"] = taken["hinge"]
            values = {k: jnp.where(self._chosen()[:, None], v, jnp.nan) for k, v in values.items()}
        found = {
            f"mur/{part}{name}": value_LxP[:, number]
            for number, part in enumerate(self._parts)
            for name, value_LxP in values.items()
        }
        if self.mode.adds_hinge:
            found["mur/lambda"] = self.weight(step)
        if self.mode.scales_updates:
            found["mur/multiplier"] = self.factors(memory, step)
        return found

    def _chosen(self) -> jax.Array:
        index_L = jnp.arange(self._n)
        return (index_L >= self.layers.start) & (index_L < self.layers.stop)


class StatRequest:
    """What one step takes out of its backward pass.

    Attributes:
      names: the statistics that are reported.
      tau_LxP: thresholds in force.
      slots: zeros; their gradient is what was taken, summed over micro-batches.
    """

    def __init__(self, objective: Objective, memory: dict, step, names: tuple[str, ...]):
        mur, mode = objective._mur, objective.mode
        self._objective, self.names = objective, names
        self.tau_LxP = objective.tau(memory)
        self._key = jax.random.fold_in(objective._key, step)
        each = len(objective.layers) * len(objective._parts) * objective._accum
        self._gain = objective.weight(step) / each
        level = objective._threshold.level(mur.tau)
        wanted = (*names, *objective._kept, *(("hinge",) if mode.adds_hinge else ()))
        self._taking = streams.UtilitySpec(
            Measure(mur.metric, mur.eps, level),
            tuple(dict.fromkeys(wanted)),
            mur.reduce,
            mur.sample_k,
            mur.top_share,
        )
        self.slots = self._taking.slots(objective._n, len(objective._parts), 0)

    def around(self, slots, targets_BxT, n_targets, index) -> streams.UtilityProbe:
        """What micro-batch `index` puts around its blocks."""
        draws = REDUCTIONS[self._taking.reduce].draws
        known = streams.BackwardInputs(
            targets_BxT >= 0,
            n_targets,
            self.tau_LxP,
            self._gain,
            jax.random.fold_in(self._key, index) if draws else None,
        )
        o = self._objective
        layers = o.layers if o.mode.adds_hinge else range(o._n)
        kind = streams.HingeGradient if o.mode.adds_hinge else streams.UtilityProbe
        return kind(self._taking, slots, known, layers, GRANULARITIES[o._mur.granularity].names)

    def taken(self, slot_bars) -> dict:
        """{statistic: [L, P]}, the mean over micro-batches."""
        values_LxPxS = slot_bars / self._objective._accum
        return {name: values_LxPxS[..., i] for i, name in enumerate(self._taking.names)}


class Target(NamedTuple):
    """What a layer's factor multiplies.

    Attributes:
      scale: (gradients, factor [L]) -> (gradients, keywords of the optimizer's update).
      remark: what is said of it to people, where there is something to say of {optimizer}.
    """

    scale: Callable
    remark: str = ""


def _scale_updates(grads: dict, factor_L: jax.Array) -> tuple[dict, dict]:
    return grads, {"block_factors": factor_L}


def _scale_gradients(grads: dict, factor_L: jax.Array) -> tuple[dict, dict]:
    def one(g):
        return g * factor_L.reshape(-1, *[1] * (g.ndim - 1))

    return grads | {"blocks": jax.tree.map(one, grads["blocks"])}, {}


TARGETS = Modes(
    "mur.apply_to",
    {
        "updates": Target(_scale_updates),
        "grads": Target(_scale_gradients, "; {optimizer} cancels a factor of the gradients"),
    },
)


def make_objective(config) -> Objective | None:
    """None where nothing is measured."""
    return Objective(config) if MODES[config.mur.mode].measures else None


def mur_choices(config) -> dict[str, str]:
    """What is done, in a line, by name; {} where nothing is."""
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


def _mean(memory: dict, name: str) -> jax.Array:
    """[L, P]: a running mean; 0 before the first step."""
    weight = memory["weight"]
    return jnp.where(weight > 0, memory["sums"][name] / jnp.where(weight > 0, weight, 1.0), 0.0)
