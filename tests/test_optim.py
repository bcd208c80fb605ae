"""Schedules and AdamW against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build, param
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules


def resolved(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(
        {"model.n_layers": 2, "model.d_model": 16, "model.n_heads": 2}
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return resolve(config, 20)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_values(name):
    changes = {"schedule__name": name, "train__steps": 100, "schedule__warmup": "10"}
    if name == "wsd":
        changes["schedule__cooldown"] = "25%"
    config = resolved(**changes)
    ours = np.array([float(schedules.make_schedule(config)(s)) for s in range(100)])
    for s in range(100):
        if s < 10:
            wanted = (s + 1) / 10
        elif name == "constant":
            wanted = 1.0
        elif name == "wsd":
            wanted = 1.0 if s < 75 else 1 - 0.9 * (s - 75) / 25
        elif name == "linear":
            wanted = 1 - 0.9 * (s - 10) / 90
        else:
            wanted = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (s - 10) / 90))
        assert ours[s] == pytest.approx(wanted, abs=1e-6), s
    assert ours == pytest.approx(
        np.array(schedules.make_schedule(config, np)(np.arange(100))), abs=1e-6
    )


def test_durations():
    for text, steps in (("20", 20), ("10%", 50), ("20 steps", 20), ("5k tokens", 5),
                        ("0.1M tokens", 100), ("1.5k tokens", 2), ("0", 0)):  # fmt: skip
        config = resolved(
            train__steps=500, train__batch_size=10, data__seq_len=100, schedule__warmup=text
        )
        assert config.schedule.warmup == steps, text


@pytest.mark.parametrize("mode", ["independent", "coupled"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("decay_on", ["matrices", "hidden", "all"])
def test_adamw_equals_its_definition(mode, clip, decay_on):
    """Ten steps of the textbook recursion in numpy float64, every parameter on its own."""
    config = resolved(
        optim__decay_mode=mode, optim__clip=clip, optim__weight_decay=0.1, optim__lr=0.01,
        optim__decay_on=decay_on, train__steps=20, model__bias=True,
    )  # fmt: skip
    model = build.build_model(config, platform="cpu")
    transform = optim.build_optimizer(config, model.param_rules)
    params = model.init(jax.random.key(0))
    state = transform.init(params)
    theirs = {k: np.asarray(v, np.float64) for k, v in param.named(params).items()}
    moments = {k: (0.0, 0.0) for k in theirs}
    factor = schedules.make_schedule(config, np)
    chance = np.random.default_rng(0)
    for step in range(10):
        grads = param.map_named(
            lambda _, x: jnp.asarray(chance.normal(size=x.shape), jnp.float32), params
        )
        updates, state = transform.update(grads, state, params, step=jnp.int32(step))
        params = optim.apply_updates(params, updates)
        flat = {k: np.asarray(v, np.float64) for k, v in param.named(grads).items()}
        norm = np.sqrt(sum((g**2).sum() for g in flat.values()))
        for path, g in flat.items():
            g = g * min(1.0, clip / norm) if clip else g
            m, v = moments[path]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            moments[path] = m, v
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            lr = 0.01 * float(factor(step))
            matrix = path.endswith(("weight", "tokens", "positions"))
            hidden = path.startswith("blocks/") and path.endswith("weight")
            decays = {"matrices": matrix, "hidden": hidden, "all": True}[decay_on]
            shrink = (lr if mode == "coupled" else float(factor(step))) * 0.1 * decays
            theirs[path] -= lr * m_hat / (np.sqrt(v_hat) + 1e-8) + shrink * theirs[path]
    for path, values in param.named(params).items():
        np.testing.assert_allclose(values, theirs[path], rtol=2e-5, atol=2e-7, err_msg=path)
