"""One optimizer step, (state, batch) -> (state, metrics): a pure function under one jit."""

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
from lmscale_jax.model.build import Model
from lmscale_jax.model.mesh import state_shardings
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.train import diagnostics

# Keys that decide neither shapes nor operations. They and TRACED_DURATIONS are arguments of the
# compiled step, so runs that differ in nothing else share one program: all budgets, seeds and
# learning rates of a ladder's rung.
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
    """The state of training. The names of its fields are paths in checkpoints.

    Attributes:
      step: batches consumed, int32.
      params, opt_state: float32 trees.
      bad: consecutive steps skipped because loss or gradient was not finite, int32.
      skipped: all steps skipped, int32.
      memory: start vectors of the spectral measurements (`diagnostics.begin_diagnostics`).
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
    """Initializes the state before the first step."""
    params = model.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    start_vectors = diagnostics.begin_diagnostics(config, model)
    objective = mur.make_objective(config)
    means = objective.init_means() if objective else {}
    return TrainState(zero, params, transform.init(params), zero, zero, start_vectors, means)


def train_state_shardings(config, model: Model, transform, mesh: Mesh) -> TrainState:
    """Returns the shardings of the state, a tree like it, without allocating anything."""
    shapes = jax.eval_shape(lambda: initial_state(config, model, transform, 0))
    return state_shardings(shapes, model.specs, mesh)


def abstract_state(config, model: Model, transform, placed: TrainState) -> TrainState:
    """Describes the whole state, with its shardings, for a checkpoint to be read into."""
    shapes = jax.eval_shape(lambda: initial_state(config, model, transform, config.seed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )


class TrainStep(functools.partial):
    """The jitted `step(state, batch, measure=())`, which donates its state.

    A program compiled from `lower` is called with (state, batch, hparams).
    """

    def __new__(cls, config, model: Model, mesh: Mesh, shardings: TrainState):
        platform = mesh.devices.flat[0].platform

        def optimizer(config):
            return optim.build_optimizer(config, model.param_rules, mesh, platform)

        jitted = jax.jit(
            make_train_step(config, model, optimizer, mesh),
            static_argnames="measure",
            donate_argnums=0,
            out_shardings=(shardings, None),
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
    # A hyperparameter of 0 stays a constant, so that its term is left out of the program.
    nonzero = {path: n for path in TRACED_HPARAMS if (n := get(config, path))}
    return nonzero | {path: get(config, path) for path in TRACED_DURATIONS}


def with_hparams(config, hparams: dict) -> ConfigDict:
    """Returns a copy of the config with the values of `hparams`, which may be traced."""
    traced_config = ConfigDict(config.to_dict())
    with traced_config.ignore_type():
        traced_config.update_from_flattened_dict(hparams)
    return traced_config


def begin_state(config, model: Model, transform, shardings: TrainState) -> TrainState:
    """Initializes the state on the mesh; one compiled program serves all seeds."""
    program = jax.jit(
        lambda seed: initial_state(config, model, transform, seed), out_shardings=shardings
    )
    return program(config.seed)


def make_train_step(config, model: Model, optimizer: Callable, mesh: Mesh) -> Callable:
    """Returns `train_step(state, batch, hparams=None, measure=()) -> (state, metrics)`.

    Metrics include the measurements that `measure` names (`diagnostics.due_measurements`). Each
    combination is a program of its own, so that other steps do not pay for it.

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
        request = objective and objective.request_stats(state.utility, state.step, measure)
        n_targets, stat_buffers = count_targets(batch), request.stat_buffers if request else ()
        gradient = make_gradient(config, model, mesh, n_targets, request, state.step)
        loss, (grads, buffer_grads) = gradient(state.params, stat_buffers, *batch, key)
        stats = request.read_stats(buffer_grads) if request else {}
        norm = optax.tree.norm(grads)
        utility, options = state.utility, {"step": state.step}
        if request:
            utility = objective.update_means(utility, stats)
            grads, factors = objective.scale(utility, state.step, grads)
            options |= factors
        updates, opt_state = transform.update(grads, state.opt_state, state.params, **options)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state, utility = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (optim.apply_updates(state.params, updates), opt_state, utility),
            (state.params, state.opt_state, state.utility),
        )
        nonfinite_in_a_row = jnp.where(is_finite, 0, state.bad + 1)
        skipped_steps = state.skipped + jnp.where(is_finite, 0, 1)
        metrics = {
            "train_loss": loss,
            "grad_norm": norm,
            "lr": traced.optim.lr * factor(state.step),
            "bad": nonfinite_in_a_row,
            "skipped": skipped_steps,
        }
        measured, start_vectors = diagnostics.take_diagnostics(
            measure, model, batch, grads, state.params, updates, state.memory
        )
        if request and request.names:
            measured |= objective.metrics(request, stats, utility, state.step)
        counts = nonfinite_in_a_row, skipped_steps
        new_state = TrainState(state.step + 1, params, opt_state, *counts, start_vectors, utility)
        return new_state, metrics | measured

    return train_step


def count_targets(batch) -> jax.Array:
    """Returns the number of tokens with a label, at least 1."""
    return jnp.maximum(1, (batch.targets_BxT >= 0).sum())


def make_gradient(
    config, model: Model, mesh: Mesh, n_targets: jax.Array, request=None, step=None
) -> Callable:
    """Returns a function of (params, stat_buffers, tokens_BxT, targets_BxT, key).

    It returns (loss, (gradient, buffer_grads)). The loss is the sum over tokens, divided by
    `n_targets`, which counts the whole batch. A scan adds up the micro-batches, so their number
    does not change the result. `request` is a `mur.objective.StatRequest` or None; its statistics
    are the "gradient" of its stat_buffers, () without one. In its loss mode the gradient includes
    the hinges, and the loss does not.
    """
    accum, micro_sharding = config.train.accum, NamedSharding(mesh, P(None, *BATCH))

    def mean_loss(params, stat_buffers, tokens_BxT, targets_BxT, key, index=0):
        wrapper = request and request.wrapper(stat_buffers, targets_BxT, n_targets, index)
        nll_BxT = model.losses(params, tokens_BxT, targets_BxT, key, wrapper, step)
        return nll_BxT.sum() / n_targets

    gradient = jax.value_and_grad(mean_loss, argnums=(0, 1))

    def split_batch(x):
        micro = x.reshape(accum, x.shape[0] // accum, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, micro_sharding)

    def accumulated(params, stat_buffers, tokens_BxT, targets_BxT, key):
        def add(total, micro):
            index, parts = micro
            micro_key = None if key is None else jax.random.fold_in(key, index)
            part = gradient(params, stat_buffers, *parts, micro_key, index)
            return jax.tree.map(jnp.add, total, part), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (params, stat_buffers)))
        parts = jax.tree.map(split_batch, (tokens_BxT, targets_BxT))
        return jax.lax.scan(add, zero, (jnp.arange(accum), parts))[0]

    return gradient if accum == 1 else accumulated
