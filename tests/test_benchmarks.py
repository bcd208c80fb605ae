"""What of the benchmarks needs neither PyTorch nor a quiet machine. No times are asserted."""

import json
import sys

import pytest

from benchmarks import (
    interleave,
    machine,
    nanogpt_char,
    optimizer_sweep,
    optimizers,
    train_step,
)
from benchmarks.interleave import Chunk
from lmscale_jax.errors import RunFailed

# Tells in its loss which worker it is.
FAKE = "import sys\nprint('ready', flush=True)\nfor n in sys.stdin: print(2.0, {}, flush=True)"


def test_every_worker_has_one_chunk_a_round():
    workers = [interleave.Worker(k, [sys.executable, "-c", FAKE.format(k)]) for k in ("1", "2")]
    for worker in workers:
        worker.wait()
    chunks, losses = interleave.measure(workers, rounds=3, chunk_ms=1.0, limit_s=60.0)
    for worker in workers:
        worker.close()
    assert {k: [c.ms for c in v] for k, v in chunks.items()} == {"1": [2.0] * 3, "2": [2.0] * 3}
    assert losses == {"1": 1.0, "2": 2.0}


def test_a_dead_worker_is_named_with_its_last_words():
    worker = interleave.Worker("peer", [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RunFailed, match=r"'peer' died: no such thing"):
        worker.wait()
    worker.close()


def test_ratios_are_of_rounds_in_which_both_were_clean():
    own = [Chunk(10.0, True), Chunk(90.0, False), Chunk(12.0, True), Chunk(14.0, True)]
    base = [Chunk(10.0, True), Chunk(10.0, True), Chunk(10.0, False), Chunk(7.0, True)]
    assert interleave.ms(own)["median"] == 12.0
    assert interleave.ratio(own, base) == {"n": 2, "median": 1.5, "quartiles": [1.25, 1.75]}
    nothing = interleave.ratio(own, [Chunk(10.0, False)] * 4)
    assert nothing["median"] is None and train_step.cell(nothing, 2) == "no clean chunk"


def test_the_text_is_the_same_every_time(tmp_path):
    said = [nanogpt_char.library_text(tmp_path / name) for name in "ab"]
    assert said[0] == said[1] and "1,115,394 characters" in said[0]
    texts = [(tmp_path / name).read_bytes() for name in "ab"]
    assert texts[0] == texts[1] and len(texts[0]) == nanogpt_char.TEXT_CHARACTERS


def test_runs_become_a_table():
    run = {"precision": "float32", "seconds": 60.0, "steps_per_second": 30.0}
    runs = [run | {"side": s, "val_loss": x} for s in ("torch", "ours") for x in (1.8, 1.9)]
    lines = nanogpt_char.show(runs).splitlines()
    assert len(lines) == 4
    assert "| torch float32 | 2 |" in lines[2] and "1.8500 ± 0.0707" in lines[3]


def test_the_cost_of_newton_schulz_is_predicted_by_counting():
    """Square matrices of the attention: 6 m^3 a step and matrix, over 6 m^2 B."""
    found = optimizers.predicted(1, 12)
    assert found["rule"] == 5 * 128 / (12 * 64)
    # The rule is a bound; the readout and attention itself cost too.
    assert 0.5 * found["rule"] < found["share"] < found["rule"]
    assert optimizers.predicted(1, 48)["share"] == pytest.approx(found["share"] / 4)


def test_the_step_at_which_a_loss_is_reached():
    curve = [(20, 5.0), (40, 4.0), (60, 4.2), (80, 3.8)]
    assert optimizer_sweep.reached(curve, 4.5) == 30.0
    assert optimizer_sweep.reached(curve, 3.9) == 75.0
    assert optimizer_sweep.reached(curve, 3.0) is None
    runs = [{"rate": 0.1, "seed": s, "loss": 3.8, "curve": curve} for s in range(2)]
    side = {"best": 0.1, "sweep": runs[:1], "seeds": runs}
    lines = optimizer_sweep.show({"adamw": side, "muon": side}).splitlines()
    assert "3.8000, 3.8000 | 3.8000 ± 0.0000 | 80, 80" in lines[-1]


def test_a_machine_without_pytorch_is_told_so(capsys):
    assert machine.torch_version("no-such-python") is None
    assert capsys.readouterr().out.count("\n") == 1


def test_results_are_json_with_lists_on_one_line(tmp_path):
    result = {"a": {"b": [1.5, 2.5]}, "c": [{"d": 1}]}
    machine.save("r", result, tmp_path / "new")
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == result and "[ 1.5, 2.5 ]" in text
