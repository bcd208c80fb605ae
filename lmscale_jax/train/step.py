"""One optimizer step: (state, batch) -> (state, metrics), a pure function under one jit."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lmscale_jax.config.keys import get
from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.build import Model
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.train import diagnostics

# Keys that are numbers to the program, and decide neither shapes nor what is computed. They and
# TRACED_DURATIONS are arguments of the compiled step, so that runs that differ in nothing else
# compile it once: a rung of a ladder at each of its budgets, seeds and learning rates.
TRACED_HPARAMS = (
    "seed",
    "optim.lr",
    "optim.muon_lr",
    "optim.weight_decay",
    "mur.lambda_max",
    "mur.alpha",
)
# The same, in steps.
TRACED_DURATIONS = (
    "train.steps",
    "schedule.warmup",
    "schedule.cooldown",
    "optim.momentum_warmup",
    "mur.warmup",
    "mur.ramp",
)


class TrainState(NamedTuple):
    """Attributes:
    step: batches consumed, int32.
    params, opt_state: float32 trees.
    bad: consecutive steps that were skipped, int32.
    skipped: all steps that were skipped, int32.
    memory: what measurements remember (see `diagnostics.begin_diagnostics`).
    utility: running means of `mur.objective`.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    bad: jax.Array
    skipped: jax.Array
    memory: dict
    utility: dict


def initial_state(config, model: Model, transform, seed) -> TrainState:
    """The state before the first step."""
    params = model.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    memory, objective = diagnostics.begin_diagnostics(config, model), mur.make_objective(config)
    utility = objective.begin() if objective else {}
    return TrainState(zero, params, transform.init(params), zero, zero, memory, utility)


def train_state_shardings(config, model: Model, transform, mesh: Mesh) -> TrainState:
    """Shardings of the whole state, without allocating it."""
    shapes = jax.eval_shape(lambda: initial_state(config, model, transform, 0))
    return meshes.state_shardings(shapes, model.specs, mesh)


def abstract_state(config, model: Model, transform, placed: TrainState) -> TrainState:
    """Describes the whole state, with its shardings, for a checkpoint to be read into."""
    shapes = jax.eval_shape(lambda: initial_state(config, model, transform, config.seed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )


class TrainStep(functools.partial):
    """The jitted `step(state, batch, measure=())`; the state that it gets is consumed.

    What `lower` compiles to is called with (state, batch, hparams).
    """

    def __new__(cls, config, model: Model, mesh: Mesh, placed: TrainState):
        platform = mesh.devices.flat[0].platform

        def optimizer(config):
            return optim.build_optimizer(config, model.rows, mesh, platform)

        jitted = jax.jit(
            make_train_step(config, model, optimizer, mesh),
            static_argnames="measure",
            donate_argnums=0,
            out_shardings=(placed, None),
        )
        return super().__new__(cls, jitted, hparams=traced_hparams(config))

    @property
    def hparams(self) -> dict[str, int | float]:
        return self.keywords["hparams"]

    def lower(self, state: TrainState, batch, measure: tuple[str, ...] = ()):
        """Lowers as `jax.jit` does, for arrays or their descriptions."""
        return self.func.lower(state, batch, self.hparams, measure=measure)


def traced_hparams(config) -> dict[str, int | float]:
    """Returns TRACED_HPARAMS and TRACED_DURATIONS of a resolved config, by path."""
    # Something that is multiplied by 0 is left out of the program.
    nonzero = {path: n for path in TRACED_HPARAMS if (n := get(config, path))}
    return nonzero | {path: get(config, path) for path in TRACED_DURATIONS}


def with_hparams(config, hparams: dict) -> ConfigDict:
    """Returns the config with other values, which may be traced."""
    changed = ConfigDict(config.to_dict())
    with changed.ignore_type():
        changed.update_from_flattened_dict(hparams)
    return changed


def begin_state(config, model: Model, transform, placed: TrainState) -> TrainState:
    """The state before the first step, placed on the mesh; the seed is no part of the program."""
    first = jax.jit(
        lambda seed: initial_state(config, model, transform, seed), out_shardings=placed
    )
    return first(config.seed)


def make_train_step(config, model: Model, optimizer: Callable, mesh: Mesh) -> Callable:
    """Returns `train_step(state, batch, hparams=None, measure=()) -> (state, metrics)`.

    Metrics also hold what `measure` names (see `diagnostics.due_measurements`). Each combination is
    compiled apart, so that other steps do not pay for it.

    Args:
      config: resolved.
      model: of the config.
      optimizer: config -> the optax transformation.
      mesh: that batches are split over.
    """

    def train_step(state: TrainState, batch, hparams=None, measure: tuple[str, ...] = ()):
        # Values of keys by path, which may be traced.
        traced = with_hparams(config, hparams or {})
        transform, factor = optimizer(traced), schedules.make_schedule(traced)
        dropout = jax.random.key(traced.seed) if traced.model.dropout else None
        objective = mur.make_objective(traced)
        key = None if dropout is None else jax.random.fold_in(dropout, state.step)
        asked = objective and objective.ask(state.utility, state.step, measure)
        n_targets, slots = count_targets(batch), asked.slots if asked else ()
        gradient = make_gradient(config, model, mesh, n_targets, asked, state.step)
        loss, (grads, slot_bars) = gradient(state.params, slots, *batch, key)
        taken = asked.taken(slot_bars) if asked else {}
        norm = optax.tree.norm(grads)
        utility, more = state.utility, {"step": state.step}
        if asked:
            utility = objective.learn(utility, taken)
            grads, factors = objective.scale(utility, state.step, grads)
            more |= factors
        updates, opt_state = transform.update(grads, state.opt_state, state.params, **more)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state, utility = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (optim.apply_updates(state.params, updates), opt_state, utility),
            (state.params, state.opt_state, state.utility),
        )
        bad = jnp.where(ok, 0, state.bad + 1)
        skipped = state.skipped + jnp.where(ok, 0, 1)
        metrics = {
            "train_loss": loss,
            "grad_norm": norm,
            "lr": traced.optim.lr * factor(state.step),
            "bad": bad,
            "skipped": skipped,
        }
        measured, memory = diagnostics.take_diagnostics(
            measure, model, batch, grads, state.params, updates, state.memory
        )
        if asked and asked.names:
            measured |= objective.metrics(asked, taken, utility, state.step)
        after = TrainState(state.step + 1, params, opt_state, bad, skipped, memory, utility)
        return after, metrics | measured

    return train_step


def count_targets(batch) -> jax.Array:
    """Returns the number of tokens with a label, at least 1."""
    return jnp.maximum(1, (batch.targets_BxT >= 0).sum())


def make_gradient(
    config, model: Model, mesh: Mesh, n_targets: jax.Array, asked=None, step=None
) -> Callable:
    """Returns (params, slots, tokens_BxT, targets_BxT, key) -> (loss, (gradient, slot_bars)).

    The loss is the sum over tokens, divided by `n_targets`, those of the whole batch. Micro-batches
    are added up by a scan, so cutting the batch changes no number. What a
    `mur.objective.StatRequest` takes out of the backward pass is the "gradient" of its slots, ()
    without one; in loss mode the gradient is that of its objective, the loss is not.
    """
    accum, rows = config.train.accum, NamedSharding(mesh, P(None, *BATCH))

    def mean_loss(params, slots, tokens_BxT, targets_BxT, key, index=0):
        wrapper = asked and asked.around(slots, targets_BxT, n_targets, index)
        nll_BxT = model.losses(params, tokens_BxT, targets_BxT, key, wrapper, step)
        return nll_BxT.sum() / n_targets

    gradient = jax.value_and_grad(mean_loss, argnums=(0, 1))

    def cut(x):
        micro = x.reshape(accum, x.shape[0] // accum, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, rows)

    def accumulated(params, slots, tokens_BxT, targets_BxT, key):
        def add(total, micro):
            index, parts = micro
            micro_key = None if key is None else jax.random.fold_in(key, index)
            part = gradient(params, slots, *parts, micro_key, index)
            return jax.tree.map(jnp.add, total, part), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (params, slots)))
        parts = jax.tree.map(cut, (tokens_BxT, targets_BxT))
        return jax.lax.scan(add, zero, (jnp.arange(accum), parts))[0]

    return gradient if accum == 1 else accumulated
