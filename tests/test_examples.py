"""The files of examples/: each trains, and does what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.keys import keys
from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.configs import base
from lmscale_jax.data.batches import Batch
from lmscale_jax.model import flops
from lmscale_jax.optim import schedules
from lmscale_jax.train import aot
from lmscale_jax.train.setup import TrainStep, build_setup

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "model.n_layers": 2, "model.d_model": 32, "model.n_heads": 2, "model.vocab_size": 64,
    "model.positions": "rope", "data.seq_len": 16, "train.batch_size": 8, "train.steps": 10,
    "schedule.warmup": "0", "optim.lr": 1e-2,
}  # fmt: skip
# Of each file: the key, the name, and settings with which it is small.
CASES = {
    "poly": ("model.mlp", "PolyMLP", {"own.poly.power": 3}),
    "differential": ("model.attention_module", "Differential", {}),
    "linear_block": ("model.block", "LinearBlock", {}),
    "signum": ("optim.name", "signum", {"optim.lr": 1e-3}),
    "zloss": ("objective.terms", "z_loss", {"own.zloss.weight": 0.1}),
    "inverse_sqrt": ("schedule.name", "inverse_sqrt", {}),
    "fan_in_init": ("parametrization.rule", "fan_in", {}),
    "leaky_shift": ("model.mlp", "LeakyShift", {}),
}


def config_of(file: str, **changes):
    """The resolved config of an example; keyword arguments have __ for dots."""
    key, name, settings = CASES[file]
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    overrides = SMALL | {key: f"{EXAMPLES}/{file}.py:{name}"} | settings | changes
    return resolve(apply_overrides(base.get_config(), overrides))


def batch_of(config) -> Batch:
    shape = config.train.batch_size, config.data.seq_len + 1
    ids = np.random.default_rng(0).integers(0, 64, shape, np.int32)
    targets = ids[:, 1:].copy()
    targets[0, 3:] = -1  # micro-batches have different numbers of targets
    return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(targets))


def train(config, steps: int) -> list[dict]:
    setup = build_setup(config, 0)
    state, take, metrics = setup.begin(), TrainStep(setup), []
    for _ in range(steps):
        state, values = take(state, batch_of(config))
        metrics.append(jax.device_get(values))
    return metrics


def test_every_file_is_tested_and_says_its_key():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)
    for file, (key, name, _) in CASES.items():
        assert (
            f'`{key} = here(__file__) + "{file}.py:{name}"`'
            in (EXAMPLES / f"{file}.py").read_text()
        ), file
    taking = {path for path, key in keys() if key.code}
    assert taking - {key for key, _, _ in CASES.values()} == {"model.norm"}


def test_they_import_the_api_alone():
    for path in EXAMPLES.glob("*.py"):
        assert set(re.findall(r"lmscale_jax[\w.]*(?= import)", path.read_text())) <= {
            "lmscale_jax.api"
        }, path


@pytest.mark.parametrize("file", CASES)
def test_it_learns_the_batch(file):
    losses = [m["train_loss"] for m in train(config_of(file, model__stack="scan"), 8)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("file", ["poly", "differential", "linear_block", "zloss", "leaky_shift"])
def test_accumulation_and_scan_do_not_change_it(file):
    last = [
        train(config_of(file, **changes), 2)[-1]
        for changes in ({}, {"train__accum": 2}, {"model__stack": "scan"})
    ]
    for other in last[1:]:
        for name in ("train_loss", "grad_norm"):
            np.testing.assert_allclose(other[name], last[0][name], rtol=1e-4)


def test_a_term_is_added_once_and_not_to_train_loss():
    """By its definition from the logits; also where micro-batches have unlike target counts."""
    plain = resolve(apply_overrides(base.get_config(), SMALL))
    setup, batch = build_setup(plain, 0), batch_of(plain)
    logits_BxTxV = setup.model.logits(setup.begin().params, batch.tokens_BxT)
    logz_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    expected = 0.1 * jnp.square(logz_BxT).mean(where=batch.targets_BxT >= 0)
    (without,) = train(plain, 1)
    for changes in ({}, {"train__accum": 4, "model__loss_chunk": 16}):
        (metrics,) = train(config_of("zloss", **changes), 1)
        np.testing.assert_allclose(metrics["term/z_loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["train_loss"], without["train_loss"], rtol=1e-6)
        assert abs(metrics["grad_norm"] / without["grad_norm"] - 1) > 1e-3


def _weights(products: list[tuple[int, int]]) -> float:
    return 2.0 * sum(a * b for a, b in products)


def test_flops_are_those_of_the_module():
    config, visible = config_of("differential"), (16 + 1) / 2
    parts = flops.forward_flops(config, build_setup(config, 0).model.specs)
    assert parts["attention"] == 2 * 3 * 2 * visible * 32
    # Six matrices of attention, two of the MLP.
    assert parts["dense"] == 2 * _weights([(32, 32)] * 6 + [(32, 128)] * 2)
    config = config_of("linear_block")
    parts = flops.forward_flops(config, build_setup(config, 0).model.specs)
    assert parts["attention"] == 2 * 2 * 2 * 16 * 32
    assert parts["dense"] == 2 * _weights([(32, 32)] * 4 + [(32, 128)] * 2)


def test_an_optimizer_has_rates_and_memory_of_its_own():
    config = config_of("signum", parametrization__name="mup", parametrization__base_width=16)
    setup = build_setup(config, 0)
    moments = aot.optimizer_moments(config, setup.model)
    assert moments["blocks/mlp/up/weight"] == 1 and moments["embed/tokens"] == 2
    state = setup.begin()
    new, _ = TrainStep(build_setup(config, 0))(state, batch_of(config))
    start = build_setup(config, 0).begin().params["blocks"]["mlp"]["up"]["weight"]
    change = np.asarray(new.params["blocks"]["mlp"]["up"]["weight"] - start)
    # The learning rate, halved at twice the base width as Adam's, and the decay.
    np.testing.assert_allclose(np.abs(change + 1e-4 * np.asarray(start)), 1e-3 / 2, rtol=1e-3)


def test_a_schedule_sees_warmup_and_length():
    config = config_of("inverse_sqrt", schedule__warmup="2", train__steps=100)
    factors = schedules.make_schedule(config, np)(np.arange(100))
    assert factors[0] == 0.5 and factors[10] == 1.0
    np.testing.assert_allclose(factors[40:], np.sqrt(10 / np.arange(40, 100)), rtol=1e-6)


def test_a_rule_sets_initial_values():
    model = build_setup(config_of("fan_in_init"), 0).model
    values = np.asarray(model.init(jax.random.key(0))["blocks"]["mlp"]["up"]["weight"])
    assert abs(values.std() * 32**0.5 - 1) < 0.05
    assert model.param_rules["embed/tokens"].init_std == 0.02


def test_the_leak_is_one():
    """Logits depend on later tokens in leaky_shift.py and in no other example."""

    def reach(file: str) -> float:
        model = build_setup(config_of(file), 0).model
        params = model.init(jax.random.key(0))
        ids = jnp.arange(16)[None]
        changed = ids.at[0, 9].set(40)
        difference = model.logits(params, ids) - model.logits(params, changed)
        return float(jnp.abs(difference[0, :9]).max())

    architectures = [file for file, (key, *_) in CASES.items() if key.startswith("model.")]
    assert {file for file in architectures if reach(file) > 0} == {"leaky_shift"}
