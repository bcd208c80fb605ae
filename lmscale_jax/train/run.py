"""Builds a run from its config (data, mesh, model, optimizer) and opens its directory."""

import contextlib
import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from lmscale_jax.config import own_code, own_keys
from lmscale_jax.config.durations import in_steps
from lmscale_jax.config.resolve import derived, fingerprint
from lmscale_jax.data import prepare
from lmscale_jax.data.batches import Batch, TrainBatches, val_batches, val_bytes
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.evals import perplexity, redundancy
from lmscale_jax.model import flops, mesh, visible_keys
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.layerwise import averaged_params
from lmscale_jax.optim.rules import rules_as_json
from lmscale_jax.train import branch, distributed, run_dir
from lmscale_jax.train.metrics import Diverged, check_writers
from lmscale_jax.train.setup import Setup, build_setup
from lmscale_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Run(Setup):
    """What a run is made of; nothing of it changes while the run trains.

    Attributes:
      recorded: the config with the user's durations (see `config.durations`).
      eval_sums, drop_sums: compiled sums for `evals.perplexity` and `evals.redundancy`.
      parent: the run that this one branches off, as `branch.find_parent` describes it.
    """

    recorded: object
    workdir: Path
    data: prepare.Prepared
    eval_sums: Callable
    drop_sums: Callable
    parent: dict | None = None

    @functools.cached_property
    def batches(self) -> TrainBatches:
        """The training batches. Raises InputError where the data has none."""
        config = self.config
        size = config.train.batch_size
        rows = mesh.host_rows(size, self.mesh)
        batches = TrainBatches(self.data, config.data.seq_len, size, config.data.seed, rows)
        batches.part_windows(config.train.steps)
        return batches

    def trained_params(self, state: TrainState) -> dict:
        """Returns the parameters by which a state is evaluated, sampled and exported."""
        return optim.params_to_evaluate(self.config, state.params, state.opt_state)

    def score(self, state: TrainState) -> dict:
        """Validates the weights; adds val_loss_ema, of their running mean, where one is kept."""
        mean = averaged_params(state.opt_state)
        of_mean = {} if mean is None else {"val_loss_ema": self.validate(mean)["val_loss"]}
        return self.validate(self.trained_params(state)) | of_mean

    def validate(self, params) -> dict:
        """Evaluates `perplexity.evaluate_loss` on the held-out tokens."""
        n_tokens = self.config.eval.tokens
        n_bytes = val_bytes(self.data, n_tokens)
        held_out = self.held_out(n_tokens)
        return perplexity.evaluate_loss(self.eval_sums, params, held_out, self.mesh, n_bytes)

    def held_out(self, n_tokens: int) -> Iterator[Batch]:
        """Yields batches of the first validation tokens, of a micro-batch's size by default."""
        config = self.config
        size = config.eval.batch_size or config.train.batch_size // config.train.accum
        shards = mesh.batch_shards(self.mesh)
        size = -(-size // shards) * shards
        rows = mesh.host_rows(size, self.mesh)
        return val_batches(self.data, config.data.seq_len, size, n_tokens, rows)

    def redundancy(self, state: TrainState) -> dict:
        """Measures Block Influence and layer drop, for a line of metrics.jsonl."""
        held_out = self.held_out(self.config.eval.redundancy_tokens)
        n_layers = self.config.model.n_layers
        return redundancy.redundancy_line(
            self.drop_sums, self.trained_params(state), held_out, self.mesh, n_layers
        )


class OpenRun(NamedTuple):
    """A run that may take steps, with its record and the lock of its directory.

    Of several processes the first one holds the lock; `lock` is None on the others.
    """

    run: Run
    record: run_dir.RunRecord
    lock: run_dir.RunLock | None


def open_run(
    config, workdir: Path, say: Callable[[str], None], notes: dict | None = None
) -> OpenRun | None:
    """Checks everything, then opens the run's directory and its record.

    Returns None if the run is finished. `notes` are further fields of run.json. Raises InputError
    before anything is written where the config, the data or the directory do not fit.
    """
    config = own_keys.adopted(config)
    recorded = derived(config, prepare.find_token_ids(config.data).vocab_size)
    check_writers(recorded)
    before = distributed.broadcast(
        distributed.on_first(lambda: run_dir.check_workdir(workdir, recorded))
    )
    if before and before["status"] == "finished":
        say(f"{workdir} is finished: validation loss {before['final']['val_loss']:.4f}")
        return None
    # The parent of a branch that has begun is not checked again: it may have trained further.
    parent = before.get("parent") if before else branch.find_parent(recorded)
    run = dataclasses.replace(build_run(config, workdir, say), parent=parent)
    _check_data(run)
    _warn_of_few_windows(run, say)
    lock = distributed.on_first(lambda: run_dir.RunLock(workdir))
    _check_shared(workdir)
    first = distributed.is_first()
    record = run_dir.RunRecord(workdir if first else None, record_facts(run) | (notes or {}))
    counts = {"started": before["started"], "restarts": before["restarts"] + 1} if before else {}
    record.update(status="running", **counts)
    if first:
        splits = mesh.param_splits(run.model.param_rules, run.mesh)
        table = rules_as_json(run.model.param_rules, run.config, splits)
        run_dir.write_json(workdir / "parametrization.json", table)
        own_code.save_sources(own_keys.code_parts(recorded), workdir)
    return OpenRun(run, record, lock)


def _check_shared(workdir: Path, seconds: float = 10.0) -> None:
    """Checks that all processes see the first one's new lock; else InputError."""
    holder, until = distributed.broadcast(run_dir.lock_holder(workdir)), time.monotonic() + seconds
    # Network file systems show a new file to other hosts after a moment.
    while run_dir.lock_holder(workdir) != holder and time.monotonic() < until:
        time.sleep(0.1)
    hosts = distributed.gather([platform.node(), run_dir.lock_holder(workdir) == holder])
    blind = next(((i, host) for i, (host, sees) in enumerate(hosts) if not sees), None)
    if blind:
        raise InputError(
            f"--workdir={workdir}: process {blind[0]} on {blind[1]} does not see what process 0 "
            f"writes there; use a directory that all hosts share"
        )


@contextlib.contextmanager
def recording_failures(opened: OpenRun):
    """Records how the work inside fails, and releases the run's directory at its end.

    Raises RunFailed in place of an OSError; other exceptions pass.
    """
    record, workdir = opened.record, opened.run.workdir
    try:
        yield
    except Diverged as error:
        record.update(status="diverged", error=str(error))
        raise
    except OSError as error:
        _record_failure(record, error)
        raise RunFailed(
            f"--workdir={workdir}: {error}; its checkpoints are intact, use the same command again"
        ) from error
    except Exception as error:
        _record_failure(record, error)
        raise
    finally:
        if opened.lock:
            opened.lock.release()


def build_run(config, workdir: Path, say: Callable[[str], None]) -> Run:
    """Builds data, mesh, model and optimizer of a config; allocates no parameters.

    Raises InputError where the config does not fit the data or the devices.
    """
    data = prepare.prepare_data(config.data, config.model.vocab_size, log=say)
    recorded = derived(config, data.vocab_size)
    setup = build_setup(in_steps(recorded), data.boundary)
    grid, model = setup.mesh, setup.model
    return Run(
        config=setup.config,
        mesh=grid,
        model=model,
        recorded=recorded,
        workdir=workdir,
        data=data,
        eval_sums=perplexity.make_loss_sums(model, grid),
        drop_sums=redundancy.make_drop_sums(model, grid),
    )


def _warn_of_few_windows(run: Run, say: Callable[[str], None]) -> None:
    tokens, length = run.data.val.n_tokens, run.config.data.seq_len
    if tokens <= length + 1:
        say(
            f"data: the {tokens:,} held-out tokens are one window of data.seq_len={length} or "
            f"less, so the loss gets no error; hold out more"
        )


def _check_data(run: Run) -> None:
    """Checks that all processes and a branch's parent read the same tokens; else InputError."""
    _ = run.batches  # refuses data that are too short
    distributed.check_agreement(
        "data.fingerprint", run.data.fingerprint, "the same files on every host"
    )
    if run.parent and run.parent["data_fingerprint"] != run.data.fingerprint:
        raise InputError(
            f"config.data.source={run.config.data.source!r} holds other tokens than the parent "
            f"{run.parent['workdir']} was trained on; use the parent's data"
        )


def record_facts(run: Run) -> dict:
    """Returns the fields of run.json that are set before the first step."""
    config, devices, trains = run.config, run.mesh.devices, bool(run.data.train.paths)
    per_token = flops.flops_per_token(config, run.model.specs)
    return {
        "name": run.workdir.name,
        "config": run.recorded.to_dict(),
        "config_hash": fingerprint(run.recorded),
        "seed": config.seed,
        "counts": flops.parameter_counts(run.model.specs),
        "flops_per_token": per_token["model"],
        "flops_per_token_by_convention": per_token,
        "visible_keys": visible_keys.describe_visible(config),
        **branch.branch_costs(config, per_token["model"]),
        "parent": run.parent,
        "own": [
            {"key": path} | own_code.describe_source(part)
            for path, value in own_keys.code_values(config).items()
            for part in own_code.split_code(value)
        ],
        "epochs": run.batches.epochs(config.train.steps) if trains else 0.0,
        "windows_by_part": run.batches.part_windows(config.train.steps) if trains else [],
        "data": {
            "fingerprint": run.data.fingerprint,
            "val_fingerprint": run.data.val_fingerprint,
            "train_tokens": run.data.train.n_tokens,
            "val_tokens": run.data.val.n_tokens,
        },
        "device": {
            "platform": devices.flat[0].platform,
            "kind": devices.flat[0].device_kind,
            "count": devices.size,
            "processes": jax.process_count(),
            "mesh": dict(run.mesh.shape),
        },
        "choices": run.model.choices
        | optim.optimizer_choices(config, devices.flat[0].platform)
        | mur.mur_choices(config),
        "restarts": 0,
        "final": {},
        "throughput": {"tokens_per_second": None, "mfu": None, "data_wait": None},
        **run_dir.provenance(),
    }


def _record_failure(record: run_dir.RunRecord, error: Exception) -> None:
    """Sets the status "failed". A full disk is ignored, so that it does not hide the error."""
    with contextlib.suppress(OSError):
        record.update(status="failed", error=" ".join(str(error).split())[:500])
