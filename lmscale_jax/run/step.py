"""One optimizer step: (state, batch) -> (state, metrics), a pure function under one jit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lmscale_jax.config import get, keys
from lmscale_jax.derived import duration
from lmscale_jax.model.build import Model
from lmscale_jax.model.placement import BATCH
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.run import measures
from lmscale_jax.run import mesh as meshes

# Keys that are numbers to the program, and decide neither shapes nor what is computed. They and
# LENGTHS are arguments of the compiled step, so that runs that differ in nothing else compile it
# once: a rung of a ladder at each of its budgets, seeds and learning rates.
NUMBERS = (
    "seed",
    "optim.lr",
    "optim.muon_lr",
    "optim.weight_decay",
    "mur.lambda_max",
    "mur.alpha",
)
# The same, in steps.
LENGTHS = (
    "train.steps",
    "schedule.warmup",
    "schedule.cooldown",
    "optim.momentum_warmup",
    "mur.warmup",
    "mur.ramp",
)


class State(NamedTuple):
    """Attributes:
    step: batches consumed, int32.
    params, opt_state: float32 trees.
    bad: consecutive steps that were skipped, int32.
    skipped: all steps that were skipped, int32.
    memory: what measurements remember (see `measures.begin`).
    utility: running means of `mur.objective`.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    bad: jax.Array
    skipped: jax.Array
    memory: dict
    utility: dict


def initial(config, model: Model, transform, seed) -> State:
    """The state before the first step."""
    params = model.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    memory, objective = measures.begin(config, model), mur.make(config)
    utility = objective.begin() if objective else {}
    return State(zero, params, transform.init(params), zero, zero, memory, utility)


def shardings(config, model: Model, transform, mesh: Mesh) -> State:
    """Shardings of the whole state, without allocating it."""
    shapes = jax.eval_shape(lambda: initial(config, model, transform, 0))
    return meshes.state_shardings(shapes, model.specs, mesh)


class Step:
    """The jitted `step(state, batch, measure=())`; the state given is consumed.

    What `lower` compiles to is called with (state, batch, numbers).
    """

    def __init__(self, config, model: Model, mesh: Mesh, placed: State):
        platform = mesh.devices.flat[0].platform
        config = in_steps(config)
        self.numbers = numbers(config)

        def step(state, batch, numbers, measure):
            own = with_numbers(config, numbers)
            transform = optim.build(own, model.rows, mesh, platform)
            return pure(own, model, transform, mesh)(state, batch, measure)

        self._run = jax.jit(
            step, static_argnames="measure", donate_argnums=0, out_shardings=(placed, None)
        )

    def __call__(self, state: State, batch, measure: tuple[str, ...] = ()):
        return self._run(state, batch, self.numbers, measure=measure)

    def lower(self, state: State, batch, measure: tuple[str, ...] = ()):
        """As `jax.jit`'s, for arrays or their descriptions."""
        return self._run.lower(state, batch, self.numbers, measure=measure)


def in_steps(config) -> ConfigDict:
    """The config with every duration as a number of steps."""
    return with_numbers(
        config,
        {path: duration(get(config, path), config) for path, key in keys() if key.duration},
    )


def numbers(config) -> dict[str, int | float]:
    """NUMBERS and LENGTHS of a config `in_steps`, by path."""
    # Something that is multiplied by 0 is left out of the program.
    given = {path: n for path in NUMBERS if (n := get(config, path))}
    return given | {path: get(config, path) for path in LENGTHS}


def with_numbers(config, numbers: dict) -> ConfigDict:
    """The config with other values, which may be traced."""
    own = ConfigDict(config.to_dict())
    with own.ignore_type():
        own.update_from_flattened_dict(numbers)
    return own


def begin(config, model: Model, transform, placed: State) -> State:
    """The state before the first step, placed on the mesh; the seed is no part of the program."""
    first = jax.jit(lambda seed: initial(config, model, transform, seed), out_shardings=placed)
    return first(config.seed)


def pure(config, model: Model, transform, mesh: Mesh) -> Callable:
    """`step(state, batch, measure=()) -> (state, metrics)`.

    Metrics also hold what `measure` names (see `measures.due`). Each combination is compiled apart,
    so that other steps do not pay for it. NUMBERS in the config may be traced, and LENGTHS where it
    is `in_steps`.
    """
    gradient, factor = make_gradient(config, model, mesh), schedules.make(config)
    dropout = jax.random.key(config.seed) if config.model.dropout else None
    objective = mur.make(config)

    def step(state: State, batch, measure: tuple[str, ...] = ()):
        key = None if dropout is None else jax.random.fold_in(dropout, state.step)
        asked = objective and objective.ask(state.utility, state.step, measure)
        loss, grads, taken = gradient(state.params, batch, key, asked, state.step)
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
            (optim.apply(state.params, updates), opt_state, utility),
            (state.params, state.opt_state, state.utility),
        )
        bad = jnp.where(ok, 0, state.bad + 1)
        skipped = state.skipped + jnp.where(ok, 0, 1)
        metrics = {
            "train_loss": loss,
            "grad_norm": norm,
            "lr": config.optim.lr * factor(state.step),
            "bad": bad,
            "skipped": skipped,
        }
        seen, memory = measures.take(
            measure, model, batch, grads, state.params, updates, state.memory
        )
        if asked and asked.names:
            seen |= objective.metrics(asked, taken, utility, state.step)
        after = State(state.step + 1, params, opt_state, bad, skipped, memory, utility)
        return after, metrics | seen

    return step


def make_gradient(config, model: Model, mesh: Mesh) -> Callable:
    """(params, batch, key, asked=None, step=None) -> (mean loss over targets, gradient, taken).

    Micro-batches are added up by a scan; each is divided by the targets of the whole batch, so
    cutting the batch changes no number. `taken` is what a `mur.objective.Asked` takes out of the
    backward pass; in loss mode the gradient is that of its objective, the loss is not.
    """
    accum = config.train.accum
    rows = NamedSharding(mesh, P(None, *BATCH))

    def cut(x):
        micro = x.reshape(accum, x.shape[0] // accum, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, rows)

    def gradient(params, batch, key, asked=None, step=None):
        slots = asked.slots if asked else ()
        n_targets = jnp.maximum(1, (batch.targets_BxT >= 0).sum())

        def mean_loss(params, slots, tokens_BxT, targets_BxT, key, index=0):
            wrapper = asked and asked.around(slots, targets_BxT, n_targets, index)
            nll_BxT = model.losses(params, tokens_BxT, targets_BxT, key, wrapper, step)
            return nll_BxT.sum() / n_targets

        function = jax.value_and_grad(mean_loss, argnums=(0, 1))

        def one(total, micro):
            index, parts = micro
            micro_key = None if key is None else jax.random.fold_in(key, index)
            part = function(params, slots, *parts, micro_key, index)
            return jax.tree.map(jnp.add, total, part), None

        if accum == 1:
            loss, (grads, bars) = function(params, slots, *batch, key)
        else:
            zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (params, slots)))
            parts = jax.tree.map(cut, tuple(batch))
            (loss, (grads, bars)), _ = jax.lax.scan(one, zero, (jnp.arange(accum), parts))
        return loss, grads, asked.taken(bars) if asked else {}

    return gradient
