"""Fair turns on a shared machine: processes that are all warmed up, run one after the other.

Speed drifts by more than the differences looked for, so steps are timed in short chunks, every
process has one in each round, the order turns around from round to round, and only chunks of the
same round are divided by each other. A chunk during which other processes had more than `DIRTY`
cores' worth of time is tried again, and left out if that does not help.
"""

import dataclasses
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from lmscale_jax.errors import RunFailed

DIRTY, TRIES, PAUSE_SECONDS = 0.2, 3, 0.05


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Attributes:
    ms: milliseconds a step.
    clean: the machine was ours meanwhile.
    """

    ms: float
    clean: bool


class Worker:
    """A process that prints `ready`, then for each line "N" times N steps: "milliseconds loss"."""

    def __init__(self, label: str, command: list[str]):
        self.label = label
        self._errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def wait(self) -> None:
        """Until it is warmed up."""
        self._read(lambda line: line.strip() == "ready")

    def chunk(self, steps: int) -> tuple[Chunk, float]:
        """Times some steps. Returns also the loss of the last one."""
        begin, busy, own = time.perf_counter(), _busy_seconds(), self._cpu_seconds()
        self._process.stdin.write(f"{steps}\n")
        ms, loss = (float(word) for word in self._read(lambda line: True).split())
        others = (_busy_seconds() - busy) - (self._cpu_seconds() - own)
        return Chunk(ms, others < DIRTY * (time.perf_counter() - begin)), loss

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self, wanted) -> str:
        for line in self._process.stdout:
            if wanted(line):
                return line
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["nothing on stderr"]
        raise RunFailed(f"the process of {self.label!r} died: {said[-1]}")

    def _cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float:
    """Seconds that all cores were busy since boot; 0 where there is no /proc: all chunks pass."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def measure(
    workers: list[Worker], rounds: int, chunk_ms: float, limit_s: float
) -> tuple[dict[str, list[Chunk]], dict[str, float]]:
    """The chunks of each worker by its label, one a round, and its last loss.

    After `limit_s` seconds no new round begins.
    """
    end = time.perf_counter() + limit_s
    quickest = {w.label: min(w.chunk(2)[0].ms for _ in range(2)) for w in workers}
    chunks: dict[str, list[Chunk]] = {w.label: [] for w in workers}
    losses = {}
    for number in range(rounds):
        if time.perf_counter() > end:
            break
        for worker in workers[:: 1 if number % 2 == 0 else -1]:
            steps = max(2, round(chunk_ms / quickest[worker.label]))
            for _ in range(TRIES):
                time.sleep(PAUSE_SECONDS)
                chunk, losses[worker.label] = worker.chunk(steps)
                if chunk.clean:
                    quickest[worker.label] = min(quickest[worker.label], chunk.ms)
                    break
                time.sleep(5 * PAUSE_SECONDS)
            chunks[worker.label].append(chunk)
    return chunks, losses


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
