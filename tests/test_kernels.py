"""Attention kernels and float8 products against their definitions, and which of them is chosen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_dtypes import float8_e4m3fn, float8_e5m2
from test_model import make

from lmscale_jax.errors import InputError
from lmscale_jax.model import (
    attention,
    banded,
    build,
    flops,
    fp8,
    fused_attention,
    kernels,
    skip_connections,
)
from lmscale_jax.model.sharding import AXES, ShardingContext
from lmscale_jax.train import aot


def context_of(length: int, documents=None, window=None, unit: int = 1, bound=None):
    """The context of a kernel under a mask, made by the code that makes it in a model.

    `window` is in units and may be traced; then `bound` is the most it can be.
    """
    config = make(**({} if window is None else {"window_layers": "all", "window": unit}))[0]
    context = build.model_context(config, "cpu", ShardingContext())
    context = context.replace(
        scales=context.scales._replace(attention=0.2), length=length, window_block=unit,
        document_starts_BxT=documents, windows=None if window is None else (window, window),
    )  # fmt: skip
    if window is not None:
        with config.unlocked():
            config.model.window_block, config.model.window = unit, unit * (bound or window)
    return skip_connections.layer_inputs(config.model, context, 0)


def operands(B, T, H, K, d):
    chance = np.random.default_rng(0)
    shapes = ((B, T, H, d), (B, T, K, d), (B, T, K, d))
    return [jnp.asarray(chance.normal(size=s), jnp.float32) for s in shapes]


def random_starts(B: int, T: int, seed: int):
    """Documents of random lengths; the first row's begin where a block of queries does."""
    chance = np.random.default_rng(seed)
    begins = chance.random((B, T)) < 5 / T
    begins[0] = np.arange(T) % 64 == 0
    return jnp.asarray(np.maximum.accumulate(begins * np.arange(T), axis=1), jnp.int32)


def value_and_gradients(attend, inputs):
    run = jax.value_and_grad(lambda *x: jnp.sin(attend(*x)).sum(), argnums=(0, 1, 2))
    value, gradients = jax.jit(run)(*inputs)
    return [np.asarray(x) for x in (value, *gradients)]


def softmax_over(q, k, v, sees):
    """The definition in numpy; `sees(row, query, key)` says what the mask allows."""
    (B, T, H, _), K = q.shape, k.shape[2]
    mask = np.array([[[sees(b, t, s) for s in range(T)] for t in range(T)] for b in range(B)])
    k, v = (np.repeat(np.asarray(x, np.float64), H // K, axis=2) for x in (k, v))
    scores = 0.2 * np.einsum("bthd,bshd->bhts", np.asarray(q, np.float64), k)
    p = np.where(mask[:, None], np.exp(scores), 0)
    return np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("with_documents", [False, True])
def test_masks_are_their_definition(window, with_documents):
    """First keys against documents and windows of units, token by token."""
    B, T, unit = 2, 24, 4
    starts = random_starts(B, T, 1) if with_documents else None
    inputs = operands(B, T, 2, 1, 8)
    context = context_of(T, starts, window, unit)

    def sees(b, t, s):
        near = window is None or t // unit - s // unit < window
        return s <= t and near and (starts is None or starts[b, t] == starts[b, s])

    wanted = softmax_over(*inputs, sees)
    for name in ("plain", "saved", "xla", "banded"):
        actual = kernels.KERNELS[name].attend(*inputs, context)
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-6, err_msg=name)


# (queries of a block, row, window in units, tokens of a unit, window that it grows to, documents)
BANDS = [
    (256, 256, None, 1, None, False), (32, 256, None, 1, None, True), (32, 256, 40, 1, None, True),
    (16, 256, 2, 32, None, False), (16, 80, 3, 8, 4, True),
]  # fmt: skip


@pytest.mark.parametrize("band", BANDS, ids=str)
def test_banded_attention_is_the_definition(band, monkeypatch):
    """Values and gradients, for documents, windows of units, and a traced window that grows."""
    block, T, window, unit, bound, with_documents = band
    monkeypatch.setattr(banded, "BLOCK", block)
    starts = random_starts(2, T, block) if with_documents else None
    inputs = operands(2, T, 4, 2, 8)

    def attend(name):
        return lambda q, k, v, w=window: kernels.KERNELS[name].attend(
            q, k, v, context_of(T, starts, w, unit, bound)
        )

    if bound is not None:
        inputs.append(jnp.asarray(window))
    wanted, actual = (value_and_gradients(attend(name), inputs) for name in ("plain", "banded"))
    for got, want in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_bands_are_as_narrow_as_the_mask_allows():
    def band(block, reach, unit):
        return block * banded.band_pieces(8192, block, reach, unit)

    # Units of 128: 14 of them begin 13 before that of a block's first query.
    assert band(256, 14 * 128, 128) == 256 + 13 * 128 + 128 and band(128, 14 * 128, 128) == 14 * 128
    # Windows of single tokens, and units that do not divide a block.
    assert [band(64, n, 1) for n in (1, 2, 65, 66)] == [64, 128, 128, 192]
    assert band(64, 96, 96) == 64 + 128 and band(64, None, 1) == 8192
    # Without a window: a quarter of the row, then two, three and four.
    plain = banded.band_stages(8192, 8192, 256, 8192)
    assert [(s.first, s.count, s.band) for s in plain] == [
        (0, 8, 2048), (8, 8, 4096), (16, 8, 6144), (24, 8, 8192)
    ]  # fmt: skip
    # A part of a row may be anywhere in it.
    assert banded.band_stages(128, 512, 64, 512) == [banded.Stage(0, 2, 512, 512)]
    assert [banded.block_length(n) for n in (8192, 640, 96, 101, 1021)] == [256, 160, 96, 101, 1021]


@pytest.mark.parametrize("case", ["causal", "documents", "window", "window and documents"])
@pytest.mark.parametrize("width", [128, 64])
def test_splash_is_the_definition(case, width):
    """Values and gradients of JAX's TPU kernel, interpreted here, which also applies RoPE; 64
    channels are filled up."""
    T = 256
    starts = random_starts(1, T, 3) if "documents" in case else None
    context = context_of(T, starts, 20 if "window" in case else None)
    context = context.replace(rope=attention.rope_tables(T, width, 1e4))
    inputs = operands(1, T, 2, 1, width)

    def plain(q, k, v):
        q, k = attention.rotate(q, context.rope), attention.rotate(k, context.rope)
        return kernels.KERNELS["plain"].attend(q, k, v, context)

    wanted = value_and_gradients(plain, inputs)
    actual = value_and_gradients(
        lambda q, k, v: kernels.splash(q, k, v, context, interpret=True), inputs
    )
    assert abs(wanted[0] - actual[0]) < 1e-3
    for gradient, other in zip(wanted[1:], actual[1:], strict=True):
        np.testing.assert_allclose(other, gradient, atol=2e-4)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_documents", [False, True])
def test_tokamax_gets_the_mask(window, with_documents, monkeypatch):
    """Values and gradients by its own definition, on any platform; chunks of the backward pass."""
    base = pytest.importorskip("tokamax._src.ops.attention.base")
    monkeypatch.setattr(fused_attention, "CHUNK", 32)
    T, unit = 256, 16
    starts = random_starts(2, T, 5) if with_documents else None
    context, inputs = context_of(T, starts, window, unit), operands(2, T, 4, 2, 8)
    assert fused_attention.backward_pieces(T, context) == (0 if window is None else 2)
    reference = base.DotProductAttention(vjp=base.DotProductAttentionVjp())
    wanted = value_and_gradients(
        lambda q, k, v: kernels.KERNELS["plain"].attend(q, k, v, context), inputs
    )
    actual = value_and_gradients(
        lambda q, k, v: fused_attention.tokamax(q, k, v, context, [reference]), inputs
    )
    for got, want in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-5)


def test_auto_says_which_and_why(monkeypatch):
    def chosen(platform, **changes):
        sizes = AbstractMesh((2, changes.pop("sequence", 1)), ("data", "sequence"))
        changes = {"dtype": "bfloat16", "head_dim": 128} | changes
        length = changes.pop("seq_len", 1024)
        config = make(**changes)[0]
        with config.unlocked():
            config.data.seq_len = length
        return kernels.choose_kernel(config, platform, ShardingContext(sizes))

    monkeypatch.setattr(kernels, "tokamax_installed", lambda: False)
    assert chosen("cpu")[0] == "saved" and chosen("cpu", dropout=0.1)[0] == "plain"
    assert chosen("gpu") == ("cudnn", "made for gpu")
    assert chosen("tpu") == chosen("tpu", head_dim=64) == ("splash", "made for tpu")
    for platform, changes, reason in (
        ("gpu", {"dtype": "float32"}, "banded.*cudnn.*model.dtype='float32'; it needs bfloat16"),
        ("gpu", {"dtype": "float32", "seq_len": 512}, "xla rows of at most 512; cudnn"),
        ("gpu", {"head_dim": 256}, "head_dim=256; it needs a multiple of 8 up to 128"),
        ("gpu", {"mask": "document"}, "cudnn does not support model.mask='document'; tokamax does "
         "not support this Python, where it is not installed"),
        ("gpu", {"window_layers": "ends"}, "one window for all blocks and steps"),
        ("tpu", {"sequence": 4}, r"banded.*sequence parallelism \(mesh\.sequence=4\)"),
        ("tpu", {"seq_len": 1000}, "banded.*data.seq_len=1000; it needs a multiple of 128"),
    ):  # fmt: skip
        assert re.search(reason, " ".join(chosen(platform, **changes))), (platform, changes)
    monkeypatch.setattr(kernels, "tokamax_installed", lambda: True)
    for changes in ({"mask": "document"}, {"window_layers": "ends"}, {"sequence": 4}):
        assert chosen("gpu", **changes)[0] == "tokamax"
    assert chosen("gpu", seq_len=96, mask="document")[0] == "xla"


@pytest.mark.parametrize("name", ["cudnn", "splash", "tokamax"])
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
