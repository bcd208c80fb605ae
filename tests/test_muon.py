"""Muon: singular values, invariances, optax's implementation as an oracle, and who goes where."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build, param, parametrization
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import muon, schedules
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import rules_as_json, update_rules
from lmscale_jax.train import aot

RANGES = {"quintic": (0.68, 1.21), "polar_express": (0.85, 1.15), "stable": (0.999, 1.001)}


def config_and_model(**changes):
    """A small resolved config and its model."""
    config = base.get_config()
    sizes = {"model.n_layers": 3, "model.d_model": 16, "model.n_heads": 2, "optim.name": "muon"}
    config.update_from_flattened_dict(sizes | {k.replace("__", "."): v for k, v in changes.items()})
    config = resolve(config, 20)
    return config, build.build_model(config, platform="cpu")


def spectra(x) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def random_like(params, seed=0):
    chance = np.random.default_rng(seed)
    return param.map_named(lambda _, x: jnp.asarray(chance.normal(size=x.shape), x.dtype), params)


def conditioned(m, n, smallest, seed=0):
    """A matrix whose singular values go from `smallest` of its Frobenius norm upwards."""
    chance = np.random.default_rng(seed)
    u, v = (np.linalg.qr(chance.normal(size=(k, k)))[0] for k in (m, n))
    values = np.geomspace(smallest, 1.0, m)
    values[-1] = math.sqrt(1 - (values[:-1] ** 2).sum()) if (values[:-1] ** 2).sum() < 1 else 1
    x = (u * (values / np.sqrt((values**2).sum()))) @ v[:m]
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RANGES)
def test_singular_values_end_in_their_range(name, dtype):
    """The image of [0.002, 1]: scalars first, then matrices of known spectrum."""
    low, high = RANGES[name]
    iteration = muon.COEFFICIENTS[name]
    s = np.geomspace(2e-3 / iteration.margin, 1 / iteration.margin, 2000)
    for a, b, c in iteration.steps:
        s = a * s + b * s**3 + c * s**5
    assert low <= s.min() and s.max() <= high
    # Rounding to bfloat16, 2^-8 of a step's largest term, is not part of the map.
    slack = 0.0 if dtype == "float32" else 0.06
    x = jnp.stack([conditioned(16, 32, 3e-3, seed) for seed in range(4)])
    singular = spectra(muon.newton_schulz(3.0 * x, name, jnp.dtype(dtype)).astype(jnp.float32))
    assert low - slack <= singular.min() and singular.max() <= high + slack


@pytest.mark.parametrize("name", ["quintic", "polar_express"])
def test_random_matrices(name):
    """Square ones have singular values near 0 which stay small; rectangular ones have none."""
    low, high = RANGES[name]
    chance = np.random.default_rng(0)
    square = jnp.asarray(chance.normal(size=(1, 256, 256)), jnp.float32)
    wide = jnp.asarray(chance.normal(size=(1, 256, 1024)), jnp.float32)
    middle, width = {"quintic": (0.92, 0.05), "polar_express": (1.01, 0.03)}[name]
    for x in (square, wide):
        out = muon.newton_schulz(x, name, jnp.float32)
        singular = spectra(out)
        inside = (singular >= low) & (singular <= high)
        assert singular.max() <= high and inside.mean() >= 0.97
        rms = math.sqrt(float(jnp.square(out).mean())) * math.sqrt(x.shape[2])
        assert abs(rms - middle) <= width
        assert inside.all() or x is square
        # The singular vectors stay those of x.
        u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
        inner = np.einsum("bmi,bmn,bin->bi", u, np.asarray(out, np.float64), v)
        assert np.abs(inner - singular).max() < 0.6 and (inner > 0).all()


def test_bfloat16_is_near_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 256)), jnp.float32)
    for name in RANGES:
        exact, rounded = (
            np.asarray(muon.newton_schulz(x, name, jnp.dtype(d)), np.float32)
            for d in ("float32", "bfloat16")
        )
        assert np.linalg.norm(rounded - exact) < 0.04 * np.linalg.norm(exact), name


def test_scale_of_the_gradient_does_not_matter():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 24)), jnp.float32)
    alone = muon.newton_schulz(x, "polar_express", jnp.float32)
    for scale in (1e-6, 1e6):
        other = muon.newton_schulz(scale * x, "polar_express", jnp.float32)
        np.testing.assert_allclose(alone, other, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "more"), [("muon", {}), ("normuon", {"optim__muon_neurons": "longer"})]
)
def test_transposed_matrices_get_the_transposed_update(name, more):
    """A wide and a tall matrix in one model, and both in one batch."""
    config, _ = config_and_model(
        optim__name=name, optim__muon_scale="kj", optim__momentum_warmup="0", **more
    )
    specs = {
        "wide": param.Spec(("layers", "embed", "mlp"), (3, 8, 24), 1, "hidden"),
        "tall": param.Spec(("layers", "mlp", "embed"), (3, 24, 8), 1, "hidden"),
    }
    rows = update_rules(parametrization.param_rules(specs, specs, config), config)
    transform = OPTIMIZERS[name].direction(config, rows, None, "cpu")
    wide = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 24)), jnp.float32)
    grads = {"wide": wide, "tall": wide.swapaxes(1, 2)}
    out, _ = jax.jit(transform.update)(grads, transform.init(grads), step=0)
    scales = rows["wide"].update_scale, rows["tall"].update_scale
    assert scales == (math.sqrt(3), 1.0)
    np.testing.assert_allclose(
        out["wide"] / scales[0], out["tall"].swapaxes(1, 2) / scales[1], atol=1e-6
    )


@pytest.mark.parametrize(("name", "unit"), [("muon", "matrix"), ("normuon", "head")])
def test_no_gradient_no_update(name, unit):
    config, model = config_and_model(
        optim__name=name,
        optim__muon_unit=unit,
        optim__weight_decay=0.0,
        optim__muon_dtype="bfloat16",
    )
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    transform = optim.build_optimizer(config, model.param_rules)
    grads = jax.tree.map(np.zeros_like, params)
    state = jax.jit(transform.init)(params)
    updates, _ = jax.jit(transform.update)(grads, state, params, step=50)
    assert all(not np.asarray(u).any() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("kind", [{}, {"model__n_kv_heads": 1, "model__mlp": "swiglu"}])
def test_the_first_step_is_that_of_optax(kind):
    """float32, the standard coefficients, t = 1, sqrt(max(1, out/in)); optax is told the axes."""
    config, model = config_and_model(
        optim__muon_coefficients="quintic", optim__muon_scale="kj", optim__momentum_warmup="0",
        **kind,
    )  # fmt: skip
    rules_by_path = update_rules(model.param_rules, config)
    rows = {path: rule for path, rule in rules_by_path.items() if rule.optimizer == "muon"}
    params = {path: jnp.zeros(row.spec.shape) for path, row in rows.items()}
    grads = random_like(params)
    dims = {
        path: contrib.MuonDimensionNumbers(
            tuple(range(1, 1 + row.spec.n_in)), tuple(range(1 + row.spec.n_in, len(row.spec.axes)))
        )
        for path, row in rows.items()
    }
    theirs = contrib.muon(1.0, muon_weight_dimension_numbers=dims)
    wanted, _ = jax.jit(theirs.update)(grads, jax.jit(theirs.init)(params), params)
    ours = muon.scale_by_muon(rows, config)
    updates, _ = jax.jit(ours.update)(grads, ours.init(params), step=0)
    for path in rows:
        np.testing.assert_allclose(updates[path], -wanted[path], atol=2e-5, err_msg=path)


def test_momentum_is_nesterovs_and_warms_up():
    config, model = config_and_model(optim__momentum_warmup="4", train__steps=100)
    assert [float(schedules.momentum_schedule(config)(t)) for t in (0, 2, 4, 50)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95]
    )
    path = "blocks/mlp/up/weight"
    rows = {path: update_rules(model.param_rules, config)[path]}
    transform = muon.scale_by_muon(rows, config)
    update = jax.jit(transform.update)
    params = {path: jnp.zeros(rows[path].spec.shape)}
    state, m = transform.init(params), np.zeros(rows[path].spec.shape)
    for t in range(3):
        grads = random_like(params, seed=t)
        updates, state = update(grads, state, step=t)
        b, g = 0.85 + 0.1 * t / 4, np.asarray(grads[path], np.float64)
        m = b * m + (1 - b) * g
        ahead = b * m + (1 - b) * g
        np.testing.assert_allclose(state.momentum[path], m, atol=1e-6)
        wanted = muon.newton_schulz(jnp.asarray(ahead, jnp.float32), "polar_express", jnp.float32)
        np.testing.assert_allclose(updates[path] / 2, wanted, atol=1e-4)  # sqrt(64 / 16)


def test_normuon_evens_out_the_neurons():
    """Every neuron ends with the same mean square after one step; the Frobenius norm stays."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 24)), jnp.float32)
    y, squares = muon.normalize_neurons(x, jnp.zeros((2, 24)), 0.9, axis=2)
    np.testing.assert_allclose(squares, 0.1 * np.square(x).mean(axis=1), rtol=1e-5)
    mean = np.square(y).mean(axis=1)
    np.testing.assert_allclose(mean, np.broadcast_to(mean[:, :1], mean.shape), rtol=1e-4)
    norms = [np.linalg.norm(np.asarray(z), axis=(1, 2)) for z in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    # A square matrix has its neurons along fan-out, the last axis.
    spec = param.Spec(("layers", "embed", "heads", "head_dim"), (3, 16, 2, 8), 1, "hidden")
    layout = muon.as_matrices(spec, "matrix")
    assert layout.split(jnp.zeros(spec.shape)).shape == (3, 16, 16)
    assert layout.order == (0, 1, 2, 3)


@pytest.mark.parametrize("neurons", ["output", "longer"])
def test_normuon_is_that_of_its_paper(neurons):
    """Algorithm 1 of arXiv 2510.05491 in NumPy, three steps: wide, tall and square matrices, and
    keys of fewer heads. "longer" evens out the longer side, which differs for tall ones."""
    config, model = config_and_model(
        optim__name="normuon", optim__muon_neurons=neurons, optim__momentum_warmup="0",
        optim__muon_coefficients="stable", model__n_kv_heads=1,
    )  # fmt: skip
    rules = update_rules(model.param_rules, config)
    rows = {path: rule for path, rule in rules.items() if rule.optimizer == "normuon"}
    zeros = {path: jnp.zeros(row.spec.shape) for path, row in rows.items()}
    transform = OPTIMIZERS["normuon"].direction(config, rows, None, "cpu")
    state, update = transform.init(zeros), jax.jit(transform.update)
    moments, squares = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    for t in range(3):
        grads = random_like(zeros, t)
        updates, state = update(grads, state, step=t)
        for path, row in rows.items():
            g = np.asarray(grads[path], np.float64).reshape(3, row.spec.fan_in, row.spec.fan_out)
            moments[path] = 0.95 * moments[path] + 0.05 * g
            left, _, right = np.linalg.svd(0.95 * moments[path] + 0.05 * g, full_matrices=False)
            orthogonal = left @ right  # [layers, fan_in, fan_out]
            tall = row.spec.fan_in > row.spec.fan_out
            along = 2 if neurons == "longer" and tall else 1  # the axis of a neuron's weights
            mean = np.square(orthogonal).mean(axis=along, keepdims=True)
            squares[path] = 0.95 * squares[path] + 0.05 * mean
            even = orthogonal / np.sqrt(squares[path])
            norms = [np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (orthogonal, even)]
            wanted = row.update_scale * even * norms[0] / norms[1]
            ours = np.asarray(updates[path]).reshape(wanted.shape)
            np.testing.assert_allclose(ours, wanted, atol=2e-3, err_msg=path)
    tall = {path.split("/")[-2] for path, r in rows.items() if r.spec.fan_in > r.spec.fan_out}
    assert tall == {"down", "key", "value"}


def test_each_head_on_its_own():
    config, model = config_and_model(optim__muon_unit="head", optim__momentum_warmup="0")
    rules_by_path = update_rules(model.param_rules, config)
    rows = {p: rule for p, rule in rules_by_path.items() if rule.optimizer == "muon"}
    grads = random_like({path: jnp.zeros(row.spec.shape) for path, row in rows.items()})
    transform = muon.scale_by_muon(rows, config)
    updates, _ = jax.jit(transform.update)(grads, transform.init(grads), step=0)
    query = np.asarray(updates["blocks/attention/query/weight"])  # [layers, embed, heads, head_dim]
    out = np.asarray(updates["blocks/attention/out/weight"])  # [layers, heads, head_dim, embed]
    for layer in range(3):
        for head in range(2):
            for matrix in (query[layer, :, head], out[layer, head]):
                values = spectra(matrix)
                assert values.min() > 0.8 and values.max() < 1.15
    whole = spectra(query.reshape(3, 16, 16))
    assert whole.max() > 1.2


# The optimizer of what is no hidden matrix.
OTHERS = {name: entry.others or name for name, entry in OPTIMIZERS.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_parameter_is_in_one_group(name, head):
    config, model = config_and_model(optim__name=name, model__head=head, model__bias=True)
    rules_by_path = update_rules(model.param_rules, config)
    shares = {path: rule.optimizer for path, rule in rules_by_path.items()}
    for path, row in model.param_rules.items():
        matrix = row.spec.role == "hidden"
        assert shares[path] == (name if matrix else OTHERS[name]), path
        assert matrix == (path.startswith("blocks/") and path.endswith("weight"))
    assert shares["embed/tokens"] == shares["embed/positions"] == OTHERS[name]
    # Each parameter's moments are kept once: as many arrays of its shape as its optimizer needs.
    assert aot.optimizer_moments(config, model) == {
        path: {"adamw": 2}.get(rule.optimizer, 1) for path, rule in rules_by_path.items()
    }
    table = {
        entry["path"]: entry["optimizer"] for entry in rules_as_json(model.param_rules, config)
    }
    assert table == shares


@pytest.mark.parametrize("scale", ["spectral", "kj", "moonlight"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_learning_rate_factors_keep_the_spectral_condition(scale, m):
    """Scale times factor must grow like sqrt(out/in); never Adam's 1/m."""
    config, model = config_and_model(
        parametrization__name="mup", parametrization__base_width=16, model__d_model=16 * m,
        model__n_heads=2 * m, optim__muon_scale=scale, optim__momentum_warmup="0",
    )  # fmt: skip
    for path, update in update_rules(model.param_rules, config).items():
        if update.optimizer != "muon":
            assert update.update_scale == 1.0, path
            continue
        norm, at_base = (
            muon.SCALES[scale](spec) * math.sqrt(spec.fan_in / spec.fan_out)
            for spec in (update.spec, model.param_rules[path].base)
        )
        assert update.lr_factor * norm == pytest.approx(at_base), path
        wanted = m**-0.5 if scale == "moonlight" else 1.0
        assert update.lr_factor == pytest.approx(wanted), path
        assert update.eps_factor == 1.0


def test_heads_of_their_own_lower_the_rate_as_heads_are_added():
    config, model = config_and_model(
        parametrization__name="mup", parametrization__base_width=16, model__d_model=64,
        model__n_heads=8, optim__muon_unit="head",
    )  # fmt: skip
    by_path = update_rules(model.param_rules, config)
    assert by_path["blocks/attention/query/weight"].lr_factor == pytest.approx(0.5)
    assert by_path["blocks/mlp/up/weight"].lr_factor == 1.0


def test_cautious_decay_only_helps_the_update():
    for where in ("everywhere", "cautious"):
        config, model = config_and_model(
            optim__decay_where=where, optim__weight_decay=0.1, optim__clip=0.0
        )
        params = random_like(jax.eval_shape(model.init, jax.random.key(0)), seed=1)
        transform = optim.build_optimizer(config, model.param_rules)
        grads, state = random_like(params), jax.jit(transform.init)(params)
        with_decay, _ = jax.jit(transform.update)(grads, state, params, step=500)
        config.unlock()
        config.optim.weight_decay = 0.0
        transform = optim.build_optimizer(config, model.param_rules)
        without, _ = jax.jit(transform.update)(grads, state, params, step=500)
        s = float(schedules.make_schedule(config)(500))
        for path, p in param.named(params).items():
            u, w = param.named(with_decay)[path], param.named(without)[path]
            helps = (np.asarray(w) * np.asarray(p) <= 0) | (where == "everywhere")
            wanted = w - 0.1 * s * update_rules(model.param_rules, config)[path].decay * p * helps
            np.testing.assert_allclose(u, wanted, atol=1e-6, err_msg=path)
