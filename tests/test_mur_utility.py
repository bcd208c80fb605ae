"""Utilities, reductions and statistics against numpy; which layers a range means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.blocks import mur_layers
from lmscale_jax.config.resolve import resolve, validate
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.mur import utility
from lmscale_jax.mur.utility import Measure

N, D = 12, 8
LABELLED = jnp.arange(N) % 4 != 3


def draws(seed=0):
    chance = np.random.default_rng(seed)
    return (chance.normal(size=(2, N, D))).astype(np.float32)


def test_a_share_of_tokens_is_exact():
    """All percents of up to 3,000 tokens, in integers; a share with many digits."""
    counts = np.arange(3000)
    for percent in range(1, 101):
        wanted = -(-percent * counts // 100)
        taken = utility.share_of(percent / 100, jnp.asarray(counts), 3000)
        np.testing.assert_array_equal(taken, wanted)
    taken = utility.share_of(0.123456789, jnp.asarray(counts), 3000)
    np.testing.assert_array_equal(taken, [-(-123456789 * int(n) // 10**9) for n in counts])


def test_definitions():
    g, delta = draws()
    dot = -(g * delta).sum(axis=1)
    lengths = np.linalg.norm(g, axis=1), np.linalg.norm(delta, axis=1)
    wanted = {"raw": dot, "cos": dot / (lengths[0] * lengths[1]), "proj": dot / lengths[0] ** 2}
    for metric, values in wanted.items():
        utilities = utility.token_utilities(Measure(metric, 1e-6), g, delta, LABELLED)
        np.testing.assert_allclose(utilities, values, rtol=1e-5)


def test_eps_is_relative_and_zeros_are_harmless():
    g, delta = draws()
    how = Measure("cos", 1e-6)
    small = utility.token_utilities(how, g * 1e-9, delta * 1e-6, LABELLED)
    np.testing.assert_allclose(small, utility.token_utilities(how, g, delta, LABELLED), rtol=1e-5)
    # One token a thousand times smaller than the floor: its cosine shrinks, the others stay.
    tiny = g.copy()
    tiny[0] *= 1e-9
    utilities = utility.token_utilities(how, tiny, delta, LABELLED)
    assert abs(utilities[0]) < 2e-3
    np.testing.assert_allclose(
        utilities[1:], utility.token_utilities(how, g, delta, LABELLED)[1:], rtol=1e-6
    )
    for metric in ("cos", "proj", "raw"):
        for a, b in ((g * 0, delta), (g, delta * 0), (g * 0, delta * 0)):
            how, weight = Measure(metric, 1e-6), jnp.full(N, 1 / N)
            value, slope = jax.value_and_grad(utility.hinge, argnums=2)(
                how, a, jnp.asarray(b), LABELLED, weight, 1.0
            )
            assert np.isfinite(value) and np.isfinite(slope).all()


def test_weights():
    nll_BxT = jnp.asarray(np.random.default_rng(1).permutation(24).reshape(3, 8), jnp.float32)
    labelled_BxT = jnp.ones((3, 8), bool).at[0, 3:].set(False).at[:, 7].set(False)
    key = jax.random.key(0)

    def weigh(reduce, k=4, share=0.25, labelled_BxT=labelled_BxT):
        return np.asarray(utility.token_weights(reduce, nll_BxT, labelled_BxT, key, k, share))

    for reduce in ("mean", "sample_k", "top_loss"):
        weight_BxT = weigh(reduce)
        assert (
            weight_BxT.sum() == pytest.approx(1) and not weight_BxT[~np.asarray(labelled_BxT)].any()
        )
        assert not weigh(reduce, labelled_BxT=labelled_BxT & False).any()
    # Each of a sequence's positions at most once, all where fewer than k have a label.
    assert ((weigh("sample_k") > 0).sum(axis=1) == [3, 4, 4]).all()
    assert np.unique(weigh("sample_k")).size == 2
    highest = np.sort(np.asarray(nll_BxT)[np.asarray(labelled_BxT)])[-5:]  # of 17
    chosen = np.asarray(nll_BxT)[weigh("top_loss") > 0]
    np.testing.assert_array_equal(np.sort(chosen), highest)


def test_statistics():
    g, delta = draws(2)
    labelled_BxT = LABELLED.reshape(3, 4)
    how = Measure("cos", 1e-6, level=0.7)
    weight_N = jnp.where(LABELLED, 1 / 9, 0.0)
    statistics = utility.utility_statistics(
        utility.STATISTICS, how, g, delta, labelled_BxT, weight_N, 0.1
    )
    statistics = dict(zip(utility.STATISTICS, np.asarray(statistics), strict=True))
    u = np.asarray(utility.token_utilities(how, g, delta, LABELLED))
    u_S, keep = u[LABELLED], np.asarray(LABELLED)
    assert statistics["mean"] == pytest.approx(u_S.mean(), rel=1e-5)
    assert statistics["utility"] == pytest.approx(u_S.mean(), rel=1e-5)
    assert statistics["hinge"] == pytest.approx(max(0, 0.1 - u_S.mean()), rel=1e-5)
    for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("quantile", 0.7)):
        assert statistics[name] == pytest.approx(np.quantile(u_S, q), rel=1e-4, abs=1e-6), name
    assert statistics["frac_below_tau"] == pytest.approx((u_S < 0.1).mean())
    assert statistics["delta_norm"] == pytest.approx(np.linalg.norm(delta[keep], axis=1).mean())
    assert statistics["grad_norm"] == pytest.approx(np.linalg.norm(g[keep], axis=1).mean())
    each = u_S.reshape(3, 3).mean(axis=1)
    assert statistics["stderr"] == pytest.approx(each.std(ddof=1) / np.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(
    "n, start, end, wanted",
    [
        (8, 0.33, 0.67, [3, 4]), (8, 0.2, 0.8, [2, 3, 4, 5]), (8, 0.0, 1.0, range(8)),
        (10, 0.33, 0.67, range(3, 7)), (10, 0.2, 0.8, range(2, 8)), (12, 0.33, 0.67, range(4, 8)),
        (20, 0.33, 0.67, range(7, 13)), (20, 0.2, 0.8, range(4, 16)), (20, 1.0, 1.0, [19]),
        (1, 0.33, 0.67, [0]),
    ],
)  # fmt: skip
def test_fractions_of_the_depth(n, start, end, wanted):
    config = base.get_config()
    config.model.n_layers, config.mur.start, config.mur.end = n, start, end
    assert list(mur_layers(config)) == list(wanted)


def test_absolute_blocks():
    config = base.get_config()
    config.model.n_layers, config.mur.mode = 8, "loss"
    config.mur.first_block, config.mur.last_block = 1, 1
    assert list(mur_layers(config)) == [1]
    config.mur.first_block, config.mur.last_block = -1, 6
    assert list(mur_layers(config)) == [3, 4, 5, 6]
    validate(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": "loss", "first_block": 4}, "first_block=4"),
        ({"mode": "loss", "first_block": 2, "last_block": 1}, "last_block=1"),
        ({"mode": "loss", "start": 0.8, "end": 0.2}, "start=0.8"),
        ({"mode": "loss", "alpha": 0.3}, "alpha=0.3"),
        ({"mode": "loss", "warmup": "2000"}, "warmup='2000'"),
        ({"mode": "loss", "tau_kind": "quantile", "tau": 1.5}, "tau=1.5"),
        ({"mode": "loss", "sample_k": 8}, "sample_k=8"),
        ({"mode": "loss", "first_block": 1, "start": 0.5}, "start=0.5"),
        ({"mode": "update", "granularity": "branch"}, "granularity='branch'"),
        ({"mode": "diagnose", "warmup": "10"}, "warmup='10'"),
        ({"tau": 0.1}, "tau=0.1"),
    ],
)
def test_misuse_is_one_line(changes, message):
    config = base.get_config()
    config.mur.update(changes)
    with pytest.raises(InputError, match=f"config.mur.{message}") as caught:
        resolve(config)
    assert "\n" not in str(caught.value)
