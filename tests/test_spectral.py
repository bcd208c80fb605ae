"""The spectral monitor against numpy's singular values, and inside a run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finish, flags, start

from lmscale_jax.model.param import Spec
from lmscale_jax.train import diagnostics


def matrices(kind: str, layers: int = 3) -> np.ndarray:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(layers, 96, 160)).astype(np.float32)
    if kind == "square":
        w = rng.normal(size=(layers, 128, 128)).astype(np.float32)
    if kind == "spiked":
        w += 40 * rng.normal(size=(layers, 96, 1)) * rng.normal(size=(layers, 1, 160)) / 124
    if kind == "power law":
        u, s, v = np.linalg.svd(w, full_matrices=False)
        w = u * (np.arange(1, s.shape[1] + 1) ** -0.7) @ v
    if kind == "low rank":
        w = w[:, :, :4] @ w[:, :4, :]
    return w.astype(np.float32)


@pytest.mark.parametrize("kind", ["wide", "square", "spiked", "power law", "low rank"])
def test_norm_is_a_close_lower_bound(kind):
    w = matrices(kind)
    start = diagnostics.begin_spectral(
        {"w": Spec(("layers", "embed", "mlp"), w.shape, 1, "hidden")}
    )
    exact_L = np.linalg.norm(w, ord=2, axis=(1, 2))
    cold_L, v = diagnostics.top_singular(jnp.asarray(w), start["weight"]["w"])
    assert np.all(cold_L <= exact_L * (1 + 1e-3))
    np.testing.assert_allclose(cold_L, exact_L, rtol=0.02)
    # Warm, a few iterations more each time: the bound only rises.
    for _ in range(8):
        warm_L, v = diagnostics.top_singular(jnp.asarray(w), v, iterations=5)
    assert np.all(warm_L >= cold_L * (1 - 1e-6)) and np.all(warm_L <= exact_L * (1 + 1e-3))
    np.testing.assert_allclose(warm_L, exact_L, rtol=0.006)


def test_zeros_and_what_follows_them():
    w = jnp.zeros((2, 8, 8))
    v = diagnostics.begin_spectral({"w": Spec(("layers", "a", "b"), (2, 8, 8), 1, "hidden")})[
        "weight"
    ]["w"]
    sigma_L, after = diagnostics.top_singular(w, v)
    assert sigma_L.tolist() == [0, 0] and np.array_equal(after, v)
    sigma_L, _ = diagnostics.top_singular(w.at[1].set(jnp.eye(8)), after)
    assert sigma_L.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_quantities_are_normalised_by_shape():
    specs = {
        "blocks": {"w": Spec(("layers", "embed", "mlp"), (2, 16, 64), 1, "hidden")},
        "gain": Spec(("embed",), (16,), 0, "vector"),
        "embed": Spec(("vocab", "embed"), (40, 16), 1, "input"),
    }
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
        specs,
        is_leaf=lambda x: isinstance(x, Spec),
    )
    updates = jax.tree.map(lambda x: -0.01 * x, tree)
    vectors = diagnostics.begin_spectral(specs)
    for _ in range(5):
        values, vectors = diagnostics.measure_spectral(specs, tree, updates, vectors)
    assert set(values) == {
        f"spectral/{q}/{p}"
        for q in ("weight", "update", "relative", "stable_rank")
        for p in ("blocks/w", "embed")
    }
    w = np.asarray(tree["blocks"]["w"])
    sigma_L = np.linalg.norm(w, ord=2, axis=(1, 2))
    np.testing.assert_allclose(values["spectral/weight/blocks/w"], sigma_L * 0.5, rtol=0.01)
    np.testing.assert_allclose(values["spectral/relative/blocks/w"], [0.01] * 2, rtol=0.02)
    rank_L = np.square(w).sum(axis=(1, 2)) / sigma_L**2
    np.testing.assert_allclose(values["spectral/stable_rank/blocks/w"], rank_L, rtol=0.02)


def test_each_measurement_has_a_period_of_its_own(small):
    config = small(log__every=2, log__spectral_every=4, log__activations_every=6)
    due = {done: diagnostics.due_measurements(config, done) for done in range(1, 13)}
    assert [n for n in due if "norms" in due[n]] == [2, 4, 6, 8, 10, 12]
    assert [n for n in due if "spectral" in due[n]] == [4, 8, 12]
    assert [n for n in due if "activations" in due[n]] == [6, 12]


@pytest.mark.slow
def test_a_run_logs_by_layer_and_resumes_to_the_bit(settings, tmp_path):
    """Interrupted and continued, the lines and so the vectors behind them are the same."""
    asked = settings | {"log.spectral_every": 4, "log.activations_every": 4, "log.every": 2}
    # Two programs in place of three: a step measures everything or nothing.
    asked |= {"log.per_layer": False}
    command = ["main", "--config=configs/base.py", f"--workdir={tmp_path}", *flags(asked)]
    status, _, err = finish(start(*command))
    assert status == 0, err
    whole = (tmp_path / "metrics.jsonl").read_text()
    # Back to an earlier checkpoint, as after a crash.
    record = json.loads((tmp_path / "run.json").read_text()) | {"status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    status, out, err = finish(start(*command))
    assert status == 0 and "going on from step 8" in out, out + err
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    lines = [json.loads(line) for line in whole.splitlines()]
    at = {line["step"]: line for line in lines}
    name = "spectral/weight/blocks/mlp/up/weight"
    assert [step for step in at if name in at[step]] == [4, 8, 12]
    assert len(at[4][name]) == 2 and all(v > 0 for v in at[4][name])
    assert [step for step in at if "activation/residual/rms" in at[step]] == [4, 8, 12]
    assert len(at[4]["activation/residual/max"]) == 2
    assert at[4]["activation/logits/max"] >= at[4]["activation/logits/rms"]
    assert (tmp_path / "plots" / "spectral.png").exists()
