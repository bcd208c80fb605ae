"""The small parts of a run: clock, metrics file, metric logger."""

import json
import math

import pytest

from lmscale_jax.errors import InputError
from lmscale_jax.train import metrics
from lmscale_jax.train import metrics as clocks


@pytest.fixture
def time(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_clock_leaves_out_compilation_and_pauses(time):
    clock = clocks.Clock()
    time(9.0)
    assert clock.lap(10) is None  # the first step compiles
    time(2.0)
    assert clock.lap(10) == 5.0
    time(2.0)
    with clock.pause():
        time(50.0)
    assert clock.lap(10) == 5.0
    clock.leave_out()
    time(30.0)
    assert clock.lap(10) is None
    assert clock.tokens_per_second == 5.0 and clock.wall_seconds == 93.0


def test_clock_goes_on_after_a_restart(time):
    first = clocks.Clock()
    first.lap(10)
    time(2.0)
    first.lap(10)
    time(1.0)
    second = clocks.Clock(json.loads(json.dumps(first.state())))
    second.lap(10)
    time(8.0)
    second.lap(10)
    assert second.tokens_per_second == 20 / 10 and second.wall_seconds == 11.0


def test_clock_counts_waiting(time):
    clock = clocks.Clock()

    def slow():
        for item in range(3):
            time(1.0)
            yield item

    items = []
    for item in clock.waiting_for(slow()):
        time(3.0)
        clock.lap(1)
        items.append(item)
    assert items == [0, 1, 2]
    # The first lap is left out of the seconds, its wait is not: 3 of 8.
    assert clock.data_wait == pytest.approx(3 / 8)


def test_metrics_file_drops_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = metrics.MetricsFile(path, 0)
    for step in (1, 2, 3):
        before.write({"step": step, "loss": math.nan if step == 2 else 1.0})
    before.close()
    path.write_text(path.read_text() + '{"step": 4, "los')
    continued = metrics.MetricsFile(path, 2)
    continued.write({"step": 3, "loss": 0.5})
    continued.close()
    lines = metrics.read_metrics(path)
    assert lines == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip


def test_what_a_checkpoint_remembers_does_not_change_after(small, tmp_path):
    """A thread writes it, while the run adds further losses."""
    config = small(log__tensorboard=False, log__every=4)
    logger = metrics.MetricLogger(
        config, tmp_path, 0, {}, clocks.Clock(), "run", metrics.SilentProgress()
    )
    logger.log(1, {"train_loss": 2.0, "bad": 0})
    remembered = logger.sync()
    logger.log(2, {"train_loss": 3.0, "bad": 0})
    assert remembered == {"losses": [2.0]} and logger.sync() == {"losses": [2.0, 3.0]}
    logger.close()


def test_scalars_name_layers_and_leave_out_what_is_not_finite():
    line = {"step": 3, "loss": 2.0, "bad": math.nan, "norms": [1.0, math.inf], "text": "x"}
    assert metrics.finite_scalars(line) == {"loss": 2.0, "norms/0": 1.0}


def test_a_writer_that_is_not_installed_is_refused(monkeypatch, small):
    config = small(log__wandb="offline")
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"log\.wandb='offline' needs .*or 'off'"):
        metrics.check_writers(config)
    metrics.check_writers(small())
