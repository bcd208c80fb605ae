"""An optimizer that evaluates another point than it trains is evaluated there by every door.

The optimizer of these tests is AdamW whose evaluated point is the running mean of the weights: so
whatever reads a trained model must get what `val_loss_ema` is of.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from lmscale_jax.ladders import pack
from lmscale_jax.optim.layerwise import averaged_params
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.sweeps import population
from lmscale_jax.train import checkpoint, evaluation, loop, restore
from lmscale_jax.train import run as runs

PACKAGE = Path(__file__).parents[1] / "lmscale_jax"
# Who may take the parameters out of a state: what trains them, and what asks for those to evaluate.
MAY = {"train/step.py", "train/run.py", "optim/layerwise.py", "sweeps/population.py"}
# These measure the training step itself, at the point where it takes gradients.
MAY |= {"train/diagnostics.py", "sweeps/coord_check.py"}


def quiet(line: str) -> None:
    pass


@pytest.fixture
def config(small, monkeypatch):
    """A small config of an optimizer that evaluates the running mean."""
    entry = OPTIMIZERS["adamw"]._replace(evaluated=lambda params, state: averaged_params(state))
    monkeypatch.setitem(OPTIMIZERS, "adamw", entry)
    return small(
        train__steps=6, eval__every=3, optim__ema_decay=0.9, optim__lr=0.01,
        eval__redundancy_every="3", eval__redundancy_tokens=2000,
    )  # fmt: skip


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def state_of(workdir, config):
    """The state of a run's last checkpoint."""
    setup = runs.build_run(config, workdir, quiet)
    abstract = setup.abstract_state()
    checkpoints = checkpoint.Checkpoints(workdir)
    state, _ = checkpoints.restore_step(checkpoints.find_step(), abstract)
    checkpoints.close()
    return state


def test_every_reader_gets_the_evaluated_point(config, tmp_path):
    finished = loop.train(config, tmp_path / "run", quiet)
    state = state_of(tmp_path / "run", config)
    mean = averaged_params(state.opt_state)
    assert not same(mean, state.params)
    # What the final summary samples, and what evaluate, generate and convert load.
    assert same(finished.params, mean)
    loaded = restore.load_run(tmp_path / "run")
    assert loaded.step == 6 and same(loaded.params, mean)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "val_loss" in line] + [finished.record["final"]]
    assert len(scored) == 3
    for line in scored:
        assert line["val_loss"] == line["val_loss_ema"]
    path = evaluation.evaluate_run(tmp_path / "run", ["perplexity", "redundancy"], 0, 2000, quiet)
    scores = json.loads(path.read_text())
    assert scores["val_loss"] == finished.record["final"]["val_loss"]
    for name in ("layer_drop", "block_influence"):
        np.testing.assert_allclose(lines[-1][name], scores[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_populations_and_packs_are_scored_at_the_evaluated_point(config, tmp_path):
    finished = loop.train(config, tmp_path / "alone", quiet)
    final = finished.record["final"]
    setup = finished.run
    trained = population.train_population([setup.config], setup.data)
    np.testing.assert_allclose(trained.val_loss_K, [final["val_loss"]], rtol=1e-5)
    raw = setup.validate(state_of(tmp_path / "alone", config).params)["val_loss"]
    assert abs(raw - final["val_loss"]) > 1e-3
    pack.run_pack([(config, tmp_path / "packed")], quiet)
    packed, alone = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("packed", "alone")
    )
    for name in ("val_loss", "layer_drop", "block_influence"):
        np.testing.assert_allclose(packed[name], alone[name], rtol=1e-3, atol=1e-5)


def test_nobody_else_takes_parameters_out_of_a_state():
    reading = re.compile(r"\bstate\w*(\([^()]*\))?\.params\b")
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if reading.search(path.read_text())
    }
    assert readers == MAY, "use Run.trained_params(state)"
