"""Runs packed into one population, each with directory, record and checkpoints of its own.

What is written is what the runs would write by themselves, so a pack that was stopped may go on as
a pack, in part, or run by run.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lmscale_jax.config.keys import get, keys
from lmscale_jax.errors import InputError
from lmscale_jax.evals import redundancy
from lmscale_jax.optim.layerwise import FREEZING
from lmscale_jax.sweeps import population
from lmscale_jax.train import diagnostics, loop, step, watchdog
from lmscale_jax.train import metrics as writers
from lmscale_jax.train import run as runs
from lmscale_jax.train.checkpoint import Checkpoints
from lmscale_jax.train.metrics import Clock, Diverged, MetricLogger

AHEAD = "checkpoints_ahead"


def run_pack(
    members: list[tuple[object, Path]],
    say: Callable[[str], None] = print,
    notes: dict | None = None,
) -> None:
    """Trains the runs of (config, workdir); those that are finished already are left out.

    A member that diverges is recorded as such and the rest go on. Raises InputError where the
    configs cannot be members of one population, and as `train.loop.train` does.
    """
    begun = [b for b in (runs.open_run(c, w, say, notes) for c, w in members) if b is not None]
    if not begun:
        return
    try:
        population.check_members([one.setup.config for one in begun])
    except InputError:
        for one in begun:
            one.lock.release()
        raise
    with contextlib.ExitStack() as stack:
        for one in begun:
            stack.enter_context(runs.recording_failures(one))
        Pack(begun, say).finish()


class SharedClock(Clock):
    """A member's clock: every step takes it as long as it takes the pack."""

    seconds_per_step: float | None = None

    def lap(self, tokens: int) -> float | None:
        if self.seconds_per_step is None:
            return None
        self.step_seconds += self.seconds_per_step
        self.step_tokens += tokens
        return tokens / self.seconds_per_step


class Member:
    """The directory's side of one member: journal, clock and checkpoints."""

    def __init__(self, begun: runs.OpenRun):
        self.setup, self.record = begun.setup, begun.record
        keep = self.setup.config.checkpoint
        self.checkpoints = Checkpoints(self.setup.workdir, keep.keep, keep.keep_every)
        self.diverged: Diverged | None = None
        self.final: dict | None = None

    def open(self, first: int, host: dict, progress) -> None:
        self.clock = SharedClock(host.get("clock"))
        memory = host.get("journal", {})
        config, workdir = self.setup.recorded, self.setup.workdir
        self.journal = MetricLogger(
            config, workdir, first, memory, self.clock, self.record.id, progress
        )

    def take(self, first: int, each: dict, last: dict, extra: dict) -> None:
        """The metrics of the steps after `first`."""
        count = len(each["train_loss"])
        for t in range(count - 1):
            self.journal.log(first + t + 1, {name: values[t] for name, values in each.items()})
        self.journal.log(first + count, last, extra)

    def save(self, done: int, state) -> None:
        host = {"journal": self.journal.sync(), "clock": self.clock.state()}
        self.checkpoints.save(done, state, host)


class Pack:
    """Runs on their way through one population."""

    def __init__(self, begun: list[runs.OpenRun], say: Callable[[str], None]):
        self.members, self._say = [Member(one) for one in begun], say
        self._config = begun[0].setup.config
        self._population = population.Population([one.setup.config for one in begun])
        self._read = population.batch_reader(
            [one.setup.config for one in begun], begun[0].setup.data
        )
        self._looks = redundancy.redundancy_steps(self._config)
        self._compiled: set[tuple] = set()
        self._progress = writers.Progress(self._config.train.steps, 0)

    def finish(self) -> None:
        """Takes all steps that are left and writes the final records."""
        state, first = self._restore()
        stop = watchdog.SignalHandler()
        try:
            state = self._loop(state, first, stop)
        finally:
            self._progress.close()
            for member in self.members:
                member.journal.close()
            stop.restore()
        if stop.received and int(state.step[0]) < self._config.train.steps:
            for member in self._alive():
                member.record.update(interrupted=f"{stop.received} in a pack")
                member.checkpoints.close()
            self._say(f"stopped by {stop.received}: the same command goes on from there")
            raise SystemExit(128 + signal.Signals[stop.received])
        for k, member in enumerate(self.members):
            if not member.diverged:
                own = _member(state, k)
                final = member.final or member.setup.score(own)
                loop.finish_run(member.setup, member.record, own, final, member.clock)
            member.checkpoints.close()

    def _restore(self) -> tuple[step.TrainState, int]:
        """The members' states at the latest step of which each has a checkpoint."""
        saved = [set(member.checkpoints.steps()) for member in self.members]
        first = max(set.intersection(*saved), default=0)
        for member, steps in zip(self.members, saved, strict=True):
            for later in sorted(s for s in steps if s > first):
                member.checkpoints.set_aside(later, AHEAD)
        state, hosts = self._population.begin(), [{} for _ in self.members]
        if first:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_here()), state
            )
            found = [member.checkpoints.restore_step(first, abstract) for member in self.members]
            state = jax.tree.map(lambda *x: jax.numpy.stack(x), *[one for one, _ in found])
            hosts = [host for _, host in found]
            self._say(f"going on from step {first}")
        for k, (member, host) in enumerate(zip(self.members, hosts, strict=True)):
            member.open(first, host, self._progress if k == 0 else writers.SilentProgress())
        return state, first

    def _loop(self, state, first: int, stop: watchdog.SignalHandler):
        config = self._config
        for begin, end in _chunks(config, self._looks, first):
            started = time.perf_counter()
            program = end - begin, diagnostics.due_measurements(config, end)
            state, metrics = self._population.advance(
                state, self._read(begin, end), measure=program[1]
            )
            metrics = jax.device_get(metrics)
            self._pace((time.perf_counter() - started) / (end - begin), program)
            evaluate = end == config.train.steps or loop.is_due(end, config.eval.every)
            save = end == config.train.steps or loop.is_due(end, config.checkpoint.every)
            for k, member in enumerate(self.members):
                if not member.diverged:
                    self._take(k, begin, end, metrics, state, evaluate)
            if save or stop.received:
                self._save(end, state)
            if stop.received or not self._alive():
                break
        return state

    def _pace(self, seconds: float, program: tuple) -> None:
        """The first chunk of each kind is compiled in its time, which is not counted."""
        for member in self.members:
            member.clock.seconds_per_step = seconds if program in self._compiled else None
        self._compiled.add(program)

    def _take(self, k: int, begin: int, end: int, metrics, state, evaluate: bool) -> None:
        member, config = self.members[k], self._config
        last = {name: values_K[k] for name, values_K in metrics["last"].items()}
        each = {name: metrics[name][k] for name in ("train_loss", "bad")}
        extra = {}
        if evaluate:
            extra |= member.setup.score(_member(state, k))
        if end in self._looks:
            extra |= member.setup.redundancy(_member(state, k))
        try:
            member.take(begin, each, last, extra)
        except Diverged as error:
            member.diverged = error
            member.record.update(status="diverged", error=str(error))
            self._say(f"{member.setup.workdir.name}: {error}")
        member.final = extra if end == config.train.steps else None

    def _save(self, done: int, state) -> None:
        for k, member in enumerate(self.members):
            if not member.diverged:
                member.save(done, _member(state, k))
        for member in self._alive():
            member.checkpoints.wait()

    def _alive(self) -> list[Member]:
        return [member for member in self.members if not member.diverged]


def _chunks(config, looks: set[int], first: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the steps taken at a time; whatever is due after a step ends a chunk."""
    every = [config.log.every, config.eval.every, config.checkpoint.every, population.CHUNK]
    while first < config.train.steps:
        ends = [(first // n + 1) * n for n in every if n] + [s for s in looks if s > first]
        end = min([*ends, config.train.steps])
        yield first, end
        first = end


def _member(state_K: step.TrainState, k: int) -> step.TrainState:
    return jax.tree.map(lambda x: x[k], state_K)


def _here():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def pack_signature(config) -> str:
    """What runs must share to be packed, of a resolved config: a text to compare."""
    numbers = (*population.TRACED_HPARAMS, population.ORDER)
    kept = {path: get(config, path) for path, key in keys() if key.identity and path not in numbers}
    # Blocks that are drawn by the seed are part of the program.
    drawn = config.seed if FREEZING[config.freeze.mode].draws else None
    return repr((sorted(kept.items()), drawn))
