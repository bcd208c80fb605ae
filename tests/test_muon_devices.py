"""Muon on eight simulated devices: the same numbers, and no talking inside the iteration."""

import json
import re

import numpy as np
import pytest
import simulated
from conftest import finish, flags, record, start_training

SIZES = {
    "optim.name": "muon", "model.n_heads": 4, "model.n_layers": 3, "model.mlp": "swiglu",
    "model.d_ff": 64, "log.tensorboard": False, "eval.sample": 0, "eval.baselines": False,
    "log.per_layer": False,
}  # fmt: skip
GRIDS = {
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.data": 1, "mesh.fsdp": 8},
    "all three": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}


def trained(settings, workdir, **changes):
    overrides = settings | SIZES | changes
    process = start_training("--config=configs/base.py", f"--workdir={workdir}", *flags(overrides))
    status, _, err = finish(process)
    assert status == 0, err
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        # The iteration's part of these is in test_no_collective_inside_newton_schulz.
        pytest.param("muon", "all three", marks=pytest.mark.slow),
        pytest.param("normuon", "fsdp", marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_alike(settings, tmp_path, name, grid):
    single = trained(settings, tmp_path / "single", **{"mesh.cpu_devices": 1, "optim.name": name})
    workdir = tmp_path / "eight"
    eight = {"mesh.cpu_devices": 8, "optim.name": name} | GRIDS[grid]
    many = trained(settings, workdir, **eight)
    assert record(workdir)["device"]["count"] == 8
    for a, b in zip(many, single, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # An orthogonal direction carries the rounding of its smallest singular values.
            bound = 2e-5 if "loss" in key else 2e-3
            np.testing.assert_allclose(value, b[key], rtol=bound, err_msg=key)


PRINT = "print(setup(argument).lower_step().compile().as_text())"
COLLECTIVE = re.compile(
    r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|ragged-all-to-all)(-start)?\("
)


def computations(text: str) -> dict[str, str]:
    """The body of every computation of an HLO module by its name."""
    bodies = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S):
        bodies[name] = body
    return bodies


def reached(parts: dict[str, str], name: str, seen: set) -> set:
    """Names of a computation and of all that it calls."""
    if name not in seen and name in parts:
        seen.add(name)
        called = re.findall(
            r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.-]+)", parts[name]
        )
        for other in called:
            reached(parts, other, seen)
    return seen


@pytest.mark.parametrize(
    "grid",
    ["all three", *(pytest.param(g, marks=pytest.mark.slow) for g in ("data", "fsdp"))],
)
def test_no_collective_inside_newton_schulz(grid, tmp_path):
    changes = {k: v for k, v in SIZES.items() if not k.startswith(("log", "eval"))}
    changes |= GRIDS[grid] | {
        "mesh.cpu_devices": 8, "model.d_model": 32, "data.seq_len": 16, "train.batch_size": 8,
        "data.cache": str(tmp_path), "model.stack": "scan",
    }  # fmt: skip
    text = simulated.run(PRINT, changes)
    parts = computations(text)
    whiles = [
        line
        for body in parts.values()
        for line in body.splitlines()
        if " while(" in line and "newton_schulz" in line
    ]
    # One batch for each shape: [32, 32] of attention, [32, 64] of the MLP.
    assert len(whiles) == 2
    for line in whiles:
        inside = reached(parts, re.search(r"body=%?([\w.-]+)", line)[1], set())
        body = "\n".join(parts[name] for name in inside)
        assert "dot(" in body or "custom-call(" in body
        assert not COLLECTIVE.findall(body)
    # Outside there are some, so the search for them works.
    assert COLLECTIVE.findall(text)
    # 12 matrices of attention and 9 of the MLP on 8 devices: at most two each.
    assert set(re.findall(r"f32\[(\d+),32,(?:32|64)\]", " ".join(whiles))) == {"2"}
