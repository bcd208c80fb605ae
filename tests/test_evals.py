"""Evaluation, baselines and sampling against definitions written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.evals import perplexity
from lmscale_jax.model import sampling


class Stream:
    def __init__(self, ids):
        self.ids, self.n_tokens = np.asarray(ids, np.int32), len(ids)

    def read(self, start, length):
        return self.ids[start : start + length]


def test_baselines_equal_their_definitions():
    chance = np.random.default_rng(0)
    train, val = chance.choice(7, 500, p=np.arange(7) / 21), chance.integers(0, 7, 100)
    losses = perplexity.baseline_losses(Stream(train), Stream(val), 7, 99)
    unigram, bigram = [], []
    for a, b in itertools.pairwise(val):
        p_b = (np.sum(train == b) + 1) / (500 + 7)
        unigram.append(-np.log(p_b))
        after = [y for x, y in itertools.pairwise(train) if x == a]
        n, t = len(after), len(set(after))
        bigram.append(-np.log((after.count(b) + t * p_b) / (n + t)) if n else -np.log(p_b))
    assert losses["unigram"] == pytest.approx(np.mean(unigram))
    assert losses["bigram"] == pytest.approx(np.mean(bigram))


def test_bigram_probabilities_sum_to_one():
    train = np.random.default_rng(1).integers(0, 5, 200)
    total = sum(
        np.exp(-perplexity.baseline_losses(Stream(train), Stream([3, b]), 5, 1)["bigram"])
        for b in range(5)
    )
    assert total == pytest.approx(1)


def test_standard_error_against_the_bootstrap():
    chance = np.random.default_rng(2)
    count = chance.integers(20, 33, 300)
    nll = count * chance.normal(3, 0.4, 300)
    summary = perplexity.loss_summary(nll, count, 1000)
    draws = chance.integers(0, 300, (4000, 300))
    spread = (nll[draws].sum(1) / count[draws].sum(1)).std()
    assert summary["val_loss"] == pytest.approx(nll.sum() / count.sum())
    assert summary["val_loss_sem"] == pytest.approx(spread, rel=0.05)
    assert summary["bits_per_byte"] == pytest.approx(nll.sum() / np.log(2) / 1000)


def successor(params, tokens_BxT, key=None):
    """A "model" that is nearly sure of (last token + 1) mod 10; ids 10 and 11 are padding."""
    wanted = (tokens_BxT + 1) % 10
    return 20.0 * jax.nn.one_hot(wanted, 12) + 30.0 * (jnp.arange(12) >= 10)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_sampling_follows_the_model_beyond_its_window(temperature):
    new = sampling.sample(
        successor, None, np.array([3]), 25, length=8, vocab_size=10, temperature=temperature
    )
    assert new.tolist() == [(4 + i) % 10 for i in range(25)]


def test_top_k_and_temperature_draw_the_right_distribution():
    z = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    def model(params, tokens_BxT, key=None):
        return jnp.broadcast_to(z, (*tokens_BxT.shape, 4))

    draws = sampling.sample(
        model, None, np.array([0]), 4000, length=4, vocab_size=4, temperature=2.0, top_k=3
    )
    share = np.bincount(draws, minlength=4) / 4000
    root = np.sqrt([0.5, 0.3, 0.15, 0.0])
    assert np.abs(share - root / root.sum()).max() < 0.03 and share[3] == 0
