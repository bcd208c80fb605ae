"""One training run, chapter by chapter: open, restore or begin, loop, finish."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from lmscale_jax.data import batches as pipeline
from lmscale_jax.errors import RunFailed
from lmscale_jax.evals import redundancy
from lmscale_jax.model import flops, mesh
from lmscale_jax.train import checkpoint, diagnostics, distributed, run_dir, step
from lmscale_jax.train.metrics import Clock, MetricLogger
from lmscale_jax.train.run import Run, open_run, recording_failures
from lmscale_jax.train.watchdog import SignalHandler, Watchdog


class FinishedRun(NamedTuple):
    """A run that has just ended: its record, what it was made of, and the parameters to
    evaluate."""

    record: run_dir.RunRecord
    setup: Run
    params: dict


def train(
    config, workdir: Path, say: Callable[[str], None] | None = None, notes: dict | None = None
) -> FinishedRun | None:
    """Trains the run of a config in `workdir`, going on from its last checkpoint if it has one.

    `notes` are further fields of run.json. Returns None if the run was finished before. Of several
    processes the first one prints and writes; they call this together. Raises InputError on bad
    input, before anything is written there, and RunFailed where the run diverged or its end could
    not be saved.
    """
    say = say or (print if distributed.is_first() else lambda line: None)
    begun = open_run(config, workdir, say, notes)
    if begun is None:
        return None
    with recording_failures(begun):
        setup, run, config = begun.setup, begun.record, begun.setup.config
        checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.keep, config.checkpoint.keep_every
        )
        state, host = restore_or_begin(setup, checkpoints, say)
        clock, memory = Clock(host.get("clock")), host.get("journal", {})
        folder = workdir if distributed.is_first() else None
        journal = MetricLogger(setup.recorded, folder, int(state.step), memory, clock, run.id)
        stop, watchdog = SignalHandler(), Watchdog(config.log.watchdog)
        try:
            state, final = train_steps(setup, state, journal, clock, checkpoints, stop, watchdog)
        finally:
            watchdog.stop()
            journal.close()
            stop.restore()
        if stop.agreed and int(state.step) < config.train.steps:
            _leave_early(run, stop.agreed, int(state.step), config.train.steps, checkpoints, say)
        finish_run(setup, run, state, final or setup.score(state), clock)
        checkpoints.close()
    return FinishedRun(run, setup, setup.trained_params(state))


def _leave_early(run, signal_name: str, done: int, steps: int, checkpoints, say) -> None:
    """Notes that a signal has stopped the run and raises SystemExit with the status for it."""
    run.update(interrupted=f"{signal_name} after step {done}")
    say(
        f"stopped by {signal_name}: step {done} of {steps} is saved; the same command goes on from "
        f"there"
    )
    checkpoints.close()
    raise SystemExit(128 + signal.Signals[signal_name])


def restore_or_begin(setup: Run, checkpoints, say) -> tuple[step.TrainState, dict]:
    """The state to go on from, placed on the mesh, and what the host remembered with it."""
    abstract = step.abstract_state(setup.config, setup.model, setup.transform, setup.placed)
    found = checkpoints.restore(abstract, say)
    if found is not None:
        say(f"going on from step {found[1]['step']}")
        return found
    if setup.parent:
        say(f"branching off step {setup.parent['step']} of {setup.parent['workdir']}")
        parent = checkpoint.Checkpoints(Path(setup.parent["workdir"]))
        state, _ = parent.restore_step(setup.parent["step"], abstract)
        parent.close()
        return state, {}
    return step.begin_state(setup.config, setup.model, setup.transform, setup.placed), {}


def train_steps(
    setup: Run, state, journal: MetricLogger, clock: Clock, checkpoints, stop, watchdog
):
    """Runs the remaining steps. Returns the last state and, if it was reached, its evaluation.

    The metrics of a step are read while the next one runs, except where the state is needed. What
    several processes decide, they decide from the same numbers, and so alike.
    """
    config, first, last = setup.config, int(state.step), setup.config.train.steps
    take_step = step.TrainStep(config, setup.model, setup.mesh, setup.placed)
    stream = pipeline.prefetch(setup.batches.at, first, last, workers=config.data.workers)
    compiled, pending, final, looks = set(), None, None, redundancy.redundancy_steps(config)
    for done, batch in enumerate(clock.waiting_for(stream), first + 1):
        measure = diagnostics.due_measurements(config, done)
        state, metrics = take_step(state, mesh.put_batch(batch, setup.mesh), measure=measure)
        if measure not in compiled:
            compiled.add(measure)
            clock.leave_out()
        stop.vote()
        if pending:
            journal.log(*pending)
        watchdog.beat(done - 1)
        pending = (done, metrics)
        evaluate = done == last or is_due(done, config.eval.every)
        save = done == last or is_due(done, config.checkpoint.every) or stop.agreed
        if not (evaluate or save or done in looks):
            continue
        jax.block_until_ready(state)
        with clock.pause():
            extra = setup.score(state) if evaluate else {}
            extra |= setup.redundancy(state) if done in looks else {}
        journal.log(*pending, extra)
        pending, final = None, extra if done == last else None
        if evaluate:
            journal.progress.say(f"step {done}: validation loss {extra['val_loss']:.4f}")
        if save:
            with clock.pause():
                leaving = done == last or stop.agreed is not None
                _save_checkpoint(checkpoints, done, state, journal, clock, final=leaving)
        if stop.agreed:
            break
    return state, final


def is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _save_checkpoint(
    checkpoints, done: int, state, journal: MetricLogger, clock: Clock, final: bool
) -> None:
    """Saves; what goes wrong is said, and ends the run only if this was its last chance."""

    def save():
        checkpoints.save(done, state, {"journal": journal.sync(), "clock": clock.state()})
        if final:
            checkpoints.wait()

    # What was being written since the last time may have failed in the background.
    for which, action in ((checkpoints.writing, checkpoints.wait), (done, save)):
        try:
            action()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            kept = [s for s in checkpoints.steps() if s != which]
            text = f"checkpoint {which} could not be written ({reason}); kept: {kept or 'none'}"
            if final and which == done:
                raise RunFailed(text) from error
            journal.progress.say(text)


def finish_run(setup: Run, run: run_dir.RunRecord, state, final: dict, clock: Clock) -> None:
    """Writes the final record."""
    speed = clock.tokens_per_second
    devices = setup.mesh.devices
    peak = flops.peak(devices.flat[0].device_kind, setup.config.model.dtype)
    mfu = speed * run["flops_per_token"] / (peak * devices.size) if speed and peak else None
    run.update(
        status="finished",
        final=final,
        throughput={"tokens_per_second": speed, "mfu": mfu, "data_wait": clock.data_wait},
        wall_seconds=clock.wall_seconds,
        skipped_steps=int(state.skipped),
    )
