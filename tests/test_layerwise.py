"""Factors of blocks' updates, and blocks that do not learn."""

import jax
import numpy as np
import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, param
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import layerwise

OPTIMIZERS = ("adamw", "sgd", "lion", "muon", "normuon")


def config_and_model(n_layers=4, **changes):
    config = base.get_config()
    sizes = {"model.n_layers": n_layers, "model.d_model": 8, "model.n_heads": 2}
    sizes |= {"optim.weight_decay": 0.1, "train.steps": 40, "schedule.warmup": "1"}
    config.update_from_flattened_dict(sizes | {k.replace("__", "."): v for k, v in changes.items()})
    config = resolve(config, 12)
    return config, build.build_model(config, platform="cpu")


def random_like(params, seed):
    chance = np.random.default_rng(seed)
    return param.map_named(lambda _, x: chance.normal(size=x.shape).astype(x.dtype), params)


def start(config, model):
    """(params, state, update) of a config's optimizer, from drawn parameters."""
    transform = optim.build_optimizer(config, model.param_rules)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)), 99)
    return params, jax.jit(transform.init)(params), jax.jit(transform.update)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def stacked_state(state, n_layers: int) -> dict[str, np.ndarray]:
    """All that an optimizer remembers of the blocks, by where it is."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    key = jax.tree_util.DictKey("blocks")
    leaves_by_path = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves if key in p}
    assert leaves_by_path and all(x.shape[0] == n_layers for x in leaves_by_path.values())
    return leaves_by_path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_block_keeps_every_bit(name):
    """Its parameters, weight decay included, and all that the optimizer remembers of it."""
    config, model = config_and_model(optim__name=name, freeze__mode="fixed", freeze__blocks="1,3")
    params, state, update = start(config, model)
    # A negative zero shows whether 0 is added; what is not a number whether it is multiplied.
    params["blocks"]["mlp"]["up"]["weight"][1, 0, 0] = -0.0
    before = jax.tree.map(np.array, params)
    begin = stacked_state(state, 4)
    for t in range(3):
        grads = random_like(params, t)
        for g in jax.tree.leaves(grads["blocks"]):
            g[1] = np.nan
        updates, state = update(grads, state, params, step=t)
        params = jax.jit(optim.apply_updates)(params, updates)
    for path, x in param.named(params).items():
        old = param.named(before)[path]
        if path.startswith("blocks/"):
            same = [np.array_equal(bits(x[i]), bits(old[i])) for i in range(4)]
            assert same == [False, True, False, True], path
        else:
            assert not np.array_equal(x, old), path
    for where, x in stacked_state(state, 4).items():
        assert np.array_equal(x[[1, 3]], begin[where][[1, 3]]), where
        assert np.isfinite(x).all(), where
        assert not np.array_equal(x[0], begin[where][0]), where


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_late_block_learns_like_an_early_one(name):
    """What a block does from the step on at which it begins is what it does when it begins at 0."""
    late, model = config_and_model(
        n_layers=2, optim__name=name, freeze__mode="unfreeze", freeze__every="5", optim__clip=0.0,
        optim__weight_decay=0.0, schedule__name="constant", schedule__warmup="0",
        **({"optim__momentum_warmup": "0"} if name == "muon" else {}),
    )  # fmt: skip
    assert layerwise.unfreeze_steps(late).tolist() == [0, 5]
    params, state, update = start(late, model)

    def alike(tree):
        return tree | {"blocks": jax.tree.map(lambda x: np.array([x[0]] * 2), tree["blocks"])}

    params, first, second = alike(params), [], []
    for t in range(10):
        updates, state = update(alike(random_like(params, t % 5)), state, params, step=t)
        first.append(param.named(updates["blocks"])["mlp/up/weight"][0])
        second.append(param.named(updates["blocks"])["mlp/up/weight"][1])
        params = jax.jit(optim.apply_updates)(params, updates)
    for t in range(5):
        assert not np.asarray(second[t]).any()
        np.testing.assert_allclose(second[t + 5], first[t], atol=1e-6)


def test_which_blocks_learn_when():
    def steps(**changes):
        named = {f"freeze__{k}": v for k, v in changes.items()}
        step_L = layerwise.unfreeze_steps(config_and_model(n_layers=8, **named)[0])
        return ["never" if b == layerwise.NEVER else int(b) for b in step_L]

    assert layerwise.unfreeze_steps(config_and_model()[0]) is None
    assert steps(mode="fixed", blocks="0, 6") == ["never"] + [0] * 5 + ["never", 0]
    chosen = [steps(mode="random", count=3, seed=s) for s in range(20)]
    assert all(c.count("never") == 3 for c in chosen) and len(set(map(tuple, chosen))) > 10
    assert steps(mode="random", count=3, seed=7) == chosen[7]
    near = [steps(mode="random_near_input", count=1, seed=s).index("never") for s in range(20)]
    assert set(near) == {0, 1}
    assert steps(mode="random_near_input", near_input=0.5, count=4)[:4] == ["never"] * 4
    assert steps(mode="unfreeze", every="5") == [0, 5, 10, 15, 20, 25, 30, 35]
    assert steps(mode="unfreeze", every="5", order="output") == [35, 30, 25, 20, 15, 10, 5, 0]
    drawn = steps(mode="unfreeze", every="5", order="random", seed=1)
    assert sorted(drawn) == list(range(0, 40, 5)) and drawn != sorted(drawn)
    # 32 x 256 = 8,192 tokens a step.
    assert steps(mode="unfreeze", every="16k tokens")[:3] == [0, 2, 4]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_factors_multiply_what_the_optimizer_made(name):
    """Scaling gradients would be cancelled by both; scaling updates is not."""
    config, model = config_and_model(optim__name=name, optim__weight_decay=0.0)
    params, state, update = start(config, model)
    grads = random_like(params, 0)
    plain, _ = update(grads, state, params, step=5)
    factor_L = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
    scaled, _ = update(grads, state, params, step=5, block_factors=factor_L)
    for path, u in param.named(plain).items():
        f = factor_L.reshape(-1, *[1] * (u.ndim - 1)) if path.startswith("blocks/") else 1.0
        np.testing.assert_array_equal(param.named(scaled)[path], u * f, err_msg=path)


def test_each_block_may_have_a_lower_rate_than_the_one_above():
    config, model = config_and_model(optim__block_lr_decay=0.5, optim__weight_decay=0.0)
    updates = []
    for decay in (1.0, 0.5):
        config.unlock()
        config.optim.block_lr_decay = decay
        params, state, update = start(config, model)
        updates.append(update(random_like(params, 0), state, params, step=5)[0])
    ratio = (
        updates[1]["blocks"]["mlp"]["up"]["weight"] / updates[0]["blocks"]["mlp"]["up"]["weight"]
    )
    np.testing.assert_allclose(ratio[:, 0, 0], [0.125, 0.25, 0.5, 1.0], rtol=1e-6)
    assert np.array_equal(updates[0]["embed"]["tokens"], updates[1]["embed"]["tokens"])


@pytest.mark.parametrize("mode", ["independent", "coupled"])
@pytest.mark.parametrize("where", ["everywhere", "cautious"])
@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_factors_of_blocks_leave_decay_as_it_was(name, where, mode):
    """Against NumPy: a utility's factor multiplies the step alone, one of the learning rate the
    decay too where that follows the rate."""
    rate_L, factor_L = 0.5 ** np.arange(3.0, -1.0, -1.0), np.array([1.0, 1.5, 3.0, 1.0], np.float32)
    config, model = config_and_model(
        optim__name=name, optim__decay_mode=mode, optim__decay_where=where, optim__lr=0.25,
        optim__block_lr_decay=0.5, optim__clip=0.0, schedule__name="constant",
    )  # fmt: skip
    params, state, update = start(config, model)
    grads = random_like(params, 0)
    updates = param.named(update(grads, state, params, step=5, block_factors=factor_L)[0])
    for path, g in param.named(grads).items():
        p, u = param.named(params)[path], {"sgd": g, "lion": np.sign(g)}[name]

        def of_blocks(x_L, path=path, ndim=g.ndim):
            return x_L.reshape(-1, *[1] * (ndim - 1)) if path.startswith("blocks/") else 1.0

        rate = 0.25 * of_blocks(rate_L)
        decays = path.endswith(("weight", "embed/tokens", "embed/positions"))
        decay = 0.1 * decays * (1.0 if mode == "independent" else rate)
        shrink = decay * p * (1 if where == "everywhere" else u * p >= 0)
        wanted = -(rate * of_blocks(factor_L) * u + shrink)
        np.testing.assert_allclose(updates[path], wanted, atol=1e-6, err_msg=path)


BAD = {
    "no block named": ({"mode": "fixed"}, ["freeze.blocks=''", "0 to 3", "use '0'"]),
    "no number": ({"mode": "fixed", "blocks": "first"}, ["freeze.blocks='first'"]),
    "no such block": ({"mode": "fixed", "blocks": "4"}, ["freeze.blocks='4'", "0 to 3"]),
    "named twice": ({"mode": "fixed", "blocks": "1,1"}, ["freeze.blocks='1,1'"]),
    "too many": ({"mode": "random", "count": 5}, ["freeze.count=5", "use 4"]),
    "too many near the input": (
        {"mode": "random_near_input", "count": 2},
        ["freeze.count=2", "1 block", "use 1"],
    ),
    "too slow": ({"mode": "unfreeze", "every": "50%"}, ["freeze.every='50%'", "step 60 of 40"]),
    "unused count": ({"count": 2}, ["freeze.count=2", "unused"]),
    "unused order": ({"mode": "random", "order": "output"}, ["freeze.order='output'", "unused"]),
}


@pytest.mark.parametrize(("changes", "parts"), BAD.values(), ids=BAD)
def test_bad_freezing_is_named(changes, parts):
    with pytest.raises(InputError) as caught:
        config_and_model(**{f"freeze__{k}": v for k, v in changes.items()})
    for part in parts:
        assert part in str(caught.value), str(caught.value)
