"""Branches off one stable run, the running mean of weights, and going on after a stop."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lmscale_jax.errors import InputError
from lmscale_jax.model import mesh
from lmscale_jax.optim.layerwise import averaged_params
from lmscale_jax.train import checkpoint, loop, metrics
from lmscale_jax.train.run import build_run
from lmscale_jax.train.setup import TrainStep

QUIET = {
    "log__tensorboard": False, "eval__sample": 0, "eval__baselines": False, "model__d_model": 16,
    "train__batch_size": 4, "data__seq_len": 16, "eval__tokens": 320, "eval__every": 0,
    "checkpoint__keep": 20, "mesh__data": 1,
    # One program a run: the step that measures norms is another one.
    "log__per_layer": False,
}  # fmt: skip
BUDGETS = (20, 30, 40)
STABLE = {"schedule__name": "constant", "schedule__warmup": "2", "checkpoint__every": 8}
MUON = {"optim__name": "muon", "optim__momentum_warmup": "3"}
silent = {"say": lambda line: None}


@pytest.fixture
def make(small, monkeypatch):
    """Configs of this file; every run takes one device, whatever this process has."""
    devices = jax.devices()[:1]
    whole = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda config, _=None: whole(config, devices))
    return lambda **changes: small(**(QUIET | changes))


def cooldown(parent, budget: int) -> dict:
    return {
        "schedule__name": "wsd", "schedule__warmup": "2", "schedule__cooldown": "20%",
        "train__steps": budget, "train__parent": str(parent), "train__parent_step": budget * 4 // 5,
    }  # fmt: skip


def record(workdir) -> dict:
    return json.loads((workdir / "run.json").read_text())


def same(a: dict, b: dict) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))


def from_checkpoint(config, parent, at: int) -> dict:
    """The parameters after the steps of a config from a checkpoint on, without any branch."""
    run = build_run(config, parent, **silent)
    state, _ = checkpoint.Checkpoints(parent).restore_step(at, run.abstract_state())
    take = TrainStep(run)
    for t in range(at, config.train.steps):
        state, _ = take(state, mesh.put_batch(run.batches.at(t), run.mesh))
    return state.params


def train_branches(folder: Path, stable: dict, configs: dict[int, tuple[dict, dict]]) -> dict:
    """Trains a stable run and, for each budget, its branch and the run of that budget alone.

    Configs are plain. Returns {budget: parameters of the branch, of its steps without a branch, and
    of the run alone}.
    """
    loop.train(ConfigDict(stable), folder / "stable", **silent)
    params = {}
    for budget, (branch, alone) in configs.items():
        branched = loop.train(ConfigDict(branch), folder / str(budget), **silent).params
        at = budget * 4 // 5
        continued = from_checkpoint(ConfigDict(branch), folder / "stable", at)
        unbranched = loop.train(ConfigDict(alone), folder / f"{budget} alone", **silent).params
        params[budget] = jax.tree.map(np.asarray, (branched, continued, unbranched))
    return params


@pytest.mark.slow
def test_three_budgets_from_one_stable_run(make, tmp_path, plain_process):
    """The run alone is another program; a quick compiler may round its products otherwise."""
    stable = tmp_path / "stable"
    configs = {}
    for budget in BUDGETS:
        changes = cooldown(stable, budget)
        alone = {k: v for k, v in changes.items() if "parent" not in k}
        configs[budget] = make(**changes).to_dict(), make(**alone).to_dict()
    stable_config = make(**STABLE, train__steps=32).to_dict()
    trained = plain_process.submit(train_branches, tmp_path, stable_config, configs).result()
    spent = record(stable)["tokens_own"]
    for budget in BUDGETS:
        workdir = tmp_path / str(budget)
        # To the bit what the same cooldown from that checkpoint gives, and a run of its own.
        branched, continued, unbranched = trained[budget]
        same(branched, continued)
        same(branched, unbranched)
        run, whole = record(workdir), record(tmp_path / f"{budget} alone")
        assert run["final"] == whole["final"]
        assert (run["tokens"], run["flops_total"]) == (whole["tokens"], whole["flops_total"])
        assert run["tokens_own"] == budget // 5 * 64
        assert run["tokens_own"] + run["tokens_shared"] == run["tokens"]
        assert run["flops_own"] + run["flops_shared"] == pytest.approx(run["flops_total"])
        assert run["flops_own"] == run["flops_per_token"] * run["tokens_own"]
        assert (run["parent"]["name"], run["parent"]["step"]) == ("stable", budget * 4 // 5)
        assert run["parent"]["config_hash"] == record(stable)["config_hash"]
        assert (whole["parent"], whole["tokens_shared"]) == (None, 0)
        spent += run["tokens_own"]
    assert spent < 0.6 * sum(budget * 64 for budget in BUDGETS)
    lines = [json.loads(x) for x in (tmp_path / "20" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [18, 20]


def stopped(config, workdir, at: int, monkeypatch) -> None:
    """Trains until a SIGTERM comes after step `at`."""
    log = metrics.MetricLogger.log

    def stop(self, done, *rest):
        log(self, done, *rest)
        if done == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.MetricLogger, "log", stop)
        with pytest.raises(SystemExit):
            loop.train(config, workdir, **silent)
    assert record(workdir)["status"] == "running"


KINDS = {
    "sgd": {"optim__name": "sgd"},
    "lion with a mean": {"optim__name": "lion", "optim__ema_decay": 0.9},
    "normuon by heads": MUON | {"optim__name": "normuon", "optim__muon_unit": "head"},
    "adamw frozen": {"freeze__mode": "fixed", "freeze__blocks": "1"},
    "muon unfrozen step by step": MUON | {"freeze__mode": "unfreeze", "freeze__every": "6"},
}


# It has most of what the others have.
FAST = ("muon unfrozen step by step",)


@pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_stopped_run_ends_with_the_same_bits(make, tmp_path, monkeypatch, kind):
    config = make(**KINDS[kind], train__steps=12, eval__every=4)
    whole = loop.train(config, tmp_path / "whole", **silent)
    stopped(config, tmp_path / "stopped", 7, monkeypatch)
    resumed = loop.train(config, tmp_path / "stopped", **silent)
    same(whole.params, resumed.params)
    whole_path, stopped_path = (tmp_path / name / "metrics.jsonl" for name in ("whole", "stopped"))
    assert whole_path.read_text() == stopped_path.read_text()
    assert record(tmp_path / "whole")["final"] == record(tmp_path / "stopped")["final"]
    assert ("val_loss_ema" in record(tmp_path / "whole")["final"]) == ("mean" in kind)
    if kind == "adamw frozen":
        begin = jax.jit(resumed.run.model.init)(jax.random.key(0))["blocks"]
        for x, y in zip(
            jax.tree.leaves(begin), jax.tree.leaves(resumed.params["blocks"]), strict=True
        ):
            assert np.array_equal(x[1], y[1]) and not np.array_equal(x[0], y[0])


@pytest.mark.slow
def test_a_stopped_branch_goes_on_without_its_parent(make, tmp_path, monkeypatch):
    stable, branch = tmp_path / "stable", tmp_path / "branch"
    loop.train(make(**STABLE, **MUON, train__steps=16), stable, **silent)
    config = make(**MUON, **cooldown(stable, 20))
    whole = loop.train(config, tmp_path / "whole", **silent)
    stopped(config, branch, 17, monkeypatch)
    shutil.rmtree(stable)
    resumed = loop.train(config, branch, **silent)
    same(whole.params, resumed.params)
    assert record(branch)["parent"]["name"] == "stable"
    whole_path, branch_path = (p / "metrics.jsonl" for p in (tmp_path / "whole", branch))
    assert whole_path.read_text() == branch_path.read_text()


def test_the_mean_of_weights_is_what_it_says(make):
    run = build_run(make(optim__ema_decay=0.5), None, **silent)
    state = run.begin()
    take = TrainStep(run)
    mean = np.asarray(state.params["embed"]["tokens"], np.float64)
    for t in range(12):
        state, _ = take(state, mesh.put_batch(run.batches.at(t), run.mesh))
        decay = min(0.5, (1 + t) / (10 + t))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["embed"]["tokens"])
    np.testing.assert_allclose(averaged_params(state.opt_state)["embed"]["tokens"], mean, atol=1e-6)
    scores = run.score(state)
    assert scores["val_loss_ema"] != scores["val_loss"]
    assert scores["val_loss_ema"] == run.validate(averaged_params(state.opt_state))["val_loss"]


@pytest.fixture(scope="module")
def stable(settings, tmp_path_factory):
    """A short stable run, whose checkpoints are at 4 and 8."""
    from lmscale_jax.configs import base

    workdir = tmp_path_factory.mktemp("runs") / "stable"
    config = base.get_config()
    more = {k.replace("__", "."): v for k, v in (QUIET | STABLE | MUON).items()}
    more |= {"train.steps": 8, "checkpoint.every": 4, "mesh.data": -1, "train.batch_size": 8}
    config.update_from_flattened_dict(settings | more)
    loop.train(config, workdir, **silent)
    return workdir


BAD = {
    "no run": ({"train__parent": "nowhere"}, ["train.parent='nowhere'", "--workdir of a run"]),
    "no such step": ({"train__parent_step": 5}, ["parent_step=5", "[4, 8]", "use 8"]),
    "no step": ({"train__parent_step": 0}, ["train.parent_step=0", "names no checkpoint"]),
    "budget already spent": ({"train__steps": 4}, ["train.steps=4", "parent_step=4", "use 8"]),
    "another rate": ({"optim__muon_lr": 0.5}, ["optim.muon_lr=0.5", "use 0.02"]),
    "another seed": ({"data__seed": 3}, ["data.seed=3", "use 0 "]),
    "another schedule": (
        {"schedule__cooldown": "4"},
        ["schedule.name='wsd'", "step 3", "use schedule.name='wsd'", "cooldown='2'"],
    ),
    "another warm-up": ({"schedule__warmup": "1"}, ["warmup='1'", "warmup='2'"]),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_a_branch_is_refused(small, stable, tmp_path, changes, message):
    good = QUIET | MUON | {
        "schedule__name": "wsd", "schedule__warmup": "2", "schedule__cooldown": "2",
        "train__steps": 6, "train__parent": str(stable), "train__parent_step": 4,
        "train__batch_size": 8, "mesh__data": -1,
    }  # fmt: skip
    files = sorted(stable.rglob("*"))
    with pytest.raises(InputError) as caught:
        loop.train(small(**(good | changes)), tmp_path / "branch", **silent)
    for part in message:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "branch").exists()
    assert sorted(stable.rglob("*")) == files


def test_a_share_of_another_length_is_no_share(small, settings, tmp_path):
    """10 % of the parent's steps are not 10 % of the branch's."""
    parent = tmp_path / "parent"
    changes = QUIET | STABLE | {"optim__name": "muon", "train__steps": 20, "mesh__data": -1}
    changes |= {"train__batch_size": 8}
    loop.train(small(**changes), parent, **silent)
    with pytest.raises(InputError, match=r"momentum_warmup='10%' is 1 steps here and 2 in the"):
        branch = cooldown(parent, 10)
        loop.train(small(**(changes | branch)), tmp_path / "branch", **silent)
