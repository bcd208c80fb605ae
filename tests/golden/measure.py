"""Everything that is compared: measured here, for make.py to write and the tests to check."""

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import machine
from lmscale_jax import scaling
from lmscale_jax.configs import base
from lmscale_jax.configs.ladders import gate, isoflop, muon_vs_adamw, mup_transfer, mur, quickstart
from lmscale_jax.ladders import plan
from lmscale_jax.model import mesh
from lmscale_jax.train import loop
from tests.golden import cases

HERE = Path(__file__).parent
# Models this small compile in half the time without most of XLA's optimizations.
COMPILER = {"jax_disable_most_optimizations": True}
LADDERS = {
    "quickstart": quickstart.get_config,
    "mur": mur.get_config,
    "muon_vs_adamw": muon_vs_adamw.get_config,
    "mup_transfer": mup_transfer.get_config,
    "gate": gate.get_config,
    "gate:flops": lambda: gate.get_config("flops"),
    "isoflop": isoflop.get_config,
}


def taken_on() -> dict:
    """Returns what decides the last bits of a number: processor, versions, compiler settings."""
    facts = machine.facts(torch=None, asked={})
    versions = facts["versions"] | {"scipy": importlib.metadata.version("scipy")}
    versions = {name: text for name, text in versions.items() if text}
    kept = {name: facts[name] for name in ("cpu", "cores", "system", "xla_flags")}
    return kept | {"versions": versions, "compiler": COMPILER}


@contextlib.contextmanager
def place() -> Iterator[None]:
    """Enters a new directory with the text that the runs read, with COMPILER's settings.

    Compiled programs are kept where those of other runs are.
    """
    names = (*COMPILER, "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    mesh.start_jax(base.get_config())
    # Most of these programs are small, and each run's first state is asked for twice.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for name, value in COMPILER.items():
        jax.config.update(name, value)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("text.txt").write_text(cases.text(), encoding="utf-8")
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def run(name: str) -> dict:
    """Trains one of the twelve runs under the working directory; returns what it left behind."""
    workdir = Path("runs", name)
    finished = loop.train(cases.config(name, Path("cache")), workdir, lambda line: None)
    record = json.loads((workdir / "run.json").read_text())
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    trained = finished.run
    state = trained.begin()
    same = ("config_hash", "counts", "flops_per_token", "flops_per_token_by_convention")
    return {
        **{field: record[field] for field in same},
        "data": record["data"],
        "first_batch": [digest(part) for part in trained.batches.at(0)],
        "parametrization": json.loads((workdir / "parametrization.json").read_text()),
        "state": leaves(state, lambda x: f"{x.dtype} {list(x.shape)}"),
        "initial": leaves(state.params, initial),
        "fields": [sorted(line) for line in lines],
        "train_loss": [line["train_loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "val_loss": lines[-1]["val_loss"],
        "metrics": hashlib.sha256(text.encode()).hexdigest(),
    }


def runs() -> dict:
    """Trains all twelve in a directory of their own."""
    with place():
        return {name: run(name) for name in cases.CHANGES}


def leaves(tree, describe) -> dict:
    """Returns {path: what `describe` says} of every array, by its path in a checkpoint."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): describe(x) for path, x in pairs
    }


def initial(array) -> dict:
    """Returns the SHA-256 of an array's bytes, its root mean square and its last entry."""
    values = np.asarray(array)
    square = np.mean(np.square(values, dtype=np.float64))
    last = float(values.ravel()[-1])
    return {"sha256": digest(values), "rms": float(np.sqrt(square)), "last": last}


def digest(array) -> str:
    """Returns the first 16 hex digits of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def ladder(name: str) -> dict:
    """Returns the ids of a ladder's plan and cells, in the order in which they are trained."""
    ladder_plan = plan.make_plan(LADDERS[name](), lambda line: None)
    cells = [
        [c.id, c.label, c.role, c.needs, c.tokens, c.flops_per_token] for c in ladder_plan.cells
    ]
    return {"id": ladder_plan.id, "vocab_size": ladder_plan.vocab_size, "cells": cells}


def _arms() -> dict:
    """Returns the columns of arms.csv: two arms, six sizes, two seeds."""
    with open(HERE / "arms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("variant", "run_id")
    return {k: [r[k] if k in words else float(r[k]) for r in rows] for k in rows[0]}


def _law(table, **settings) -> dict:
    shown = scaling.fit_law(table, **settings).to_json()
    fields = ("law", "n_points", "params", "compound", "objective", "delta", "intervals", "floor")
    return {field: shown[field] for field in fields}


def _isoflop() -> dict:
    summary, curves = scaling.fit_isoflop(scaling.read_table("kyo_takano"), bootstrap=50, seed=3)
    methods = summary["methods"]
    kept = {name: {k: methods[name][k] for k in ("a", "k", "intervals")} for name in methods}
    return {"methods": kept, "objective": curves["surface"].objective}


def _compared() -> dict:
    verdict = scaling.compare_arms(_arms(), "A", "B", bootstrap=99, seed=4)
    return {field: verdict[field] for field in ("verdict", "shift", "gain", "floors")}


def _arm(name: str):
    return scaling.as_table(_arms()).arm(name)


def _forecast() -> dict:
    table = scaling.read_table("kyo_takano")
    prediction = scaling.forecast_loss(table, n=1e9, d=2e10, bootstrap=100, seed=5, cluster="size")
    return {name: value for name, value in prediction.items() if name != "warnings"}


FITS = {
    "chinchilla": lambda: _law(scaling.read_table("kyo_takano"), bootstrap=100, seed=1),
    "chinchilla, delta 1e-3, floor pinned": lambda: _law(
        scaling.read_table("kyo_takano"), delta=1e-3, floor=1.8, bootstrap=0
    ),
    "chinchilla, least squares": lambda: _law(
        scaling.read_table("kyo_takano"), delta=float("inf"), bootstrap=0
    ),
    "power": lambda: _law(_arm("A"), law="power", bootstrap=100, seed=2),
    "power_floor": lambda: _law(_arm("B"), law="power_floor", bootstrap=0, delta=0.01),
    "isoflop": _isoflop,
    "compare": _compared,
    "forecast": _forecast,
}
