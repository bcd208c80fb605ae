"""What of the benchmarks needs neither PyTorch nor a quiet machine. No times are asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    __main__,
    interleave,
    machine,
    nanogpt_char,
    optimizer_sweep,
    optimizers,
    overheads,
    readme,
    tables,
)
from benchmarks.interleave import Chunk
from benchmarks.shapes import SHAPES
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import RunFailed

ROOT = Path(__file__).parents[1]

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
    chunks = [Chunk(10.0, True), Chunk(90.0, False), Chunk(12.0, True), Chunk(14.0, True)]
    base = [Chunk(10.0, True), Chunk(10.0, True), Chunk(10.0, False), Chunk(7.0, True)]
    assert interleave.ms(chunks)["median"] == 12.0
    assert interleave.ratio(chunks, base) == {"n": 2, "median": 1.5, "quartiles": [1.25, 1.75]}
    nothing = interleave.ratio(chunks, [Chunk(10.0, False)] * 4)
    assert nothing["median"] is None and tables.cell(nothing, 2) == "no clean chunk"


def test_the_text_is_the_same_every_time(tmp_path):
    lines = [nanogpt_char.library_text(tmp_path / name) for name in "ab"]
    assert lines[0] == lines[1] and "1,115,394 characters" in lines[0]
    texts = [(tmp_path / name).read_bytes() for name in "ab"]
    assert texts[0] == texts[1] and len(texts[0]) == nanogpt_char.TEXT_CHARACTERS


def test_runs_become_a_table():
    run = {"precision": "float32", "seconds": 60.0, "steps_per_second": 30.0}
    runs = [run | {"side": s, "val_loss": x} for s in ("torch", "ours") for x in (1.8, 1.9)]
    lines = tables.whole_runs(runs).splitlines()
    assert len(lines) == 4
    assert "| torch float32 | 2 |" in lines[2] and "1.8500 ± 0.0707" in lines[3]


def test_the_cost_of_newton_schulz_is_predicted_by_counting():
    """Square matrices of the attention: 6 m^3 a step and matrix, over 6 m^2 B."""
    cost = optimizers.predicted(1, 12)
    assert cost["rule"] == 5 * 128 / (12 * 64)
    # The rule is a bound; the readout and attention itself cost too.
    assert 0.5 * cost["rule"] < cost["share"] < cost["rule"]
    assert optimizers.predicted(1, 48)["share"] == pytest.approx(cost["share"] / 4)


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


# A model that compiles in a second or two; the results then bear the config's name.
TINY = [
    "--config=configs/quickstart.py", "--config.model.n_layers=1", "--config.model.d_model=16",
    "--config.data.seq_len=8", "--config.data.vocab_size=300", "--rounds=1", "--chunk_ms=1",
]  # fmt: skip


def benchmark(name: str, results: Path, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a benchmark, on a machine that need not be quiet."""
    flags = ["--others=99", "--torch_python=no-such-python", f"--results={results}", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def check_facts(facts: dict) -> None:
    assert {"python", "jax", "torch"} <= facts["versions"].keys()
    assert facts["cpu"] and facts["cores"] and facts["date"]


def test_steps_have_times_rates_and_shares(tmp_path):
    few = [*TINY, "--product=128", "--batches=2", "--rows=ours float32, one device"]
    status, out, err = benchmark("train_step", tmp_path, *few)
    assert status == 0, err
    result = json.loads((tmp_path / "train_step_quickstart.json").read_text())
    check_facts(result["machine"])
    shape = result["shapes"]["quickstart B=2"]
    row = shape["rows"]["ours float32, one device"]
    assert row["ms"]["n"] == 1 and len(row["ms"]["quartiles"]) == 2
    assert row["device"]["platform"] and row["device"]["count"] == 1
    assert row["tokens_s"] == pytest.approx(1e3 * shape["tokens"] / row["ms"]["median"])
    assert row["gflops"] == pytest.approx(shape["flops"] / row["ms"]["median"] / 1e6)
    assert row["of_product"] > 0 and shape["products"]["ours float32"]["gflops"] > 0
    assert "| tokens/s | GFLOP/s | of a bare product |" in out


@pytest.mark.slow
def test_processes_on_a_core_each_count_together(tmp_path):
    few = ["--shapes=1", "--dtypes=float32", "--rounds=1", "--chunk_ms=1"]
    status, out, err = benchmark("cores", tmp_path, *few)
    assert status == 0, err
    result = json.loads((tmp_path / "cores.json").read_text())
    check_facts(result["machine"])
    rows = result["shapes"]["1"]["rows"]["float32"]
    whole, apart = rows["ours, one process"], rows["ours, a process a core"]
    gain = whole["ms_by_round"][0] / apart["ms_by_round"][0]
    assert apart["gain"]["median"] == pytest.approx(gain, rel=1e-3) and whole["gain"] is None
    assert tables.cores(result) in out


def test_a_step_is_taken_apart(tmp_path):
    status, out, err = benchmark("breakdown", tmp_path, *TINY, "--batch=2")
    assert status == 0, err
    result = json.loads((tmp_path / "breakdown_quickstart.json").read_text())
    check_facts(result["machine"])
    row = result["rows"]["quickstart B=2, float32"]
    assert row["device"]["count"] == 1
    assert all(part["n"] == 1 for part in row["parts"].values())
    turns = {name: chunks[0]["ms"] for name, chunks in row["turns"].items()}
    backward = turns["forward and backward"] - turns["forward"]
    assert row["parts"]["backward"]["median"] == pytest.approx(backward)
    assert tables.breakdown(result) in out


def test_changes_are_divided_by_the_plain_step(tmp_path):
    few = [*TINY, "--batch=2", "--changes=qk_norm,fp8"]
    status, out, err = benchmark("overheads", tmp_path, *few)
    assert status == 0, err
    result = json.loads((tmp_path / "overheads_quickstart.json").read_text())
    check_facts(result["machine"])
    rows = result["rows"]
    # The plain step is what a run takes where it is not asked for more.
    assert result["device"]["platform"] != "cpu" or result["device"]["count"] == 1
    assert rows["qk_norm"]["ratio"]["n"] == 1 and rows["qk_norm"]["bytes_ratio"] > 0
    # What a machine cannot do is said, not left out; a CPU has no float8.
    if result["device"]["platform"] == "cpu":
        assert "not fp8" in rows["fp8"]["error"]
    assert tables.overheads(result) in out


def test_every_kernel_that_serves_has_a_row(tmp_path):
    few = ["--lengths=8", "--tokens=128", "--heads=1", "--head_dim=8", "--rounds=1", "--turn=0"]
    status, out, err = benchmark("attention", tmp_path, *few)
    assert status == 0, err
    (path,) = tmp_path.glob("attention_*.json")
    result = json.loads(path.read_text())
    check_facts(result)
    assert {"plain", "xla"} <= {row["kernel"] for row in result["rows"]}
    assert tables.attention(result) in out


@pytest.mark.slow
def test_a_start_has_parts_that_add_up(tmp_path):
    small = "--set=model.n_layers=1,model.d_model=32,data.tokenizer=bytes,data.vocab_size=4096"
    few = ["--configs=quickstart", "--rounds=1", small]
    status, out, err = benchmark("start", tmp_path, *few)
    assert status == 0, err
    result = json.loads((tmp_path / "start.json").read_text())
    check_facts(result["machine"])
    for kind in ("cold", "warm"):
        row = result["rows"][f"quickstart, {kind}"]
        parts = dict(row["by_round"][0])
        assert parts.pop("all") == pytest.approx(sum(parts.values()))
        assert row["device"]["count"] >= 1
    assert tables.start(result) in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is not told")
def test_more_steps_hold_no_more_memory():
    """The temporaries of a step are given back, or used again by the next."""
    program = [sys.executable, "-m", "benchmarks.worker_jax", "--shape=1", "--devices=2"]
    worker = interleave.Worker("ours", program)
    worker.wait()

    def peak_after(turns: int) -> int:
        """kB, after some turns of three steps more."""
        for _ in range(turns):
            worker.chunk(2)
        status = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    early, late = peak_after(3), peak_after(12)
    worker.close()
    assert late < 1.1 * early


@pytest.mark.parametrize("label", overheads.CHANGES)
def test_every_change_is_a_config_of_every_shape(label):
    changes, _ = overheads.CHANGES[label]
    for number, shape in SHAPES.items():
        plain, changed = (
            overheads.config_with(shape, "float32", more).to_dict() for more in ({}, changes)
        )
        assert changes.keys() <= set(differences(plain, changed)), number


@pytest.mark.slow
def test_every_change_can_be_measured(tmp_path):
    status, _, err = benchmark("overheads", tmp_path, *TINY, "--batch=2")
    assert status == 0, err
    rows = json.loads((tmp_path / "overheads_quickstart.json").read_text())["rows"]
    assert rows.keys() == overheads.CHANGES.keys()
    assert not [row for row in rows.values() if row.get("error", "").startswith("failed")]


@pytest.mark.slow
def test_a_config_by_name_is_timed(tmp_path):
    small = {"model.d_model": 32, "model.n_heads": 2, "model.n_layers": 2, "model.d_ff": 64,
             "data.seq_len": 16, "data.vocab_size": 300, "train.batch_size": 2,
             "train.accum": 1}  # fmt: skip
    keys = [f"--config.{name}={value}" for name, value in small.items()]
    config = ["--config=configs/llama_100m.py", *keys]
    few = ["--rounds=1", "--chunk_ms=1", "--product=64", "--apart", "--batches=2,4"]
    status, _, err = benchmark("train_step", tmp_path, *config, *few)
    assert status == 0, err
    shapes = json.loads((tmp_path / "train_step_llama_100m.json").read_text())["shapes"]
    assert list(shapes) == ["llama_100m B=2", "llama_100m B=4"]
    assert all("bfloat16" in label for shape in shapes.values() for label in shape["rows"])


def test_a_failing_benchmark_is_named_and_the_others_go_on(tmp_path, capfd):
    good = [sys.executable, "-c", f"open({str(tmp_path / 'good.json')!r}, 'w').write('1')"]
    programs = {
        "bad": ([sys.executable, "-c", "raise SystemExit(3)"], 60.0),
        "long": ([sys.executable, "-c", "import time; time.sleep(60)"], 0.2),
        "good": (good, 60.0),
    }
    with pytest.raises(RunFailed, match=r"2 of 3 .*: bad \(exit status 3\), long \(stopped"):
        __main__.run_all(programs, tmp_path)
    out = capfd.readouterr().out
    assert "| done | good.json |" in out and "Not included" in out


def test_the_one_command_exits_with_1_where_a_benchmark_fails(tmp_path):
    # No directory can be made where a file is.
    (tmp_path / "file").write_text("")
    status, _, err = benchmark("__main__", tmp_path / "file", "--only=attention")
    assert status == 1 and "1 of 1 benchmarks failed: attention" in err
    status, _, err = benchmark("__main__", tmp_path, "--only=nothing")
    assert status == 2 and "--only=nothing" in err


def test_every_planned_benchmark_is_a_module_with_those_flags():
    for run in __main__.PLAN.values():
        text = (ROOT / "benchmarks" / f"{run.module}.py").read_text()
        for flag in (*run.short, *run.always):
            name = flag.removeprefix("--").partition("=")[0]
            assert f'("{name}"' in text or name == "limit" or f'"{name}", ' in text, flag


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = readme.README.read_text()
    again, changed = readme.rewrite(text, ROOT / "benchmarks/results")
    assert not changed and again == text
    assert {m["name"] for m in readme.MARKED.finditer(text)} == readme.TABLES.keys()


def test_a_table_that_was_not_measured_says_so(tmp_path):
    text = "a\n<!-- table: start -->\nold\n<!-- end -->\nb"
    again, changed = readme.rewrite(text, tmp_path)
    assert changed == ["start"] and "old" not in again and "Not measured yet." in again
