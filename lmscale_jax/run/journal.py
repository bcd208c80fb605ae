"""Averages the metrics of steps, writes them, and ends a run whose loss is no longer finite."""

import json
import math
from pathlib import Path

import numpy as np

from lmscale_jax.derived import tokens_per_step
from lmscale_jax.errors import RunFailed
from lmscale_jax.run import writers
from lmscale_jax.run.clock import Clock


class Diverged(RunFailed):
    """Too many steps in a row had a non-finite loss or gradient."""


class Journal:
    """Logs the metrics of each step: a line every `log.every` steps, and progress.

    train_loss is the mean over the steps since the last line; the other metrics are those of the
    line's own step.

    Args:
      workdir: of the run; None: nothing is written or shown, as another process does it.
      step: from which the run continues.
      state: what `sync` returned for that step's checkpoint, or {}.
      clock: measures the steps.
      run_id: names the run in Weights & Biases.
      progress: by default the terminal's.
    """

    def __init__(
        self,
        config,
        workdir: Path | None,
        step: int,
        state: dict,
        clock: Clock,
        run_id: str,
        progress: writers.Progress | writers.Silence | None = None,
    ):
        self._config, self._clock = config, clock
        self._losses: list[float] = list(state.get("losses", []))
        self._extra_writers = []
        if workdir is None:
            self._file = self._timing = writers.Nowhere()
            self.progress = writers.Silence()
            return
        self._file = writers.MetricsFile(workdir / "metrics.jsonl", step)
        self._timing = open(workdir / "timing.jsonl", "a")
        if config.log.tensorboard:
            self._extra_writers.append(writers.TensorBoard(workdir, step))
        if config.log.wandb != "off":
            self._extra_writers.append(writers.Wandb(workdir, config, run_id))
        self.progress = progress or writers.Progress(config.train.steps, step)

    def log(self, step: int, metrics: dict, extra: dict | None = None) -> None:
        """Waits for the metrics of `step`, the number of steps done; `extra` joins its line.

        Raises Diverged after `optim.max_bad_steps` non-finite steps in a row.
        """
        loss = float(metrics["train_loss"])
        speed = self._clock.lap(tokens_per_step(self._config))
        self.progress.show(step, loss, speed)
        if math.isfinite(loss):
            self._losses.append(loss)
        line_due = step % self._config.log.every == 0 or step == self._config.train.steps
        if line_due or extra:
            line = self._line(step, metrics) if line_due else self._position(step)
            self._write(line | (extra or {}), speed)
        if int(metrics["bad"]) >= self._config.optim.max_bad_steps:
            raise Diverged(
                f"diverged: no finite loss or gradient in the {int(metrics['bad'])} steps up to "
                f"{step}; try an optim.lr below {self._config.optim.lr} or a longer schedule.warmup"
            )

    def _position(self, step: int) -> dict:
        return {"step": step, "tokens": step * tokens_per_step(self._config)}

    def _line(self, step: int, metrics: dict) -> dict:
        mean = float(np.mean(self._losses)) if self._losses else None
        self._losses = []
        others = {k: np.asarray(v).tolist() for k, v in metrics.items() if k != "bad"}
        return self._position(step) | others | {"train_loss": mean}

    def _write(self, line: dict, speed: float | None) -> None:
        self._file.write(line)
        timing = {"step": line["step"], "tokens_per_second": speed}
        self._timing.write(json.dumps(timing) + "\n")
        self._timing.flush()
        for writer in self._extra_writers:
            writer.write(line | ({"tokens_per_second": speed} if speed else {}))

    def sync(self) -> dict:
        """Puts all lines on the disk. Returns what a checkpoint of this moment must remember."""
        self._file.sync()
        # A copy, as a thread writes the checkpoint while further losses are added.
        return {"losses": list(self._losses)}

    def close(self) -> None:
        self.progress.close()
        self._file.close()
        self._timing.close()
        for writer in self._extra_writers:
            writer.close()
