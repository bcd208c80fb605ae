"""Shows the progress of a ladder: a table that redraws itself, or plain lines."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lmscale_jax.study import records
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import Plan, run_dir

ENDED = ("finished", "diverged", "failed")


class Progress:
    """A table of cells: status, step and loss of each, and the time left for all."""

    def __init__(self, plan: Plan, cells: list[Cell], workdir: Path, say: Callable[[str], None]):
        self._cells, self._workdir, self._say = cells, workdir, say
        run = plan.ladder["run"]
        self._tokens_per_step = run["train"]["batch_size"] * run["data"]["seq_len"]
        self._started = time.monotonic()
        self._statuses = {cell.id: records.status(workdir, cell) for cell in cells}
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
            status = records.status(self._workdir, cell)
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
            with open(run_dir(self._workdir, cell.id) / "metrics.jsonl", "rb") as file:
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
        record = records.record_of(self._workdir, cell) if status == "finished" else None
        if record:
            loss = f"  held out {record['final']['val_loss']:.4f}"
        step = f"step {metrics['step']}/{steps}" if metrics.get("step") else f"{steps} steps"
        return f"{cell.id}  {cell.label:<40} {status:<9} {step}{loss}"

    def _summary(self) -> str:
        n_ended = sum(self._statuses[c.id] in ENDED for c in self._cells)
        seconds = self._seconds_left()
        time_left = "" if seconds is None else f", about {_hms(seconds)} left"
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


def _hms(seconds: float) -> str:
    """Formats a duration as H:MM:SS, or M:SS below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
