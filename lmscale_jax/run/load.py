"""A trained run, read back: its record, what it is made of, and the parameters of a checkpoint."""

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lmscale_jax.errors import InputError
from lmscale_jax.model.placement import AXES
from lmscale_jax.run import checkpoint, mesh, train
from lmscale_jax.run.record import read_record


class Loaded(NamedTuple):
    """Attributes:
    record: run.json as it is.
    setup: as the run was prepared, over the devices that there are here.
    step: of the checkpoint.
    params: verified against their checksums.
    """

    record: dict
    setup: train.Setup
    step: int
    params: dict


def load(workdir: Path, step: int = 0) -> Loaded:
    """Reads a run that may be unfinished. `step` 0 is the newest checkpoint.

    Raises InputError where there is no run, no such checkpoint, one that cannot be read whole, or
    other data than the run was trained with.
    """
    record = read_record(workdir)
    config = ConfigDict(record["config"])
    config.mesh.update(dict.fromkeys(AXES, 1) | {"data": -1, "cpu_devices": 0})
    # Before anything of size: a directory without checkpoints is told at once.
    checkpoints = checkpoint.Checkpoints(workdir)
    if not checkpoints.steps():
        raise InputError(
            f"--workdir={workdir} holds no checkpoint (status {record['status']!r}); train it first"
        )
    mesh.start(config)
    setup = train.prepare(config, workdir, say=lambda line: None)
    if setup.data.val_fingerprint != record["data"]["val_fingerprint"]:
        raise InputError(
            f"config.data.source={config.data.source!r} holds other held-out tokens here than "
            f"{workdir} was evaluated on; its own data would work"
        )
    placed = mesh.param_shardings(setup.model.specs, setup.mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(setup.model.init, jax.random.key(0)),
        placed,
    )
    step, params = checkpoints.params(abstract, step)
    checkpoints.close()
    return Loaded(record, setup, step, params)
