"""Large tables: fitted from the minima of a subset, with intervals by single Newton steps."""

import numpy as np
import pytest
from synthetic import CHINCHILLA, surface

from lmscale_jax.scaling import fit_law, intervals, solve
from lmscale_jax.scaling import summary as describe

ROWS, SUBSET = 1200, 400


def table(runs: int, seed: int = 0) -> dict:
    """Simulates runs of equally many rows, whose losses have an error in common."""
    rng = np.random.default_rng(seed)
    each = ROWS // runs
    n = np.repeat(np.exp(rng.uniform(np.log(1e7), np.log(1e10), runs)), each)
    d = np.exp(rng.uniform(np.log(1e9), np.log(1e12), ROWS))
    run = np.repeat(np.arange(runs), each)
    error = 0.003 * rng.standard_normal(ROWS) + 0.003 * rng.standard_normal(runs)[run]
    return {"n": n, "d": d, "loss": surface(n, d, **CHINCHILLA) * np.exp(error),
            "run_id": run.astype(str)}  # fmt: skip


def both(monkeypatch, runs: int):
    """Fits one table as a small one and as a large one."""
    columns = table(runs)
    settings = {"points": "curve", "bootstrap": 400}
    usual = fit_law(columns, **settings)
    monkeypatch.setattr(solve, "SUBSET", SUBSET)
    lines = []
    return usual, fit_law(columns, say=lines.append, **settings), lines


@pytest.mark.parametrize("runs", [ROWS, 60, 12])
def test_a_large_table_has_the_fit_of_a_small_one(monkeypatch, runs):
    usual, large, lines = both(monkeypatch, runs)
    assert large.params == pytest.approx(usual.params, rel=1e-6)
    assert large.objective == pytest.approx(usual.objective, rel=1e-9)
    assert not usual.draws.linear and large.draws.linear
    assert (large.draws.kind, large.draws.degrees) == (usual.draws.kind, usual.draws.degrees)
    for name in ("E", "alpha", "beta", "A"):
        width, usual_width = (float(np.ptp(fit.intervals[name])) for fit in (large, usual))
        assert width == pytest.approx(usual_width, rel=0.4 if runs < 20 else 0.2), name
    assert large.profile.low == pytest.approx(usual.profile.low, rel=3e-3)
    assert large.profile.high == pytest.approx(usual.profile.high, rel=3e-3)
    assert [line[:6] for line in lines] == ["1 of 3", "2 of 3", "3 of 3"]
    text = "\n".join(describe.fit_lines(large))
    assert "from the minima of 400 drawn at random" in text and "single Newton steps" in text
    assert large.to_json()["resampling"]["linear"] and large.diagnostics["starts"]["rows"] == SUBSET
    assert large.diagnostics["starts"]["tried"] > 10


def test_many_clusters_are_drawn_by_their_normal_limit(monkeypatch):
    columns = table(ROWS)
    monkeypatch.setattr(solve, "SUBSET", SUBSET)
    widths = []
    for most in (ROWS, 10):
        monkeypatch.setattr(intervals, "MAX_MULTINOMIAL", most)
        fit = fit_law(columns, bootstrap=2000)
        widths.append([np.ptp(fit.intervals[k]) for k in ("E", "alpha", "beta")])
    np.testing.assert_allclose(widths[0], widths[1], rtol=0.1)


def test_leverage_is_removed_alike_by_either_product():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((40, 3)))
    part, r = q[:25], rng.standard_normal(25)
    expected = np.linalg.solve(np.eye(25) - part @ part.T, r)
    np.testing.assert_allclose(intervals._without_leverage(part, r), expected, rtol=1e-9)
    # A direction that these rows do not determine, and one that no other rows do.
    constant = np.zeros((6, 2))
    constant[:, 0] = 0.1
    np.testing.assert_allclose(intervals._without_leverage(constant, r[:6]).std(), r[:6].std())
    alone = np.concatenate([np.full((4, 1), 0.5), np.zeros((2, 1))])
    remaining = intervals._without_leverage(alone, r[:6])
    np.testing.assert_allclose(remaining[:4], r[:4] - r[:4].mean(), atol=1e-12)
