"""The same run on one device and on eight simulated ones, each in its own process."""

import json
import math

import numpy as np
import pytest
from conftest import finish, record
from jax.sharding import PartitionSpec as P

from lmscale_jax.model.sharding import AXES, partition

pytestmark = pytest.mark.usefixtures("quick_compiler")

GRIDS = {
    "data, in two micro-batches": {"mesh__data": 4, "mesh__cpu_devices": 4, "train__accum": 2},
    "fsdp": {"mesh__data": 1, "mesh__fsdp": 8},
    "tensor": {"mesh__data": 2, "mesh__fsdp": 1, "mesh__tensor": 4},
    "sequence": {"mesh__data": 2, "mesh__sequence": 4},
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
            # Norms and spreads of small differences carry more relative rounding than losses.
            bound = 2e-6 if name in ("train_loss", "val_loss") else 2e-4
            np.testing.assert_allclose(value, theirs_line[name], rtol=bound, err_msg=name)


def test_parameters_are_split_as_annotated():
    """From the sizes of a mesh alone, without devices."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.configs import base
    from lmscale_jax.model import build, param

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
