"""One optimizer step: (state, batch) -> (state, metrics), a pure function under one jit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale_jax.model.build import Model
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.run import measures
from lmscale_jax.run import mesh as meshes


class State(NamedTuple):
    """Attributes:
    step: batches consumed, int32.
    params, opt_state: float32 trees.
    bad: consecutive steps that were skipped, int32.
    skipped: all steps that were skipped, int32.
    memory: what measurements remember (see `measures.begin`).
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    bad: jax.Array
    skipped: jax.Array
    memory: dict


def initial(config, model: Model, transform, seed) -> State:
    """The state before the first step."""
    params = model.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    memory = measures.begin(config, model)
    return State(zero, params, transform.init(params), zero, zero, memory)


def shardings(config, model: Model, transform, mesh: Mesh) -> State:
    """Shardings of the whole state, without allocating it."""
    shapes = jax.eval_shape(lambda: initial(config, model, transform, 0))
    return meshes.state_shardings(shapes, model.specs, mesh)


def make(config, model: Model, transform, mesh: Mesh, placed: State) -> Callable:
    """The jitted `step(state, batch, measure=())`; the state given is consumed."""
    return jax.jit(
        pure(config, model, transform, mesh),
        static_argnames="measure",
        donate_argnums=0,
        out_shardings=(placed, None),
    )


def pure(config, model: Model, transform, mesh: Mesh) -> Callable:
    """`step(state, batch, lr=config.optim.lr, measure=()) -> (state, metrics)`.

    Metrics also hold what `measure` names (see `measures.due`). Each combination is compiled apart,
    so that other steps do not pay for it. `lr` may be traced, so that one program can train a
    population.
    """
    gradient, factor = make_gradient(config, model, mesh), schedules.make(config)
    dropout = jax.random.key(config.seed) if config.model.dropout else None

    def step(state: State, batch, lr=config.optim.lr, measure: tuple[str, ...] = ()):
        key = None if dropout is None else jax.random.fold_in(dropout, state.step)
        loss, grads = gradient(state.params, batch, key)
        norm = optax.tree.norm(grads)
        updates, opt_state = transform.update(
            grads, state.opt_state, state.params, step=state.step, lr=lr
        )
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (optim.apply(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        bad = jnp.where(ok, 0, state.bad + 1)
        skipped = state.skipped + jnp.where(ok, 0, 1)
        metrics = {
            "train_loss": loss,
            "grad_norm": norm,
            "lr": lr * factor(state.step),
            "bad": bad,
            "skipped": skipped,
        }
        seen, memory = measures.take(
            measure, model, batch, grads, state.params, updates, state.memory
        )
        return State(state.step + 1, params, opt_state, bad, skipped, memory), metrics | seen

    return step


def make_gradient(config, model: Model, mesh: Mesh) -> Callable:
    """(params, batch, key) -> (mean loss over the batch's targets, its gradient).

    Micro-batches are added up by a scan; each is divided by the targets of the whole batch, so
    cutting the batch changes no number.
    """
    accum = config.train.accum
    rows = NamedSharding(mesh, P(None, *meshes.BATCH))

    def mean_loss(params, tokens_BxT, targets_BxT, n_targets, key):
        return model.losses(params, tokens_BxT, targets_BxT, key).sum() / n_targets

    function = jax.value_and_grad(mean_loss)

    def cut(x):
        micro = x.reshape(accum, x.shape[0] // accum, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, rows)

    def gradient(params, batch, key):
        n_targets = jnp.maximum(1, (batch.targets_BxT >= 0).sum())
        if accum == 1:
            return function(params, *batch, n_targets, key)

        def one(total, micro):
            index, parts = micro
            micro_key = None if key is None else jax.random.fold_in(key, index)
            part = function(params, *parts, n_targets, micro_key)
            return jax.tree.map(jnp.add, total, part), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        parts = jax.tree.map(cut, tuple(batch))
        return jax.lax.scan(one, zero, (jnp.arange(accum), parts))[0]

    return gradient
