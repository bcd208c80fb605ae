"""The test of exponents: it detects shifts, ignores offsets, and is undetermined in between."""

import numpy as np
import pytest
from synthetic import two_arms

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import as_table, compare_arms, shift


def verdicts(draws: int, s: float, **settings) -> dict:
    counts: dict = {}
    for seed in range(draws):
        verdict = compare_arms(two_arms(s, seed=seed, **settings), "A", "B", bootstrap=199)[
            "verdict"
        ]
        counts[verdict] = counts.get(verdict, 0) + 1
    return counts


def test_without_noise_the_shift_is_what_was_put_in():
    comparison = compare_arms(two_arms(0.08, tau=0.5, noise=1e-9, seeds=2), "A", "B", bootstrap=0)
    assert comparison["shift"]["s"] == pytest.approx(0.08, abs=0.005)
    for row in comparison["gain"]:
        true = np.exp(0.5 + 0.08 * np.log(row["c"] / comparison["shift"]["at_c"]))
        assert row["k"] == pytest.approx(true, rel=0.02)


DRAWS = [15, pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("draws", DRAWS)
def test_an_exponent_shift_of_8_percent_is_found(draws):
    counts = verdicts(draws, s=0.08, tau=0.4, seeds=3)
    assert counts.get("exponent shift", 0) >= 0.9 * draws, counts


@pytest.mark.parametrize("draws", DRAWS)
def test_a_pure_offset_is_not_taken_for_a_shift(draws):
    counts = verdicts(draws, s=0.0, tau=0.4, seeds=3)
    wrong = counts.get("exponent shift", 0) + counts.get("no detectable difference", 0)
    assert wrong <= 0.08 * draws, counts
    assert counts.get("constant offset", 0) >= 0.85 * draws, counts


@pytest.mark.slow
def test_equal_arms_differ_in_nothing():
    counts = verdicts(60, s=0.0, tau=0.0, seeds=3)
    assert counts.get("no detectable difference", 0) >= 48, counts
    assert counts.get("exponent shift", 0) <= 5, counts


@pytest.mark.slow
@pytest.mark.parametrize("seeds, least", [(1, 0.85), (3, 0.97)])
def test_size_and_power_of_the_test_itself(seeds, least):
    """Measures rejections of s = 0 at 5 %, and the power at s = 0.08, over 300x of compute."""
    p = {s: [] for s in (0.0, 0.08)}
    for seed in range(300):
        for s, p_values in p.items():
            table = as_table(two_arms(s, tau=0.4, seeds=seeds, seed=seed))
            data = shift.two_arms(table, "A", "B")
            fits = [shift.estimate_shift(k, data) for k in ("quadratic", "cubic")]
            p_values.append(min(fits, key=lambda e: e.aicc).p)
    size, power = (float(np.mean(np.array(p[s]) < 0.05)) for s in (0.0, 0.08))
    assert 0.03 <= size <= 0.08, size
    assert power > least, power


def test_too_little_data_is_undetermined_and_says_what_would_settle_it():
    comparison = compare_arms(
        two_arms(0.0, tau=0.3, sizes=5, span=30.0, noise=0.01), "A", "B", bootstrap=199
    )
    assert comparison["verdict"] == "undetermined"
    assert comparison["detectable"] > comparison["effect"] and "next_runs" in comparison["reason"]
    assert comparison["next_runs"]
    for option in comparison["next_runs"]:
        assert option["detectable"] <= comparison["effect"] * 1.01 and option["runs"] > 0
    flops = [o["flops"] for o in comparison["next_runs"]]
    assert flops == sorted(flops)


def test_the_runs_advised_do_settle_it():
    """The suggested seeds reduce the detectable shift to the promised value."""
    settings = {"s": 0.0, "tau": 0.3, "span": 60.0, "noise": 0.014}
    ratios = []
    for i in range(6):
        before = compare_arms(two_arms(**settings, seeds=3, seed=i), "A", "B", bootstrap=0)
        options = [o for o in before["next_runs"] if o["add"].endswith("cell in both arms")]
        if options:
            seeds = 3 + int(options[0]["add"].split()[0])
            after = compare_arms(
                two_arms(**settings, seeds=seeds, seed=100 + i), "A", "B", bootstrap=0
            )
            ratios.append(after["detectable"] / options[0]["detectable"])
    assert len(ratios) >= 3
    assert 0.7 < np.median(ratios) < 1.4, ratios


def test_the_gain_at_a_target_and_the_floors():
    comparison = compare_arms(two_arms(0.0, tau=0.5, seeds=3), "A", "B", target_c=1e21, bootstrap=0)
    last = comparison["gain"][-1]
    assert last["c"] == pytest.approx(1e21) and last["low"] < np.exp(0.5) < last["high"]
    assert len(comparison["gain"]) == 6
    floors = [row["E"] for row in comparison["floors"]]
    assert floors == sorted(floors) and min(floors) < 1.7 < max(floors) + 0.5
    models = comparison["nested"]["models"]
    assert list(models) == ["same", "offsets", "exponents", "separate"]
    assert models["same"]["aicc"] > models["offsets"]["aicc"] + 10


def test_sizes_and_tokens_off_one_curve_use_the_surface():
    rng = np.random.default_rng(0)
    rows = []
    for arm, k in (("A", 1.0), ("B", 1.6)):
        for n in np.geomspace(1e7, 3e8, 5):
            for ratio in (5, 20, 80):
                d = ratio * n
                x, z = n * np.sqrt(k), d * np.sqrt(k)
                loss = 1.8 + 480 * x**-0.35 + 2100 * z**-0.37
                loss *= np.exp(0.002 * rng.standard_normal())
                rows.append({"n": n, "d": d, "loss": loss, "variant": arm})
    comparison = compare_arms(rows, "A", "B", bootstrap=99)
    assert comparison["shift"]["baseline"] == "surface"
    middle = comparison["gain"][2]
    assert middle["low"] < 1.6 < middle["high"] and middle["high"] < 1.8
    assert comparison["verdict"] == "constant offset"
    assert comparison["nested"]["law"] == "chinchilla"


def test_arms_that_are_not_there():
    table = two_arms(0.0)
    with pytest.raises(InputError, match="variant 'C' is not in table, which has A, B"):
        compare_arms(table, "A", "C")
    with pytest.raises(InputError, match="one arm twice"):
        compare_arms(table, "A", "A")
    single_budget = {k: v[:1] + v[6:] for k, v in table.items()}
    with pytest.raises(InputError, match="'A' has 1 compute budget"):
        compare_arms(single_budget, "A", "B")


def test_copied_runs_and_losses_that_do_not_overlap_are_named():
    table = two_arms(0.0, tau=0.0)
    table["loss"][6:8] = table["loss"][:2]
    codes = {w["code"] for w in compare_arms(table, "A", "B", bootstrap=0)["warnings"]}
    assert {"copied_runs", "tune_both"} <= codes
    far = two_arms(0.0, tau=6.0, span=30.0)
    codes = {w["code"] for w in compare_arms(far, "A", "B", bootstrap=0)["warnings"]}
    assert "little_overlap" in codes
