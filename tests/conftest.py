"""Shared by the tests: a small real corpus, a small config, and commands as real processes."""

import copy
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lmscale_jax.configs import base, laddering

ROOT = Path(__file__).parents[1]
# A program that is a file has its own directory as the first of its paths, not the working one.
PATHS = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
PACKAGES = ("email", "json", "logging", "unittest", "xml")


# Without most of XLA's optimizations models this small compile in half the time; where XLA still
# has its older way to emit fusions, in a quarter.
QUICK_COMPILER = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILER["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Lets all processes of this session share their compiled programs, however short they took,
    compile quickly, and look for nothing on the hub of Hugging Face.

    JAX_COMPILATION_CACHE_DIR, if set, keeps them from session to session as well. Workers of xdist
    and commands that tests start inherit what is set here; JAX reads it when it is imported.
    XLA_FLAGS of the user's own are left alone.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"
    for name, value in QUICK_COMPILER.items():
        os.environ.setdefault(name, value)
    # Each look would wait for half a minute where there is no network.
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def plain_compiler():
    """Takes QUICK_COMPILER out of the environment of processes that are started from now on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK_COMPILER.items():
            if os.environ.get(name) == value:
                patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def plain_process(plain_compiler):
    """Executes functions in a process that compiles as a user's does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


# Files whose tests call what a new Python, JAX, Flax, Optax, Orbax or Grain may change. The other
# files make the same calls for other ends, or compute with numpy alone.
VERSIONS = {
    "test_data_pipeline", "test_data_pretrained", "test_data_tables", "test_data_tokenizers",
    "test_evals", "test_explain", "test_golden", "test_hf", "test_kernels", "test_model",
    "test_ops", "test_optim", "test_resume", "test_sharding", "test_train",
}  # fmt: skip


# Files that mostly wait or take longest: started first, they do not keep the others waiting.
FIRST = ("test_launch_processes", "test_keys_read", "test_golden")


def pytest_collection_modifyitems(items):
    """Marks the tests of VERSIONS, and begins with the longest files."""
    absent = [name for name in VERSIONS if not (ROOT / "tests" / f"{name}.py").exists()]
    assert not absent, f"tests/conftest.py names files that are not there: {absent}"
    for item in items:
        if item.path.stem in VERSIONS:
            item.add_marker(pytest.mark.versions)
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About a hundred files of the standard library's source: real text, a second to prepare."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            name = "_".join(path.relative_to(library).parts)
            if path.stat().st_size > 2000:
                shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="session")
def settings(corpus, tmp_path_factory) -> dict:
    """Overrides that make any config a few seconds' work on the small corpus."""
    return {
        "data.source": "text",
        "data.path": str(corpus),
        "data.tokenizer": "bytes",
        "data.val_fraction": 0.2,
        "data.seq_len": 32,
        "data.cache": str(tmp_path_factory.mktemp("cache")),
        "model.n_layers": 2,
        "model.d_model": 32,
        "model.n_heads": 2,
        "train.steps": 12,
        "train.batch_size": 8,
        "eval.tokens": 2000,
        "eval.every": 6,
        "eval.sample": 8,
        "checkpoint.every": 4,
        "log.every": 2,
    }


@pytest.fixture(scope="module")
def planned_once():
    """Plans each ladder of a file once: to find the shapes takes most of the time of a test."""
    from lmscale_jax.ladders import grid

    cells_by_config, make_cells = {}, grid.make_cells

    def remembered(config, vocab_size):
        text = repr((config.to_dict(), vocab_size))
        if text not in cells_by_config:
            cells_by_config[text] = make_cells(config, vocab_size)
        return copy.deepcopy(cells_by_config[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "make_cells", remembered)
        yield


@pytest.fixture
def small(settings):
    """Makes a small config; keyword arguments have __ for dots."""

    def make(**changes):
        config = base.get_config()
        named = {k.replace("__", "."): v for k, v in changes.items()}
        with config.ignore_type():
            config.update_from_flattened_dict(settings | named)
        return config

    return make


@pytest.fixture
def ladder(corpus, monkeypatch, tmp_path):
    """Makes the config of a ladder of five anchors, three seeds and a held-out rung."""
    monkeypatch.setenv("LMSCALE_CACHE", str(tmp_path / "cache"))

    def make(**changes):
        run = base.get_config()
        run.data.source, run.data.path, run.data.tokenizer = "text", str(corpus), "bytes"
        run.data.document, run.data.split = "file", "tail"
        run.data.seq_len, run.train.batch_size = 64, 16
        run.model.norm, run.model.positions = "rmsnorm", "rope"
        c = laddering.get_config(run)
        c.question, c.baseline, c.switch = "Which?", "gelu", ("model.mlp",)
        c.arms = {"gelu": {}, "swiglu": {"model": {"mlp": "swiglu"}}}
        c.rungs.sizes, c.rungs.held_out = (1e5, 3e5, 1e6, 3e6, 1e7), 3e7
        c.rungs.head_dim, c.rungs.match, c.rungs.aspect = 16, "parameters", 32.0
        c.seeds, c.fit.effect = 3, 0.08
        c.guards.mode = "never"
        with c.ignore_type():
            for key, value in changes.items():
                *groups, name = key.split("__")
                group = c
                for part in groups:
                    group[part] = group.get(part, {})
                    group = group[part]
                group[name] = value
        return c

    return make


def flags(overrides: dict) -> list[str]:
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def start(module: str, *arguments, **environment) -> subprocess.Popen:
    """A command as its own process."""
    return start_program(["-m", f"lmscale_jax.{module}"], *arguments, **environment)


def start_program(program: list[str], *arguments, **environment) -> subprocess.Popen:
    """A program as its own process: Python's arguments that name it, and the program's."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def start_training(*arguments, **environment) -> subprocess.Popen:
    """The command `main` as its own process, without the plots at its end."""
    program = [str(ROOT / "tests" / "train_without_plots.py")]
    return start_program(program, *arguments, **({"PYTHONPATH": PATHS} | environment))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a process."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(module: str, *arguments, **environment) -> tuple[int, str, str]:
    return finish(start(module, *arguments, **environment))


@pytest.fixture
def train(settings):
    """Starts training runs of the small config as processes, which end without plots."""

    def begin(workdir, **changes) -> subprocess.Popen:
        named = {k.replace("__", "."): v for k, v in changes.items()}
        return start_training(
            "--config=configs/base.py", f"--workdir={workdir}", *flags(settings | named)
        )

    return begin


def record(workdir) -> dict:
    return json.loads((Path(workdir) / "run.json").read_text())


def train_losses(workdir) -> list[float]:
    """Every training loss of metrics.jsonl, in its order."""
    lines = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Polls; fails when the time is over or the process ended first."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        assert process is None or process.poll() is None, finish(process)
        time.sleep(0.002)
