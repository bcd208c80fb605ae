"""Reads a trained run: its record, its model and data, and the parameters of a checkpoint.

Makes a run directory of weights that were trained elsewhere, for `evaluate` to read.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lmscale_jax.config import own_code
from lmscale_jax.config.keys import get_config, is_used
from lmscale_jax.data import hf_tokenizers
from lmscale_jax.errors import InputError
from lmscale_jax.model import hf, mesh
from lmscale_jax.model.sharding import AXES
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.train import checkpoint, run_dir
from lmscale_jax.train.checkpoint import Checkpoints
from lmscale_jax.train.run import Run, build_run, record_facts
from lmscale_jax.train.run_dir import read_record


class LoadedRun(NamedTuple):
    """A run as it was read back.

    Attributes:
      record: run.json as it is.
      run: the run's model, data and mesh, over the devices of this machine.
      step: of the checkpoint.
      params: those to evaluate, of arrays that were verified against their checksums.
    """

    record: dict
    run: Run
    step: int
    params: dict


def load_run(workdir: Path, step: int = 0) -> LoadedRun:
    """Reads a run, which may be unfinished. `step` 0 is the newest checkpoint.

    Raises InputError where there is no run or no such checkpoint, where it cannot be read
    completely, and where the data differ from those that the run was trained with.
    """
    record = read_record(workdir)
    own_code.look_in(workdir)
    config = ConfigDict(record["config"])
    config.mesh.update(dict.fromkeys(AXES, 1) | {"data": -1, "cpu_devices": 0})
    # Before anything large, so that a directory without checkpoints is an error at once.
    checkpoints = checkpoint.Checkpoints(workdir)
    if not checkpoints.steps():
        raise InputError(
            f"--workdir={workdir} holds no checkpoint (status {record['status']!r}); train it first"
        )
    mesh.start_jax(config)
    run = build_run(config, workdir, say=lambda line: None)
    if run.data.val_fingerprint != record["data"]["val_fingerprint"]:
        raise InputError(
            f"config.data.source={config.data.source!r} holds other held-out tokens than "
            f"{workdir} was evaluated on; use the data that it was trained on"
        )
    step, params = _params_to_evaluate(run, checkpoints, step)
    checkpoints.close()
    return LoadedRun(record, run, step, params)


def _params_to_evaluate(run: Run, checkpoints: Checkpoints, step: int) -> tuple[int, dict]:
    """Returns (step, parameters to evaluate) of a checkpoint."""
    abstract = run.abstract_state()
    if OPTIMIZERS[run.config.optim.name].evaluated is None:
        # The rest of the state is often twice as large.
        return checkpoints.restore_params(abstract.params, step)
    step = checkpoints.find_step(step)
    state, _ = checkpoints.restore_step(step, abstract)
    return step, run.trained_params(state)


def import_run(
    config: ConfigDict | None, source: Path, workdir: Path, say: Callable[[str], None]
) -> dict:
    """Reads a Hugging Face directory into `workdir` and returns the run's record.

    The tokenizer of the directory, where it has one, reads the config's text. Without a config
    nothing is evaluated. The record counts one step, though none was taken here.

    Args:
      config: of the data on which the weights are evaluated; None: no data.
      source: the directory.
      workdir: a new or empty directory.
      say: prints a line.

    Raises:
      InputError: the source cannot be read, the model cannot read the data, or `workdir` is not
        empty.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty; use a new directory")
    config = _import_config(config, source, say)
    mesh.start_jax(config)
    run = build_run(config, workdir, say)
    params = hf.read_params(source, run.config.model, run.model.specs)
    shardings = mesh.param_shardings(run.model.specs, run.mesh)
    params = jax.tree.map(jax.device_put, params, shardings)
    lock = run_dir.RunLock(workdir)
    try:
        record = run_dir.RunRecord(workdir, record_facts(run) | {"imported_from": source.name})
        state = run.initial(run.config.seed)
        # Averages and other memory of the parameters are of these.
        opt_state = run.transform.init(params)
        checkpoints = Checkpoints(workdir)
        imported = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        checkpoints.save(1, imported, {})
        checkpoints.wait()
        checkpoints.close()
        final = run.validate(params) if run.data.val.paths else _NOT_EVALUATED
        record.update(status="finished", final=final, wall_seconds=0.0)
    finally:
        lock.release()
    return record


_NOT_EVALUATED = {
    "val_loss": None, "val_loss_sem": None, "val_tokens": 0, "bits_per_byte": None,
    "perplexity": None,
}  # fmt: skip


def _import_config(config: ConfigDict | None, source: Path, say) -> ConfigDict:
    """Returns the config of an imported model: its own groups `model` and `parametrization`.

    Settings of a trained architecture would change what the weights compute.
    """
    model, tokenizer = hf.read_config(source), hf_tokenizers.tokenizer_files(source)
    base = get_config()
    config = base if config is None else ConfigDict(config.to_dict())
    if config is base:
        config.data.source = "none"
        config.data.seq_len = min(config.data.seq_len, model.get("max_seq_len", math.inf))
    if tokenizer and is_used(config, "data.tokenizer") and config.data.tokenizer != "hf":
        config.data.tokenizer, config.data.tokenizer_path = "hf", str(source.absolute())
        config.data.vocab_size = base.data.vocab_size
        say(f"tokenizer            that of {source}")
    with config.ignore_type():
        config.model = ConfigDict(
            get_config().model.to_dict() | {"dtype": config.model.dtype} | model
        )
    config.parametrization = get_config().parametrization
    config.train.steps, config.train.tokens = 1, 0.0
    config.schedule.warmup, config.eval.baselines = "0", False
    return config


def copy_tokenizer(data_cfg, directory: Path) -> None:
    """Copies the files of the tokenizer that data.tokenizer_path names into a directory."""
    if data_cfg.tokenizer == "hf":
        for path in hf_tokenizers.tokenizer_files(Path(data_cfg.tokenizer_path).expanduser()):
            shutil.copy(path, directory)
