"""What eight simulated devices say to each other, what each holds, and what opens on which mesh."""

import importlib.util
import json
import math
import re

import numpy as np
import pytest
import simulated

SIZES = {
    "mesh.cpu_devices": 8, "mesh.data": 1, "model.d_model": 64, "model.n_layers": 3,
    "model.n_heads": 4, "model.d_ff": 128, "model.stack": "scan", "model.head": "untied",
    "model.positions": "learned", "data.seq_len": 32, "train.batch_size": 16,
}  # fmt: skip
PRINT = "print(setup(argument).lower_step().compile().as_text())"
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> dict[str, list[int]]:
    """{kind: the entries of the largest array of each of them}, largest first."""
    by_kind: dict[str, list[int]] = {}
    for shapes, kind in re.findall(rf"= (.+?) ({KINDS})(?:-start)?\(", text):
        sizes = [
            math.prod(map(int, dims.split(","))) if dims else 1
            for dims in re.findall(r"[a-z]\d+\[([\d,]*)\]", shapes)
        ]
        by_kind.setdefault(kind, []).append(max(sizes))
    return {kind: sorted(sizes, reverse=True) for kind, sizes in by_kind.items()}


def test_fsdp_gathers_weights_and_scatters_gradients(tmp_path):
    changes = SIZES | {"mesh.fsdp": 8, "data.cache": str(tmp_path)}
    sizes = collectives(simulated.run(PRINT, changes))
    # q, k, v, out, up and down in the loop over blocks; readout, tokens and positions once.
    assert len(sizes["reduce-scatter"]) == 9
    # Forward and backward, but tokens and positions only forward, and the readout once for both.
    assert len(sizes["all-gather"]) == 15
    # Whole gradients are summed only of gains and biases.
    assert sizes["all-reduce"][0] == 64
    assert set(sizes) == {"reduce-scatter", "all-gather", "all-reduce"}
    # No activation moves: the largest thing gathered is the MLP's matrix.
    assert sizes["all-gather"][0] == 64 * 128


def test_data_sums_gradients_and_moves_nothing_else(tmp_path):
    changes = SIZES | {"mesh.data": 8, "data.cache": str(tmp_path)}
    assert set(collectives(simulated.run(PRINT, changes))) == {"all-reduce"}


def test_replicas_sum_only_their_part_of_a_gradient(tmp_path):
    changes = SIZES | {"mesh.replica": 2, "mesh.fsdp": 4, "data.cache": str(tmp_path)}
    sizes = collectives(simulated.run(PRINT, changes))
    # Between the slices goes a quarter of the largest matrix.
    assert sizes["all-reduce"][0] == 64 * 128 // 4
    assert len(sizes["reduce-scatter"]) == 9


def test_sequence_gathers_keys_and_values(tmp_path):
    changes = SIZES | {"mesh.data": 2, "mesh.sequence": 4, "data.cache": str(tmp_path)}
    sizes = collectives(simulated.run(PRINT, changes))
    # Keys and values of a device's 8 rows; their gradients go back the same way.
    assert sizes["all-gather"] == [8 * 32 * 64] * len(sizes["all-gather"]) != []
    assert len(sizes["reduce-scatter"]) == 2


MEASURE = """
setup = setup(argument)
state, batch = setup.abstract_state(), setup.abstract_batch()
programs = {
    "init": jax.jit(lambda: setup.initial(0), out_shardings=setup.shardings).lower(),
    "step": setup.lower_step(),
    "loss": perplexity.make_loss_sums(setup.model, setup.mesh).lower(state.params, batch),
    "checksums": jax.jit(checkpoint.checksums).lower(state),
}
sizes = {"parameters": 4 * sum(x.size for x in jax.tree.leaves(state.params))}
for name, lowered in programs.items():
    m = lowered.compile().memory_analysis()
    sizes[name] = (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
                   + m.temp_size_in_bytes)
print(json.dumps(sizes))
"""


@pytest.mark.parametrize(
    ("grid", "optimizer"),
    [
        pytest.param({"mesh.fsdp": 8}, "adamw", marks=pytest.mark.slow),
        pytest.param({"mesh.fsdp": 8}, "muon", marks=pytest.mark.slow),
        pytest.param({"mesh.fsdp": 4, "mesh.tensor": 2}, "adamw", marks=pytest.mark.slow),
    ],
)
def test_no_device_ever_holds_all_parameters(grid, optimizer, tmp_path):
    """What the compiler sets aside for one device, in every program that touches the state."""
    changes = SIZES | grid | {
        "model.d_model": 256, "model.d_ff": 1024, "model.n_layers": 12, "data.seq_len": 8,
        "train.batch_size": 8, "optim.name": optimizer, "data.cache": str(tmp_path),
    }  # fmt: skip
    sizes = json.loads(simulated.run(MEASURE, changes))
    whole = sizes.pop("parameters")
    assert whole > 35e6
    # Parameters, two moments, gradients and updates are an eighth each: 5 / 8 with all of them.
    assert all(size < 0.8 * whole for size in sizes.values()), (sizes, whole)
    assert sizes["loss"] < 0.4 * whole and sizes["init"] < 0.7 * whole


MOVE = """
import tempfile
from pathlib import Path

grids, optimizers = argument
for name in optimizers:
    states = []
    folder = Path(tempfile.mkdtemp())
    first = setup(grids[0] | {"optim.name": name})
    leaves, tree = jax.tree.flatten(first.abstract_state())
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def fill(keys):
        return tree.unflatten([
            (100 * jax.random.normal(k, x.shape)).astype(x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ])

    there = jax.jit(fill, out_shardings=first.shardings)(keys)
    saved = checkpoint.Checkpoints(folder)
    saved.save(3, there, {})
    saved.wait()
    saved.close()
    for changes in grids[1:]:
        wanted = setup(changes | {"optim.name": name}).abstract_state()
        here, host = checkpoint.Checkpoints(folder).restore(wanted, print)
        for (path, a), b, w in zip(
            jax.tree_util.tree_leaves_with_path(here), jax.tree.leaves(there),
            jax.tree.leaves(wanted), strict=True,
        ):
            assert np.array_equal(np.asarray(a), np.asarray(b)), path
            assert a.sharding.is_equivalent_to(w.sharding, a.ndim), path
    print(name, len(leaves), host["step"])
"""


@pytest.mark.slow
def test_a_checkpoint_opens_on_another_mesh(tmp_path):
    """Every optimizer, to the bit: from parameters split over two axes to three other meshes."""
    base = SIZES | {"data.cache": str(tmp_path), "optim.ema_decay": 0.9}
    grids = [
        base | {"mesh.fsdp": 4, "mesh.tensor": 2},
        base | {"mesh.data": 8},
        base | {"mesh.fsdp": 2, "mesh.sequence": 2, "mesh.replica": 2},
        base | {"mesh.tensor": 8},
    ]
    names = ["adamw", "sgd", "lion", "muon", "normuon"]
    done = [line.split() for line in simulated.run(MOVE, [grids, names]).splitlines()]
    assert [line[0] for line in done] == names and all(line[2] == "3" for line in done)


STAND_IN = """
from jax.experimental.custom_partitioning import custom_partitioning
from lmscale_jax.model import kernels
from lmscale_jax.train import aot

passed = custom_partitioning(lambda x: x * 1)
passed.def_partition(
    infer_sharding_from_operands=lambda mesh, shapes, result: shapes[0].sharding,
    partition=lambda mesh, shapes, result: (
        mesh, lambda x: x * 1, result.sharding, (shapes[0].sharding,)
    ),
    sharding_rule="... -> ...",
)
through = jax.custom_vjp(passed)
through.defvjp(lambda x: (passed(x), None), lambda _, dy: (passed(dy),))
plain = kernels.KERNELS["plain"]


def attend(q, k, v, context):
    return through(plain.attend(through(q), k, v, context))


stand_in = kernels.KERNELS["cudnn"]._replace(attend=attend, unsupported=None)
counts = []
for changes in argument:
    texts = []
    for kernels.KERNELS["plain"] in (plain, stand_in):
        texts.append(setup(changes).lower_step().as_text())
    # In a program of all devices such an operation is left for XLA's partitioner to call back.
    assert "CustomSPMDPartitioning" not in texts[1], changes
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")
    counts.append([[text.count(f"stablehlo.{kind}") for kind in kinds] for text in texts])
print(json.dumps(counts))
"""
MESHES = [
    {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"sequence": 8}, {"replica": 8},
    {"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 4}, {"data": 2, "sequence": 4},
    {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2},
]  # fmt: skip


def test_a_kernel_that_partitions_itself_lowers_on_every_mesh(tmp_path):
    """As cuDNN's attention, which needs a GPU: JAX lowers such operations only in a program of one
    mesh, and cuDNN's only where all its axes are local."""
    base = SIZES | {"model.n_layers": 1, "model.attention": "plain", "data.cache": str(tmp_path)}
    grids = [base | {f"mesh.{axis}": n for axis, n in grid.items()} for grid in MESHES]
    for grid, (plain, stand_in) in zip(
        MESHES, json.loads(simulated.run(STAND_IN, grids)), strict=True
    ):
        assert stand_in == plain and sum(plain) > 0, grid


DESCRIBED_GPUS = """
from lmscale_jax.train import aot

jax.config.update("jax_platforms", "cpu")
devices = aot.parse_topology("H100:8").devices()
programs = []
for changes in argument:
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    config = resolve(config, 64)
    setup = build_setup(config, None, make_mesh(config, devices))
    assert setup.model.choices["attention"].startswith("cudnn"), setup.model.choices
    # There is no device to try several forms of a kernel on.
    options = {"xla_gpu_autotune_level": 0}
    programs.append(setup.lower_step().compile(options).as_text())
print(json.dumps(programs))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax_cuda13_plugin, which compiles for GPUs without one, is not installed",
)
def test_attention_of_cudnn_compiles_for_eight_gpus(tmp_path):
    """A step for eight described H100, none of which is here, and what the devices say in it."""
    base = SIZES | {
        "mesh.cpu_devices": 0, "model.dtype": "bfloat16", "model.attention": "auto",
        "model.n_layers": 2, "data.cache": str(tmp_path),
    }  # fmt: skip
    fsdp = {"all-gather", "reduce-scatter", "all-reduce"}
    kinds = [
        ({"fsdp": 8}, fsdp), ({"data": 8}, {"all-reduce"}), ({"fsdp": 4, "tensor": 2}, fsdp)
    ]  # fmt: skip
    changes = [base | {f"mesh.{axis}": n for axis, n in grid.items()} for grid, _ in kinds]
    texts = json.loads(simulated.run(DESCRIBED_GPUS, changes))
    for (grid, wanted), text in zip(kinds, texts, strict=True):
        calls = re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?"', text)
        assert set(calls) == {"", "Backward"}, grid
        assert set(collectives(text)) == wanted, grid


MASKED = """
from jax.sharding import NamedSharding
from lmscale_jax.model.sharding import BATCH
losses = []
for changes in argument:
    setup_of_run = setup(changes)
    model, grid = setup_of_run.model, setup_of_run.mesh
    params = jax.jit(model.init, out_shardings=setup_of_run.shardings.params)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 64)) % 11
    tokens = jax.device_put(tokens.astype(np.int32), NamedSharding(grid, BATCH))
    value = lambda p: model.losses(p, tokens, tokens).mean()
    loss, slopes = jax.jit(jax.value_and_grad(value))(params)
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(slopes["blocks"])]
    losses.append([float(loss), *norms])
print(json.dumps(losses))
"""


@pytest.mark.slow
def test_documents_and_windows_are_the_same_on_every_mesh(tmp_path):
    """Of kernels that see a part of the rows, of the heads, or of the queries."""
    base = SIZES | {
        "data.cache": str(tmp_path), "data.seq_len": 64, "model.mask": "document",
        "model.window_layers": "ends", "model.window": 16, "model.window_block": 4,
    }  # fmt: skip
    grids = [
        {"model.attention": "plain", "mesh.data": 8},
        {"model.attention": "banded", "mesh.fsdp": 4, "mesh.tensor": 2},
        {"model.attention": "banded", "mesh.fsdp": 2, "mesh.sequence": 4},
        {"model.attention": "saved", "mesh.sequence": 2, "mesh.tensor": 4},
    ]
    plain, *others = json.loads(simulated.run(MASKED, [base | grid for grid in grids]))
    for norms in others:
        np.testing.assert_allclose(norms, plain, rtol=2e-4)


SPLIT = """
import functools
from jax.sharding import PartitionSpec as P
from lmscale_jax.model import primitives
from lmscale_jax.model.sharding import ShardingContext

sharding = ShardingContext(setup(argument).mesh)
logits = 4 * jax.random.normal(jax.random.key(0), (9, 24))
targets = jnp.array([0, 23, -1, 3, 2, -1, 7, 12, 11])
g = jax.random.normal(jax.random.key(1), (9,))

def local(ops, logits, targets):
    first = jax.lax.axis_index("tensor") * logits.shape[1]
    return ops.cross_entropy(logits, targets, first=first, axis="tensor")

def split(ops):
    run = functools.partial(local, ops)
    return sharding.shard(run, (P(None, "tensor"), P(None)), P(None))

def both(loss):
    y, pull = jax.vjp(lambda x: loss(x, targets), logits)
    return np.concatenate([y, *pull(g)[0]]).tolist()

losses = [primitives.plain.cross_entropy, split(primitives.cpu), split(primitives.accelerator)]
print(json.dumps([both(jax.jit(loss)) for loss in losses]))
"""


def test_vocabularies_over_devices_have_the_rules_of_whole_ones():
    """Losses and their gradients, with targets on the first, the last and no device."""
    plain, *rules = json.loads(simulated.run(SPLIT, {"mesh.cpu_devices": 8, "mesh.tensor": 8}))
    for rule in rules:
        np.testing.assert_allclose(rule, plain, rtol=1e-5, atol=1e-6)
