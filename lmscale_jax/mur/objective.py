"""Marginal Utility Regularization as the training step sees it: what `mur.*` of a config asks for.

"diagnose" measures on the steps that write a line and changes nothing. "loss" adds
λ(t) * mean over the chosen layers (and parts) of max(0, tau - utility) to the objective, g held
constant; the utility is that of a micro-batch, and the objective its mean over micro-batches.
"update" multiplies the update of layer l by 1 + s(t) * max(0, tau - ū_l), where ū_l is a running
mean. λ(t) and s(t) are 0 during mur.warmup and then rise in a line over mur.ramp.
"""

import jax
import jax.numpy as jnp

from lmscale_jax.config.blocks import mur_layers
from lmscale_jax.mur import streams
from lmscale_jax.mur.utility import Measure

PARTS = {"block": ("",), "branch": ("attention/", "mlp/")}
REPORTED = ("mean", "p10", "p50", "p90", "frac_below_tau", "delta_norm", "grad_norm", "stderr")
_STREAM = 0x6D7572


class Objective:
    """The part of a training step that a resolved config's `mur` group describes."""

    def __init__(self, config):
        mur, n = config.mur, config.model.n_layers
        self._mur, self._n, self.mode = mur, n, mur.mode
        self.layers = mur_layers(config)
        self._parts = PARTS[mur.granularity]
        self._accum = config.train.accum
        self._begin, self._ramp = mur.warmup, mur.ramp
        self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
        # What is taken in every step, and remembered.
        kept = {"absolute": (), "quantile": ("quantile",), "stderr": ("stderr",)}[mur.tau_kind]
        self._kept = kept + (("utility",) if self.mode == "update" else ())

    def begin(self) -> dict:
        """The running means before the first step: {"weight", "sums": {statistic: [L, P]}}."""
        if not self._kept:
            return {}
        zero = jnp.zeros((self._n, len(self._parts)))
        return {"weight": jnp.zeros(()), "sums": {name: zero for name in self._kept}}

    def ask(self, memory: dict, step: jax.Array, measure: tuple[str, ...]) -> "Asked | None":
        """What to take out of the backward pass of this step; None: nothing."""
        if self.mode == "diagnose" and "mur" not in measure:
            return None
        return Asked(self, memory, step, REPORTED if "mur" in measure else ())

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
        if self.mode != "update":
            return grads, {}
        factor_L = self.factors(memory, step)
        if self._mur.apply_to == "updates":
            return grads, {"block_factors": factor_L}

        def one(g):
            return g * factor_L.reshape(-1, *[1] * (g.ndim - 1))

        return grads | {"blocks": jax.tree.map(one, grads["blocks"])}, {}

    def strength(self, step: jax.Array) -> jax.Array:
        """Share of λ or s in force after `step` steps, from 0 to 1."""
        since = step - self._begin
        rising = jnp.clip(since / jnp.maximum(1, self._ramp), 0.0, 1.0)
        rising = jnp.where(self._ramp > 0, rising, 1.0)
        return jnp.where(since < 0, 0.0, rising)

    def weight(self, step: jax.Array) -> jax.Array:
        """λ(t), 0 but in loss mode."""
        return self._mur.lambda_max * self.strength(step) if self.mode == "loss" else jnp.zeros(())

    def tau(self, memory: dict) -> jax.Array:
        """[L, P]."""
        mur, shape = self._mur, (self._n, len(self._parts))
        if mur.tau_kind == "absolute":
            return jnp.full(shape, mur.tau)
        if mur.tau_kind == "stderr":
            return mur.tau * _mean(memory, "stderr")
        inside = jnp.where(self._chosen()[:, None], _mean(memory, "quantile"), 0.0).sum()
        return jnp.broadcast_to(inside / (len(self.layers) * len(self._parts)), shape)

    def metrics(self, asked: "Asked", taken: dict, memory: dict, step: jax.Array) -> dict:
        """{"mur/STATISTIC" or "mur/BRANCH/STATISTIC": [L]}; not a number where not measured."""
        values = {name: taken[name] for name in asked.names} | {"tau": asked.tau_LxP}
        if self.mode == "loss":
            values["hinge"] = taken["hinge"]
            values = {k: jnp.where(self._chosen()[:, None], v, jnp.nan) for k, v in values.items()}
        found = {
            f"mur/{part}{name}": value_LxP[:, number]
            for number, part in enumerate(self._parts)
            for name, value_LxP in values.items()
        }
        if self.mode == "loss":
            found["mur/lambda"] = self.weight(step)
        if self.mode == "update":
            found["mur/multiplier"] = self.factors(memory, step)
        return found

    def _chosen(self) -> jax.Array:
        index_L = jnp.arange(self._n)
        return (index_L >= self.layers.start) & (index_L < self.layers.stop)


class Asked:
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
        level = mur.tau if mur.tau_kind == "quantile" else 0.5
        wanted = (*names, *objective._kept, *(("hinge",) if mode == "loss" else ()))
        self._taking = streams.Taking(
            Measure(mur.metric, mur.eps, level),
            tuple(dict.fromkeys(wanted)),
            mur.reduce,
            mur.sample_k,
            mur.top_share,
        )
        self.slots = self._taking.slots(objective._n, len(objective._parts), 0)

    def around(self, slots, targets_BxT, n_targets, index) -> streams.Watch:
        """What micro-batch `index` puts around its blocks."""
        known = streams.Known(
            targets_BxT >= 0,
            n_targets,
            self.tau_LxP,
            self._gain,
            jax.random.fold_in(self._key, index) if self._taking.reduce == "sample_k" else None,
        )
        o = self._objective
        layers = o.layers if o.mode == "loss" else range(o._n)
        kind = streams.Paired if o.mode == "loss" else streams.Watch
        return kind(self._taking, slots, known, layers, o._mur.granularity)

    def taken(self, slot_bars) -> dict:
        """{statistic: [L, P]}, the mean over micro-batches."""
        values_LxPxS = slot_bars / self._objective._accum
        return {name: values_LxPxS[..., i] for i, name in enumerate(self._taking.names)}


def make(config) -> Objective | None:
    """None where mur.mode is "off"."""
    return None if config.mur.mode == "off" else Objective(config)


def choices(config) -> dict[str, str]:
    """What is done, in a line, by name; {} where nothing is."""
    if config.mur.mode == "off":
        return {}
    mur, layers = config.mur, mur_layers(config)
    if mur.mode == "diagnose":
        return {"mur": f"diagnose: {mur.metric} utility of every block, nothing is changed"}
    begin, end = mur.warmup, mur.warmup + mur.ramp
    where = f"blocks {layers.start} to {layers.stop - 1} of {config.model.n_layers}"
    what = f"λ {mur.lambda_max:g}" if mur.mode == "loss" else f"s {mur.alpha:g} on {mur.apply_to}"
    said = f"{mur.mode}: {mur.metric}, {where}, {what} from step {begin} to {end}"
    if mur.apply_to == "grads":
        said += f"; {config.optim.name} cancels a factor of the gradients"
    return {"mur": said}


def _mean(memory: dict, name: str) -> jax.Array:
    """[L, P]: a running mean; 0 before the first step."""
    weight = memory["weight"]
    return jnp.where(weight > 0, memory["sums"][name] / jnp.where(weight > 0, weight, 1.0), 0.0)
