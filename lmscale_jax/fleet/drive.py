"""Schedules the cells of a plan: starts those that can start, notes failures, shows progress."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lmscale_jax.files import write_json
from lmscale_jax.fleet import packing
from lmscale_jax.fleet.progress import Progress
from lmscale_jax.run.record import in_use
from lmscale_jax.study import records
from lmscale_jax.study.cells import TRUNK, Cell
from lmscale_jax.study.plan import Plan, run_dir

DONE = ("finished", "diverged")


class Stopped(Exception):
    """Raised after SIGTERM or SIGINT, once the runs have saved and exited."""

    def __init__(self, name: str):
        super().__init__(name)
        self.status = 128 + signal.Signals[name]


def run(
    plan: Plan,
    cells: list[Cell],
    workdir: Path,
    executor,
    say: Callable[[str], None] = print,
    every: float = 0.5,
) -> None:
    """Trains the cells that are neither finished nor diverged: trunks first, then all others.

    The runs of a failed pack are retried one by one. A failed run is noted in attempts.jsonl and
    left for the next call. `every` is the polling interval in seconds. Raises Interrupted on
    SIGTERM and SIGINT.
    """
    for stage in ([c for c in cells if c.role == TRUNK], [c for c in cells if c.role != TRUNK]):
        stage = [c for c in stage if records.status(workdir, c) not in DONE]
        stage = [c for c in stage if _ready(plan, c, workdir, say)]
        if stage:
            _Stage(plan, stage, workdir, executor, say).train(every)


def _ready(plan: Plan, cell: Cell, workdir: Path, say) -> bool:
    """Returns whether a cell may start: a branch needs its finished trunk."""
    if not cell.needs or records.status(workdir, plan.cell(cell.needs)) == "finished":
        return True
    records.note(workdir, [cell.id], 1, f"its trunk {cell.needs} is not finished")
    say(f"{cell.label}: left out, its trunk {cell.needs} is not finished")
    return False


class _Stage:
    """Cells that do not depend on each other, and the jobs that train them."""

    def __init__(self, plan: Plan, cells: list[Cell], workdir: Path, executor, say):
        self._workdir, self._executor, self._say = workdir, executor, say
        self._cells = {cell.id: cell for cell in cells}
        self._waiting = packing.jobs(plan, cells, executor.slots)
        self._n_running = 0
        self._progress = Progress(plan, cells, workdir, say)

    def train(self, every: float) -> None:
        """Runs all jobs to their end. Raises Interrupted on SIGTERM and SIGINT."""
        signals: list[str] = []
        handlers = {
            s: signal.signal(s, lambda number, _: signals.append(signal.Signals(number).name))
            for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while (self._waiting or self._n_running) and not signals:
                self._submit()
                for ended in self._executor.poll():
                    self._handle(ended)
                self._progress.show()
                if self._waiting or self._n_running:
                    time.sleep(every)
            if signals:
                self._say(f"{signals[0]}: waiting for the runs to save")
                self._executor.stop()
                raise Stopped(signals[0])
        finally:
            self._progress.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _submit(self) -> None:
        """Submits the waiting jobs whose run directories are free.

        A process that a killed ladder left behind may still be saving in one.
        """
        locked = [job for job in self._waiting if self._is_locked(job)]
        ready = [job for job in self._waiting if job not in locked]
        unsubmitted = self._executor.submit(ready)
        self._n_running += len(ready) - len(unsubmitted)
        self._waiting = unsubmitted + locked

    def _is_locked(self, job: list[str]) -> bool:
        return any(in_use(run_dir(self._workdir, name)) for name in job)

    def _handle(self, ended) -> None:
        """Notes the failed runs of a job that ended, and retries those of a pack one by one."""
        self._n_running -= 1
        failed = [name for name in ended.job if self._status(name) not in DONE]
        if not failed:
            return
        records.note(self._workdir, failed, ended.status, ended.message)
        for name in failed:
            _close_record(run_dir(self._workdir, name), ended)
        if len(ended.job) > 1:
            self._say(
                f"a pack of {len(ended.job)} failed ({ended.message}); retrying its runs one by one"
            )
            self._waiting += [[name] for name in failed]
            return
        self._say(f"{self._cells[failed[0]].label}: failed: {ended.message}")

    def _status(self, name: str) -> str:
        return records.status(self._workdir, self._cells[name])


def _close_record(directory: Path, ended) -> None:
    """Sets the status "failed" in run.json where a process was killed before it could."""
    path = directory / "run.json"
    if not path.exists():
        return
    fields = json.loads(path.read_text())
    if fields["status"] == "running":
        text = f"its process ended with status {ended.status}: {ended.message}"
        write_json(path, fields | {"status": "failed", "error": text})
