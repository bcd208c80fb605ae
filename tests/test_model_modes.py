"""Every choice of a key of the model is in a table, and a choice that is not is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import make, tokens

from lmscale_jax.config.key import TABLES
from lmscale_jax.config.model_keys import MODEL
from lmscale_jax.data.batches import Batch
from lmscale_jax.errors import InputError
from lmscale_jax.evals import attention_stats, suites
from lmscale_jax.model import attention, build, costs, hf, memory  # noqa: F401
from lmscale_jax.model.mesh import make_mesh

KEYS = sorted(name for name, key in MODEL.items() if key.choices)


@pytest.mark.parametrize("name", KEYS)
def test_tables_have_exactly_the_choices_of_the_key(name):
    tables = TABLES[f"model.{name}"]
    assert tables
    for table in tables:
        assert set(table) == set(MODEL[name].choices), table.module


@pytest.mark.parametrize("name", KEYS)
def test_a_choice_without_an_implementation_is_refused(name):
    """Where other keys make it irrelevant too: gates, windows and softcaps are off here."""
    config = make()[0]
    with config.unlocked():
        config.model[name] = "new"
    pattern = rf"config\.model\.{name}='new' is declared but not implemented: [A-Z_0-9]+ in lmscale"
    with pytest.raises(InputError, match=pattern):
        build.build_model(config, platform="cpu")


def gates_of(monkeypatch, activation):
    """(statistics of the suite, gates) of a model whose gates have this activation."""
    monkeypatch.setitem(attention.ACTIVATIONS, "sigmoid", activation)
    config, model, params = make(attn_gate="headwise", gate_bias_init=-0.5)
    with config.unlocked():
        config.train.batch_size, config.mesh.cpu_devices = 1, 1
    mesh, ids = make_mesh(config, jax.devices()[:1]), np.asarray(tokens(2), np.int32)
    bounds = attention_stats.gate_range(config.model)
    statistics = attention_stats.evaluate_attention(
        attention_stats.make_attention_stats(model, mesh, bounds),
        params,
        [Batch(ids, ids)],
        mesh,
        bounds,
    )
    return statistics["gate"], model.taps(params, ids, lambda _, x: x)["blocks"]["gate"]


def test_gates_below_0_are_measured(monkeypatch):
    statistics, gate = gates_of(monkeypatch, attention.Activation(jnp.tanh, -1.0, 1.0))
    gate = np.asarray(gate).reshape(len(gate), -1)
    assert gate.mean() < -0.2
    np.testing.assert_allclose(statistics["mean"], gate.mean(axis=1), atol=0.006)
    np.testing.assert_allclose(statistics["p50"], np.median(gate, axis=1), atol=0.03)
    np.testing.assert_allclose(statistics["frac_below_0.1"], (gate < 0.1).mean(axis=1), atol=0.02)


def test_gates_without_bounds_are_refused(monkeypatch):
    identity = attention.Activation(lambda x: x, -math.inf, math.inf)
    monkeypatch.setitem(attention.ACTIVATIONS, "sigmoid", identity)
    with pytest.raises(InputError, match="gate_activation='sigmoid', whose gates have no bounds"):
        suites.check_suite(["attention"], make(attn_gate="headwise")[0].model)


@pytest.mark.parametrize("name", attention.ACTIVATIONS)
def test_gates_fill_the_range_that_their_entry_declares(name):
    """Statistics of gates count nothing outside of it."""
    entry = attention.ACTIVATIONS[name]
    gates = np.asarray(entry.apply(jnp.linspace(-30, 30, 601)))
    for end, bound in ((gates.min(), entry.low), (gates.max(), entry.high)):
        assert math.isinf(bound) or end == pytest.approx(bound, abs=0.01)
    assert entry.low <= gates.min() and gates.max() <= entry.high
