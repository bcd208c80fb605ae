"""Runs the cells of a plan: what can start starts, what failed is noted, the rest go on."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lmscale_jax.files import write_json
from lmscale_jax.fleet import packing
from lmscale_jax.fleet.progress import Progress
from lmscale_jax.run import record
from lmscale_jax.study import records
from lmscale_jax.study.cells import TRUNK, Cell
from lmscale_jax.study.plan import Plan, run_dir

DONE = ("finished", "diverged")


class Stopped(Exception):
    """SIGTERM or SIGINT came; the runs have saved and left."""

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
    """Trains the cells that are not done: trunks first, then the rest, cheapest first.

    A pack that fails is tried again run by run; a run that fails is noted in attempts.jsonl and
    tried again the next time. Raises Stopped.
    """
    for stage in ([c for c in cells if c.role == TRUNK], [c for c in cells if c.role != TRUNK]):
        stage = [c for c in stage if records.status(workdir, c) not in DONE]
        stage = [c for c in stage if _ready(plan, c, workdir, say)]
        if stage:
            _Stage(plan, stage, workdir, executor, say).finish(every)


def _ready(plan: Plan, cell: Cell, workdir: Path, say) -> bool:
    """A branch needs its trunk."""
    if not cell.needs or records.status(workdir, plan.cell(cell.needs)) == "finished":
        return True
    records.note(workdir, [cell.id], 1, f"its trunk {cell.needs} is not finished")
    say(f"{cell.label}: left out, its trunk {cell.needs} is not finished")
    return False


class _Stage:
    """Cells that may train beside each other."""

    def __init__(self, plan: Plan, cells: list[Cell], workdir: Path, executor, say):
        self._plan, self._workdir, self._executor, self._say = plan, workdir, executor, say
        self._cells = {cell.id: cell for cell in cells}
        self._waiting = packing.jobs(plan, cells, executor.slots)
        self._running = 0
        self._progress = Progress(plan, cells, workdir, executor.slots, say)

    def finish(self, every: float) -> None:
        asked: list[str] = []
        before = {
            s: signal.signal(s, lambda number, _: asked.append(signal.Signals(number).name))
            for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while (self._waiting or self._running) and not asked:
                self._submit()
                for ended in self._executor.poll():
                    self._take(ended)
                self._progress.show()
                if self._waiting or self._running:
                    time.sleep(every)
            if asked:
                self._say(f"{asked[0]}: waiting for the runs to save")
                self._executor.stop()
                raise Stopped(asked[0])
        finally:
            self._progress.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _submit(self) -> None:
        """A run that an earlier, killed ladder left behind is given time to save and leave."""
        free = [j for j in self._waiting if not self._in_use(j)]
        held = [j for j in self._waiting if self._in_use(j)]
        left = self._executor.submit(free)
        self._running += len(free) - len(left)
        self._waiting = left + held

    def _in_use(self, job: list[str]) -> bool:
        return any(record.in_use(run_dir(self._workdir, name)) for name in job)

    def _take(self, ended) -> None:
        self._running -= 1
        left = [n for n in ended.job if self._status(n) not in DONE]
        if not left:
            return
        records.note(self._workdir, left, ended.status, ended.said)
        for name in left:
            _close_record(run_dir(self._workdir, name), ended)
        if len(ended.job) > 1:
            self._say(f"a pack of {len(ended.job)} failed ({ended.said}); its runs go on alone")
            self._waiting += [[name] for name in left]
            return
        self._say(f"{self._cells[left[0]].label}: failed: {ended.said}")

    def _status(self, name: str) -> str:
        return records.status(self._workdir, self._cells[name])


def _close_record(directory: Path, ended) -> None:
    """A process that was killed cannot say so in its record."""
    path = directory / "run.json"
    if not path.exists():
        return
    fields = json.loads(path.read_text())
    if fields["status"] == "running":
        text = f"its process ended with status {ended.status}: {ended.said}"
        write_json(path, fields | {"status": "failed", "error": text})
