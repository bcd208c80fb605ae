"""Loss mode against its definition in two passes, in every way that the stack can run."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from benchmarks import mur_forms
from lmscale_jax.config.blocks import mur_layers
from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.data.batches import Batch
from lmscale_jax.model import mesh
from lmscale_jax.model.build import build_model
from lmscale_jax.mur import objective, utility
from lmscale_jax.train import step

# So large that the hinges' part of the gradient is as large as the loss's.
BASE = {
    "model.n_layers": 4, "model.d_model": 16, "model.n_heads": 4, "model.stack": "unroll",
    "data.seq_len": 8, "train.batch_size": 4, "train.steps": 10, "mesh.cpu_devices": 1,
    "mur.mode": "loss", "mur.tau": 0.5, "mur.lambda_max": 30.0, "mur.warmup": "0", "mur.ramp": "0",
}  # fmt: skip
CASES = {
    "cos": {},
    "proj, scan, remat block": {
        "mur.metric": "proj", "mur.lambda_max": 0.3, "model.stack": "scan", "model.remat": "block",
    },
    "raw, scan, untied, GQA, RoPE, two micro-batches": {
        "mur.metric": "raw", "model.stack": "scan", "model.head": "untied", "model.n_kv_heads": 2,
        "model.positions": "rope", "model.norm": "rmsnorm", "model.mlp": "swiglu", "train.accum": 2,
    },
    "branches, bias, remat dots, sample_k": {
        "mur.granularity": "branch", "model.bias": True, "model.remat": "dots",
        "mur.reduce": "sample_k", "mur.sample_k": 3,
    },
}  # fmt: skip
SLOW = {
    "proj": {"mur.metric": "proj", "mur.lambda_max": 0.3},
    "raw": {"mur.metric": "raw"},
    "scan": {"model.stack": "scan"},
    "one block, scan": {"model.stack": "scan", "mur.first_block": 3, "mur.last_block": 3},
    "all blocks, scan": {"model.stack": "scan", "mur.start": 0.0, "mur.end": 1.0},
    "all blocks, remat block": {"model.remat": "block", "mur.start": 0.0, "mur.end": 1.0},
    "two micro-batches": {"train.accum": 2},
    "branches, scan, remat": {
        "mur.granularity": "branch", "model.stack": "scan", "model.remat": "block",
    },
    "top_loss": {"mur.reduce": "top_loss"},
    "dropout, documents, loss in chunks": {
        "model.dropout": 0.2, "model.mask": "document", "model.loss_chunk": 8,
    },
}  # fmt: skip


def setup(changes):
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(BASE | changes)
    config = resolve(config, 32)
    model = build_model(config, platform="cpu", bos_id=0)
    # Larger than the usual beginning, so that attention and norms matter.
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    return config, model, params, tokens(config)


def tokens(config, seed=0):
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, 32, (config.train.batch_size, config.data.seq_len + 1), np.int32)
    targets = ids[:, 1:].copy()
    targets[0, 5:] = targets[:, -1] = -1
    return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(targets))


def ours(config, model, params, batch, key=None, measure=()):
    """Returns (gradient of the objective, statistics)."""
    mur = objective.make_objective(config)
    grid, n_targets = mesh.make_mesh(config, jax.devices()[:1]), step.count_targets(batch)
    # The keys of draws are functions of step and micro-batch.
    request = mur.request_stats(mur.init_means(), jnp.int32(3), measure)
    gradient = step.make_gradient(config, model, grid, n_targets, request)
    _, (grads, buffer_grads) = jax.jit(gradient)(params, request.stat_buffers, *batch, key)
    return grads, request.read_stats(buffer_grads)


def oracle(config, model, params, batch, key=None):
    """Two passes for each micro-batch, weighted by its share of the targets."""
    mur, accum = config.mur, config.train.accum
    how = utility.Measure(mur.metric, mur.eps)
    request = objective.make_objective(config).request_stats({}, jnp.int32(3), ())
    n, total = (batch.targets_BxT >= 0).sum(), None
    for index in range(accum):
        rows = slice(index * 4 // accum, (index + 1) * 4 // accum)
        part = Batch(*(x[rows] for x in batch))
        weigh = functools.partial(
            utility.token_weights, mur.reduce, key=jax.random.fold_in(request._key, index),
            k=mur.sample_k, share=mur.top_share,
        )  # fmt: skip
        share = (part.targets_BxT >= 0).sum() / n
        # The whole is share * (loss + λ/(accum share) * hinges), added up.
        lam = mur.lambda_max / accum / share
        function = mur_forms.two_pass(config, model, how, lam, mur_layers(config), weigh)
        grads = jax.tree.map(lambda g, s=share: s * g, jax.jit(function)(params, part, key)[1])
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    return total


def relative(grads, expected) -> float:
    """Largest difference of any array over its largest entry, or a thousandth of the tree's."""
    least = 1e-3 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))

    def difference(a, b):
        return float(jnp.abs(a - b).max()) / max(float(jnp.abs(b).max()), least)

    return max(jax.tree.leaves(jax.tree.map(difference, grads, expected)))


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_gradient_is_that_of_the_definition(case):
    config, model, params, batch = setup((CASES | SLOW)[case])
    key = jax.random.key(5) if config.model.dropout else None
    grads, stats = ours(config, model, params, batch, key)
    assert relative(grads, oracle(config, model, params, batch, key)) < 1e-5
    assert stats["hinge"].max() > 0


def test_it_is_not_the_gradient_of_the_loss_alone():
    config, model, params, batch = setup({"model.stack": "scan"})
    grads, _ = ours(config, model, params, batch)
    plain = jax.grad(lambda p: model.losses(p, *batch).sum() / (batch.targets_BxT >= 0).sum())
    assert relative(grads, jax.jit(plain)(params)) > 1e-2


@pytest.mark.slow
def test_one_combined_pull_back_is_the_same():
    config, model, params, batch = setup({})
    weigh = functools.partial(utility.token_weights, "mean", key=None, k=1, share=1.0)
    how, layers = utility.Measure("cos", 1e-6), mur_layers(config)
    both = (
        f(config, model, how, 30.0, layers, weigh) for f in (mur_forms.combined, mur_forms.two_pass)
    )
    combined, two_pass = (jax.jit(f)(params, batch)[1] for f in both)
    assert relative(combined, two_pass) < 1e-5


@pytest.mark.slow
def test_bfloat16_products():
    """Both forms round, in different places; the directions agree."""
    config, model, params, batch = setup({"model.dtype": "bfloat16", "mur.start": 0.0})
    grads, _ = ours(config, model, params, batch)
    expected = oracle(config, model, params, batch)
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (grads, expected))
    assert float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.999


METRICS = ["cos", *(pytest.param(name, marks=pytest.mark.slow) for name in ("proj", "raw"))]


@pytest.mark.parametrize("metric", METRICS)
def test_finite_differences_of_the_objective_with_g_held(metric):
    config, model, params, batch = setup({"mur.metric": metric, "mur.lambda_max": 1.0})
    mur, n = config.mur, (batch.targets_BxT >= 0).sum()
    how, layers = utility.Measure(metric, mur.eps), mur_layers(config)
    probes = mur_forms._zeros(config, batch)
    weight_N = utility.token_weights(
        "mean", batch.tokens_BxT * 0.0, batch.targets_BxT >= 0, None, 1, 1.0
    )

    def forward(params, probes):
        return model.losses(params, *batch, None, mur_forms.Collect(probes, ("block",)))

    g = jax.jit(jax.grad(lambda probes: forward(params, probes)[0].sum()))(probes)

    @jax.jit
    def value(params):
        nll_BxT, deltas = forward(params, probes)
        hinges = [
            utility.hinge(
                how, g[l, 0], deltas[l, 0], (batch.targets_BxT >= 0).reshape(-1),
                weight_N.reshape(-1), mur.tau,
            )
            for l in layers  # noqa: E741
        ]  # fmt: skip
        return nll_BxT.sum() / n + sum(hinges) / len(hinges)

    grads, _ = ours(config, model, params, batch)
    # Along the gradient the differences are large, and rounding small beside them.
    length = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(grads)))

    def at(t):
        return float(value(jax.tree.map(lambda p, d: p + t / length * d, params, grads)))

    slopes = [(at(t) - at(-t)) / (2 * t) for t in (0.002, 0.004)]
    extrapolated = (4 * slopes[0] - slopes[1]) / 3
    assert extrapolated == pytest.approx(float(length), rel=3e-3)


DIAGNOSE = {
    "mur.mode": "diagnose", "mur.tau": 0.1, "mur.lambda_max": 0.1, "mur.warmup": "5%",
    "mur.ramp": "10%",
}  # fmt: skip


@pytest.mark.parametrize("stack", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
def test_watching_changes_nothing(stack):
    """Diagnose mode: the same gradient, and statistics as two passes give them."""
    config, model, params, batch = setup(DIAGNOSE | {"model.stack": stack})
    grads, stats = ours(config, model, params, batch, measure=("mur",))
    probes, n = mur_forms._zeros(config, batch), (batch.targets_BxT >= 0).sum()

    def forward(params, probes):
        nll_BxT, deltas = model.losses(params, *batch, None, mur_forms.Collect(probes, ("block",)))
        return nll_BxT.sum() / n, deltas

    both = jax.grad(forward, argnums=(0, 1), has_aux=True)
    (plain, g), deltas = jax.jit(both)(params, probes)
    assert relative(grads, plain) < 1e-5
    for layer in range(4):
        expected = utility.utility_statistics(
            objective.REPORTED, utility.Measure("cos", 1e-6), n * g[layer, 0], deltas[layer, 0],
            batch.targets_BxT >= 0, None, 0.1,
        )  # fmt: skip
        for name, value in zip(objective.REPORTED, expected, strict=True):
            np.testing.assert_allclose(stats[name][layer, 0], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_utilities_do_not_depend_on_the_batch(metric):
    """The same sequence alone, among two and among four."""
    _, model, params, batch = setup({"mur.metric": metric})
    utilities = []
    for size in (1, 2, 4):
        part = Batch(*(x[-size:] for x in batch))
        spec = objective.streams.UtilitySpec(utility.Measure(metric, 1e-6), ())
        n = (part.targets_BxT >= 0).sum()
        inputs = objective.streams.BackwardInputs(
            part.targets_BxT >= 0, n, jnp.zeros((4, 1)), 0.0, None
        )

        def loss(stat_buffers):
            probe = objective.streams.UtilityProbe(spec, stat_buffers, inputs, range(4), ("block",))  # noqa: B023
            return model.losses(params, *part, None, probe).sum() / n  # noqa: B023

        values = jax.jit(jax.grad(loss))(spec.stat_buffers(4, 1, part.tokens_BxT.size))
        utilities.append(np.asarray(values).reshape(4, 3, size, -1)[:, :, -1])
    for other in utilities[1:]:
        np.testing.assert_allclose(other, utilities[0], rtol=2e-4, atol=1e-6)
    # The last position has no label and nothing after it: no gradient there, hence masked.
    assert not utilities[0][:, 2, -1].any() and utilities[0][:, 2, :-1].all()


EIGHT = """
import jax, sys
sys.path.insert(0, "tests")
import test_mur_exact as t
from lmscale_jax.model import mesh
from lmscale_jax.mur import objective
from lmscale_jax.train import step
import jax.numpy as jnp
changes = {"train.batch_size": 4, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
for more in ({}, {"model.stack": "scan", "mur.granularity": "branch"}):
    config, model, params, batch = t.setup(changes | {"mesh.cpu_devices": 8} | more)
    expected = t.oracle(config, model, params, batch)
    grid = mesh.make_mesh(config)
    params = jax.device_put(params, mesh.param_shardings(model.specs, grid))
    batch = jax.device_put(batch, jax.sharding.NamedSharding(grid, mesh.BATCH))
    mur = objective.make_objective(config)
    request = mur.request_stats(mur.init_means(), jnp.int32(3), ("mur",))
    gradient = step.make_gradient(config, model, grid, step.count_targets(batch), request)
    _, (grads, _) = jax.jit(gradient)(params, request.stat_buffers, *batch, None)
    print(len(jax.devices()), t.relative(jax.device_get(grads), jax.device_get(expected)))
"""


@pytest.mark.slow
def test_eight_devices():
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\n" + EIGHT
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        devices, difference = line.split()
        assert devices == "8" and float(difference) < 1e-5
