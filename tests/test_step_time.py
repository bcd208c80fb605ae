"""The compute factor in seconds, from planted speeds."""

import numpy as np
import pytest

from lmscale_jax.ladders.step_time import compare_seconds, seconds_sentence

ARMS, LEVEL = ["gelu", "swiglu"], 0.95
GAIN = [{"c": 1e10 * 10**i, "k": 1.2, "low": 1.1, "high": 1.31} for i in range(3)]
# For each size its FLOPs, and the second arm's seconds per token over the first's.
SLOWER = {1e4: (1e10, 1.4), 1e5: (1e11, 1.4), 1e6: (1e12, 1.4)}


def runs(seeds=2, own_noise=0.0, shared_noise=0.0, rng=None, **changes) -> list[dict]:
    """Rows of a ladder; `changes` are columns of the second arm.

    `shared_noise` is the standard deviation of what the seeds of a size and arm have in common.
    """
    rows, rng = [], rng or np.random.default_rng(0)
    for size, (flops, ratio) in SLOWER.items():
        for arm in ARMS:
            load = shared_noise * rng.standard_normal()
            for _ in range(seeds):
                speed = 1e3 / size / (ratio if arm == "swiglu" else 1.0)
                speed *= np.exp(load + own_noise * rng.standard_normal())
                row = {
                    "variant": arm, "size": size, "flops": flops, "tokens_per_second": speed,
                    "flops_per_token": 6 * size, "devices": "1 x cpu", "packed": 1,
                }  # fmt: skip
                rows.append(row | (changes if arm == "swiglu" else {}))
    return rows


def test_a_slower_arm_pays_in_seconds():
    seconds = compare_seconds(runs(), ARMS, GAIN, LEVEL)
    assert [s["ratio"] for s in seconds["steps"]] == pytest.approx([1.4] * 3)
    assert [g["k"] for g in seconds["gain"]] == pytest.approx([1.2 / 1.4] * 3)
    # Equal speeds of all seeds and sizes add nothing to the interval of k in FLOPs.
    widths = [np.log(g["high"] / g["low"]) for g in seconds["gain"]]
    assert widths == pytest.approx([np.log(1.31 / 1.1)] * 3)
    assert "1.40 (1.40 to 1.40) times as long as gelu on 1 x cpu: in seconds" in seconds_sentence(
        {"arms": ARMS, "seconds": seconds}
    )
    # At equal speed in tokens, an arm with more FLOPs per token needs fewer seconds per FLOP.
    of_arm = {"gelu": 6, "swiglu": 9}
    more = [r | {"flops_per_token": of_arm[r["variant"]] * r["size"]} for r in runs()]
    seconds = compare_seconds(more, ARMS, GAIN, LEVEL)
    assert seconds["gain"][0]["k"] == pytest.approx(1.2 / 1.4 * 1.5)
    assert seconds["steps"][0]["ratio"] == pytest.approx(1.4)


def test_between_sizes_it_is_interpolated_in_the_logarithm(monkeypatch):
    monkeypatch.setitem(SLOWER, 1e6, (1e12, 1.1))
    middle = [{"c": 10**11.5, "k": 1.0, "low": 1.0, "high": 1.0}]
    (row,) = compare_seconds(runs(), ARMS, middle, LEVEL)["gain"]
    assert row["k"] == pytest.approx(1 / np.sqrt(1.4 * 1.1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"devices": "1 x H100"}, "gelu ran on 1 x cpu and swiglu on 1 x H100"),
        ({"packed": 4}, r"in packs of other sizes \(1 for gelu, 4 for swiglu\)"),
        ({"tokens_per_second": None}, "no run of swiglu took enough steps"),
        ({"size": 5.0}, "no size was timed in both"),
    ],
)
def test_it_says_why_it_cannot_be_told(changes, reason):
    seconds = compare_seconds(runs(**changes), ARMS, GAIN, LEVEL)
    assert seconds["gain"] == seconds["steps"] == []
    with pytest.raises(AssertionError, match=f"cannot be told: .*{reason}"):
        raise AssertionError(seconds_sentence({"arms": ARMS, "seconds": seconds}))


def test_runs_that_are_unlike_are_left_out():
    """Of two kinds of device the one with more runs; runs of larger packs beside single ones."""
    unlike = [{"devices": "1 x H100"}, {"packed": 2}]
    rows = runs(3) + [r | c | {"tokens_per_second": 1.0} for c in unlike for r in runs(1)]
    seconds = compare_seconds(rows, ARMS, GAIN, LEVEL)
    assert seconds == compare_seconds(runs(3), ARMS, GAIN, LEVEL)
    assert (seconds["devices"], seconds["packed"]) == ("1 x cpu", [1])


def test_without_repeated_seeds_the_sizes_scatter(monkeypatch):
    for size, ratio in ((1e5, 1.2), (1e6, 1.1)):
        monkeypatch.setitem(SLOWER, size, (size * 1e6, ratio))
    half = 4.302653 * np.log([1.4, 1.2, 1.1]).std(ddof=1)  # t of 2 degrees of freedom
    # Seeds of one pack have one clock, and are no repetition.
    for rows in (runs(1), [r | {"packed": 2} for r in runs(2)]):
        step = compare_seconds(rows, ARMS, [], LEVEL)["steps"][0]
        assert np.log(step["high"] / step["low"]) / 2 == pytest.approx(half, rel=1e-5)
    single = [row for row in runs(1) if row["size"] == 1e4]
    seconds = compare_seconds(single, ARMS, GAIN, LEVEL)
    assert seconds["gain"][0]["low"] is None
    assert "1.40 (spread unknown)" in seconds_sentence({"arms": ARMS, "seconds": seconds})


@pytest.mark.parametrize(("own_noise", "shared_noise"), [(0.1, 0.0), (0.05, 0.1), (0.0, 0.1)])
def test_intervals_cover_as_often_as_they_say(own_noise, shared_noise):
    """Also where the seeds of an arm are slow together, as on a machine that others use."""
    rng, inside, draws = np.random.default_rng(1), 0, 300
    for _ in range(draws):
        rows = runs(2, own_noise, shared_noise, rng)
        step = compare_seconds(rows, ARMS, [], LEVEL)["steps"][1]
        inside += step["low"] < 1.4 < step["high"]
    assert inside / draws > LEVEL - 3 * np.sqrt(LEVEL * (1 - LEVEL) / draws)
