"""The order is a permutation for every size, keyed by seed and epoch, and has no state."""

import numpy as np
import pytest

from lmscale_jax.data.order import WindowOrder

SIZES = [*range(1, 40), 63, 64, 65, 100, 255, 256, 257, 1000, 4095, 4097]


@pytest.mark.parametrize("n_windows", SIZES)
def test_every_epoch_shows_every_window_once(n_windows):
    for seed in (0, 1, 2**63 + 5):
        windows_ExW = WindowOrder(n_windows, seed).indices(0, 3 * n_windows).reshape(3, n_windows)
        assert (np.sort(windows_ExW, axis=1) == np.arange(n_windows)).all()


def test_batches_are_pieces_of_one_stream_whatever_their_size():
    order, n = WindowOrder(101, 7), 420
    stream = order.indices(0, n)
    for batch_size in (1, 4, 7, 60, 210):
        batches = [order.indices(step, batch_size) for step in range(n // batch_size)]
        assert (np.concatenate(batches) == stream).all()
        assert all(batch.dtype == np.int64 for batch in batches)


def test_seeds_and_epochs_differ_and_repeat():
    n = 500
    orders = [WindowOrder(n, seed).indices(0, 2 * n).reshape(2, n) for seed in range(20)]
    distinct = {epoch.tobytes() for order in orders for epoch in order}
    assert len(distinct) == 40
    assert (WindowOrder(n, 3).indices(0, n) == orders[3][0]).all()


@pytest.mark.parametrize("n_windows", [2, 3, 5, 17, 64])
def test_places_are_uniform_over_seeds(n_windows):
    """Chi-squared of the place of window 0 and of the first window, at 6 standard deviations."""
    trials = 1500
    orders = np.array([WindowOrder(n_windows, s).indices(0, n_windows) for s in range(trials)])
    for sample in (orders[:, 0], np.argmin(orders, axis=1)):
        counts = np.bincount(sample, minlength=n_windows)
        expected = trials / n_windows
        chi2 = ((counts - expected) ** 2 / expected).sum()
        freedom = n_windows - 1
        assert chi2 < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_are_unrelated():
    n = 20_000
    order = WindowOrder(n, 0).indices(0, n).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.04
    fixed_points = (order == np.arange(n)).sum()
    assert fixed_points <= 8  # Poisson of mean 1


def test_far_steps_and_large_sizes():
    order = WindowOrder(10**12 + 39, 1)
    far = order.indices(10**9, 512)
    assert len(set(far.tolist())) == 512
    assert far.min() >= 0 and far.max() < 10**12 + 39


def test_no_windows_is_an_error():
    with pytest.raises(ValueError, match="n_windows=0"):
        WindowOrder(0, 0)
