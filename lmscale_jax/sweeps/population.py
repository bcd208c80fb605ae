"""Trains runs that differ only in traced hyperparameters as one program, a `vmap` over members.

The members' configs differ in TRACED_HPARAMS, which the program takes as arrays, and in the order
of the data. A scan takes several steps at a time, so that small models do not wait for the host.
Member k computes what a single run of its config would, up to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.keys import get
from lmscale_jax.config.own_keys import all_keys
from lmscale_jax.data.batches import Batch, TrainBatches, val_batches
from lmscale_jax.data.prepare import Prepared
from lmscale_jax.errors import InputError
from lmscale_jax.model.mesh import one_device_mesh
from lmscale_jax.optim import build as optim
from lmscale_jax.train import step
from lmscale_jax.train.setup import build_setup
from lmscale_jax.train.step import TRACED_HPARAMS

# Steps of one scan.
CHUNK = 25
DATA_ORDER = "data.seed"


def check_members(members: list[ConfigDict]) -> None:
    """Raises InputError where resolved configs cannot be members of one population."""
    first = members[0]
    for path, key in all_keys(first):
        values = {get(member, path) for member in members}
        if len(values) > 1 and key.identity and path not in (*TRACED_HPARAMS, DATA_ORDER):
            raise InputError(
                f"config.{path}={' and '.join(sorted(map(repr, values)))} differs between members "
                f"of one population; use one value, or vary only "
                f"{', '.join((*TRACED_HPARAMS, DATA_ORDER))}"
            )
    if first.train.parent:
        raise InputError(
            f"config.train.parent={first.train.parent!r} does not support populations, whose "
            f"members have different initial values; use '' with train.parent_step=0"
        )


class Population:
    """The program of K members with resolved configs, on one device.

    Attributes:
      setup: of the first member, for what all members share.
    """

    def __init__(
        self,
        members: list[ConfigDict],
        boundary: int | None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Raises the InputErrors of `check_members` and `build_setup`, for `boundary` see there.

        `mesh`: one device, by default of those here; it may be only described, to `lower` for.
        """
        check_members(members)
        self.setup = build_setup(members[0], boundary, mesh or one_device_mesh())
        self._member_hparams = {
            path: np.array([get(member, path) for member in members])
            for path in TRACED_HPARAMS
            if len({get(member, path) for member in members}) > 1
        }
        self._shared_hparams = {
            path: n
            for path, n in step.traced_hparams(members[0]).items()
            if path not in self._member_hparams
        }
        self._size = len(members)
        self._run = jax.jit(self._advance, static_argnames="measure", donate_argnums=0)

    def begin(self) -> step.TrainState:
        """Initializes the members' states, stacked along a leading axis K."""

        def initial(hparams, _):
            config = step.with_hparams(self.setup.config, hparams)
            setup = dataclasses.replace(self.setup, config=config)
            return setup.initial(config.seed)

        # The second argument gives K its length where no hyperparameter differs.
        return jax.jit(jax.vmap(initial))(self._member_hparams, np.arange(self._size))

    def advance(self, state_K, batches_KxSxBxT, measure: tuple[str, ...] = ()):
        """Takes S steps of every member and returns (states, metrics); donates `state_K`.

        Metrics have "train_loss" and "bad" of each step, [K, S], and under "last" all metrics of
        the last step, which takes the measurements `measure`.
        """
        return self._run(
            state_K, batches_KxSxBxT, self._member_hparams, self._shared_hparams, measure=measure
        )

    def lower(self, state_K, batches_KxSxBxT):
        """Lowers `advance` for descriptions of arrays."""
        hparams = self._member_hparams, self._shared_hparams
        return self._run.lower(state_K, batches_KxSxBxT, *hparams, measure=())

    def _advance(self, state_K, batches_KxSxBxT, hparams_K, shared_hparams, measure):
        def advance_member(member_hparams, state, batches_SxBxT):
            hparams = member_hparams | shared_hparams
            train_step = self.setup.train_step()

            def scan_step(state, batch):
                state, metrics = train_step(state, batch, hparams)
                return state, {name: metrics[name] for name in ("train_loss", "bad")}

            n_early = len(batches_SxBxT.tokens_BxT) - 1
            early = jax.tree.map(lambda x: x[:n_early], batches_SxBxT)
            last = jax.tree.map(lambda x: x[n_early], batches_SxBxT)
            series = []
            if n_early:  # a scan over no steps would be compiled all the same
                state, losses = jax.lax.scan(scan_step, state, early)
                series.append(losses)
            state, metrics = train_step(state, last, hparams, measure)
            series.append({name: metrics[name][None] for name in ("train_loss", "bad")})
            joined = jax.tree.map(lambda *x: jnp.concatenate(x), *series)
            return state, joined | {"last": metrics}

        return jax.vmap(advance_member)(hparams_K, state_K, batches_KxSxBxT)


class Trained(NamedTuple):
    """The losses of a trained population.

    Attributes:
      train_loss_KxS: nats per token, of each step before its update.
      val_loss_K: over eval.tokens held-out tokens; nan where a member diverged.
    """

    train_loss_KxS: np.ndarray
    val_loss_K: np.ndarray


def train_population(members: list[ConfigDict], data: Prepared) -> Trained:
    """Trains members from their first step to their last and returns their losses only."""
    population, config = Population(members, data.boundary), members[0]
    state, losses = population.begin(), []
    read = batch_reader(members, data)
    for start in range(0, config.train.steps, CHUNK):
        batches = read(start, min(start + CHUNK, config.train.steps))
        state, metrics = population.advance(state, batches)
        losses.append(metrics["train_loss"])
    return Trained(
        np.concatenate([np.asarray(x) for x in losses], axis=1),
        validate_members(config, data, population.setup.model, state),
    )


def batch_reader(members: list[ConfigDict], data: Prepared) -> Callable[[int, int], Batch]:
    """Returns (first, stop) -> the batches of these steps for every member, [K, S, B, T]."""
    config = members[0]
    orders = {
        member.data.seed: TrainBatches(
            data, config.data.seq_len, config.train.batch_size, member.data.seed
        )
        for member in members
    }

    def read(first: int, stop: int) -> Batch:
        by_seed = {
            seed: jax.tree.map(lambda *x: np.stack(x), *[order.at(t) for t in range(first, stop)])
            for seed, order in orders.items()
        }
        return jax.tree.map(lambda *x: np.stack(x), *[by_seed[m.data.seed] for m in members])

    return read


def validate_members(config, data: Prepared, model, state_K: step.TrainState) -> np.ndarray:
    """Computes the members' mean held-out losses in nats per token, [K]."""

    @jax.jit
    def sums(params_K, batch):
        nll_KxBxT = jax.vmap(model.losses, in_axes=(0, None, None))(params_K, *batch)
        return nll_KxBxT.sum(axis=(1, 2)), (batch.targets_BxT >= 0).sum()

    evaluated = jax.vmap(functools.partial(optim.params_to_evaluate, config))
    params_K = evaluated(state_K.params, state_K.opt_state)
    total_K, count = 0.0, 0
    size = config.eval.batch_size or config.train.batch_size
    for batch in val_batches(data, config.data.seq_len, size, config.eval.tokens):
        nll_K, n = sums(params_K, batch)
        total_K, count = total_K + np.asarray(nll_K, np.float64), count + int(n)
    return total_K / count
