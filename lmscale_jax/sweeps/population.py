"""Trains runs that differ only in numbers as one compiled program, by `vmap` over its members.

The members' configs are the same but for TRACED_HPARAMS, which the program takes as arrays, and for
the order of the data. A scan takes several steps at a time, so that small models do not wait for
the host. Member k computes what a run of its own config would, up to rounding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.keys import get, keys
from lmscale_jax.data import batches as pipeline
from lmscale_jax.data.prepare import Prepared
from lmscale_jax.errors import InputError
from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.build import build_model
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.layerwise import FREEZING
from lmscale_jax.train import step as steps
from lmscale_jax.train.step import TRACED_HPARAMS

CHUNK = 25
ORDER = "data.seed"


def check_members(members: list[ConfigDict]) -> None:
    """Raises InputError where resolved configs cannot be members of one population."""
    first = members[0]
    for path, key in keys():
        values = {get(member, path) for member in members}
        if len(values) > 1 and key.identity and path not in (*TRACED_HPARAMS, ORDER):
            raise InputError(
                f"config.{path} is {' and '.join(sorted(map(repr, values)))} in members of one "
                f"population, which may differ in {', '.join((*TRACED_HPARAMS, ORDER))} only"
            )
    if first.train.parent:
        raise InputError(
            f"config.train.parent={first.train.parent!r} cannot begin a population, whose members "
            f"have initial values of their own; '' with train.parent_step=0 would work"
        )
    if FREEZING[first.freeze.mode].draws and len({m.seed for m in members}) > 1:
        raise InputError(
            f"config.freeze.mode={first.freeze.mode!r} draws other blocks for each seed, which one "
            f"population cannot freeze; 'fixed' would work"
        )


class Population:
    """The program of K members with resolved configs.

    Attributes:
      config: of the first member, for all that the members share.
      model: shared by all.
    """

    def __init__(self, members: list[ConfigDict]):
        check_members(members)
        self.config = members[0]
        self._mesh = meshes.make_mesh(self.config)
        self._platform = self._mesh.devices.flat[0].platform
        self.model = build_model(self.config, platform=self._platform)
        self._numbers = {
            path: np.array([get(member, path) for member in members])
            for path in TRACED_HPARAMS
            if len({get(member, path) for member in members}) > 1
        }
        self._shared = {
            path: n
            for path, n in steps.traced_hparams(self.config).items()
            if path not in self._numbers
        }
        self._size = len(members)
        self._run = jax.jit(self._advance, static_argnames="measure", donate_argnums=0)

    def begin(self) -> steps.TrainState:
        """The members' states before the first step, stacked along a leading axis."""

        def one(numbers, _):
            config = steps.with_hparams(self.config, numbers)
            return steps.initial_state(config, self.model, self._transform(config), config.seed)

        # The second argument gives the axis its length where no number differs.
        return jax.jit(jax.vmap(one))(self._numbers, np.arange(self._size))

    def advance(self, state_K, batches_KxSxBxT, measure: tuple[str, ...] = ()):
        """(states, metrics): S steps of every member; the states given are consumed.

        Metrics hold "train_loss" and "bad" for each step, [K, S], and under "last" those of the
        last step, in which `measure` is measured.
        """
        return self._run(state_K, batches_KxSxBxT, self._numbers, self._shared, measure=measure)

    def _advance(self, state_K, batches_KxSxBxT, numbers_K, shared, measure):
        def member(numbers, state, batches_SxBxT):
            hparams = numbers | shared
            train_step = steps.make_train_step(self.config, self.model, self._transform, self._mesh)

            def take(state, batch):
                state, metrics = train_step(state, batch, hparams)
                return state, {name: metrics[name] for name in ("train_loss", "bad")}

            early, last = (
                jax.tree.map(lambda x, part=part: x[part], batches_SxBxT)
                for part in (slice(0, -1), -1)
            )
            state, each = jax.lax.scan(take, state, early)
            state, metrics = train_step(state, last, hparams, measure)
            return state, {k: jnp.append(v, metrics[k]) for k, v in each.items()} | {
                "last": metrics
            }

        return jax.vmap(member)(numbers_K, state_K, batches_KxSxBxT)

    def _transform(self, config):
        # Without the mesh: a population is one program on one device.
        return optim.build_optimizer(config, self.model.rows, platform=self._platform)


class Trained(NamedTuple):
    """Attributes:
    train_loss_KxS: nats per token, each step before its update.
    val_loss_K: over the held-out tokens of eval.tokens; nan where a member diverged.
    """

    train_loss_KxS: np.ndarray
    val_loss_K: np.ndarray


def train_population(members: list[ConfigDict], data: Prepared) -> Trained:
    """Trains members from their first step to their last and keeps nothing but their losses."""
    population, config = Population(members), members[0]
    state, losses = population.begin(), []
    read = batch_reader(members, data)
    for start in range(0, config.train.steps, CHUNK):
        batches = read(start, min(start + CHUNK, config.train.steps))
        state, metrics = population.advance(state, batches)
        losses.append(metrics["train_loss"])
    return Trained(
        np.concatenate([np.asarray(x) for x in losses], axis=1),
        _validate(config, data, population.model, state),
    )


def batch_reader(members: list[ConfigDict], data: Prepared) -> Callable[[int, int], pipeline.Batch]:
    """(first, stop) -> the batches of these steps for every member, [K, S, B, T]."""
    config = members[0]
    orders = {
        member.data.seed: pipeline.TrainBatches(
            data, config.data.seq_len, config.train.batch_size, member.data.seed
        )
        for member in members
    }

    def read(first: int, stop: int) -> pipeline.Batch:
        each = {
            seed: jax.tree.map(lambda *x: np.stack(x), *[order.at(t) for t in range(first, stop)])
            for seed, order in orders.items()
        }
        return jax.tree.map(lambda *x: np.stack(x), *[each[m.data.seed] for m in members])

    return read


def _validate(config, data: Prepared, model, state_K: steps.TrainState) -> np.ndarray:
    """[K] mean held-out loss in nats per token."""

    @jax.jit
    def sums(params_K, batch):
        nll_KxBxT = jax.vmap(model.losses, in_axes=(0, None, None))(params_K, *batch)
        return nll_KxBxT.sum(axis=(1, 2)), (batch.targets_BxT >= 0).sum()

    evaluated = jax.vmap(functools.partial(optim.params_to_evaluate, config))
    params_K = evaluated(state_K.params, state_K.opt_state)
    total_K, count = 0.0, 0
    size = config.eval.batch_size or config.train.batch_size
    for batch in pipeline.val_batches(data, config.data.seq_len, size, config.eval.tokens):
        nll_K, n = sums(params_K, batch)
        total_K, count = total_K + np.asarray(nll_K, np.float64), count + int(n)
    return total_K / count
