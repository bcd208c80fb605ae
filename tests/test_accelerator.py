"""The one command for a machine with a GPU, as far as a machine without one can show it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import accelerator, accelerator_models, accelerator_tables, step_facts

ROOT = Path(__file__).parents[1]
# What the command must do without: all but what benchmarks/README.md lists.
ABSENT = """
import sys

class Absent:
    names = {"grain", "tensorboardX", "tqdm", "datasets", "transformers", "tensorflow_datasets",
             "submitit", "ray", "wandb", "tokamax", "jupytext"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


def accelerate(folder: Path, parts: str) -> tuple[dict, str]:
    """(results, printed page) of a tiny run without PyTorch and without optional packages."""
    (folder / "sitecustomize.py").write_text(ABSENT)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", "--tiny", f"--parts={parts}",
         f"--results={folder}", "--torch_python=no-such-python"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (folder / "accelerator.md").read_text()
    assert page.strip() in done.stdout
    return json.loads((folder / "accelerator.json").read_text()), page


def test_a_step_is_timed_and_its_kernels_are_profiled(tmp_path):
    results, page = accelerate(tmp_path, "llama_100m,profile")
    (entry,) = results["parts"]["llama_100m"]["result"]["batches"]
    row = entry["sides"]["ours"]
    assert row["tokens_s"] == pytest.approx(1e3 * 2 * 64 / row["ms"]["median"])
    assert entry["report"]["memory"]["compiled"] > 0 and entry["report"]["compile_s"] > 0
    kernels = results["parts"]["profile"]["result"]["kernels"]
    # A product is there, and what is there takes time.
    assert sum(row["times"] for row in kernels) > 20 and all(row["ms"] >= 0 for row in kernels)
    assert "| 2 x 64 | ours |" in page and "kernels of a step take" in page
    if results["device"] == "cpu":
        assert row["mfu"] is None and entry["report"]["estimate"] is None


@pytest.mark.slow
def test_losses_of_two_platforms_and_the_step_of_the_speedrun(tmp_path):
    results, page = accelerate(tmp_path, "losses,record26")
    for dtype, row in results["parts"]["losses"]["result"]["rows"].items():
        assert row["equal"] and len(row["losses"][0]) == row["steps"], dtype
    assert results["parts"]["record26"]["result"]["batches"][0]["sides"]["ours"]["tokens_s"] > 0
    assert "FlexAttention" in page


def parts_of(monkeypatch, names: list[str], seconds_left: float, **parts) -> dict:
    """The results after parts with those functions; what was saved after each is in "saved"."""
    table = {name: accelerator.Part(run, "ratios", 5, 10) for name, run in parts.items()}
    monkeypatch.setattr(accelerator, "PARTS", table)
    monkeypatch.setattr(accelerator, "TINY", SimpleNamespace(value=False))
    results = {"seconds": 0.0, "parts": {}, "saved": []}
    end = time.perf_counter() + seconds_left
    accelerator.run_parts(
        names, results, end, lambda: results["saved"].append(dict(results["parts"]))
    )
    return results


def test_a_part_that_fails_is_recorded_and_the_next_goes_on(monkeypatch):
    def fail(limit_s, results):
        raise ValueError("no memory")

    limits = []
    good = lambda limit_s, results: limits.append(limit_s) or {"model": "m", "rows": {}}  # noqa: E731
    results = parts_of(monkeypatch, ["bad", "good"], 8.0, bad=fail, good=good)
    assert results["parts"]["bad"]["error"] == "ValueError: no memory"
    assert results["parts"]["good"]["result"] == {"model": "m", "rows": {}}
    assert [list(saved) for saved in results["saved"]] == [["bad"], ["bad", "good"]]
    # No longer than the time that is left.
    assert 7 < limits[0] < 8


def test_a_part_without_time_is_skipped(monkeypatch):
    results = parts_of(monkeypatch, ["late"], 3.0, late=lambda limit_s, results: {})
    assert "3 s are left" in results["parts"]["late"]["skipped"]
    assert "result" not in results["parts"]["late"]


def test_processes_end_with_the_time():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    begin = time.perf_counter()
    with (
        pytest.raises(accelerator.RunFailed, match="'slow' died"),
        accelerator.workers(0.5) as start,
    ):
        start("slow", sleeper).wait()
    assert time.perf_counter() - begin < 30


def trace(**planes) -> list:
    """Planes of {line: [(name, milliseconds, instruction or None)]}."""

    def event(name, ms, instruction):
        stats = {"hlo_op": instruction} if instruction else {}
        return SimpleNamespace(name=name, duration_ns=1e6 * ms, stats=stats.items())

    def line(name, events):
        return SimpleNamespace(name=name, events=[event(*e) for e in events])

    return [
        SimpleNamespace(name=name.replace("_", "/").replace("DEV", ":GPU:0"),
                        lines=[line(*item) for item in lines.items()])
        for name, lines in planes.items()
    ]  # fmt: skip


def test_kernels_of_a_trace_are_those_of_the_streams():
    stream = [("gemm_x", 3.0, "dot.1"), ("fusion_2", 1.0, None), ("gemm_x", 1.0, "dot.1")]
    planes = trace(
        _deviceDEV={"Stream #1(Compute)": stream, "XLA Ops": [("dot.1", 4.0, "dot.1")]},
        _host={"python": [("call", 9.0, "dot.1")]},
    )
    kernels = step_facts.traced_kernels(planes, steps=2)
    assert kernels == {"dot.1": [1.0, 2.0], "fusion_2": [0.5, 0.5]}
    program = {"kernels": {"dot.1": ["dense", 1.5], "fusion.2": ["loss", 0.25]}}
    rows = step_facts.matched(kernels, program)
    assert [(row["category"], row["estimate"]) for row in rows] == [("dense", 1.5), ("loss", 0.25)]
    text = accelerator_tables.categories(rows)
    assert "| dense | 2.000 | 1.500 | 1.33 |" in text and "| loss | 0.500 | 0.250 | 2.00 |" in text


def test_a_host_alone_counts_operations_and_no_loops():
    events = [("while.3", 5.0, "while.3"), ("add", 1.0, "add.7"), ("python", 9.0, None)]
    assert step_facts.traced_kernels(trace(_host={"t": events}), steps=1) == {"add.7": [1.0, 1.0]}


def test_every_named_model_has_a_config_and_a_peer(monkeypatch):
    monkeypatch.setattr(accelerator_models, "TINY", SimpleNamespace(value=False))
    for name, model in accelerator_models.MODELS.items():
        shape = accelerator_models.peer_shape(model, model.rows)
        assert shape["B"] == model.rows and shape["L"] >= 10, name
    # Half of the windows of record 26 in blocks of 128 tokens, but at its ends.
    windows = accelerator_models.peer_shape(accelerator_models.MODELS["record26"], 8)["windows"]
    assert set(windows) == {14, 7} and windows[0] == windows[-1] == 14
