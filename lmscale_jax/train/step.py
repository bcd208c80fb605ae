"""One optimizer step, (state, batch) -> (state, metrics): a pure function under one jit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lmscale_jax.config.keys import get
from lmscale_jax.errors import InputError
from lmscale_jax.model.build import Model
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.train import diagnostics
from lmscale_jax.train.terms import TermInputs, loss_terms

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
        (_, (loss, terms)), both = gradient(state.params, stat_buffers, *batch, key)
        grads, buffer_grads = both
        stats = request.read_stats(buffer_grads) if request else {}
        norm = optax.tree.norm(grads)
        utility, options = state.utility, {"step": state.step}
        if request:
            utility = objective.update_means(utility, stats)
            grads, factors = objective.scale(utility, state.step, grads)
            options |= factors
        updates, opt_state = transform.update(grads, state.opt_state, state.params, **options)
        measured, start_vectors = diagnostics.take_diagnostics(
            measure, model, batch, grads, state, updates
        )
        params = optim.apply_updates(state.params, updates)
        taken = state._replace(params=params, opt_state=opt_state, memory=start_vectors)
        taken = taken._replace(utility=utility)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # All of the state, so that nothing of a step that is skipped reaches the next one.
        new_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), taken, state)
        new_state = new_state._replace(
            step=state.step + 1,
            bad=jnp.where(is_finite, 0, state.bad + 1),
            skipped=state.skipped + jnp.where(is_finite, 0, 1),
        )
        metrics = {
            "train_loss": loss,
            "grad_norm": norm,
            "lr": traced.optim.lr * factor(state.step),
            "bad": new_state.bad,
            "skipped": new_state.skipped,
        } | {f"term/{name}": value for name, value in terms.items()}
        if request and request.names:
            measured |= objective.metrics(request, stats, new_state.utility, state.step)
        return new_state, metrics | measured

    return train_step


def count_targets(batch) -> jax.Array:
    """Returns the number of tokens with a label, at least 1."""
    return jnp.maximum(1, (batch.targets_BxT >= 0).sum())


def make_gradient(
    config, model: Model, mesh: Mesh, n_targets: jax.Array, request=None, step=None
) -> Callable:
    """Returns a function of (params, stat_buffers, tokens_BxT, targets_BxT, key).

    It returns ((sum, (loss, {name of a term: value})), (gradient, buffer_grads)). The loss is the
    sum over tokens, divided by `n_targets`, which counts the whole batch. The gradient is of the
    sum of the loss and the terms. A scan adds up the micro-batches, so their number does not change
    the result: a term weighs by its tokens, or else by its share of the batch. `request` is a
    `mur.objective.StatRequest` or None; its statistics are the "gradient" of its stat_buffers, ()
    without one. In its loss mode the gradient includes the hinges, and the loss does not.
    """
    accum, micro_sharding = config.train.accum, NamedSharding(mesh, P(None, *BATCH))
    terms = loss_terms(config)
    needs = tuple(sorted({name for term in terms for name in term.needs}))
    if request and "streams" in needs:
        raise InputError(
            f"config.objective.terms={config.objective.terms!r} needs streams, which mur.mode="
            f"{config.mur.mode!r} does not hand out; use mur.mode='off'"
        )

    def mean_loss(params, stat_buffers, tokens_BxT, targets_BxT, key, index=0):
        wrapper = request and request.wrapper(stat_buffers, targets_BxT, n_targets, index)
        nll_BxT, handed_out = model.losses(
            params, tokens_BxT, targets_BxT, key, wrapper, step, needs
        )
        counted = targets_BxT >= 0
        out = TermInputs(tokens_BxT, targets_BxT, counted, nll_BxT, **handed_out)
        shares = {True: counted.sum() / n_targets, False: 1 / accum}
        values = {
            term.name: shares[term.per_token] * term.value(params, out, config, step)
            for term in terms
        }
        loss = nll_BxT.sum() / n_targets
        return sum(values.values(), loss), (loss, values)

    gradient = jax.value_and_grad(mean_loss, (0, 1), has_aux=True)

    def split_batch(x):
        micro = x.reshape(accum, x.shape[0] // accum, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, micro_sharding)

    def accumulated(params, stat_buffers, tokens_BxT, targets_BxT, key):
        def add(total, micro):
            index, parts = micro
            micro_key = None if key is None else jax.random.fold_in(key, index)
            part = gradient(params, stat_buffers, *parts, micro_key, index)
            return jax.tree.map(jnp.add, total, part), None

        scalars = {term.name: jnp.zeros(()) for term in terms}
        zero = (jnp.zeros(()), (jnp.zeros(()), scalars)), (params, stat_buffers)
        zero = jax.tree.map(jnp.zeros_like, zero)
        parts = jax.tree.map(split_batch, (tokens_BxT, targets_BxT))
        return jax.lax.scan(add, zero, (jnp.arange(accum), parts))[0]

    return gradient if accum == 1 else accumulated
