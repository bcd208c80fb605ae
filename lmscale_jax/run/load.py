"""Reads a trained run: its record, its model and data, and the parameters of a checkpoint."""

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lmscale_jax.errors import InputError
from lmscale_jax.model.placement import AXES
from lmscale_jax.run import checkpoint, mesh, train
from lmscale_jax.run.record import read_record


class Loaded(NamedTuple):
    """A run as it was read back.

    Attributes:
      record: run.json as it is.
      setup: the run's model, data and mesh, over the devices of this machine.
      step: of the checkpoint.
      params: verified against their checksums.
    """

    record: dict
    setup: train.Setup
    step: int
    params: dict


def load(workdir: Path, step: int = 0) -> Loaded:
    """Reads a run, which may be unfinished. `step` 0 is the newest checkpoint.

    Raises InputError where there is no run or no such checkpoint, where it cannot be read
    completely, and where the data differ from those that the run was trained with.
    """
    record = read_record(workdir)
    config = ConfigDict(record["config"])
    config.mesh.update(dict.fromkeys(AXES, 1) | {"data": -1, "cpu_devices": 0})
    # Before anything large, so that a directory without checkpoints is an error at once.
    checkpoints = checkpoint.Checkpoints(workdir)
    if not checkpoints.steps():
        raise InputError(
            f"--workdir={workdir} holds no checkpoint (status {record['status']!r}); train it first"
        )
    mesh.start(config)
    setup = train.prepare(config, workdir, say=lambda line: None)
    if setup.data.val_fingerprint != record["data"]["val_fingerprint"]:
        raise InputError(
            f"config.data.source={config.data.source!r} holds other held-out tokens than "
            f"{workdir} was evaluated on; use the data that it was trained on"
        )
    shardings = mesh.param_shardings(setup.model.specs, setup.mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(setup.model.init, jax.random.key(0)),
        shardings,
    )
    step, params = checkpoints.restore_params(abstract, step)
    checkpoints.close()
    return Loaded(record, setup, step, params)
