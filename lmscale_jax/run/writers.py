"""Writers of metrics: metrics.jsonl always; terminal, TensorBoard and Weights & Biases as well."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.files import atomic_write, plain_values


class MetricsFile:
    """metrics.jsonl: one object a line, a function of the run's config alone.

    Lines after `step`, that of the checkpoint from which the run continues, are dropped, so that an
    interrupted run ends with the same file as one that was never stopped. Whatever depends on the
    machine's speed goes to timing.jsonl instead.
    """

    def __init__(self, path: Path, step: int):
        valid = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        atomic_write(path, "".join(line + "\n" for line in valid))
        self._file = open(path, "a")

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
    return [line for line in path.read_text().split("\n")[:-1] if line]


def read_metrics(path: Path) -> list[dict]:
    """Reads all lines of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def check(config) -> None:
    """Raises InputError where a writer that the config names is not installed."""
    if config.log.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"config.log.wandb={config.log.wandb!r} needs the wandb package; use "
            f"pip install 'lmscale_jax[wandb]', or 'off'"
        )


def scalars(line: dict) -> dict[str, float]:
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
        for name, value in scalars(line).items():
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
            mode=config.log.wandb,
            config=config.to_dict(),
        )

    def write(self, line: dict) -> None:
        self._run.log(scalars(line), step=line["step"])

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


class Nowhere:
    """Stands for a file that another process writes."""

    def write(self, line) -> None:
        pass

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Silence:
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
