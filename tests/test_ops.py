"""Every primitive, plain and with its rules, against float64 formulas written out in numpy.

Bounds. In float32 a result may differ by 5e-6 of the largest entry. In bfloat16 the oracle gets the
rounded inputs, so only roundings inside count: U = 2^-8 is bfloat16's unit roundoff, and a bound is
first order in U with 5 % for the rest, plus the float32 bound. A result rounded once is within
U |y|; what else a fast rule rounds is derived where it is tested."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.model import primitives

NAMES = ("plain", "cpu", "accelerator")
SETS = pytest.mark.parametrize("kernels", [getattr(primitives, n) for n in NAMES], ids=NAMES)
TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
U, EPS = 2.0**-8, 1e-5
B, H, T, D = 2, 3, 10, 8


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(*arrays) -> list[np.ndarray]:
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]


def close(got: jax.Array, want: np.ndarray, bound=0.0):
    """|got - want| <= 1.05 bound + 5e-6 max |want|, entry by entry."""
    assert got.shape == want.shape
    error = np.abs(exact(got)[0] - want)
    limit = 1.05 * bound + 5e-6 * np.abs(want).max()
    assert np.all(error <= limit), f"worst: {np.max(error - limit)} over {np.max(limit)}"


def unit(dtype) -> float:
    return U if dtype == jnp.bfloat16 else 0.0


def pull(f, args, cotangent):
    """The result of f and the gradients of its arguments, compiled as one program."""

    def both(args, cotangent):
        y, back = jax.vjp(f, *args)
        return y, back(cotangent)

    return jax.jit(both)(args, cotangent)


@SETS
@TYPES
@pytest.mark.parametrize("shape", [(7, 4, 5), (64, 48, 32), (1, 8, 1)])
def test_dense(kernels, dtype, shape):
    N, I, O = shape  # noqa: E741
    x, w, g = normal(0, N, I, dtype=dtype), normal(1, I, O), normal(2, N, O, dtype=dtype)
    y, (dx, dw) = pull(kernels.dense, (x, w), g)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    xe, we, ge = exact(x, w.astype(dtype), g)
    u = unit(dtype)
    close(y, xe @ we, u * np.abs(xe @ we))
    close(dx, ge @ we.T, u * np.abs(ge @ we.T))
    # The gradient of the weights, which micro-batches and devices add up, is never rounded.
    close(dw, xe.T @ ge)


def norm_oracle(x, scale, bias, g, centre):
    """Row by row through the Jacobian of x_hat = (x - mean) / std."""
    y, dx, dscale = np.zeros_like(x), np.zeros_like(x), np.zeros_like(scale)
    n = x.shape[1]
    for i, row in enumerate(x):
        row = row - row.mean() * centre
        std = np.sqrt(np.mean(row**2) + EPS)
        x_hat = row / std
        jacobian = (np.eye(n) - centre / n - np.outer(x_hat, x_hat) / n) / std
        y[i] = x_hat * scale + bias
        dx[i] = jacobian.T @ (g[i] * scale)
        dscale += g[i] * x_hat
    return y, dx, dscale


@SETS
@TYPES
@pytest.mark.parametrize("kind", ["layer", "layer_bias", "rms"])
def test_norms(kernels, dtype, kind):
    x = 3 * normal(0, 7, 12, dtype=dtype) + 2
    g = normal(1, 7, 12, dtype=dtype)
    scale, bias = 1 + normal(2, 12), normal(3, 12)
    if kind == "rms":
        f, args = lambda x, s: kernels.rms_norm(x, s, EPS), (x, scale)
    else:
        args = (x, scale, bias if kind == "layer_bias" else None)
        f = lambda x, s, b: kernels.layer_norm(x, s, b, EPS)  # noqa: E731
    y, grads = pull(f, args, g)
    assert (y.dtype, grads[0].dtype, grads[1].dtype) == (dtype, dtype, jnp.float32)
    xe, se, be, ge = exact(x, scale, bias, g)
    want, dx, dscale = norm_oracle(
        xe, se, be if kind == "layer_bias" else 0, ge, centre=kind != "rms"
    )
    u = unit(dtype)
    close(y, want, u * np.abs(want))
    close(grads[0], dx, u * np.abs(dx))
    close(grads[1], dscale)
    if kind == "layer_bias":
        close(grads[2], ge.sum(0))


def first_keys(segments_BxT):
    """Where each token's segment begins."""
    return jnp.asarray([[list(row).index(n) for n in row] for row in segments_BxT], jnp.int32)


def attention_oracle(q, k, v, g, scale, segments=None):
    """Values, gradients, and the magnitudes that the bounds of the fast form are made of."""
    T = q.shape[1]
    visible = np.tri(T, dtype=bool)[None]
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        visible = visible & np.repeat(same, q.shape[0] // len(same), axis=0)
    s = np.where(visible, scale * q @ k.swapaxes(1, 2), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(1, 2)
    delta = (p * dp).sum(-1, keepdims=True)
    ds = scale * p * (dp - delta)
    values = p @ v, ds @ k, ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ g
    # p, o and ds are each rounded once; delta is read from an o with both of the first two.
    spread = p @ np.abs(v)
    o_error = U * (spread + np.abs(values[0]))
    ddelta = (np.abs(g) * o_error).sum(-1, keepdims=True)
    ds_error = 2 * U * np.abs(ds) + scale * p * ddelta
    bounds = (
        o_error,
        ds_error @ np.abs(k) + U * np.abs(values[1]),
        ds_error.swapaxes(1, 2) @ np.abs(q) + U * np.abs(values[2]),
        U * (p.swapaxes(1, 2) @ np.abs(g) + np.abs(values[3])),
    )
    return values, bounds


@SETS
@TYPES
@pytest.mark.parametrize(("segmented", "length"), [(False, 7), (True, T)])
def test_attention(kernels, dtype, segmented, length):
    q, k, v, g = (normal(i, B * H, length, D, dtype=dtype) for i in range(4))
    segments = np.array([[0] * 3 + [1] * 4 + [5] * 3, [2] * 9 + [3]])[:, :length]
    f = functools.partial(kernels.attention, scale=0.3)
    if segmented:
        f = functools.partial(f, first_key_BxT=first_keys(segments))
    y, grads = pull(f, (q, k, v), g)
    want, bounds = attention_oracle(*exact(q, k, v, g), 0.3, segments if segmented else None)
    for got, value, bound in zip((y, *grads), want, bounds, strict=True):
        assert got.dtype == dtype
        if kernels is not primitives.cpu:  # float32 throughout, rounded once
            bound = U * np.abs(value)
        close(got, value, bound * (dtype == jnp.bfloat16))


@SETS
@TYPES
def test_cross_entropy(kernels, dtype):
    logits = 4 * normal(0, 9, 11, dtype=dtype)
    targets = jnp.array([0, 10, -1, 3, 3, -1, 7, 5, 1], jnp.int32)
    g = normal(1, 9)
    y, (dlogits,) = pull(lambda x: kernels.cross_entropy(x, targets), (logits,), g)
    assert (y.dtype, dlogits.dtype) == (jnp.float32, dtype)
    le, ge = exact(logits, g)
    p = np.exp(le) / np.exp(le).sum(1, keepdims=True)
    kept = np.asarray(targets) >= 0
    close(y, np.where(kept, -np.log(p[np.arange(9), np.maximum(targets, 0)]), 0))
    want = (p - (np.asarray(targets)[:, None] == np.arange(11))) * (ge * kept)[:, None]
    close(dlogits, want, unit(dtype) * np.abs(want))
    assert not np.any(np.asarray(y)[~kept]) and not np.any(exact(dlogits)[0][~kept])


# --- Properties ---------------------------------------------------------------------------------


@SETS
def test_attention_is_causal(kernels):
    """The result at t has no gradient into any later position, and some into every earlier one."""
    q, k, v = (normal(i, H, T, D) for i in range(3))

    @jax.jit
    def at(t):
        return jax.grad(lambda x: kernels.attention(*x, scale=1.0)[:, t].sum() ** 2)((q, k, v))

    for t in (0, 4, T - 1):
        dq, dk, dv = (np.abs(x).sum((0, 2)) for x in at(t))
        assert not dk[t + 1 :].any() and not dv[t + 1 :].any()
        assert dv[: t + 1].all() and (t == 0 or dk[: t + 1].all())
        assert set(np.flatnonzero(dq)) <= {t}


@SETS
@TYPES
def test_padding_of_the_vocabulary_has_neither_probability_nor_gradient(kernels, dtype):
    # More columns than one tile of a reduction: two of -inf are merged before anything else.
    logits, targets = 4 * normal(0, 5, 70, dtype=dtype), jnp.array([0, 69, -1, 3, 40], jnp.int32)
    padded = jnp.pad(logits, ((0, 0), (0, 190)), constant_values=-jnp.inf)
    g = normal(1, 5)
    y, (dlogits,) = pull(lambda x: kernels.cross_entropy(x, targets), (logits,), g)
    y_padded, (dpadded,) = pull(lambda x: kernels.cross_entropy(x, targets), (padded,), g)
    np.testing.assert_allclose(y_padded, y, rtol=1e-6)
    np.testing.assert_allclose(
        exact(dpadded[:, :70])[0], exact(dlogits)[0], atol=unit(dtype), rtol=1e-5
    )
    assert not np.any(exact(dpadded[:, 70:])[0])


@SETS
@TYPES
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_values_stay_finite(kernels, dtype, size):
    logits = jnp.zeros((3, 5), dtype).at[:, 2].set(size)
    targets = jnp.array([2, 0, -1], jnp.int32)
    nll, (dlogits,) = pull(lambda x: kernels.cross_entropy(x, targets), (logits,), jnp.ones(3))
    top = float(logits[0, 2])
    want = [0, top, 0] if size > 0 else [-top + np.log(4), np.log(4), 0]
    np.testing.assert_allclose(nll, want, rtol=1e-6)
    assert np.isfinite(exact(dlogits)[0]).all()

    if size < 0:
        return
    q = jnp.full((H, T, D), 100, dtype)
    k, v = jnp.sign(normal(0, H, T, D, dtype=dtype)) * size / 100, normal(1, H, T, D, dtype=dtype)
    y, grads = pull(functools.partial(kernels.attention, scale=1.0), (q, k, v), v)
    assert all(np.isfinite(exact(x)[0]).all() for x in (y, *grads))

    x = normal(2, 4, D, dtype=dtype) * size
    for f in (
        lambda x: kernels.rms_norm(x, jnp.ones(D), EPS),
        lambda x: kernels.layer_norm(x, jnp.ones(D), None, EPS),
    ):
        y, grads = pull(f, (x,), x)
        assert all(np.isfinite(exact(a)[0]).all() for a in (y, *grads))
    y, _ = pull(lambda x: kernels.layer_norm(x, jnp.ones(D), None, EPS), (x * 0,), x)
    assert not np.any(exact(y)[0])


def test_attention_dropout_keeps_the_mean_and_the_key():
    q, k, v = (normal(i, B * H, T, D) for i in range(3))
    f, g = (
        jax.jit(functools.partial(kernels.attention, q, k, v, scale=0.3, dropout=0.5))
        for kernels in (primitives.plain, primitives.cpu)
    )
    np.testing.assert_array_equal(f(key=jax.random.key(1)), g(key=jax.random.key(1)))
    draws = np.stack([f(key=key) for key in jax.random.split(jax.random.key(0), 400)])
    error = draws.mean(0) - primitives.plain.attention(q, k, v, scale=0.3)
    assert np.all(np.abs(error) < 6 * draws.std(0) / np.sqrt(len(draws)) + 1e-6)
    assert draws.std(0).max() > 0.1


@TYPES
def test_weights_and_activations_may_be_transposes(dtype):
    """XLA folds a transpose into the product; some folded forms have no kernel on CPU."""
    for N, I, O in [(8, 4, 6), (7, 16, 1), (2, 2, 2), (64, 65, 32), (1, 1, 1)]:  # noqa: E741
        xT, wT = normal(0, I, N, dtype=dtype), normal(1, O, I)
        g = normal(2, N, O, dtype=dtype)
        y, (dxT, dwT) = pull(lambda xT, wT: primitives.cpu.dense(xT.T, wT.T), (xT, wT), g)
        want, (dx, dw) = pull(primitives.cpu.dense, (xT.T, wT.T), g)
        bound = unit(dtype)
        for got, value in ((y, want), (dxT.T, dx), (dwT.T, dw)):
            value = exact(value)[0]
            close(got, value, 2 * bound * np.abs(value))


# --- Transformations ----------------------------------------------------------------------------


def block(kernels, w, h_NxD, starts_BxT):
    """A layer that uses every primitive but the loss; H heads of D / H channels, here D = 6."""
    N, width = h_NxD.shape
    length = starts_BxT.shape[1]
    x = kernels.layer_norm(h_NxD, w["scale"], w["bias"], EPS).astype(w["dtype"].dtype)

    def heads(y):
        y = y.reshape(N // length, length, H, width // H).transpose(0, 2, 1, 3)
        return y.reshape(-1, length, width // H)

    q, k, v = (heads(kernels.dense(x, w[name])) for name in "qkv")
    o = kernels.attention(q, k, v, scale=0.5, first_key_BxT=starts_BxT)
    o = o.reshape(N // length, H, length, width // H).transpose(0, 2, 1, 3).reshape(N, width)
    h_NxD = h_NxD + kernels.dense(o, w["o"]).astype(h_NxD.dtype)
    x = kernels.rms_norm(h_NxD, w["scale"], EPS).astype(w["dtype"].dtype)
    return h_NxD + jax.nn.gelu(kernels.dense(x, w["o"])).astype(h_NxD.dtype)


def weights(dtype, *stack: int):
    w = {name: normal(i, *stack, 6, 6) for i, name in enumerate("qkvo")}
    w |= {"scale": 1 + normal(8, *stack, 6), "bias": normal(9, *stack, 6)}
    return w | {"dtype": jnp.zeros(stack, dtype)}  # says which type products are computed in


def network(kernels, w, h_NxD, starts_BxT, targets_N, wrap=lambda f: f, scan=True):
    layer_step = wrap(lambda h, layer: (block(kernels, layer, h, starts_BxT), None))
    if scan:
        h_NxD, _ = jax.lax.scan(layer_step, h_NxD, w)
    else:
        for i in range(len(w["q"])):
            h_NxD, _ = layer_step(h_NxD, jax.tree.map(lambda x, i=i: x[i], w))
    logits = kernels.dense(h_NxD.astype(w["dtype"].dtype), w["q"][0])
    return kernels.cross_entropy(logits, targets_N).sum()


STARTS = jnp.array([[0] * 4 + [4] * 4] * 2, jnp.int32)
TARGETS = jnp.array([0, 1, -1, 5] * 4, jnp.int32)


def gradients(kernels, dtype, **options):
    f = functools.partial(network, kernels, **options)
    args = weights(dtype, 2), normal(20, 16, 6), STARTS, TARGETS
    return jax.jit(jax.value_and_grad(lambda *a: f(*a), argnums=(0, 1)))(*args)


def assert_trees(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = exact(a, b)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max() + 1e-12)


def test_scan_and_checkpoint_change_nothing():
    f32 = jnp.float32
    want = gradients(primitives.plain, f32, scan=False)
    assert_trees(gradients(primitives.cpu, f32, scan=False, wrap=jax.checkpoint), want, 5e-6)
    assert_trees(gradients(primitives.cpu, f32), want, 5e-6)
    # One program may fuse what another rounds, so in bfloat16 a few roundings may differ.
    want = gradients(primitives.cpu, jnp.bfloat16, scan=False)
    assert_trees(gradients(primitives.cpu, jnp.bfloat16, wrap=jax.checkpoint), want, 16 * U)


@TYPES
def test_vmap_is_a_loop(dtype):
    K = 3
    w, h = weights(dtype, K, 1), normal(20, K, 16, 6)
    g = jax.jit(jax.grad(functools.partial(network, primitives.cpu)))
    want = [g(jax.tree.map(lambda x, i=i: x[i], w), h[i], STARTS, TARGETS) for i in range(K)]
    got = jax.jit(jax.vmap(g, (0, 0, None, None)))(w, h, STARTS, TARGETS)
    rtol = 5e-6 if dtype == jnp.float32 else 16 * U
    assert_trees(got, jax.tree.map(lambda *x: jnp.stack(x), *want), rtol)


def test_second_derivatives():
    """A penalty on the gradient at the input, as the two-pass form of MUR has it."""

    def penalty(w, kernels):
        g = jax.grad(lambda h: network(kernels, w, h, STARTS, TARGETS))(normal(20, 16, 6))
        return jnp.sum(g**2)

    w = weights(jnp.float32, 1)
    want, got = (
        jax.jit(jax.grad(penalty), static_argnums=1)(w, k)
        for k in (primitives.plain, primitives.cpu)
    )
    assert_trees(got, want, 2e-5)


def sharded():
    """Run in its own process: gradients on 8 devices, by jit and by shard_map, against one."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for dtype, rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 16 * U)):
        w, h = weights(dtype, 1), normal(20, 64, 6)
        starts, targets = jnp.tile(STARTS, (4, 1)), jnp.tile(TARGETS, 4)
        g = jax.jit(jax.grad(functools.partial(network, primitives.cpu), argnums=(0, 1)))
        want = g(w, h, starts, targets)
        matrix = NamedSharding(mesh, P(None, None, "tensor"))
        put = {k: jax.device_put(x, matrix) if x.ndim == 3 else x for k, x in w.items()}
        batch = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (h, starts, targets)]
        assert_trees(jax.device_get(g(put, *batch)), want, rtol)

        def part(w, *batch):
            dw, dh = jax.grad(functools.partial(network, primitives.cpu), argnums=(0, 1))(w, *batch)
            return jax.lax.psum(dw, ("data",)), dh

        specs = {"in_specs": (P(), P("data"), P("data"), P("data")), "check_vma": False}
        mapped = jax.shard_map(part, mesh=mesh, out_specs=(P(), P("data")), **specs)
        assert_trees(jax.jit(mapped)(w, h, starts, targets), want, rtol)
    print("sharded: ok")


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    code = (
        f"import jax, sys; sys.path[:0] = {sys.path!r}; jax.config.update('jax_platforms', 'cpu')\n"
        "jax.config.update('jax_num_cpu_devices', 8)\n"
        "from tests import test_ops; test_ops.sharded()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sharded: ok" in done.stdout, done.stderr[-2000:]
