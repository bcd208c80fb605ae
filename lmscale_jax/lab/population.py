"""Trains a population of runs that differ only in numbers, in one compiled program.

The members are stacked along a leading axis and share each batch; a scan takes several steps at a
time, so that small models do not wait for the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.data import pipeline
from lmscale_jax.data.prepared import Prepared
from lmscale_jax.errors import InputError
from lmscale_jax.model.build import build
from lmscale_jax.optim import build as optim
from lmscale_jax.run import mesh as meshes
from lmscale_jax.run import step as steps

CHUNK = 25


class Trained(NamedTuple):
    """Attributes:
    train_loss_KxS: nats per token, each step before its update.
    val_loss_K: over the held-out tokens of eval.tokens; nan where a member diverged.
    """

    train_loss_KxS: np.ndarray
    val_loss_K: np.ndarray


def train(config, data: Prepared, seed_K: np.ndarray, lr_K: np.ndarray) -> Trained:
    """Trains K members of a resolved config, member k with seed_K[k] and the peak lr_K[k].

    Initial values are those of a run with that `seed`, batches those of `data.seed`, so member k
    computes what `main` would with these two keys, up to rounding. Under muon and normuon a rate
    scales muon_lr too, in proportion (see `optim.build`).

    Raises InputError where members would share the random numbers of dropout, or the state of a
    parent.
    """
    if config.train.parent:
        raise InputError(
            f"config.train.parent={config.train.parent!r} cannot begin a population, whose members "
            f"have initial values of their own; '' with train.parent_step=0 would work"
        )
    if config.model.dropout:
        raise InputError(
            f"config.model.dropout={config.model.dropout} draws one mask for a whole population; "
            f"0.0 would work"
        )
    mesh = meshes.make(config)
    platform = mesh.devices.flat[0].platform
    model = build(config, platform=platform)
    # Without the mesh: a population is one program on one device.
    transform = optim.build(config, model.rows, platform=platform)
    one = steps.pure(config, model, transform, mesh)
    batches = pipeline.TrainBatches(
        data, config.data.seq_len, config.train.batch_size, config.data.seed
    )

    def member(state, lr, batches_SxBxT):
        return jax.lax.scan(lambda state, batch: _loss(one(state, batch, lr)), state, batches_SxBxT)

    advance = jax.jit(jax.vmap(member, in_axes=(0, 0, None)), donate_argnums=0)
    begin = jax.jit(jax.vmap(lambda seed: steps.initial(config, model, transform, seed)))
    state, losses = begin(jnp.asarray(seed_K)), []
    lr_K = jnp.asarray(lr_K, jnp.float32)
    for start in range(0, config.train.steps, CHUNK):
        several = [batches.at(t) for t in range(start, min(start + CHUNK, config.train.steps))]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *several)
        state, loss_KxS = advance(state, lr_K, stacked)
        losses.append(loss_KxS)
    return Trained(
        np.concatenate([np.asarray(x) for x in losses], axis=1),
        _validate(config, data, model, state.params),
    )


def _loss(outcome):
    state, metrics = outcome
    return state, metrics["train_loss"]


def _validate(config, data: Prepared, model, params_K) -> np.ndarray:
    """[K] mean held-out loss in nats per token."""

    @jax.jit
    def sums(params_K, batch):
        nll_KxBxT = jax.vmap(model.losses, in_axes=(0, None, None))(params_K, *batch)
        return nll_KxBxT.sum(axis=(1, 2)), (batch.targets_BxT >= 0).sum()

    total_K, count = 0.0, 0
    size = config.eval.batch_size or config.train.batch_size
    for batch in pipeline.val_batches(data, config.data.seq_len, size, config.eval.tokens):
        nll_K, n = sums(params_K, batch)
        total_K, count = total_K + np.asarray(nll_K, np.float64), count + int(n)
    return total_K / count
