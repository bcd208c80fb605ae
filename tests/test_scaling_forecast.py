"""Forecasts, compute-optimal plans, advice on runs, and isoFLOP minima."""

import numpy as np
import pytest
from synthetic import CHINCHILLA, grid, surface

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import (
    curve_average,
    fit_isoflop,
    fit_law,
    forecast_loss,
    laws,
    plan_optimum,
    rank_next_runs,
    read_table,
    solve,
)
from lmscale_jax.scaling.forecast import (
    distinct_budgets,
    forecast_from_fit,
    law_discrepancy,
    richest_law,
)
from lmscale_jax.scaling.isoflop import polynomial_minimum, rows_by_budget
from lmscale_jax.scaling.table import as_table

SIZES, TOKENS = np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)


def test_a_forecast_of_a_true_law_covers_the_loss():
    n, d = 3e9, 4e11
    true = float(surface(n, d, **CHINCHILLA))
    inside = 0
    for seed in range(8):
        prediction = forecast_loss(
            grid(SIZES, TOKENS, noise=0.004, seed=seed), n=n, d=d, bootstrap=100
        )
        assert prediction["law"] == "chinchilla" and prediction["level"] == 0.9
        inside += prediction["low"] < true < prediction["high"]
    assert inside >= 7


def test_the_interval_grows_with_distance_and_level():
    table = read_table("kyo_takano")
    result = fit_law(table, bootstrap=300)

    def width(factor, level=0.9):
        n = float(table.n.max()) * factor
        prediction = forecast_from_fit(result, n=n, d=20 * n, level=level)
        return np.log(prediction["high"] / prediction["low"])

    assert width(1) < width(3) < width(10)
    assert width(3, 0.5) < width(3, 0.9) < width(3, 0.99)


def _coverage(table, shares=(0.5, 0.625, 0.75)) -> list[float]:
    """Computes the share of dearer runs inside the 90 % interval of a fit to the cheaper ones."""
    covered = []
    order = np.sort(table.c)
    for share in shares:
        limit = order[int(share * len(order))]
        train, test = table.take(table.c <= limit), np.flatnonzero(table.c > limit)
        result = fit_law(train, bootstrap=400)
        test = test[:: max(1, len(test) // 25)]
        hits, tau_and_cuts = 0, law_discrepancy(result)
        for i in test:
            target = {"n": table.n[i], "d": table.d[i], "c": table.c[i]}
            prediction = forecast_from_fit(result, **target, tau_and_cuts=tau_and_cuts)
            hits += prediction["low"] <= table.loss[i] <= prediction["high"]
        covered.append(hits / len(test))
    return covered


@pytest.mark.slow
def test_intervals_cover_held_out_runs_of_the_bundled_tables():
    folds = [c for name in ("kyo_takano", "olmo_ladder_c4", "olmo_ladder_pile")
             for c in _coverage(read_table(name), shares=(0.5, 0.75))]  # fmt: skip
    assert np.mean(folds) >= 0.85, folds


def test_a_small_table_gets_a_small_law():
    c = np.geomspace(1e14, 1e16, 3)
    assert richest_law(as_table({"c": c, "loss": 40 * c**-0.07})) == "power"
    c = np.geomspace(1e14, 1e18, 6)
    assert richest_law(as_table({"c": c, "loss": 40 * c**-0.07})) == "power_floor"
    assert richest_law(as_table(grid(SIZES, TOKENS))) == "chinchilla"
    n = np.geomspace(1e6, 1e9, 8)
    table = as_table({"n": n, "d": 20 * n, "loss": 40 * n**-0.1})
    assert richest_law(table) == "power_floor" and len(distinct_budgets(table)) == 8


def test_three_anchors_with_two_seeds_forecast_a_fourth():
    """On a small ladder the forecast averages over floors, none of which the runs rule out."""
    c = np.tile(np.geomspace(1e14, 1e16, 3), 2)
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(6))
    prediction = forecast_loss(
        {"c": c, "loss": (1.5 + 300 * c**-0.13) * noise}, c=1e17, bootstrap=300
    )
    true = 1.5 + 300 * 1e17**-0.13
    assert prediction["law"] == "averaged" and prediction["tau"] > 0.001
    assert prediction["low"] < true < prediction["high"]
    assert prediction["high"] / prediction["low"] < 1.12
    assert "floor_averaged" in {w["code"] for w in prediction["warnings"]}


# Share of the reducible loss, exponent and noise; how many sizes and seeds.
CURVES = {
    "a power law": ((0.0, 4.0, 0.08), 0.002, 3, 2),
    "a floor": ((1.6, 1.6, 0.16), 0.005, 3, 3),
    "a steep floor": ((2.4, 0.8, 0.35), 0.002, 3, 2),
    "five sizes": ((1.6, 1.6, 0.16), 0.005, 5, 2),
}


@pytest.mark.parametrize("name", CURVES)
def test_how_often_a_small_ladder_forecasts_rightly(name):
    """Of 100 simulated ladders at least 87 cover the next size at a stated 90 %."""
    (E, a, b), noise, sizes, seeds = CURVES[name]
    rng = np.random.default_rng(3)
    x = np.repeat(np.arange(sizes) * np.log(4), seeds)
    target = sizes * np.log(4)

    def log_loss(x):
        return np.log(E + a * np.exp(-b * x))

    inside, widths = 0, []
    for _ in range(100):
        y = log_loss(x) + noise * rng.standard_normal(len(x))
        budgets = curve_average.average_budgets(x, y, np.ones(len(x)))
        growth, cuts = curve_average.growth_of_error(budgets)
        assert cuts == sizes - 2
        mixture = curve_average.forecast_curve(budgets, target).widened(growth * (np.log(4) + 0.1))
        low, high = mixture.quantiles([0.05, 0.95])
        inside += low <= log_loss(target) + noise * rng.standard_normal() <= high
        widths.append(high - low)
    assert inside >= 87
    assert np.median(widths) < 0.075


def test_an_average_over_laws_is_that_of_its_parts():
    """Each law by an independent solver, the quantiles by drawing from the mixture."""
    from scipy.optimize import least_squares

    rng = np.random.default_rng(1)
    x = np.arange(4) * np.log(4)
    y = np.log(1.5 + 2 * np.exp(-0.15 * x)) + 0.001 * rng.standard_normal(4)
    budgets = curve_average.average_budgets(np.repeat(x, 2), np.repeat(y, 2), np.ones(8))
    np.testing.assert_allclose(budgets.log_loss, y, rtol=1e-12)
    mixture = curve_average.forecast_curve(budgets, 6.0)
    for i in (0, 15, 30):
        E = mixture.share[i] * np.exp(y.min())
        fit = least_squares(lambda p, E=E: np.log(E + np.exp(p[0] - p[1] * x)) - y, (0.5, 0.1))
        centre = np.log(E + np.exp(fit.x[0] - fit.x[1] * 6.0))
        assert mixture.centre[i] == pytest.approx(centre, abs=2e-4)
    law = rng.choice(len(mixture.centre), 200_000, p=mixture.probability)
    drawn = mixture.centre[law] + mixture.scale[law] * rng.standard_t(mixture.degrees, 200_000)
    levels = [0.05, 0.5, 0.95]
    wanted = np.quantile(drawn, levels)
    # Four standard errors of the outer quantiles drawn.
    np.testing.assert_allclose(mixture.quantiles(levels), wanted, atol=0.01 * np.ptp(wanted))


def test_what_a_forecast_needs():
    table = read_table("olmo_ladder_c4")
    for wrong, words in (
        ({"n": 1e9}, "use --forecast_n and --forecast_d"),
        ({"n": -1e9, "d": 1e10}, "--forecast_n=-1000000000.0 must be a positive number"),
        ({"n": 1e9, "d": 1e10, "level": 1.0}, "--forecast_level=1.0"),
    ):
        with pytest.raises(InputError, match=words):
            forecast_loss(table, bootstrap=0, **wrong)
    far = forecast_loss(table, n=1e12, d=2e13, bootstrap=200)
    assert "far_forecast" in {w["code"] for w in far["warnings"]}


def test_the_flops_of_a_target_follow_the_convention_of_the_table():
    table = grid(SIZES, TOKENS, noise=0.002)
    table["c"] = 1.5 * 6 * table["n"] * table["d"]
    result = fit_law(table, law="power", bootstrap=100)
    n, d = 3e9, 4e11
    assert result.table.flops(n, d) == pytest.approx(9 * n * d)
    assert result.predict(n=n, d=d) == pytest.approx(result.predict(c=9 * n * d))
    assert forecast_from_fit(result, n=n, d=d)["c"] == pytest.approx(9 * n * d)


def test_the_plan_is_the_minimum_at_its_budget():
    result = fit_law(grid(SIZES, TOKENS, noise=0.002), bootstrap=200)
    optimum = plan_optimum(result, 1e21)
    n = np.geomspace(optimum["n"] / 30, optimum["n"] * 30, 20001)
    loss = result.predict(n=n, d=1e21 / 6 / n)
    assert n[loss.argmin()] == pytest.approx(optimum["n"], rel=1e-3)
    assert optimum["n"] * optimum["d"] * 6 == pytest.approx(1e21)
    assert optimum["tokens_per_parameter"] == pytest.approx(optimum["d"] / optimum["n"])
    low, high = optimum["intervals"]["n"]
    assert low < optimum["n"] < high
    with pytest.raises(InputError, match="use --law=chinchilla"):
        plan_optimum(fit_law(read_table("kyo_takano"), law="power", bootstrap=0), 1e21)


@pytest.mark.slow
def test_advised_runs_do_what_is_promised():
    """The promised standard deviation matches that over simulated repetitions."""
    sizes, tokens = np.geomspace(1e7, 1e8, 4), np.geomspace(1e9, 1e10, 4)
    noise, target = 0.004, {"n": 3e9, "d": 6e10}
    before = fit_law(grid(sizes, tokens, noise=noise), delta=np.inf, bootstrap=0)
    advice = rank_next_runs(before, 1e21, **target)
    assert sum(row["c"] for row in advice["allocation"]) <= 1e21
    assert advice["spent"] <= 1e21 and advice["sd_after"] < advice["sd_before"]
    gains = [row["reduction"] for row in advice["ranking"]]
    assert gains == sorted(gains, reverse=True)
    n, d = np.array([(r["n"], r["d"]) for r in advice["allocation"] for _ in range(r["runs"])]).T
    spread = {"before": [], "after": []}
    for seed in range(30):
        table = grid(sizes, tokens, noise=noise, seed=seed)
        spread["before"].append(_at(table, target))
        error = np.exp(noise * np.random.default_rng(1000 + seed).standard_normal(len(n)))
        new_runs = {"n": n, "d": d, "loss": surface(n, d, **CHINCHILLA) * error}
        spread["after"].append(_at({k: np.append(table[k], new_runs[k]) for k in table}, target))
    spread = {k: np.std(v) for k, v in spread.items()}
    promised = advice["sd_after"] / advice["sd_before"]
    assert promised < 0.5
    assert spread["after"] / spread["before"] == pytest.approx(promised, rel=0.6)


def _at(table: dict, target: dict) -> float:
    """Predicts ln L at the target by least squares."""
    table = as_table(table)
    problem = laws.fit_problem(table, laws.LAWS["chinchilla"])
    theta = solve.solve_many_starts(problem, np.inf).theta
    params = laws.natural_parameters(problem.law, problem.centre, theta)
    return float(np.log(laws.evaluate_law(problem.law, params, **target)))


def test_advice_needs_a_target_and_a_budget():
    result = fit_law(grid(SIZES, TOKENS, noise=0.002), bootstrap=0)
    with pytest.raises(InputError, match="--forecast_n is missing"):
        rank_next_runs(result, 1e20, d=1e11)
    with pytest.raises(InputError, match=r"pays for no cell"):
        rank_next_runs(result, 1.0, n=1e10, d=1e11)
    law = fit_law(grid(SIZES, TOKENS, noise=0.002), law="power", bootstrap=0)
    assert rank_next_runs(law, 1e21, n=1e10, d=1e11)["allocation"]


def made_budgets(reach: float, points: int = 15, **params) -> dict:
    """Simulates runs at five budgets, with sizes up to `reach` times the optimum on each side."""
    p = CHINCHILLA | params
    a = p["beta"] / (p["alpha"] + p["beta"])
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    c = np.geomspace(1e17, 1e21, 5)
    n = G * (c[:, None] / 6) ** a * np.geomspace(1 / reach, reach, points)
    d = c[:, None] / (6 * n)
    return {"n": n.ravel(), "d": d.ravel(), "loss": surface(n, d, **p).ravel()}


@pytest.mark.parametrize("reach, bias", [(2, 1.003), (4, 1.013), (8, 1.030), (16, 1.054)])
def test_the_bias_of_a_parabola_is_the_known_one(reach, bias):
    # Hoffmann et al. (2022), approach 3.
    hoffmann = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    summary, _ = fit_isoflop(made_budgets(reach, **hoffmann), bootstrap=0)
    parabola, cubic = (summary["methods"][k] for k in ("parabola", "cubic"))
    assert parabola["a"] == pytest.approx(0.28 / 0.62, abs=1e-4)
    assert [b["bias"] for b in parabola["budgets"]] == pytest.approx([bias] * 5, abs=6e-4)
    assert [b["bias"] for b in cubic["budgets"]] == pytest.approx([1.0] * 5, abs=2.1e-3)
    codes = {w["code"] for w in summary["warnings"]}
    assert ("parabola_bias" in codes) == (bias > 1.0305)


def test_minima_at_the_edge_are_dropped_and_named():
    table = made_budgets(4)
    retained = np.ones(75, bool)
    retained[:9] = False
    summary, curves = fit_isoflop({k: v[retained] for k, v in table.items()}, bootstrap=50)
    stars = [b["n_star"] for b in summary["methods"]["parabola"]["budgets"]]
    assert stars[0] is None and None not in stars[1:]
    assert "minimum_at_edge" in {w["code"] for w in summary["warnings"]}
    assert len(curves["groups"]) == 5


def test_a_minimum_is_found_where_it_is():
    x = np.linspace(-1, 2, 9)
    assert polynomial_minimum(x, 3 + (x - 0.4) ** 2, 2) == (pytest.approx(0.4), True)
    assert polynomial_minimum(x, 3 - x, 2)[1] is False
    assert polynomial_minimum(x, 3 + (x - 5.0) ** 2, 2) == (pytest.approx(5.0), False)


def test_tables_without_budgets_are_refused():
    with pytest.raises(InputError, match="compute budgets of 5 and more sizes"):
        fit_isoflop(grid(SIZES[:3], TOKENS[:2]))
    assert len(rows_by_budget(as_table(made_budgets(4)))) == 5
