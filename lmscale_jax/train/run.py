"""What a run is made of, and its directory: data, mesh, model, optimizer, record and lock."""

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from lmscale_jax.config.durations import in_steps
from lmscale_jax.config.resolve import derived, fingerprint
from lmscale_jax.data import batches as pipeline
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.evals import perplexity, redundancy
from lmscale_jax.model import flops, mesh
from lmscale_jax.model.build import Model, build_model
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.layerwise import averaged_params
from lmscale_jax.optim.rules import rules_as_json
from lmscale_jax.train import branch, distributed, run_dir, step
from lmscale_jax.train import metrics as writers
from lmscale_jax.train.metrics import Diverged


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything of a run that does not change while it runs.

    `config` is resolved, `recorded` the same with the user's durations (see `config.durations`),
    `parent` as in `branch.find_parent`.
    """

    config: object
    recorded: object
    workdir: Path
    data: prepare.Prepared
    mesh: jax.sharding.Mesh
    model: Model
    transform: object
    placed: step.TrainState
    batches: pipeline.TrainBatches
    eval_sums: Callable
    drop_sums: Callable
    parent: dict | None = None

    def trained_params(self, state: step.TrainState) -> dict:
        """The parameters that a state is evaluated, sampled and exported by."""
        return optim.params_to_evaluate(self.config, state.params, state.opt_state)

    def score(self, state: step.TrainState) -> dict:
        """`validate` of the weights, and val_loss_ema of their running mean where one is kept."""
        mean = averaged_params(state.opt_state)
        beside = {} if mean is None else {"val_loss_ema": self.validate(mean)["val_loss"]}
        return self.validate(self.trained_params(state)) | beside

    def validate(self, params) -> dict:
        """Loss and its kin on the held-out tokens."""
        n_tokens = self.config.eval.tokens
        n_bytes = pipeline.val_bytes(self.data, n_tokens)
        held_out = self.held_out(n_tokens)
        return perplexity.evaluate_loss(self.eval_sums, params, held_out, self.mesh, n_bytes)

    def held_out(self, n_tokens: int) -> Iterator[pipeline.Batch]:
        """The first tokens of the validation split, as many at once as in training."""
        config = self.config
        size = config.eval.batch_size or config.train.batch_size // config.train.accum
        shards = mesh.batch_shards(self.mesh)
        size = -(-size // shards) * shards
        rows = mesh.host_rows(size, self.mesh)
        return pipeline.val_batches(self.data, config.data.seq_len, size, n_tokens, rows)

    def redundancy(self, state: step.TrainState) -> dict:
        """Block Influence and layer drop, for a line of metrics.jsonl."""
        held_out = self.held_out(self.config.eval.redundancy_tokens)
        n_layers = self.config.model.n_layers
        return redundancy.redundancy_line(
            self.drop_sums, self.trained_params(state), held_out, self.mesh, n_layers
        )


class OpenRun(NamedTuple):
    """A run that may take steps: nobody else may write in its directory. Of several processes the
    first one holds the lock."""

    setup: Run
    record: run_dir.RunRecord
    lock: run_dir.RunLock | None


def open_run(
    config, workdir: Path, say: Callable[[str], None], notes: dict | None = None
) -> OpenRun | None:
    """Checks everything, then opens the run's directory and its record; None if it is finished."""
    recorded = derived(config, prepare.vocab_size_of(config.data))
    writers.check_writers(recorded)
    before = distributed.broadcast(
        distributed.on_first(lambda: run_dir.check_workdir(workdir, recorded))
    )
    if before and before["status"] == "finished":
        say(f"{workdir} is finished: validation loss {before['final']['val_loss']:.4f}")
        return None
    # A branch that has begun needs no second look at its parent, which may have moved on.
    parent = before.get("parent") if before else branch.find_parent(recorded)
    setup = dataclasses.replace(build_run(config, workdir, say), parent=parent)
    _check_data(setup)
    lock = distributed.on_first(lambda: run_dir.RunLock(workdir))
    _check_shared(workdir)
    first = distributed.is_first()
    run = run_dir.RunRecord(workdir if first else None, record_facts(setup) | (notes or {}))
    again = {"started": before["started"], "restarts": before["restarts"] + 1} if before else {}
    run.update(status="running", **again)
    if first:
        split, rows = mesh.param_splits(setup.model.rows, setup.mesh), setup.model.rows
        table = rules_as_json(rows, setup.config, split)
        run_dir.write_json(workdir / "parametrization.json", table)
    return OpenRun(setup, run, lock)


def _check_shared(workdir: Path, seconds: float = 10.0) -> None:
    """All processes must see the directory that the first one has just locked."""
    holder, until = distributed.broadcast(run_dir.lock_holder(workdir)), time.monotonic() + seconds
    # Network file systems show a new file to other hosts after a moment.
    while run_dir.lock_holder(workdir) != holder and time.monotonic() < until:
        time.sleep(0.1)
    found = distributed.gather([platform.node(), run_dir.lock_holder(workdir) == holder])
    blind = next(((i, host) for i, (host, sees) in enumerate(found) if not sees), None)
    if blind:
        raise InputError(
            f"--workdir={workdir}: process {blind[0]} on {blind[1]} does not see what process 0 "
            f"writes there; a directory that all hosts share would work"
        )


@contextlib.contextmanager
def recording_failures(begun: OpenRun):
    """Notes in the record how the work inside ends where it fails; lets the directory go."""
    run, workdir = begun.record, begun.setup.workdir
    try:
        yield
    except Diverged as error:
        run.update(status="diverged", error=str(error))
        raise
    except OSError as error:
        _note_failure(run, error)
        raise RunFailed(f"--workdir={workdir}: {error}; its checkpoints are whole") from error
    except Exception as error:
        _note_failure(run, error)
        raise
    finally:
        if begun.lock:
            begun.lock.release()


def build_run(config, workdir: Path, say: Callable[[str], None]) -> Run:
    """Data, mesh, model and optimizer of a config; nothing of size is allocated."""
    data = prepare.prepare_data(config.data, config.model.vocab_size, log=say)
    recorded = derived(config, data.vocab_size)
    config = in_steps(recorded)
    if config.model.mask == "document" and data.boundary is None:
        raise InputError(
            f"config.model.mask='document' needs document marks, which data.source="
            f"{config.data.source} with data.tokenizer={config.data.tokenizer} has not; "
            f"'causal' would work"
        )
    grid = mesh.make_mesh(config)
    platform = grid.devices.flat[0].platform
    model = build_model(config, platform=platform, bos_id=data.boundary, mesh=grid)
    transform = optim.build_optimizer(config, model.rows, grid, platform)
    rows = mesh.host_rows(config.train.batch_size, grid)
    batches = pipeline.TrainBatches(
        data, config.data.seq_len, config.train.batch_size, config.data.seed, rows
    )
    return Run(
        config=config,
        recorded=recorded,
        workdir=workdir,
        data=data,
        mesh=grid,
        model=model,
        transform=transform,
        placed=step.train_state_shardings(config, model, transform, grid),
        batches=batches,
        eval_sums=perplexity.make_loss_sums(model, grid),
        drop_sums=redundancy.make_drop_sums(model, grid),
    )


def _check_data(setup: Run) -> None:
    """All processes read the same tokens, and a branch those that its parent began with."""
    distributed.check_agreement(
        "data.fingerprint", setup.data.fingerprint, "the same files on every host"
    )
    if setup.parent and setup.parent["data_fingerprint"] != setup.data.fingerprint:
        raise InputError(
            f"config.data.source={setup.config.data.source!r} holds other tokens than the parent "
            f"{setup.parent['workdir']} was trained on; the parent's own data would work"
        )


def record_facts(setup: Run) -> dict:
    """The fields of run.json that are known before the first step."""
    config, devices = setup.config, setup.mesh.devices
    per_token = flops.flops_per_token(config, setup.model.specs)
    return {
        "name": setup.workdir.name,
        "config": setup.recorded.to_dict(),
        "config_hash": fingerprint(setup.recorded),
        "seed": config.seed,
        "counts": flops.counts(setup.model.specs),
        "flops_per_token": per_token["model"],
        "flops_per_token_by_convention": per_token,
        **branch.branch_costs(config, per_token["model"]),
        "parent": setup.parent,
        "epochs": setup.batches.epochs(config.train.steps),
        "data": {
            "fingerprint": setup.data.fingerprint,
            "val_fingerprint": setup.data.val_fingerprint,
            "train_tokens": setup.data.train.n_tokens,
            "val_tokens": setup.data.val.n_tokens,
        },
        "device": {
            "platform": devices.flat[0].platform,
            "kind": devices.flat[0].device_kind,
            "count": devices.size,
            "processes": jax.process_count(),
            "mesh": dict(setup.mesh.shape),
        },
        "choices": setup.model.choices
        | optim.optimizer_choices(config, devices.flat[0].platform)
        | mur.mur_choices(config),
        "restarts": 0,
        "final": {},
        "throughput": {"tokens_per_second": None, "mfu": None, "data_wait": None},
        **run_dir.provenance(),
    }


def _note_failure(run: run_dir.RunRecord, error: Exception) -> None:
    """The status must not stay "running"; but a full disk must not hide what went wrong."""
    with contextlib.suppress(OSError):
        run.update(status="failed", error=" ".join(str(error).split())[:500])
