"""The same run on one device and on eight simulated ones, each in its own process."""

import json
import math

import numpy as np
import pytest
from conftest import finish, record
from jax.sharding import PartitionSpec as P

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build, param
from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.sharding import AXES, partition

GRIDS = {
    "data, in two micro-batches": {"mesh__data": 4, "mesh__cpu_devices": 4, "train__accum": 2},
    "replicas": {"mesh__replica": 2, "mesh__data": 1, "mesh__fsdp": -1},
    "rows and their pieces": {"mesh__data": 1, "mesh__fsdp": 2, "mesh__sequence": 2,
                              "mesh__tensor": 2, "train__accum": 2},
    "all three": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
}  # fmt: skip
SIZES = {"model__n_heads": 4, "model__bias": True, "model__head": "untied"}
SIZES |= {"log__tensorboard": False, "eval__sample": 0}
# Factors of every kind, and the monitor's vectors in the state.
SIZES |= {"parametrization__name": "mup", "parametrization__base_width": 16}
SIZES |= {"log__spectral_every": 2, "log__activations_every": 2}


@pytest.fixture(scope="module")
def single(settings, tmp_path_factory):
    from conftest import flags, start_training

    workdir = tmp_path_factory.mktemp("runs") / "single"
    named = {k.replace("__", "."): v for k, v in SIZES.items()}
    changes = settings | named | {"mesh.cpu_devices": 1}
    status, _, err = finish(
        start_training("--config=configs/base.py", f"--workdir={workdir}", *flags(changes))
    )
    assert status == 0, err
    return workdir


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_eight_devices_train_alike(train, single, tmp_path, grid):
    workdir = tmp_path / "eight"
    status, _out, err = finish(train(workdir, **({"mesh__cpu_devices": 8} | SIZES | GRIDS[grid])))
    assert status == 0, err
    sizes = record(workdir)["device"]["mesh"]
    asked = {axis: GRIDS[grid].get(f"mesh__{axis}", 1) for axis in AXES}
    assert math.prod(sizes.values()) == GRIDS[grid].get("mesh__cpu_devices", 8)
    assert sizes == {axis: sizes[axis] if n == -1 else n for axis, n in asked.items()}
    tables = [json.loads((w / "parametrization.json").read_text()) for w in (workdir, single)]
    split = [[entry.pop("sharding") for entry in table] for table in tables]
    assert tables[0] == tables[1] and len(tables[0]) > 10
    assert {name for parts in split[0] for name in parts if name} == {
        axis for axis in ("fsdp", "tensor") if sizes[axis] > 1
    }
    assert not any(any(parts) for parts in split[1])
    ours, theirs = lines(workdir), lines(single)
    assert len(ours) == len(theirs) > 5
    for ours_line, theirs_line in zip(ours, theirs, strict=True):
        assert ours_line.keys() == theirs_line.keys()
        for name, value in ours_line.items():
            # Norms and spreads of small differences carry more rounding than losses, and means of
            # scores nearly cancel.
            loss = name in ("train_loss", "val_loss")
            rtol, atol = (2e-6, 0) if loss else (2e-4, 1e-7)
            np.testing.assert_allclose(value, theirs_line[name], rtol, atol, err_msg=name)


def test_parameters_are_split_as_annotated():
    """From the sizes of a mesh alone, without devices."""
    config = base.get_config()
    config.model.head, config.model.value_embeddings = "untied", 2
    model = build.build_model(resolve(config, 50257), platform="cpu")
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    partitions = {path: partition(spec, sizes) for path, spec in param.named(model.specs).items()}
    assert partitions["blocks/attention/query/weight"] == P(None, "fsdp", "tensor", None)
    assert partitions["blocks/attention/out/weight"] == P(None, "tensor", None, "fsdp")
    assert partitions["blocks/mlp/down/weight"] == P(None, "tensor", "fsdp")
    assert partitions["blocks/mlp_norm/scale"] == P(None, None)
    # 50257 is odd: that axis stays whole.
    assert partitions["embed/tokens"] == P(None, "fsdp")
    assert partitions["embed/values"] == P(None, None, "tensor", "fsdp")
    assert partitions["readout/weight"] == P("fsdp", None)


class Described:
    """A device that is not here, as far as a mesh asks."""

    client = None

    def __init__(self, platform: str, index: int, host: int):
        self.platform, self.device_kind = platform, f"a {platform}"
        self.id, self.process_index = index, host
        self.coords, self.core_on_chip = (index % 4, index // 4, 0), 0


@pytest.mark.parametrize(
    ("platform", "hosts", "changes", "axis"),
    [
        ("gpu", 1, {}, "fsdp"),
        ("tpu", 1, {}, "fsdp"),
        ("cpu", 1, {}, "data"),
        ("gpu", 2, {}, "data"),
        ("gpu", 1, {"data": 8}, "data"),
        ("gpu", 1, {"tensor": 8, "data": 1}, "tensor"),
        ("gpu", 1, {"data": 1, "replica": -1}, "replica"),
    ],
)
def test_devices_go_to_fsdp_by_default_on_one_node_of_accelerators(platform, hosts, changes, axis):
    config = base.get_config()
    config.mesh.update(changes)
    devices = [Described(platform, i, i // (8 // hosts)) for i in range(8)]
    mesh = meshes.make_mesh(config, devices)
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {axis: 8}
    resolved = resolve(config, 64)
    choices = build.build_model(resolved, platform=platform, mesh=mesh).choices
    line = "fsdp: default on one node of accelerators; mesh.data=8 splits the batch alone"
    assert choices.get("mesh") == (line if axis == "fsdp" else None)


def test_one_accelerator_has_nothing_to_split():
    mesh = meshes.make_mesh(base.get_config(), [Described("gpu", 0, 0)])
    assert set(mesh.shape.values()) == {1}
    assert meshes.describe_mesh(base.get_config(), mesh) == {}
