"""Training time, apart from everything else and kept across restarts.

Writers of metrics: metrics.jsonl always; terminal, TensorBoard and Weights & Biases as well.

Averages the metrics of steps, writes them, and ends a run whose loss is no longer finite.
"""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.config.durations import tokens_per_step
from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.files import atomic_write, plain_values


class Clock:
    """Counts the seconds and tokens of steps; compilation, evaluation and saving are left out.

    `state()` goes into each checkpoint, so a run that was stopped and continued reports the sum.
    """

    def __init__(self, state: dict | None = None):
        state = state or {}
        self.step_seconds = state.get("step_seconds", 0.0)
        self.step_tokens = state.get("step_tokens", 0)
        self.wait_seconds = state.get("wait_seconds", 0.0)
        self._earlier_seconds = state.get("wall_seconds", 0.0)
        self._start = self._lap_start = time.perf_counter()
        self._skip_lap = True

    def lap(self, tokens: int) -> float | None:
        """Ends one step. Returns its tokens per second, or None if it was left out."""
        now = time.perf_counter()
        seconds, self._lap_start = now - self._lap_start, now
        if self._skip_lap:
            self._skip_lap = False
            return None
        self.step_seconds += seconds
        self.step_tokens += tokens
        return tokens / seconds

    def leave_out(self) -> None:
        """Leaves the current lap out, as one in which something was compiled."""
        self._skip_lap = True

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time of the block out of the training time."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start

    def waiting_for(self, stream: Iterable) -> Iterator:
        """Yields the same items, and counts the time of each `next` as waiting for data."""
        iterator = iter(stream)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.wait_seconds += time.perf_counter() - start
            yield item

    @property
    def data_wait(self) -> float | None:
        """Share of the training time in which a step waited for its batch."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else None

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run started, without those between a stop and a restart."""
        return self._earlier_seconds + time.perf_counter() - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over all steps that were counted."""
        return self.step_tokens / self.step_seconds if self.step_seconds else None

    def state(self) -> dict:
        """Returns the counts as a checkpoint keeps them."""
        return {
            "step_seconds": self.step_seconds,
            "step_tokens": self.step_tokens,
            "wait_seconds": self.wait_seconds,
            "wall_seconds": self.wall_seconds,
        }


class MetricsFile:
    """metrics.jsonl: one object a line, a function of the run's config alone.

    Lines after `step`, that of the checkpoint from which the run continues, are dropped, so that an
    interrupted run ends with the same file as one that was never stopped. Whatever depends on the
    machine's speed goes to timing.jsonl instead.
    """

    def __init__(self, path: Path, step: int):
        valid = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        atomic_write(path, "".join(line + "\n" for line in valid))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, line: dict) -> None:
        self._file.write(json.dumps(plain_values(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Reads the complete lines of a file; a last line without its end was being written."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def read_metrics(path: Path) -> list[dict]:
    """Reads all lines of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


# What wandb.init is given as its mode; None: nothing is sent there.
WANDB_MODES = Modes("log.wandb", {"off": None, "offline": "offline", "online": "online"})


def check_writers(config) -> None:
    """Raises InputError where a writer that the config names is not installed."""
    if WANDB_MODES[config.log.wandb] and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"config.log.wandb={config.log.wandb!r} needs the wandb package; use "
            f"pip install 'lmscale_jax[wandb]', or 'off'"
        )


def finite_scalars(line: dict) -> dict[str, float]:
    """Returns a line's finite numbers by name; a list by layer becomes one entry a layer."""
    flat = {}
    for name, value in plain_values(line).items():
        if isinstance(value, list):
            flat |= {f"{name}/{index}": v for index, v in enumerate(value) if v is not None}
        elif isinstance(value, (int, float)) and name != "step":
            flat[name] = value
    return flat


class TensorBoard:
    """Event files under tb/; those after the step from which a run continues are marked void."""

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tb"), purge_step=step + 1 if step else None)

    def write(self, line: dict) -> None:
        for name, value in finite_scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run of the same name; it continues when the run does."""

    def __init__(self, workdir: Path, config, run_id: str):
        import wandb

        self._run = wandb.init(
            project=config.log.wandb_project,
            dir=str(workdir),
            id=run_id,
            name=workdir.name,
            resume="allow",
            mode=WANDB_MODES[config.log.wandb],
            config=config.to_dict(),
        )

    def write(self, line: dict) -> None:
        self._run.log(finite_scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class Progress:
    """A bar with loss, speed and time left on a terminal; plain lines elsewhere.

    Plain lines are at least `seconds_between` seconds apart.
    """

    def __init__(self, total: int, step: int, seconds_between: float = 10.0):
        self._total, self._seconds_between, self._last_shown = total, seconds_between, 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)
        self._start, self._first_step = time.monotonic(), step

    def show(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        speed = f"{tokens_per_second:,.0f} tok/s" if tokens_per_second else ""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f} {speed}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_shown < self._seconds_between and step < self._total:
            return
        seconds_per_step = (now - self._start) / max(1, step - self._first_step)
        time_left = _hms(seconds_per_step * (self._total - step))
        self.say(f"step {step}/{self._total}  loss {loss:.4f}  {speed}  {time_left} left")
        self._last_shown = now

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class NullFile:
    """Stands for a file that another process writes."""

    def write(self, line) -> None:
        pass

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class SilentProgress:
    """Stands for progress that another process shows."""

    def show(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _hms(seconds: float) -> str:
    """Formats a duration as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Diverged(RunFailed):
    """Too many steps in a row had a non-finite loss or gradient."""


class MetricLogger:
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
        progress: Progress | SilentProgress | None = None,
    ):
        self._config, self._clock = config, clock
        self._losses: list[float] = list(state.get("losses", []))
        self._extra_writers = []
        if workdir is None:
            self._file = self._timing = NullFile()
            self.progress = SilentProgress()
            return
        self._file = MetricsFile(workdir / "metrics.jsonl", step)
        self._timing = open(workdir / "timing.jsonl", "a", encoding="utf-8")
        if config.log.tensorboard:
            self._extra_writers.append(TensorBoard(workdir, step))
        if WANDB_MODES[config.log.wandb]:
            self._extra_writers.append(Wandb(workdir, config, run_id))
        self.progress = progress or Progress(config.train.steps, step)

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
