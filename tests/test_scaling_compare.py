"""The test of exponents: it detects shifts, ignores offsets, and is undetermined in between."""

import numpy as np
import pytest
from synthetic import two_arms

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import as_table, compare_arms, shift

CHANGES = ("exponent shift", "changes with scale")


def changes(counts: dict) -> int:
    return sum(counts.get(word, 0) for word in CHANGES)


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
    assert changes(counts) >= 0.9 * draws, counts


@pytest.mark.parametrize("draws", DRAWS)
def test_a_pure_offset_is_not_taken_for_a_shift(draws):
    counts = verdicts(draws, s=0.0, tau=0.4, seeds=3)
    wrong = changes(counts) + counts.get("no detectable difference", 0)
    assert wrong <= 0.08 * draws, counts
    assert counts.get("constant offset", 0) >= 0.85 * draws, counts


@pytest.mark.slow
def test_equal_arms_differ_in_nothing():
    counts = verdicts(60, s=0.0, tau=0.0, seeds=3)
    assert counts.get("no detectable difference", 0) >= 48, counts
    # 5 % of 60, and two standard errors.
    assert changes(counts) + counts.get("constant offset", 0) <= 6, counts


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
    assert list(models) == ["same", "offsets", "exponents", "floors", "separate"]
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


def test_a_difference_of_floors_is_not_called_an_exponent():
    """Lower floors in one arm, by 1.6 % of the loss, are a change with scale."""
    c = np.geomspace(1e17, 3e19, 6)
    rng = np.random.default_rng(0)
    words = set()
    for _ in range(6):
        rows = [
            {"c": x, "loss": (E + 1.6 * (x / 1e17) ** -0.16) * np.exp(0.002 * error),
             "variant": arm, "run_id": f"{arm}{i}"}
            for arm, E in (("A", 1.6), ("B", 1.55))
            for i, (x, error) in enumerate(zip(np.repeat(c, 2), rng.standard_normal(12),
                                               strict=True))
        ]  # fmt: skip
        comparison = compare_arms(rows, "A", "B", bootstrap=0)
        words.add(comparison["verdict"])
        assert comparison["nested"]["reading"] != "exponents"
        if comparison["verdict"] == "changes with scale":
            assert "floor" in comparison["reason"] and "AICc" in comparison["reason"]
    assert "changes with scale" in words and "exponent shift" not in words


def test_exponents_are_named_where_the_floor_is_pinned():
    table = two_arms(0.2, tau=0.3, seeds=2)
    comparison = compare_arms(table, "A", "B", bootstrap=0, floor=1.7)
    shifted = comparison["shift"]
    assert shifted["baseline"] == "floor" and shifted["floor"] == pytest.approx(1.7)
    assert comparison["verdict"] == "exponent shift" and "pinned" in comparison["reason"]
    assert "floors" not in comparison["nested"]["models"] and comparison["floors"] is None
    # A pinned floor identifies s better than a free curve does.
    assert shifted["se"] < compare_arms(table, "A", "B", bootstrap=0)["shift"]["se"]
    with pytest.raises(InputError, match="below the smallest loss"):
        compare_arms(table, "A", "B", floor=5.0)


@pytest.mark.parametrize("change", ["disjoint", "two budgets", "far"])
def test_no_offset_at_every_scale_without_shared_scales(change):
    """Without common budgets, with two in one arm, or without common losses."""
    tau = 6.0 if change == "far" else 0.3
    table = two_arms(0.0, tau=tau, seeds=4, noise=5e-4, span=30.0)
    if change == "two budgets":
        ends = (min(table["c"]), max(table["c"]))
        pairs = zip(table["variant"], table["c"], strict=True)
        kept = [i for i, (arm, c) in enumerate(pairs) if arm == "B" or c in ends]
        table = {k: [v[i] for i in kept] for k, v in table.items()}
    if change == "disjoint":
        for i, arm in enumerate(table["variant"]):
            if arm == "B":
                for name in ("c", "d"):
                    table[name][i] *= 2500
                table["loss"][i] = 1.7 + (table["loss"][i] - 1.7) * 2500**-0.15
    comparison = compare_arms(table, "A", "B", bootstrap=0, effect=5.0)
    assert comparison["verdict"] == "undetermined", comparison["reason"]
    assert "every scale" not in comparison["reason"]


def test_checks_hold_if_they_agree_with_the_verdict():
    offset = compare_arms(two_arms(0.0, tau=0.5, seeds=3, seed=1), "A", "B", bootstrap=0)
    assert offset["verdict"] == "constant offset"
    assert {c["claim"] for c in offset["checks"]} == {"s does not differ from 0"}
    change = compare_arms(two_arms(0.3, tau=0.5, seeds=3, seed=1), "A", "B", bootstrap=0)
    assert {c["claim"] for c in change["checks"]} == {"s has the same sign"}
    for comparison in (offset, change):
        assert len(comparison["checks"]) >= 4 and all(c["holds"] for c in comparison["checks"])
        assert set(comparison["power"]) == {"shift", "offset"}


def test_seeds_of_a_cell_count_once():
    """An error that the seeds of a cell share widens s as a single run's would."""
    single, many = (two_arms(0.0, sizes=6, seeds=s, noise=1e-9) for s in (1, 20))
    for table in (single, many):  # not the same seeds in both arms
        table["seed"] = table["run_id"]
    rng = np.random.default_rng(0)
    cells = zip(single["variant"], single["c"], strict=True)
    error = {key: 0.01 * rng.standard_normal() for key in cells}
    widths = []
    for table in (single, many):
        jitter = 1e-6 * rng.standard_normal(len(table["loss"]))
        keys = zip(table["variant"], table["c"], strict=True)
        table["loss"] = [
            x * np.exp(error[key] + j)
            for x, key, j in zip(table["loss"], keys, jitter, strict=True)
        ]
        widths.append(compare_arms(table, "A", "B", bootstrap=0)["shift"]["se"])
    assert widths[1] == pytest.approx(widths[0], rel=1e-2)
