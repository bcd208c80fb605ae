"""What one sees while a ladder trains: a table that redraws itself, or plain lines."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lmscale_jax.study import records
from lmscale_jax.study.cells import Cell
from lmscale_jax.study.plan import Plan, run_dir

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Status, step and loss of the cells of a stage, and the time left."""

    def __init__(
        self, plan: Plan, cells: list[Cell], workdir: Path, slots: int, say: Callable[[str], None]
    ):
        self._cells, self._workdir, self._slots, self._say = cells, workdir, slots, say
        self._batch = (
            plan.ladder["run"]["train"]["batch_size"] * (plan.ladder["run"]["data"]["seq_len"])
        )
        self._begin = time.monotonic()
        self._known = {cell.id: records.status(workdir, cell) for cell in cells}
        self._before = sum(self._share(cell) * cell.flops for cell in cells)
        self._last, self._drawn, self._live = 0.0, 0, sys.stderr.isatty()

    def show(self) -> None:
        """Once a second on a terminal; elsewhere a line when a run's status changes."""
        if time.monotonic() - self._last < 1.0:
            return
        self._last = time.monotonic()
        changed = []
        for cell in self._cells:
            status = records.status(self._workdir, cell)
            if status != self._known[cell.id]:
                self._known[cell.id] = status
                changed.append(cell)
        if self._live:
            self._redraw()
            return
        for cell in changed:
            self._say(f"{self._row(cell)}{self._summary() if cell is changed[-1] else ''}")

    def close(self) -> None:
        self._last = 0.0
        self.show()

    def _share(self, cell: Cell) -> float:
        """How far a run is, from 0 to 1."""
        if self._known[cell.id] in ("finished", "diverged", "failed"):
            return 1.0
        return min(1.0, self._line(cell).get("step", 0) * self._batch / cell.tokens)

    def _line(self, cell: Cell) -> dict:
        """The last whole line of a run's metrics."""
        if self._known[cell.id] == "planned":
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
        line, status = self._line(cell), self._known[cell.id]
        steps = cell.tokens // self._batch
        loss = line.get("train_loss")
        shown = f"  loss {loss:.4f}" if loss and status != "planned" else ""
        record = records.record_of(self._workdir, cell) if status == "finished" else None
        if record:
            shown = f"  held out {record['final']['val_loss']:.4f}"
        at = f"step {line['step']}/{steps}" if line.get("step") else f"{steps} steps"
        return f"{cell.id}  {cell.label:<40} {status:<9} {at}{shown}"

    def _summary(self) -> str:
        done = sum(self._known[c.id] in ("finished", "diverged", "failed") for c in self._cells)
        left = self._seconds_left()
        time_left = "" if left is None else f", about {_hms(left)} left"
        return f"   [{done} of {len(self._cells)}{time_left}]"

    def _seconds_left(self) -> float | None:
        """From the FLOPs done since this began."""
        total = sum(cell.flops for cell in self._cells)
        done = sum(self._share(cell) * cell.flops for cell in self._cells)
        spent = time.monotonic() - self._begin
        if done - self._before <= 0 or spent < 5:
            return None
        return (total - done) / (done - self._before) * spent

    def _redraw(self) -> None:
        width, height = shutil.get_terminal_size()
        busy = [c for c in self._cells if self._known[c.id] == "running"]
        rest = [c for c in self._cells if self._known[c.id] not in ("running", "planned")]
        shown = [*rest, *busy][-(height - 4) :]
        rows = [*(self._row(cell) for cell in shown), self._summary()]
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}F\x1b[J")
        sys.stderr.write("".join(row[: width - 1] + "\n" for row in rows))
        sys.stderr.flush()
        self._drawn = len(rows)


def _hms(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
