"""Trains one run: opens it, restores or begins its state, takes its steps, finishes its record."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from lmscale_jax.data.batches import prefetch
from lmscale_jax.errors import RunFailed
from lmscale_jax.evals import redundancy
from lmscale_jax.model import flops, mesh
from lmscale_jax.train import checkpoint, diagnostics, distributed, run_dir
from lmscale_jax.train.metrics import Clock, MetricLogger
from lmscale_jax.train.run import Run, open_run, recording_failures
from lmscale_jax.train.setup import TrainStep
from lmscale_jax.train.step import TrainState
from lmscale_jax.train.watchdog import SignalHandler, Watchdog


class FinishedRun(NamedTuple):
    """A run that has just ended: its record, the run itself, and the parameters to evaluate."""

    record: run_dir.RunRecord
    run: Run
    params: dict


def train(
    config, workdir: Path, say: Callable[[str], None] | None = None, notes: dict | None = None
) -> FinishedRun | None:
    """Trains the run of a config in `workdir`, from its last checkpoint if it has one.

    `notes` are further fields of run.json. Returns None if the run was finished before. Several
    processes call this together; the first one prints and writes.

    Raises:
      InputError: on bad input, before anything is written in `workdir`.
      RunFailed: the run diverged, or its end could not be saved.
      SystemExit: a signal stopped the run.
    """
    say = say or (print if distributed.is_first() else lambda line: None)
    opened = open_run(config, workdir, say, notes)
    if opened is None:
        return None
    run, record, config = opened.run, opened.record, opened.run.config
    with recording_failures(opened):
        checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.keep, config.checkpoint.keep_every
        )
        state, host_state = restore_or_begin(run, checkpoints, say)
        clock, memory = Clock(host_state.get("clock")), host_state.get("journal", {})
        folder = workdir if distributed.is_first() else None
        logger = MetricLogger(run.recorded, folder, int(state.step), memory, clock, record.id)
        # A second signal may end the process before it can say more.
        signals = SignalHandler(lambda name: record.update(interrupted=f"{name} during a step"))
        watchdog = Watchdog(config.log.watchdog)
        try:
            state, final = train_steps(run, state, logger, clock, checkpoints, signals, watchdog)
        finally:
            watchdog.stop()
            logger.close()
            signals.restore()
        if signals.agreed and int(state.step) < config.train.steps:
            _stop_early(
                record, signals.agreed, int(state.step), config.train.steps, checkpoints, say
            )
        finish_run(run, record, state, final or run.score(state), clock)
        checkpoints.close()
    return FinishedRun(record, run, run.trained_params(state))


def _stop_early(record, signal_name: str, done: int, steps: int, checkpoints, say) -> None:
    """Records that a signal stopped the run; raises SystemExit with 128 + the signal's number."""
    record.update(interrupted=f"{signal_name} after step {done}")
    say(
        f"stopped by {signal_name}: step {done} of {steps} is saved; the same command goes on from "
        f"there"
    )
    checkpoints.close()
    raise SystemExit(128 + signal.Signals[signal_name])


def restore_or_begin(run: Run, checkpoints, say) -> tuple[TrainState, dict]:
    """Restores the last checkpoint, else the parent's, else initializes the state.

    Returns the state, placed on the mesh, and the state of logger and clock saved with it.
    """
    abstract = run.abstract_state()
    restored = checkpoints.restore(abstract, say)
    if restored is not None:
        say(f"going on from step {restored[1]['step']}")
        return restored
    if run.parent:
        say(f"branching off step {run.parent['step']} of {run.parent['workdir']}")
        parent = checkpoint.Checkpoints(Path(run.parent["workdir"]))
        state, _ = parent.restore_step(run.parent["step"], abstract)
        parent.close()
        return state, {}
    return run.begin(), {}


def train_steps(
    run: Run, state, logger: MetricLogger, clock: Clock, checkpoints, signals, watchdog
):
    """Takes the remaining steps. Returns the state and the last step's evaluation.

    The evaluation is None where a signal stopped the run before. The metrics of a step are fetched
    while the next one runs, except where the state itself is needed. All processes decide from the
    same numbers, and so alike.
    """
    config, first, last = run.config, int(state.step), run.config.train.steps
    take_step = TrainStep(run)
    stream = prefetch(run.batches.at, first, last, workers=config.data.workers)
    compiled, pending, final = set(), None, None
    redundancy_steps = redundancy.redundancy_steps(config)
    for done, batch in enumerate(clock.waiting_for(stream), first + 1):
        measure = diagnostics.due_measurements(config, done)
        state, metrics = take_step(state, mesh.put_batch(batch, run.mesh), measure=measure)
        if measure not in compiled:
            compiled.add(measure)
            clock.leave_out()
        signals.vote()
        if pending:
            logger.log(*pending)
        watchdog.beat(done - 1)
        pending = (done, metrics)
        evaluate = done == last or is_due(done, config.eval.every)
        save = done == last or is_due(done, config.checkpoint.every) or signals.agreed
        if not (evaluate or save or done in redundancy_steps):
            continue
        jax.block_until_ready(state)
        with clock.pause():
            extra = run.score(state) if evaluate else {}
            extra |= run.redundancy(state) if done in redundancy_steps else {}
        logger.log(*pending, extra)
        pending, final = None, extra if done == last else None
        if evaluate:
            logger.progress.say(f"step {done}: validation loss {extra['val_loss']:.4f}")
        if save:
            with clock.pause():
                ends = done == last or signals.agreed is not None
                _save_checkpoint(checkpoints, done, state, logger, clock, final=ends)
        if signals.agreed:
            break
    return state, final


def is_due(done: int, every: int) -> bool:
    """Tells whether `done` is a multiple of `every`; never for 0."""
    return every > 0 and done % every == 0


def _save_checkpoint(
    checkpoints, done: int, state, logger: MetricLogger, clock: Clock, final: bool
) -> None:
    """Saves a checkpoint and prints failures; RunFailed only where this is the `final` one."""

    def save():
        checkpoints.save(done, state, {"journal": logger.sync(), "clock": clock.state()})
        if final:
            checkpoints.wait()

    # The checkpoint before this one was written in the background and may have failed.
    for number, action in ((checkpoints.writing, checkpoints.wait), (done, save)):
        try:
            action()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            retained_steps = [s for s in checkpoints.steps() if s != number]
            text = (
                f"checkpoint {number} could not be written ({reason}); "
                f"kept: {retained_steps or 'none'}"
            )
            if final and number == done:
                raise RunFailed(text) from error
            logger.progress.say(text)


def finish_run(run: Run, record: run_dir.RunRecord, state, final: dict, clock: Clock) -> None:
    """Writes the record of a finished run: evaluation, speed and skipped steps."""
    speed = clock.tokens_per_second
    devices = run.mesh.devices
    peak = flops.peak_flops(devices.flat[0].device_kind, run.config.model.dtype)
    mfu = speed * record["flops_per_token"] / (peak * devices.size) if speed and peak else None
    record.update(
        status="finished",
        final=final,
        throughput={"tokens_per_second": speed, "mfu": mfu, "data_wait": clock.data_wait},
        wall_seconds=clock.wall_seconds,
        skipped_steps=int(state.skipped),
    )
