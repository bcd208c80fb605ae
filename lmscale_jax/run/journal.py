"""What the host does with the metrics of each step: averages them, writes them, watches them."""

import math
from pathlib import Path

import numpy as np

from lmscale_jax.config.durations import tokens_per_step
from lmscale_jax.errors import RunFailed
from lmscale_jax.run import writers
from lmscale_jax.run.clock import Clock


class Diverged(RunFailed):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Journal:
    """Takes the metrics of one step after the other and writes a line every `log.every` steps.

    train_loss is the mean over the steps since the last line; the other metrics are those of the
    line's own step. `sync()` goes into each checkpoint. `progress` is by default the terminal's.
    Without a `workdir` nothing is written or shown: another process does.
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
        self._others = []
        if workdir is None:
            self._file = self._timing = writers.Nowhere()
            self.progress = writers.Silence()
            return
        self._file = writers.MetricsFile(workdir / "metrics.jsonl", step)
        self._timing = open(workdir / "timing.jsonl", "a")
        if config.log.tensorboard:
            self._others.append(writers.TensorBoard(workdir, step))
        if writers.WANDB_MODES[config.log.wandb]:
            self._others.append(writers.Wandb(workdir, config, run_id))
        self.progress = progress or writers.Progress(config.train.steps, step)

    def take(self, step: int, metrics: dict, extra: dict | None = None) -> None:
        """Waits for the metrics of `step`, the number of steps done; `extra` joins its line.

        Raises Diverged.
        """
        loss = float(metrics["train_loss"])
        speed = self._clock.lap(tokens_per_step(self._config))
        self.progress.show(step, loss, speed)
        if math.isfinite(loss):
            self._losses.append(loss)
        due = step % self._config.log.every == 0 or step == self._config.train.steps
        if due or extra:
            line = self._line(step, metrics) if due else self._head(step)
            self._write(line | (extra or {}), speed)
        if int(metrics["bad"]) >= self._config.optim.max_bad_steps:
            raise Diverged(
                f"diverged: no finite loss or gradient in the {int(metrics['bad'])} steps up to "
                f"{step}; a lower optim.lr than {self._config.optim.lr} or a longer "
                f"schedule.warmup may help"
            )

    def _head(self, step: int) -> dict:
        return {"step": step, "tokens": step * tokens_per_step(self._config)}

    def _line(self, step: int, metrics: dict) -> dict:
        mean = float(np.mean(self._losses)) if self._losses else None
        self._losses = []
        rest = {k: np.asarray(v).tolist() for k, v in metrics.items() if k != "bad"}
        return self._head(step) | rest | {"train_loss": mean}

    def _write(self, line: dict, speed: float | None) -> None:
        self._file.write(line)
        timing = {"step": line["step"], "tokens_per_second": speed}
        self._timing.write(writers.json.dumps(timing) + "\n")
        self._timing.flush()
        for writer in self._others:
            writer.write(line | ({"tokens_per_second": speed} if speed else {}))

    def sync(self) -> dict:
        """Puts all lines on the disk; returns what a checkpoint of this moment must remember."""
        self._file.sync()
        # A copy: the checkpoint is written by a thread, while losses go on being added.
        return {"losses": list(self._losses)}

    def close(self) -> None:
        self.progress.close()
        self._file.close()
        self._timing.close()
        for writer in self._others:
            writer.close()
