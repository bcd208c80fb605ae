"""Trains packed runs as one population, each with its own directory, record and checkpoints.

The files are those that single runs write, so a stopped pack can continue as a pack, in part, or
run by run.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lmscale_jax.config.keys import get
from lmscale_jax.config.own_keys import all_keys
from lmscale_jax.errors import InputError
from lmscale_jax.evals import redundancy
from lmscale_jax.sweeps import population
from lmscale_jax.train import diagnostics, loop, step, watchdog
from lmscale_jax.train.checkpoint import Checkpoints
from lmscale_jax.train.metrics import Clock, Diverged, MetricLogger, Progress, SilentProgress
from lmscale_jax.train.run import OpenRun, open_run, recording_failures

# Folder of checkpoints later than the step at which a pack continues.
AHEAD_FOLDER = "checkpoints_ahead"


def run_pack(
    members: list[tuple[object, Path]],
    say: Callable[[str], None] = print,
    notes: dict | None = None,
) -> None:
    """Trains the runs of (config, workdir), except those that are finished.

    A member that diverges is recorded as such and the others continue. Raises InputError where the
    configs cannot be members of one population, and the errors of `train.loop.train`.
    """
    open_runs = [o for o in (open_run(c, w, say, notes) for c, w in members) if o is not None]
    if not open_runs:
        return
    try:
        population.check_members([opened.run.config for opened in open_runs])
    except InputError:
        for opened in open_runs:
            opened.lock.release()
        raise
    with contextlib.ExitStack() as stack:
        for opened in open_runs:
            stack.enter_context(recording_failures(opened))
        Pack(open_runs, say).finish()


class SharedClock(Clock):
    """A member's clock, whose steps take as long as the pack's."""

    seconds_per_step: float | None = None

    def lap(self, tokens: int) -> float | None:
        if self.seconds_per_step is None:
            return None
        self.step_seconds += self.seconds_per_step
        self.step_tokens += tokens
        return tokens / self.seconds_per_step


class Member:
    """The files of one member: metrics, clock and checkpoints."""

    def __init__(self, opened: OpenRun):
        self.run, self.record = opened.run, opened.record
        keys = self.run.config.checkpoint
        self.checkpoints = Checkpoints(self.run.workdir, keys.keep, keys.keep_every)
        self.diverged: Diverged | None = None
        self.final: dict | None = None

    def open(self, first: int, host_state: dict, progress) -> None:
        """Opens metrics and clock at step `first`, with the state saved beside its checkpoint."""
        self.clock = SharedClock(host_state.get("clock"))
        memory = host_state.get("journal", {})
        config, workdir = self.run.recorded, self.run.workdir
        self.logger = MetricLogger(
            config, workdir, first, memory, self.clock, self.record.id, progress
        )

    def log(self, first: int, series: dict, last: dict, extra: dict) -> None:
        """Logs the steps after `first`: `series` has a value per step, `last` the last metrics."""
        count = len(series["train_loss"])
        for t in range(count - 1):
            self.logger.log(first + t + 1, {name: values[t] for name, values in series.items()})
        self.logger.log(first + count, last, extra)

    def save(self, done: int, state) -> None:
        """Saves a checkpoint after step `done`."""
        host_state = {"journal": self.logger.sync(), "clock": self.clock.state()}
        self.checkpoints.save(done, state, host_state)


class Pack:
    """Open runs that train as one population."""

    def __init__(self, open_runs: list[OpenRun], say: Callable[[str], None]):
        self.members, self._say = [Member(opened) for opened in open_runs], say
        first, configs = open_runs[0].run, [opened.run.config for opened in open_runs]
        self._config = first.config
        self._population = population.Population(configs, first.data.boundary)
        self._read = population.batch_reader(configs, first.data)
        self._redundancy_steps = redundancy.redundancy_steps(self._config)
        self._compiled: set[tuple] = set()
        self._progress = Progress(self._config.train.steps, 0)

    def finish(self) -> None:
        """Takes all remaining steps and writes the final records."""
        state, first = self._restore()
        signals = watchdog.SignalHandler()
        try:
            state = self._loop(state, first, signals)
        finally:
            self._progress.close()
            for member in self.members:
                member.logger.close()
            signals.restore()
        if signals.received and int(state.step[0]) < self._config.train.steps:
            for member in self._active_members():
                member.record.update(interrupted=f"{signals.received} in a pack")
                member.checkpoints.close()
            self._say(f"stopped by {signals.received}: the same command goes on from there")
            raise SystemExit(128 + signal.Signals[signals.received])
        for k, member in enumerate(self.members):
            if not member.diverged:
                member_state = _member_state(state, k)
                final = member.final or member.run.score(member_state)
                loop.finish_run(member.run, member.record, member_state, final, member.clock)
            member.checkpoints.close()

    def _restore(self) -> tuple[step.TrainState, int]:
        """Restores the members at the latest step of which each has a checkpoint.

        Returns their stacked states and the step, 0 for initial states.
        """
        saved = [set(member.checkpoints.steps()) for member in self.members]
        first = max(set.intersection(*saved), default=0)
        for member, steps in zip(self.members, saved, strict=True):
            for later in sorted(s for s in steps if s > first):
                member.checkpoints.set_aside(later, AHEAD_FOLDER)
        state, host_states = self._population.begin(), [{} for _ in self.members]
        if first:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=device), state
            )
            restored = [m.checkpoints.restore_step(first, abstract) for m in self.members]
            states, host_states = zip(*restored, strict=True)
            state = jax.tree.map(lambda *x: jax.numpy.stack(x), *states)
            self._say(f"going on from step {first}")
        for k, (member, host) in enumerate(zip(self.members, host_states, strict=True)):
            member.open(first, host, self._progress if k == 0 else SilentProgress())
        return state, first

    def _loop(self, state, first: int, signals: watchdog.SignalHandler):
        config = self._config
        for begin, end in _chunks(config, self._redundancy_steps, first):
            started = time.perf_counter()
            program = end - begin, diagnostics.due_measurements(config, end)
            state, metrics = self._population.advance(
                state, self._read(begin, end), measure=program[1]
            )
            metrics = jax.device_get(metrics)
            self._set_pace((time.perf_counter() - started) / (end - begin), program)
            evaluate = end == config.train.steps or loop.is_due(end, config.eval.every)
            save = end == config.train.steps or loop.is_due(end, config.checkpoint.every)
            for k, member in enumerate(self.members):
                if not member.diverged:
                    self._log(k, begin, end, metrics, state, evaluate)
            if save or signals.received:
                self._save(end, state)
            if signals.received or not self._active_members():
                break
        return state

    def _set_pace(self, seconds: float, program: tuple) -> None:
        """Sets the clocks' seconds per step, except where they include compiling a program."""
        for member in self.members:
            member.clock.seconds_per_step = seconds if program in self._compiled else None
        self._compiled.add(program)

    def _log(self, k: int, begin: int, end: int, metrics, state, evaluate: bool) -> None:
        member, config = self.members[k], self._config
        last = {name: values_K[k] for name, values_K in metrics["last"].items()}
        series = {name: metrics[name][k] for name in ("train_loss", "bad")}
        extra = {}
        if evaluate:
            extra |= member.run.score(_member_state(state, k))
        if end in self._redundancy_steps:
            extra |= member.run.redundancy(_member_state(state, k))
        try:
            member.log(begin, series, last, extra)
        except Diverged as error:
            member.diverged = error
            member.record.update(status="diverged", error=str(error))
            self._say(f"{member.run.workdir.name}: {error}")
        member.final = extra if end == config.train.steps else None

    def _save(self, done: int, state) -> None:
        for k, member in enumerate(self.members):
            if not member.diverged:
                member.save(done, _member_state(state, k))
        for member in self._active_members():
            member.checkpoints.wait()

    def _active_members(self) -> list[Member]:
        """Lists the members that have not diverged."""
        return [member for member in self.members if not member.diverged]


def _chunks(config, redundancy_steps: set[int], first: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of the steps of one scan; steps with something due end a chunk."""
    every = [config.log.every, config.eval.every, config.checkpoint.every, population.CHUNK]
    while first < config.train.steps:
        ends = [(first // n + 1) * n for n in every if n] + [
            s for s in redundancy_steps if s > first
        ]
        end = min([*ends, config.train.steps])
        yield first, end
        first = end


def _member_state(state_K: step.TrainState, k: int) -> step.TrainState:
    return jax.tree.map(lambda x: x[k], state_K)


def pack_signature(config) -> str:
    """Returns a text that is equal for resolved configs that can be packed together."""
    varying = (*population.TRACED_HPARAMS, population.DATA_ORDER)
    shared = {
        path: get(config, path)
        for path, key in all_keys(config)
        if key.identity and path not in varying
    }
    return repr(sorted(shared.items()))
