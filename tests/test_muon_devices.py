"""Muon on eight simulated devices: the same numbers, and no talking inside the iteration."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, finish, flags, record, start

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
    given = settings | SIZES | changes
    process = start("main", "--config=configs/base.py", f"--workdir={workdir}", *flags(given))
    status, _, err = finish(process)
    assert status == 0, err
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        # The iteration's part of these is in test_no_collective_inside_newton_schulz.
        pytest.param("muon", "all three", marks=pytest.mark.slow),
        pytest.param("normuon", "fsdp", marks=pytest.mark.slow),
        pytest.param("muon", "data", marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_alike(settings, tmp_path, name, grid):
    one = trained(settings, tmp_path / "one", **{"mesh.cpu_devices": 1, "optim.name": name})
    workdir = tmp_path / "eight"
    eight = {"mesh.cpu_devices": 8, "optim.name": name} | GRIDS[grid]
    many = trained(settings, workdir, **eight)
    assert record(workdir)["device"]["count"] == 8
    for a, b in zip(many, one, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # An orthogonal direction carries the rounding of its smallest singular values.
            bound = 2e-5 if "loss" in key else 2e-3
            np.testing.assert_allclose(value, b[key], rtol=bound, err_msg=key)


COMPILE = """
import json
import sys
import jax
import numpy as np
from configs import base
from lmscale_jax import config as configs
from lmscale_jax.data.pipeline import Batch
from lmscale_jax.model.build import build
from lmscale_jax.optim import build as optim
from lmscale_jax.run import mesh as meshes, step

config = base.get_config()
config.update_from_flattened_dict(json.loads(sys.argv[1]))
config = configs.resolve(config, 64)
meshes.start(config)
grid = meshes.make(config)
model = build(config, platform="cpu", mesh=grid)
transform = optim.build(config, model.rows, grid, "cpu")
placed = step.shardings(config, model, transform, grid)
state = jax.jit(lambda: step.initial(config, model, transform, 0), out_shardings=placed)()
rows = np.zeros((config.train.batch_size, config.data.seq_len), np.int32)
batch = meshes.put_batch(Batch(rows, rows), grid)
print(step.make(config, model, transform, grid, placed).lower(state, batch).compile().as_text())
"""
COLLECTIVE = re.compile(
    r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|ragged-all-to-all)(-start)?\("
)


def computations(text: str) -> dict[str, str]:
    """The body of every computation of an HLO module by its name."""
    found = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S):
        found[name] = body
    return found


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
    command = [sys.executable, "-c", COMPILE, json.dumps(changes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = computations(done.stdout)
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
        text = "\n".join(parts[name] for name in inside)
        assert "dot(" in text or "custom-call(" in text
        assert not COLLECTIVE.findall(text)
    # Outside there are some, so the search for them works.
    assert COLLECTIVE.findall(done.stdout)
    # 12 matrices of attention and 9 of the MLP on 8 devices: at most two each.
    assert set(re.findall(r"f32\[(\d+),32,(?:32|64)\]", " ".join(whiles))) == {"2"}
