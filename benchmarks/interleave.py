"""Fair turns on a shared machine: processes that are all warmed up, run one after the other.

Speed drifts by more than the differences looked for, so steps are timed in short chunks, every
process has one in each round, the order turns around from round to round, and only chunks of the
same round are divided by each other. A chunk during which other processes had more than `--others`
cores' worth of time is tried again, and left out if that does not help.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import machine
from lmscale_jax.errors import RunFailed

TRIES, PAUSE_SECONDS = 3, 0.05


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Attributes:
    ms: milliseconds a step.
    clean: the machine was ours meanwhile.
    """

    ms: float
    clean: bool


class Worker:
    """A process that prints `ready` and facts, then for each line "N" times N steps: "ms loss"."""

    def __init__(self, label: str, command: list[str], environment: dict | None = None):
        self.label, self.facts = label, {}
        self._errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        variables = os.environ | (environment or {})
        self._process = subprocess.Popen(command, text=True, bufsize=1, env=variables, **pipes)
        self.pid = self._process.pid

    def wait(self) -> None:
        """Until it is warmed up; `facts` is then what it said of itself."""
        line = self._read(lambda line: line.split()[:1] == ["ready"])
        self.facts = json.loads(line.partition(" ")[2] or "{}")

    def ask(self, steps: int) -> None:
        """Has some steps timed, without waiting for it."""
        with contextlib.suppress(BrokenPipeError):  # reading says what it died of
            self._process.stdin.write(f"{steps}\n")

    def answer(self) -> tuple[float, float]:
        """(milliseconds a step, loss of the last one) of what was asked."""
        ms, loss = (float(word) for word in self._read(lambda line: True).split())
        return ms, loss

    def chunk(self, steps: int) -> tuple[Chunk, float]:
        """Times some steps. Returns also the loss of the last one."""
        watch = Watch([self])
        self.ask(steps)
        ms, loss = self.answer()
        return Chunk(ms, watch.clean()), loss

    def kill(self) -> None:
        """Ends it now; whoever reads from it gets a RunFailed."""
        self._process.kill()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _read(self, wanted) -> str:
        for line in self._process.stdout:
            if wanted(line):
                return line
        raise RunFailed(f"the process of {self.label!r} died: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its stderr."""
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["nothing on stderr"])[-1]

    def cpu_seconds(self) -> float:
        """Seconds of processor time since its start."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Whether the machine belongs to some workers, from now on."""

    def __init__(self, workers: list[Worker]):
        self._workers = workers
        self._before = self._now()

    def clean(self) -> bool:
        """Whether all others used little of it until now."""
        seconds, busy, ours = (b - a for a, b in zip(self._before, self._now(), strict=True))
        return _clean(busy - ours, seconds)

    def _now(self) -> tuple[float, float, float]:
        ours = sum(worker.cpu_seconds() for worker in self._workers)
        return time.perf_counter(), _busy_seconds(), ours


def _clean(others: float, seconds: float) -> bool:
    """Whether others used little of the machine. A test has no flags: the default holds."""
    return others < seconds * (
        machine.OTHERS.value if flags.FLAGS.is_parsed() else machine.OTHERS.default
    )


def _busy_seconds() -> float:
    """Seconds that all cores were busy since boot; 0 where there is no /proc: all chunks pass."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def measure(
    workers: list,
    rounds: int,
    chunk_ms: float,
    limit_s: float,
    failed: dict[str, str] | None = None,
) -> tuple[dict[str, list[Chunk]], dict[str, float]]:
    """The chunks of each worker by its label, one a round, and its last loss.

    After `limit_s` seconds no new round begins. With `failed`, a worker that dies is left out and
    put there with its last words; else that is a RunFailed.
    """
    end = time.perf_counter() + limit_s
    quickest, chunks, losses, living = {}, {}, {}, list(workers)

    def turn(worker, first: bool) -> None:
        label = worker.label
        if first:
            quickest[label] = worker.chunk(2)[0].ms
            if quickest[label] < chunk_ms:
                quickest[label] = min(quickest[label], worker.chunk(2)[0].ms)
            return
        chunk, losses[label] = _clean_chunk(worker, chunk_ms, quickest)
        chunks.setdefault(label, []).append(chunk)

    for number in range(-1, rounds):
        # One round at least, so that every worker has a time.
        if number > 0 and time.perf_counter() > end:
            break
        for worker in living[:: 1 if number % 2 == 0 else -1]:
            try:
                turn(worker, number < 0)
            except RunFailed as error:
                if failed is None:
                    raise
                failed[worker.label] = str(error)
                living.remove(worker)
                chunks.pop(worker.label, None)
    order = [w.label for w in workers if w.label in chunks]
    return {label: chunks[label] for label in order}, losses


def _clean_chunk(worker, chunk_ms: float, quickest: dict) -> tuple[Chunk, float]:
    """The first of some tries in which the machine was ours, or the last of them."""
    steps = max(2, round(chunk_ms / quickest[worker.label]))
    for _ in range(TRIES):
        time.sleep(PAUSE_SECONDS)
        chunk, loss = worker.chunk(steps)
        if chunk.clean:
            quickest[worker.label] = min(quickest[worker.label], chunk.ms)
            break
        time.sleep(5 * PAUSE_SECONDS)
    return chunk, loss


class Turns:
    """Steps in this process that take turns as a `Worker` does: `run(n)` makes n of them, waits,
    and returns the last loss."""

    def __init__(self, label: str, run: Callable[[int], float]):
        self.label, self.run = label, run

    def chunk(self, steps: int) -> tuple[Chunk, float]:
        self.run(1)
        begin, busy, ours = time.perf_counter(), _busy_seconds(), time.process_time()
        loss = self.run(steps)
        spent = time.perf_counter() - begin
        others = (_busy_seconds() - busy) - (time.process_time() - ours)
        return Chunk(spent / steps * 1e3, _clean(others, spent)), loss


def quartiles(values) -> dict:
    """n, median and quartiles; None where there are no values."""
    if not len(values):
        return {"n": 0, "median": None, "quartiles": [None, None]}
    low, middle, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return {"n": len(values), "median": middle, "quartiles": [low, high]}


def ms(chunks: list[Chunk]) -> dict:
    return quartiles([c.ms for c in chunks if c.clean])


def ratio(chunks: list[Chunk], base: list[Chunk]) -> dict:
    """Of the rounds in which both were clean."""
    pairs = zip(chunks, base, strict=True)
    return quartiles([a.ms / b.ms for a, b in pairs if a.clean and b.clean])
