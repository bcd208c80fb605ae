"""Attention kernels and float8 products against their definitions, and which of them is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_dtypes import float8_e4m3fn, float8_e5m2
from test_model import make

from lmscale_jax.errors import InputError
from lmscale_jax.model import build, flops, fp8, kernels
from lmscale_jax.model.sharding import AXES, ShardingContext
from lmscale_jax.train import aot


def context_of(length: int, segments=None, window=None):
    config = make()[0]
    context = build.model_context(config, "cpu", ShardingContext())
    scales = context.scales._replace(attention=0.2)
    return context.replace(scales=scales, length=length, segments_BxT=segments, window=window)


def operands(B, T, H, K, d):
    chance = np.random.default_rng(0)
    shapes = ((B, T, H, d), (B, T, K, d), (B, T, K, d))
    return [jnp.asarray(chance.normal(size=s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("case", ["causal", "documents", "window"])
def test_splash_is_the_definition(case):
    """Values and gradients of JAX's TPU kernel, interpreted here."""
    T = 128
    segments = (
        jnp.asarray((np.arange(T) > 50)[None].astype(np.int32)) if case == "documents" else None
    )
    context = context_of(T, segments, 20 if case == "window" else None)
    inputs = operands(1, T, 2, 1, 128)

    def run(kernel):
        return jax.value_and_grad(lambda *x: (jnp.sin(kernel(*x))).sum(), argnums=(0, 1, 2))(
            *inputs
        )

    wanted, gradients = run(lambda q, k, v: kernels.KERNELS["plain"].attend(q, k, v, context))
    actual, others = run(lambda q, k, v: kernels.splash(q, k, v, context, interpret=True))
    assert abs(wanted - actual) < 1e-3
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(other, gradient, atol=2e-4)


def test_auto_says_which_and_why():
    def chosen(platform, **changes):
        sizes = AbstractMesh((2, changes.pop("sequence", 1)), ("data", "sequence"))
        changes = {"dtype": "bfloat16", "head_dim": 128} | changes
        config = make(**changes)[0]
        with config.unlocked():
            config.data.seq_len = 256
        return kernels.choose_kernel(config, platform, ShardingContext(sizes))

    assert chosen("cpu")[0] == "saved" and chosen("cpu", dropout=0.1)[0] == "plain"
    assert chosen("gpu") == ("cudnn", "made for gpu")
    assert chosen("tpu") == ("splash", "made for tpu")
    for platform, changes, reason in (
        ("gpu", {"dtype": "float32"}, "xla.*model.dtype='float32'; it needs bfloat16"),
        ("gpu", {"head_dim": 256}, "head_dim=256; it needs a multiple of 8 up to 128"),
        ("gpu", {"mask": "document"}, "does not support model.mask='document'"),
        ("gpu", {"window_layers": "ends"}, "one window for all blocks and steps"),
        ("tpu", {"sequence": 4}, r"xla.*sequence parallelism \(mesh\.sequence=4\)"),
        ("tpu", {"head_dim": 64}, "head_dim=64 with data.seq_len=256; both must be multiples"),
    ):
        import re

        assert re.search(reason, " ".join(chosen(platform, **changes))), (platform, changes)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_named_kernel_that_cannot_serve_is_refused(name):
    with pytest.raises(InputError, match=f"attention='{name}' does not support .*; use 'auto'"):
        make(attention=name)
    with pytest.raises(InputError, match="does not support attention dropout"):
        make(attention=name, dropout=0.1)


def rounded(x, kind):
    """The entries of x that float8 can hold, by numpy's own types, in x's units."""
    scale = np.abs(x).max() / float(np.finfo(np.float32).max if kind is None else MOST[kind])
    return (x / scale).astype(kind).astype(np.float64) * scale


MOST = {float8_e4m3fn: 448.0, float8_e5m2: 57344.0}


def test_float8_products_are_their_definition():
    chance = np.random.default_rng(0)
    x, w, dy = (chance.normal(size=s) for s in ((12, 32), (32, 24), (12, 24)))
    w, dy = 3 * w, 1e-4 * dy
    y, pull = jax.vjp(
        lambda a, b: fp8.fp8_dense(a, b, True), *(jnp.asarray(z, jnp.float32) for z in (x, w))
    )
    dx, dw = pull(jnp.asarray(dy, jnp.float32))
    x8, w8 = (rounded(z.astype(np.float32), float8_e4m3fn) for z in (x, w))
    dy8 = rounded(dy.astype(np.float32), float8_e5m2)
    for actual, wanted, exact in (
        (y, x8 @ w8, x @ w),
        (dx, dy8 @ w8.T, dy @ w.T),
        (dw, x8.T @ dy8, x.T @ dy),
    ):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-5 * np.abs(wanted).max())
        error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
        assert 0.005 < error < 0.12, error  # 3 and 2 bits of mantissa


def test_a_gradient_of_zero_stays_zero():
    y, pull = jax.vjp(lambda a, b: fp8.fp8_dense(a, b, True), jnp.zeros((4, 8)), jnp.ones((8, 2)))
    assert np.all(np.asarray(y) == 0)
    assert all(np.all(np.asarray(g) == 0) for g in pull(jnp.zeros((4, 2))))


def test_without_float8_it_says_so():
    model = make(matmul="fp8")[1]
    assert model.choices["matmul"] == "float32, not fp8: no float8 products on cpu"


@pytest.mark.parametrize(
    ("chip", "wanted"),
    [
        ("H100", "fp8, current scaling"),
        ("A100", "float32, not fp8: compute capability 8.0 is below 8.9"),
    ],
)
def test_float8_is_chosen_for_the_mesh_not_for_this_machine(chip, wanted):
    mesh = aot.MeshSizes(dict.fromkeys(AXES, 1), flops.CHIPS[chip])
    model = build.build_model(make(matmul="fp8")[0], platform="gpu", mesh=mesh)
    assert model.choices["matmul"] == wanted
