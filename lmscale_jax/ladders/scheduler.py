"""Schedules the cells of a plan: starts those that can start, notes failures, shows progress.

Cells of equal shape are grouped into packs, which train as one program. Progress is a table that
redraws itself on a terminal, and plain lines elsewhere.
"""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.config.resolve import resolve
from lmscale_jax.errors import RunFailed
from lmscale_jax.files import write_json
from lmscale_jax.guards import table
from lmscale_jax.ladders import arm_checks, machine, results
from lmscale_jax.ladders.grid import TRUNK, Cell
from lmscale_jax.ladders.plan import LadderPlan, cell_dir
from lmscale_jax.train.run_dir import is_locked
from lmscale_jax.train.watchdog import STOPPING, end_at_next_signal

# Largest d_model and number of runs at which packs were measured to be faster on CPU
# (benchmarks/README.md, "Populations"): one larger model already keeps a core busy.
CPU_WIDTH, CPU_MOST = 32, 4
# FLOPs of a step up to which packs pay on accelerators. Not measured: by the programs compiled for
# an H100, launching kernels takes most of such a step (benchmarks/README.md, "Populations").
ACCELERATOR_FLOPS = 2e10


def pack_jobs(plan: LadderPlan, cells: list[Cell], slots: int) -> list[list[str]]:
    """Groups cells into jobs, lists of ids, in the order of `cells`; the ids of a job form a pack.

    Packs are small enough to give each of `slots` processes a job.
    """
    settings = plan.ladder["pack"]
    mode = PACK_MODES[settings["mode"]]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        alone = cell.needs or not mode.takes(plan, cell)
        groups.setdefault(cell.id if alone else pack_key(plan, cell), []).append(cell)
    size = max(1, min(mode.most(settings["most"]), len(cells) // slots))
    packs = []
    for group in groups.values():
        packs += [[c.id for c in group[i : i + size]] for i in range(0, len(group), size)]
    return packs


def pack_key(plan: LadderPlan, cell: Cell) -> str:
    """Returns a string that is equal for cells that can train as one program."""
    from lmscale_jax.ladders import pack

    config = plan.config(cell, Path())
    return f"{cell.role} {pack.pack_signature(resolve(config))}"


def packing_pays(plan: LadderPlan, cell: Cell) -> bool:
    """Returns whether packs of such models are faster than single runs on this kind of machine."""
    if machine.runs_on_cpu():
        return cell.shape["d_model"] <= CPU_WIDTH
    run = plan.ladder["run"]
    tokens = run["train"]["batch_size"] * run["data"]["seq_len"]
    return tokens * cell.flops_per_token <= ACCELERATOR_FLOPS


class PackMode(NamedTuple):
    """Which cells share a program.

    Attributes:
      takes: (plan, cell) -> whether it may be packed.
      most: pack.most -> the runs in one program.
    """

    takes: Callable
    most: Callable = lambda most: most


PACK_MODES = Modes(
    "pack.mode",
    {
        "auto": PackMode(
            packing_pays,
            lambda most: min(most, CPU_MOST) if machine.runs_on_cpu() else most,
        ),
        "always": PackMode(lambda plan, cell: True),
        "never": PackMode(lambda plan, cell: False),
    },
)


ENDED = ("finished", "diverged", "failed")


class CellTable:
    """A table of cells: status, step and loss of each, and the time left for all."""

    def __init__(
        self, plan: LadderPlan, cells: list[Cell], workdir: Path, say: Callable[[str], None]
    ):
        self._cells, self._workdir, self._say = cells, workdir, say
        run = plan.ladder["run"]
        self._tokens_per_step = run["train"]["batch_size"] * run["data"]["seq_len"]
        self._started = time.monotonic()
        self._statuses = {cell.id: results.cell_status(workdir, cell) for cell in cells}
        self._flops_before = self._flops_done()
        self._last_shown, self._rows_drawn = 0.0, 0
        self._on_terminal = sys.stderr.isatty()

    def show(self) -> None:
        """Redraws the table on a terminal; elsewhere prints a line for each new status.

        Does nothing within a second of the last time.
        """
        if time.monotonic() - self._last_shown < 1.0:
            return
        self._last_shown = time.monotonic()
        changed = []
        for cell in self._cells:
            status = results.cell_status(self._workdir, cell)
            if status != self._statuses[cell.id]:
                self._statuses[cell.id] = status
                changed.append(cell)
        if self._on_terminal:
            self._redraw()
            return
        for cell in changed:
            self._say(f"{self._row(cell)}{self._summary() if cell is changed[-1] else ''}")

    def close(self) -> None:
        """Shows the final state."""
        self._last_shown = 0.0
        self.show()

    def _flops_done(self) -> float:
        return sum(self._fraction_done(cell) * cell.flops for cell in self._cells)

    def _fraction_done(self, cell: Cell) -> float:
        if self._statuses[cell.id] in ENDED:
            return 1.0
        step = self._last_metrics(cell).get("step", 0)
        return min(1.0, step * self._tokens_per_step / cell.tokens)

    def _last_metrics(self, cell: Cell) -> dict:
        """Reads the last complete line of a run's metrics.jsonl; {} where there is none."""
        if self._statuses[cell.id] == "planned":
            return {}
        try:
            with open(cell_dir(self._workdir, cell.id) / "metrics.jsonl", "rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 20_000))
                lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1]) if lines else {}
        except (OSError, ValueError):
            return {}

    def _row(self, cell: Cell) -> str:
        metrics, status = self._last_metrics(cell), self._statuses[cell.id]
        steps = cell.tokens // self._tokens_per_step
        train_loss = metrics.get("train_loss")
        loss = f"  loss {train_loss:.4f}" if train_loss and status != "planned" else ""
        record = results.cell_record(self._workdir, cell) if status == "finished" else None
        if record:
            loss = f"  held out {record['final']['val_loss']:.4f}"
        step = f"step {metrics['step']}/{steps}" if metrics.get("step") else f"{steps} steps"
        return f"{cell.id}  {cell.label:<40} {status:<9} {step}{loss}"

    def _summary(self) -> str:
        n_ended = sum(self._statuses[c.id] in ENDED for c in self._cells)
        seconds = self._seconds_left()
        time_left = "" if seconds is None else f", about {hours_text(seconds)} left"
        return f"   [{n_ended} of {len(self._cells)}{time_left}]"

    def _seconds_left(self) -> float | None:
        """Extrapolates from the FLOPs done since the start; None in the first 5 seconds."""
        total, done = sum(cell.flops for cell in self._cells), self._flops_done()
        elapsed = time.monotonic() - self._started
        if done - self._flops_before <= 0 or elapsed < 5:
            return None
        return (total - done) / (done - self._flops_before) * elapsed

    def _redraw(self) -> None:
        width, height = shutil.get_terminal_size()
        running = [c for c in self._cells if self._statuses[c.id] == "running"]
        ended = [c for c in self._cells if self._statuses[c.id] not in ("running", "planned")]
        visible = [*ended, *running][-(height - 4) :]
        rows = [*(self._row(cell) for cell in visible), self._summary()]
        if self._rows_drawn:
            sys.stderr.write(f"\x1b[{self._rows_drawn}F\x1b[J")
        sys.stderr.write("".join(row[: width - 1] + "\n" for row in rows))
        sys.stderr.flush()
        self._rows_drawn = len(rows)


def hours_text(seconds: float) -> str:
    """Formats a duration as H:MM:SS, or M:SS below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


DONE = ("finished", "diverged")


class Interrupted(Exception):
    """Raised after SIGTERM or SIGINT, once the runs have saved and exited."""

    def __init__(self, name: str):
        super().__init__(name)
        self.status = 128 + signal.Signals[name]


def run_cells(
    plan: LadderPlan,
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
        stage = [c for c in stage if results.cell_status(workdir, c) not in DONE]
        stage = [c for c in stage if _ready(plan, c, workdir, say)]
        if stage:
            _Stage(plan, stage, workdir, executor, say).train(every)


def _ready(plan: LadderPlan, cell: Cell, workdir: Path, say) -> bool:
    """Returns whether a cell may start: a branch needs its finished trunk."""
    if not cell.needs or results.cell_status(workdir, plan.cell(cell.needs)) == "finished":
        return True
    results.note_failure(workdir, [cell.id], 1, f"its trunk {cell.needs} is not finished")
    say(f"{cell.label}: left out, its trunk {cell.needs} is not finished")
    return False


class _Stage:
    """Cells that do not depend on each other, and the jobs that train them."""

    def __init__(self, plan: LadderPlan, cells: list[Cell], workdir: Path, executor, say):
        self._plan, self._workdir, self._executor, self._say = plan, workdir, executor, say
        self._cells = {cell.id: cell for cell in cells}
        self._waiting = pack_jobs(plan, cells, executor.slots)
        self._n_running, self._warned = 0, set()
        self._progress = CellTable(plan, cells, workdir, say)

    def train(self, every: float) -> None:
        """Runs all jobs to their end. Raises Interrupted on SIGTERM and SIGINT."""
        signals: list[str] = []
        handlers = {
            s: signal.signal(s, lambda number, _: signals.append(signal.Signals(number).name))
            for s in STOPPING
        }
        try:
            self._check_losses()
            while (self._waiting or self._n_running) and not signals:
                self._submit()
                for ended in self._executor.poll():
                    self._handle(ended)
                    self._check_losses()
                self._progress.show()
                if self._waiting or self._n_running:
                    time.sleep(every)
            if signals:
                # Its death ends the runs too, which had their first signal.
                end_at_next_signal()
                self._say(f"{signals[0]}: waiting for the runs to save; once more ends all at once")
                self._executor.stop()
                raise Interrupted(signals[0])
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
        return any(is_locked(cell_dir(self._workdir, name)) for name in job)

    def _handle(self, ended) -> None:
        """Notes the failed runs of a job that ended, and retries those of a pack one by one."""
        self._n_running -= 1
        failed = [name for name in ended.job if self._status(name) not in DONE]
        if not failed:
            return
        results.note_failure(self._workdir, failed, ended.status, ended.message)
        for name in failed:
            _close_record(cell_dir(self._workdir, name), ended)
        if len(ended.job) > 1:
            self._say(
                f"a pack of {len(ended.job)} failed ({ended.message}); retrying its runs one by one"
            )
            self._waiting += [[name] for name in failed]
            return
        self._say(f"{self._cells[failed[0]].label}: failed: {ended.message}")

    def _check_losses(self) -> None:
        """Raises RunFailed, after the runs have saved, where an arm is too good to be true."""
        action = table.action_of(arm_checks.guard_settings(self._plan), "held_out")
        fault = arm_checks.held_out_fault(self._plan, self._workdir) if action.runs else None
        if fault and action.stops:
            self._executor.stop()
            raise RunFailed(fault)
        if fault and fault not in self._warned:
            self._warned.add(fault)
            self._say(fault)

    def _status(self, name: str) -> str:
        return results.cell_status(self._workdir, self._cells[name])


def _close_record(directory: Path, ended) -> None:
    """Sets the status "failed" in run.json where a process was killed before it could."""
    path = directory / "run.json"
    if not path.exists():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields["status"] == "running":
        text = f"its process ended with status {ended.status}: {ended.message}"
        write_json(path, fields | {"status": "failed", "error": text})
