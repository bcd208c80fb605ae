"""The parametrization table against its formulas, and its identity at the base size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmscale_jax.config.keys import keys
from lmscale_jax.config.optim_keys import OPTIM
from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.model import build
from lmscale_jax.model import parametrization as rules
from lmscale_jax.model.parametrization import SCHEMES, Ratios
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import rules_as_json, update_rules

LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "head": "untied"}


def make(name="mup", vocab=40, **changes):
    config = base.get_config()
    changes = {"model__d_model": 128, "model__n_heads": 4, "model__n_layers": 4} | changes
    if name != "sp":
        changes = {"parametrization__base_width": 64} | changes
    if name == "completep":
        changes = {"parametrization__base_depth": 2} | changes
    config.parametrization.name = name
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    config = resolve(config, vocab)
    return config, build.build_model(config, platform="cpu")


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("m_L", [1, 2])
def test_every_class_gets_its_row(m, m_L):
    """mup for AdamW with CompleteP's depth rules: Yang et al. table 8, Dey et al. table 1."""
    config, model = make(
        "completep", model__d_model=64 * m, model__n_heads=2 * m, model__n_layers=2 * m_L,
        model__bias=True, model__head="untied",
    )  # fmt: skip
    depth_std = 0.02 / math.sqrt(2 * 2)
    wanted = {
        "embed/tokens": (0.02, 1, 1, 1 / m),
        "embed/positions": (0.02, 1, 1, 1 / m),
        "blocks/attention/query/weight": (0.02 / m**0.5, 1, 1 / m, 1 / m / m_L),
        "blocks/attention/out/weight": (depth_std / m**0.5, 1 / m_L, 1 / m, 1 / m / m_L),
        "blocks/mlp/down/weight": (depth_std / m**0.5, 1 / m_L, 1 / m, 1 / m / m_L),
        "blocks/mlp/up/bias": (0, 1, 1, 1 / m / m_L),
        "blocks/mlp_norm/scale": (0, 1, 1, 1 / m / m_L),
        "readout/norm/scale": (0, 1, 1, 1 / m),
        "readout/weight": (0.02, 1 / m, 1, 1 / m),
    }
    updates = update_rules(model.param_rules, config)
    for path, (std, multiplier, lr, eps) in wanted.items():
        row = model.param_rules[path]
        assert row.init_std == pytest.approx(std), path
        assert row.multiplier == pytest.approx(multiplier), path
        update = updates[path]
        assert (update.lr_factor, update.eps_factor) == pytest.approx((lr, eps)), path
    scales = rules.forward_scales(config)
    assert scales == pytest.approx((1, 1 / m, 1 / m_L, 32**-0.5, 1 / m))
    for mode in ("independent", "coupled"):
        with config.unlocked():
            config.optim.decay_mode = mode
        for entry in rules_as_json(model.param_rules, config):
            decays = entry["role"] != "vector"
            assert entry["wd_factor"] * entry["lr_factor"] == pytest.approx(1.0 if decays else 0.0)


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_parts_of_blocks_follow_depth_by_their_place(gate):
    """With a branch multiplier of m_L^-1/2: rates m_L^-1/2 in branches, none for skips' weights."""
    config, model = make(
        "completep", model__n_layers=8, model__attn_gate=gate, model__value_embeddings=1,
        model__x0_mix="learned", parametrization__depth_exponent=0.5,
    )  # fmt: skip
    rows = update_rules(model.param_rules, config)
    gate_row = {"headwise": (1 / 2, 1 / 8), "elementwise": (1 / 4, 1 / 4)}[gate]
    wanted = {
        "blocks/attention/gate/weight": gate_row,
        "blocks/attention/value_share": (1 / 2, 1 / 2),
        "embed/values": (1 / 2, 1 / 4),
        "blocks/stream_share": (1, 1),
        "embed/tokens": (1, 1 / 2),
    }
    for path, (lr, eps) in wanted.items():
        row = rows[path]
        assert (row.lr_factor, row.eps_factor) == pytest.approx((lr, eps)), path


@pytest.mark.parametrize("m", [1, 2, 4])
def test_factors_of_the_other_optimizers(m):
    def lr(optimizer, role, m_in, m_out):
        name = OPTIMIZERS[optimizer].others if role != "hidden" else None
        return OPTIMIZERS[name or optimizer].lr_factor(Ratios(role, m_in, m_out))

    assert lr("sgd", "input", 1, m) == m and lr("sgd", "vector", 1, m) == m
    assert lr("sgd", "hidden", m, m) == 1 and lr("sgd", "hidden", 1, m) == m
    assert lr("sgd", "output", m, 1) == m
    # Never Adam's 1/m on a matrix that Muon orthogonalises.
    assert lr("muon", "hidden", m, m) == 1 and lr("muon", "output", m, 1) == 1


def test_real_shapes_decide():
    """Grouped keys, a rounded d_ff and a given one: each matrix by its own fans."""
    config, model = make(**{f"model__{k}": v for k, v in LLAMA.items()}, model__n_kv_heads=2)
    assert (config.model.d_ff, config.parametrization.base_d_ff) == (320, 192)
    down, key = (
        model.param_rules["blocks/mlp/down/weight"],
        model.param_rules["blocks/attention/key/weight"],
    )
    update = update_rules(model.param_rules, config)["blocks/mlp/down/weight"]
    assert down.ratios.m_in == 320 / 192 and update.lr_factor == 192 / 320
    assert (key.base.fan_out, key.spec.fan_out) == (32, 64) and key.ratios.m_in == 2
    config, model = make(model__d_ff=300)
    assert config.parametrization.base_d_ff == 150
    # Heads of another size instead of more heads: the scores fall as 1/d.
    config, _ = make(parametrization__base_head_dim=16, model__n_heads=4)
    assert config.model.head_dim == 32
    assert rules.forward_scales(config).attention == pytest.approx(16**0.5 / 32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mup", {}), ("completep", LLAMA | {"n_kv_heads": 2, "bias": True})],
)
def test_at_the_base_size_it_is_sp_to_the_bit(name, kind):
    same = {"parametrization__base_width": 32}
    if name == "completep":
        same["parametrization__base_depth"] = 1
    kind = {f"model__{k}": v for k, v in kind.items()}
    kind |= {"model__d_model": 32, "model__n_layers": 1}
    results = []
    for parametrization, more in (("sp", {}), (name, same)):
        config, model = make(parametrization, **kind, **more)
        transform = optim.build_optimizer(config, model.param_rules)
        params = jax.jit(model.init)(jax.random.key(0))
        state = jax.jit(transform.init)(params)
        ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 16)))

        @jax.jit
        def step(params, state, t, model=model, transform=transform, ids=ids):
            loss, grads = jax.value_and_grad(lambda p: model.losses(p, ids, ids).mean())(params)
            updates, state = transform.update(grads, state, params, step=t)
            return optim.apply_updates(params, updates), state, loss

        for t in range(3):
            params, state, loss = step(params, state, t)
        results.append((params, loss))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        assert np.array_equal(a, b)


def test_an_optimizer_is_one_entry(monkeypatch):
    """A new one gets the factors that its table prints: here direction g, divided by eps's."""
    entry = OPTIMIZERS["adamw"]._replace(
        direction=lambda config, rows, mesh, platform: optax.identity(),
        counts_steps=False,
    )
    monkeypatch.setitem(OPTIMIZERS, "plain", entry)
    choices = (*OPTIM["name"].choices, "plain")
    monkeypatch.setitem(OPTIM, "name", dataclasses.replace(OPTIM["name"], choices=choices))
    config, model = make(optim__name="plain", optim__clip=0.0, optim__weight_decay=0.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    transform = optim.build_optimizer(config, model.param_rules)
    updates, _ = jax.jit(transform.update)(ones, transform.init(ones), ones, step=500)
    rows = update_rules(model.param_rules, config)
    lr = float(np.abs(updates["embed"]["tokens"]).max()) * rows["embed/tokens"].eps_factor
    row = rows["blocks/mlp/up/weight"]
    assert row.eps_factor == 0.5
    update = float(np.abs(updates["blocks"]["mlp"]["up"]["weight"]).max())
    assert update == pytest.approx(lr * row.lr_factor / row.eps_factor, rel=1e-5)


def test_epsilon_has_its_factor():
    """Gradients near epsilon: the update must be that of Adam with epsilon times the factor."""
    config, model = make(optim__clip=0.0, optim__eps=1e-3, optim__weight_decay=0.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params, grads = (
        jax.tree.map(lambda x, value=value: np.full(x.shape, value, x.dtype), shapes)
        for value in (0.0, 1e-3)
    )
    transform = optim.build_optimizer(config, model.param_rules)
    state = jax.jit(transform.init)(params)
    updates, _ = jax.jit(transform.update)(grads, state, params, step=500)
    by_path = {}
    rules_paths = sorted(model.param_rules)
    for path in rules_paths:
        node = updates
        for part in path.split("/"):
            node = node[part]
        by_path[path] = float(np.abs(node).max())
    rows = update_rules(model.param_rules, config)
    lr = by_path["embed/tokens"] * (1 + rows["embed/tokens"].eps_factor)
    for path in rules_paths:
        row = rows[path]
        wanted = lr * row.lr_factor / (1 + row.eps_factor)
        assert by_path[path] == pytest.approx(wanted, rel=1e-4), path
    assert rows["blocks/mlp/up/weight"].eps_factor == 0.5


def named_schemes(path: str) -> set[str]:
    """The parametrizations with which a key is used."""
    return set(dict(keys())[path].when["parametrization.name"])


def test_the_sizes_of_a_base_are_used_by_the_schemes_that_need_them():
    for name in ("base_width", "base_depth"):
        needing = {scheme for scheme, entry in SCHEMES.items() if name in entry.base_keys}
        assert named_schemes(f"parametrization.{name}") == needing, "`when` in config/keys.py"
    relative = {scheme for scheme, entry in SCHEMES.items() if entry.has_base}
    for name in ("base_head_dim", "base_d_ff", "embed_scale", "output_scale", "control"):
        assert named_schemes(f"parametrization.{name}") == relative, name


def test_a_scheme_whose_base_is_not_used_is_refused(monkeypatch):
    monkeypatch.setitem(SCHEMES, "sp", SCHEMES["mup"])
    with pytest.raises(InputError, match=r"=0 must be given for 'sp'.*parametrization_keys\.py"):
        make("sp")


BAD = {
    "no base": ({"parametrization__base_width": 0}, ["base_width=0", "256"]),
    "no base depth": ({"name": "completep", "parametrization__base_depth": 0}, ["base_depth=0"]),
    "width and heads": ({"model__head_dim": 48}, ["model.d_model=128", "48", "use 144"]),
    "base and heads": ({"parametrization__base_width": 72}, ["base_width=72", "use 64"]),
    "base and groups": (
        {"parametrization__base_width": 32, "model__n_kv_heads": 1},
        ["base_width=32", "4 query heads", "use 128"],
    ),
    "unused under sp": ({"name": "sp", "parametrization__output_scale": 2.0}, ["unused", "'sp'"]),
}


@pytest.mark.parametrize(("changes", "parts"), BAD.values(), ids=BAD)
def test_bad_sizes_are_named(changes, parts):
    with pytest.raises(InputError) as caught:
        make(**changes)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
