"""Ladders with real processes: from nothing to a page, killed and started again, every executor."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run, start

from lmscale_jax.errors import InputError
from lmscale_jax.ladders import executors, plan, worker
from lmscale_jax.ladders.run import run_ladder
from lmscale_jax.reports import ladder_report as page

CONFIG = """
from lmscale_jax.configs import base, laddering

def get_config():
    run = base.get_config()
    run.model.norm, run.model.positions = "rmsnorm", "rope"
    run.data.source, run.data.path, run.data.tokenizer = "text", {corpus!r}, "bytes"
    run.data.cache, run.data.seq_len, run.data.val_fraction = {cache!r}, 32, 0.2
    run.train.batch_size, run.optim.lr, run.checkpoint.every = 4, 4e-3, 10
    run.eval.every, run.eval.tokens, run.eval.sample, run.eval.baselines = 0, 2000, 0, False
    run.log.tensorboard, run.log.per_layer = False, False
    run.model.n_layers, run.model.d_model, run.model.n_heads = 1, 16, 2
    c = laddering.get_config(run)
    c.question, c.baseline, c.switch = "Which?", "gelu", ("model.mlp",)
    c.arms = {{"gelu": {{}}, "relu2": {{"model": {{"mlp": "relu2"}}}}}}
    c.rungs.by, c.rungs.sizes, c.rungs.held_out = "width", (8.0, 16.0), 32.0
    c.tokens.rule, c.tokens.amounts = "budgets", (2560.0,)
    c.tokens.held_out, c.seeds, c.guards.mode = 5120.0, 1, "never"
    return c
"""


@pytest.fixture
def config(tmp_path, corpus):
    path = tmp_path / "ladder.py"
    path.write_text(CONFIG.format(corpus=str(corpus), cache=str(tmp_path / "cache")))
    return path


def load(path):
    space: dict = {}
    exec(path.read_text(), space)
    return space["get_config"]()


def losses(workdir) -> dict:
    return {
        path.parent.name: json.loads(path.read_text())["final"]["val_loss"]
        for path in workdir.glob("runs/*/run.json")
    }


def begun(workdir) -> dict:
    return {
        path.parent.name: json.loads(path.read_text())["restarts"]
        for path in workdir.glob("runs/*/run.json")
    }


def test_the_dry_run_says_what_it_costs(config, tmp_path):
    status, out, err = run("ladder", f"--config={config}", "--dry_run")
    assert status == 0, err
    assert "relu2" in out and "held_out" in out and "one H100" in out and "epochs" in out
    assert "one smaller size" in out and "seeds scatter by 0.9 %" in out and "(assumed)" in out
    assert not (tmp_path / "w").exists()
    status, _, err = run("ladder", f"--config={config}", "--config.max_hours=1e-9",
                         f"--workdir={tmp_path / 'w'}")  # fmt: skip
    assert status == 2 and "config.max_hours" in err and err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_fp8_is_no_arm_where_it_would_be_something_else(config, tmp_path, monkeypatch):
    """A CPU computes both arms alike; a device with float8 products is asked for."""
    ladder = load(config)
    ladder.switch, ladder.baseline = ("model.matmul",), "dtype"
    ladder.arms = {"dtype": {}, "fp8": {"model": {"matmul": "fp8"}}}
    with pytest.raises(InputError, match=r"arms\.fp8: model\.matmul='fp8' .* float32, not fp8: no"):
        run_ladder(ladder, tmp_path / "w", [], "verdict", page.write_ladder_report)
    assert not (tmp_path / "w").exists()
    planned = plan.make_plan(ladder, lambda line: None)
    with pytest.raises(InputError, match=r"arms\.fp8"):
        worker.train_cells(planned, planned.cells[:1], tmp_path / "w")
    # In all arms it is no difference, and each run records what it was computed in.
    ladder = load(config)
    ladder.run.model.matmul = "fp8"
    plan.check_products(plan.make_plan(ladder, lambda line: None), "cpu")


@pytest.mark.slow
def test_killed_and_started_again(config, tmp_path):
    """SIGKILL, then SIGTERM, then to the end: the same verdict, and no finished cell again."""
    arguments = [f"--config={config}"]
    status, _, err = run("ladder", *arguments, f"--workdir={tmp_path / 'whole'}")
    assert status == 0, err
    workdir = tmp_path / "cut"
    for number, wait in ((signal.SIGKILL, 1), (signal.SIGTERM, 3)):
        process = start("ladder", *arguments, f"--workdir={workdir}")
        until = time.monotonic() + 120
        while len(begun(workdir)) < wait and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1.5)
        process.send_signal(number)
        process.communicate(timeout=150)
        assert process.returncode in (-9, 143)
    finished = {
        path.parent.name: path.stat().st_mtime_ns
        for path in workdir.glob("runs/*/run.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    status, out, err = run("ladder", *arguments, f"--workdir={workdir}")
    assert status == 0, err
    assert losses(workdir) == losses(tmp_path / "whole") and len(losses(workdir)) == 6
    for name, when in finished.items():
        assert (workdir / "runs" / name / "run.json").stat().st_mtime_ns == when
    cut, whole = (
        json.loads((w / "verdict.json").read_text()) for w in (workdir, tmp_path / "whole")
    )
    for judgement in (cut, whole):
        # What was measured with a clock.
        judgement["answer"] = judgement["answer"].partition("a token takes")[0]
        for comparison in judgement["comparisons"]:
            assert comparison.pop("seconds")
    for key in ("verdict", "answer", "comparisons", "forecast"):
        assert cut[key] == whole[key]
    assert (workdir / "report" / "index.html").stat().st_size > 50_000 and "verdict:" in out


@pytest.mark.slow
def test_packs_and_single_runs_end_alike(config, tmp_path):
    results = {}
    for mode in ("always", "never"):
        changes = ["--config.seeds=3", f"--config.pack.mode={mode}", "--anchors_only"]
        status, _, err = run(
            "ladder", f"--config={config}", f"--workdir={tmp_path / mode}", *changes
        )
        assert status == 0, err
        results[mode] = losses(tmp_path / mode)
    assert results["always"].keys() == results["never"].keys() and len(results["never"]) == 12
    for name, loss in results["always"].items():
        assert loss == pytest.approx(results["never"][name], rel=2e-5)
    packed = json.loads(next(tmp_path.glob("always/runs/*/run.json")).read_text())["packed"]
    assert packed == 3
    forecast = json.loads((tmp_path / "always" / "forecast.json").read_text())
    assert forecast["arms"].keys() == {"gelu", "relu2"} and forecast["scores"] is None


@pytest.mark.slow
def test_branches_off_a_shared_trunk(config, tmp_path):
    workdir = tmp_path / "w"
    changes = [
        "--config.tokens.trunk=shared", "--config.tokens.amounts=(2560.0, 5120.0)",
        "--config.run.schedule.name=wsd", "--anchors_only", "--only=16",
        "--config.tokens.held_out=20480.0",
    ]  # fmt: skip
    status, out, err = run("ladder", f"--config={config}", f"--workdir={workdir}", *changes)
    assert status == 0, err
    trained = losses(workdir)
    branches = [cell for cell in plan.read_plan(workdir).with_role("anchor") if cell.id in trained]
    assert len(branches) == 4 and len(trained) == 6 and "trained 6 cell(s)" in out
    for cell in branches:
        record = json.loads((workdir / "runs" / cell.id / "run.json").read_text())
        assert record["parent"]["config_hash"] == cell.needs
        assert record["tokens"] == cell.tokens == record["tokens_own"] + record["tokens_shared"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm", "ray", "here"])
def test_the_same_ladder_finishes_with_other_executors(config, tmp_path, name):
    """submitit's own local jobs stand in for Slurm's; Ray starts a cluster of this machine."""
    pytest.importorskip({"slurm": "submitit", "ray": "ray", "here": "jax"}[name])
    ladder, workdir = load(config), tmp_path / "w"
    ladder.executor.name, ladder.executor.minutes = name, 5 if name == "slurm" else 240
    os.environ["PYTHONPATH"] = str(ROOT)
    kinds = {
        "slurm": functools.partial(executors.SlurmExecutor, cluster="local"),
        "ray": executors.RayExecutor,
        "here": executors.HereExecutor,
    }
    report = functools.partial(page.write_ladder_report, command="")
    last = run_ladder(ladder, workdir, [], "verdict", report, make_executor=kinds[name])
    assert "report:" in last and len(losses(workdir)) == 6


def test_an_executor_that_is_not_there(config, tmp_path):
    ladder = load(config)
    ladder.executor.name = "slurm"
    if executors.importlib.util.find_spec("submitit"):
        pytest.skip("submitit is installed")
    with pytest.raises(InputError, match=r"pip install 'lmscale_jax\[slurm\]'"):
        run_ladder(ladder, tmp_path / "w", [], "verdict", page.write_ladder_report)
    assert not (tmp_path / "w").exists()


def test_a_full_disk_is_one_line(config, tmp_path):
    """RLIMIT_FSIZE stands in for a disk without space: the plan does not fit."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.argv[0] = 'ladder';"
        "from lmscale_jax.ladder import cli, main; cli.run_command(main)"
    )
    prepared = load(config)
    plan.make_plan(prepared, print)
    workdir = tmp_path / "w"
    done = subprocess.run(
        [sys.executable, "-c", code, f"--config={config}", f"--workdir={workdir}"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and not (workdir / "plan.json").exists()
