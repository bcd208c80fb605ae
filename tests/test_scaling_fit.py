"""Laws and solver: parameters are recovered, minima are minima, reference values match."""

import dataclasses
import json

import numpy as np
import pytest
from synthetic import CHINCHILLA, grid

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import fit_law, laws, read_table, solve
from lmscale_jax.scaling.table import as_table

SIZES, TOKENS = np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)


@pytest.mark.parametrize("delta", [None, 1e-3, np.inf])
def test_a_law_without_noise_comes_back_to_eight_digits(delta):
    result = fit_law(grid(SIZES, TOKENS), delta=delta, bootstrap=0)
    for name, true in CHINCHILLA.items():
        assert result.params[name] == pytest.approx(true, rel=1e-8), name
    assert result.compound["a"] == pytest.approx(0.3658 / (0.3478 + 0.3658), rel=1e-8)


def test_power_laws_come_back_with_and_without_a_floor():
    c = np.geomspace(1e15, 1e21, 12)
    power = fit_law({"c": c, "loss": 80 * c**-0.07}, law="power", bootstrap=0)
    assert power.params == pytest.approx({"a": 80, "b": 0.07}, rel=1e-9)
    table = {"c": c, "loss": 1.7 + 900 * c**-0.16}
    free = fit_law(table, law="power_floor", bootstrap=0)
    assert free.params == pytest.approx({"E": 1.7, "a": 900, "b": 0.16}, rel=1e-8)
    pinned = fit_law(table, law="power_floor", floor=1.7, bootstrap=0)
    assert pinned.params == pytest.approx({"E": 1.7, "a": 900, "b": 0.16}, rel=1e-9)


def test_gradient_and_hessian_are_those_of_the_objective():
    table = as_table(grid(SIZES, TOKENS, noise=0.02))
    problem = laws.fit_problem(table, laws.LAWS["chinchilla"])
    delta = 0.02
    theta = solve.projection_starts(problem)[:3] + 0.05
    weight = np.random.default_rng(1).uniform(0.5, 2, len(table))
    weighted = dataclasses.replace(problem, weight=weight)
    _, g, H, _ = solve._Objective(weighted, delta).evaluate(theta, weight, problem.y, None)
    h = 1e-6
    for j in range(5):
        step = h * np.eye(5)[j]
        up, down = (solve.objective_values(weighted, theta + k * step, delta) for k in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * h), g[:, j], rtol=1e-5, atol=1e-7)
        ups, downs = (
            solve._Objective(weighted, delta).evaluate(theta + k * step, weight, problem.y, None)[1]
            for k in (1, -1)
        )
        # A residual that crosses delta within the step contributes an error of order h.
        np.testing.assert_allclose((ups - downs) / (2 * h), H[:, j], rtol=1e-4, atol=1e-4)


def test_no_start_of_a_general_optimizer_does_better():
    from scipy.optimize import minimize

    table = as_table(grid(SIZES, TOKENS, noise=0.01))
    problem = laws.fit_problem(table, laws.LAWS["chinchilla"])
    ours = solve.solve_many_starts(problem, 0.005)
    rng = np.random.default_rng(0)

    def F(theta):
        return float(solve.objective_values(problem, theta[None], 0.005)[0])

    low, high = np.array([-2, -5, 0, -5, 0]), np.array([1, 1, 1, 1, 1])
    ends = [minimize(F, rng.uniform(low, high), method="BFGS").fun for _ in range(12)]
    assert ours.objective <= min(ends) * (1 + 1e-9)
    assert min(ends) <= ours.objective * 1.01


def test_a_weight_of_two_is_a_row_twice():
    table = grid(SIZES, TOKENS, noise=0.01)
    weight = np.ones(len(table["n"]))
    weight[3] = 2
    twice = {k: np.append(v, v[3]) for k, v in table.items()}
    # Exactly equal runs would be omitted as copies.
    twice["loss"][-1] *= 1 + 1e-13
    a = fit_law(table | {"weight": weight}, delta=0.01, bootstrap=0)
    b = fit_law(twice, delta=0.01, bootstrap=0)
    assert a.params == pytest.approx(b.params, rel=1e-6)


# The published refits, Huber 1e-3: E, A, B, alpha, beta, F.
BUNDLED = {
    "kyo_takano": (1.78389, 442.16, 1271.8, 0.34263, 0.34200, 8.4009312e-4),
    "olmo_ladder_c4": (1.74745, 77.466, 24.893, 0.23784, 0.14466, 4.3785559e-5),
    "olmo_ladder_pile": (1.40569, 285.94, 66.19, 0.31508, 0.19499, 5.1919e-5),
}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tables_have_their_known_fits(name):
    result = fit_law(read_table(name), delta=1e-3, bootstrap=0)
    *params, F = BUNDLED[name]
    for (key, value), true in zip(result.params.items(), _order(params), strict=True):
        assert value == pytest.approx(true, rel=1e-4), key
    assert result.objective == pytest.approx(F, rel=1e-5)


def _order(values):
    """Reorders E, A, B, alpha, beta to the order of `params`."""
    E, A, B, alpha, beta = values
    return (E, alpha, A, beta, B)


def test_both_sign_conventions_and_json():
    result = fit_law(grid(SIZES, TOKENS, noise=0.01), bootstrap=200)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    p, q = written["params"], written["negative_exponents"]
    n, d = 3e8, 2e10
    theirs = np.exp(q["E"]) + np.exp(q["A"]) * n ** q["alpha"] + np.exp(q["B"]) * d ** q["beta"]
    assert theirs == pytest.approx(float(result.predict(n=n, d=d)), rel=1e-12)
    assert p["alpha"] == -q["alpha"] > 0
    assert {"law", "n_points", "objective", "delta", "intervals", "warnings"} <= set(written)
    assert set(written["alternatives"]) == {"chosen", "least_squares", "huber_1e-3"}
    for name in ("E", "alpha", "beta", "a"):
        low, high = written["intervals"][name]
        assert low < (result.params | result.compound)[name] < high


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    inside = 0
    for seed in range(20):
        result = fit_law(grid(SIZES, TOKENS, noise=0.01, seed=seed), bootstrap=100, level=0.9)
        low, high = result.intervals["alpha"]
        inside += low < CHINCHILLA["alpha"] < high
    assert inside >= 14


def test_curves_are_resampled_by_run():
    """Rows of a curve share their error; only resampling by run includes it."""
    rng = np.random.default_rng(0)
    table = grid(SIZES, np.geomspace(1e9, 1e12, 40))
    run = np.repeat(np.arange(6), 40)
    table["loss"] = table["loss"] * np.exp(0.02 * rng.standard_normal(6))[run]
    table["run_id"] = run
    with pytest.raises(InputError, match="cluster"):
        fit_law(table, points="curve", cluster="column")
    runs = fit_law(table, points="curve", bootstrap=300)
    rows = fit_law(table, points="curve", bootstrap=300, cluster="row")
    assert runs.draws.clusters == 6 and runs.draws.kind == "student"
    width = {k: np.diff(r.intervals["alpha"])[0] for k, r in (("run", runs), ("row", rows))}
    assert width["run"] > 3 * width["row"]
    codes = {w["code"] for w in rows.warnings}
    assert {"curve_points", "rows_resampled"} <= codes
    assert "few_clusters" in {w["code"] for w in runs.warnings}
    final = fit_law(table, bootstrap=0, law="power")
    assert len(final.table) == 6


def test_repeated_data_counts_for_less():
    r_star = 12.0
    n, d, unique = (x.ravel() for x in np.meshgrid(SIZES, TOKENS, [1e9, 1e10], indexing="ij"))
    table = {"n": n, "d": d, "unique": unique}
    worth = laws.effective_tokens(d, unique, r_star)
    assert (worth <= d * (1 + 1e-12)).all() and (worth[d <= unique] == d[d <= unique]).all()
    table["loss"] = grid(SIZES, TOKENS)["loss"].repeat(2) * 0 + CHINCHILLA["E"]
    table["loss"] += CHINCHILLA["A"] * n**-0.3478 + CHINCHILLA["B"] * worth**-0.3658
    fitted = fit_law(table, repetition="fit", bootstrap=0)
    assert fitted.r_star == pytest.approx(r_star, rel=1e-4)
    assert fitted.params["beta"] == pytest.approx(0.3658, rel=1e-4)
    ignored = fit_law(table, bootstrap=0)
    assert "repeated_data" in {w["code"] for w in ignored.warnings}
    assert abs(ignored.params["beta"] - 0.3658) > 0.05


def test_the_floor_is_pinned_below_the_losses():
    table = grid(SIZES, TOKENS)
    with pytest.raises(InputError, match=r"--floor=3.0 is not below the smallest loss"):
        fit_law(table, floor=3.0)
    result = fit_law(table, floor=1.5, bootstrap=0)
    assert result.params["E"] == 1.5 and result.profile is None


def test_same_seed_same_intervals():
    table = grid(SIZES, TOKENS, noise=0.01)
    a, b, c = (fit_law(table, bootstrap=150, seed=s).intervals for s in (1, 1, 2))
    assert a == b != c
