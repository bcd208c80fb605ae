"""Packed runs against the same runs alone: every number, every file, also after a stop."""

import json
import shutil

import numpy as np
import pytest
from conftest import record

from lmscale_jax.errors import InputError
from lmscale_jax.ladders import pack
from lmscale_jax.train import loop
from lmscale_jax.train.checkpoint import Checkpoints
from lmscale_jax.train.metrics import read_metrics

NUMBERS = (
    {"seed": 0, "optim__lr": 1e-3},
    {"seed": 1, "optim__lr": 4e-3, "data__seed": 7, "optim__weight_decay": 1e-3},
    {"seed": 2, "optim__lr": 2e-3, "optim__weight_decay": 0.0},
)
COMMON = {
    "train__steps": 24, "mesh__cpu_devices": 1, "log__every": 4, "eval__every": 8,
    "checkpoint__every": 8, "log__tensorboard": False, "eval__sample": 0,
}  # fmt: skip


def quiet(_):
    pass


def members(small, tmp_path, **changes):
    return [
        (small(**COMMON, **numbers, **changes), tmp_path / f"member{k}")
        for k, numbers in enumerate(NUMBERS)
    ]


def lines_of(workdir) -> list[dict]:
    return read_metrics(workdir / "metrics.jsonl")


def assert_same_run(packed, alone) -> None:
    """Records and metrics of two directories, to float tolerance."""
    ours, theirs = record(packed), record(alone)
    for key in ("status", "seed", "counts", "tokens", "flops_total", "config_hash", "epochs"):
        assert ours[key] == theirs[key], key
    assert ours["final"]["val_loss"] == pytest.approx(theirs["final"]["val_loss"], rel=2e-5)
    assert ours["final"]["val_tokens"] == theirs["final"]["val_tokens"]
    assert len(lines_of(packed)) == len(lines_of(alone))
    for a, b in zip(lines_of(packed), lines_of(alone), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if a[key] is not None:
                np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=1e-6, err_msg=key)
        assert a["tokens"] == b["tokens"]
        if "train_loss" in a:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=3e-5)


def test_packed_runs_are_the_runs_alone(small, tmp_path):
    """Seeds, rates, decay and data order differ; so do the losses, and each is its own run's."""
    together = members(small, tmp_path)
    pack.run_pack(together, quiet)
    for k, (config, workdir) in list(enumerate(together))[1:]:
        loop.train(config, tmp_path / f"alone{k}", quiet)
        assert_same_run(workdir, tmp_path / f"alone{k}")
        assert Checkpoints(workdir).steps() == Checkpoints(tmp_path / f"alone{k}").steps()
    losses = [record(workdir)["final"]["val_loss"] for _, workdir in together]
    assert len(set(np.round(losses, 3))) == len(losses)


def test_a_pack_that_was_stopped_goes_on(small, tmp_path):
    """One member was saved further than the rest, as after a kill between two saves."""
    whole = members(small, tmp_path / "whole")
    pack.run_pack(whole, quiet)
    cut = members(small, tmp_path / "cut")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for k, (_, workdir) in enumerate(cut):
        shutil.rmtree(workdir / "checkpoints" / "24")
        if k:
            shutil.rmtree(workdir / "checkpoints" / "16", ignore_errors=True)
        fields = record(workdir) | {"status": "running"}
        (workdir / "run.json").write_text(json.dumps(fields))
    lines = []
    pack.run_pack(cut, lines.append)
    for (_, ours), (_, theirs) in zip(cut, whole, strict=True):
        assert record(ours)["restarts"] == 1
        assert lines_of(ours) == lines_of(theirs)
        assert record(ours)["final"] == record(theirs)["final"]


@pytest.mark.slow
def test_a_member_that_diverges_leaves_the_others_alone(small, tmp_path):
    changes = {"optim__max_bad_steps": 2, "optim__clip": 0.0}
    configs = members(small, tmp_path, **changes)
    configs[1][0].optim.lr = 1e30
    pack.run_pack(configs, quiet)
    statuses = [record(workdir)["status"] for _, workdir in configs]
    assert statuses == ["finished", "diverged", "finished"]
    assert "no finite loss" in record(configs[1][1])["error"]
    # The last one is as it is without the one that diverged.
    pack.run_pack(members(small, tmp_path / "two", **changes)[::2], quiet)
    assert_same_run(configs[2][1], tmp_path / "two" / "member2")


def test_what_differs_in_more_than_numbers_is_no_pack(small, tmp_path):
    first = small(**COMMON, model__d_model=16)
    two = small(**COMMON, model__d_model=32)
    assert pack.pack_signature(first) != pack.pack_signature(two)
    assert pack.pack_signature(first) == pack.pack_signature(
        small(**COMMON, model__d_model=16, seed=5)
    )
    with pytest.raises(InputError, match=r"config\.model\.d_model=16 and 32 differs between"):
        pack.run_pack([(first, tmp_path / "a"), (two, tmp_path / "b")], quiet)
