"""Makes a run directory of weights that were trained elsewhere, for `evaluate` to read."""

from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lmscale_jax.errors import InputError
from lmscale_jax.model import hf
from lmscale_jax.run import mesh, record, step, train
from lmscale_jax.run.checkpoint import Checkpoints


def make(config: ConfigDict, source: Path, workdir: Path, say: Callable[[str], None]):
    """Reads a Hugging Face directory into `workdir` and returns the run's record.

    The config's data must be in ids of the model's own tokenizer. The record counts one step,
    though none was taken here. Raises InputError where the source cannot be read or `workdir` is
    not empty.
    """
    config = ConfigDict(config.to_dict())
    settings = hf.read_config(source)
    with config.ignore_type():
        config.model.update({"n_kv_heads": 0, "head_dim": 0, "max_seq_len": 0} | settings)
    config.train.steps, config.train.tokens = 1, 0.0
    config.schedule.warmup, config.eval.baselines = "0", False
    if workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty; use a new directory")
    mesh.start(config)
    setup = train.prepare(config, workdir, say)
    params = hf.read_params(source, setup.config.model, setup.model.specs)
    shardings = mesh.param_shardings(setup.model.specs, setup.mesh)
    params = jax.tree.map(jax.device_put, params, shardings)
    lock = record.Lock(workdir)
    try:
        run = record.Record(workdir, train.facts(setup) | {"imported_from": source.name})
        state = step.initial(setup.config, setup.model, setup.transform, setup.config.seed)
        checkpoints = Checkpoints(workdir)
        checkpoints.save(1, state._replace(params=params, step=state.step + 1), {})
        checkpoints.wait()
        checkpoints.close()
        run.update(status="finished", final=setup.validate(params), wall_seconds=0.0)
    finally:
        lock.release()
    return run
