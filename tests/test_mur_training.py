"""Marginal utility in training: factors, running means, what is logged, devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finish, record

from lmscale_jax.model import mesh
from lmscale_jax.train.run import build_run
from lmscale_jax.train.setup import TrainStep

LOSS = {"mur__mode": "loss", "mur__tau": 0.5, "mur__warmup": "2", "mur__ramp": "4"}
UPDATE = {"mur__mode": "update", "mur__tau": 0.5, "mur__alpha": 0.4}


def prepared(small, **changes):
    return build_run(small(**({"mesh__cpu_devices": 1} | changes)), None, say=lambda line: None)


def steps_of(run, count: int, measure=()):
    """(state, metrics) after `count` steps."""
    state = run.begin()
    take = TrainStep(run)
    for t in range(count):
        batch = mesh.put_batch(run.batches.at(t), run.mesh)
        state, metrics = take(state, batch, measure=measure)
    return jax.device_get(state), jax.device_get(metrics)


def update_of(run):
    """The parameters' change in the first step."""
    before = jax.device_get(run.model.init(jax.random.key(0)))
    state, metrics = steps_of(run, 1, ("mur",))
    return jax.tree.map(lambda a, b: a - b, state.params, before), metrics


@pytest.fixture(scope="module")
def plain_update(settings):
    from lmscale_jax.configs import base

    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(settings | NO_RAMP | {"mesh.cpu_devices": 1})
    return update_of(build_run(config, None, say=lambda line: None))[0]


# A rate at once, and parameters so far from 0 that rounding does not hide their change.
NO_RAMP = {"schedule.warmup": "0", "optim.weight_decay": 0.0, "optim.lr": 0.01, "optim.clip": 0.0}
# Beside the smallest gradients too; Adam cancels a factor up to this.
NO_RAMP |= {"optim.eps": 1e-16}
HERE = {k.replace(".", "__"): v for k, v in NO_RAMP.items()}
AT_ONCE = {"mur__warmup": "0", "mur__ramp": "0", "mur__start": 0.5, "mur__end": 1.0}


def largest(updates, expected) -> float:
    """Returns the largest relative difference between the updates of blocks."""
    pairs = zip(
        jax.tree.leaves(updates["blocks"]), jax.tree.leaves(expected["blocks"]), strict=True
    )
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def test_factor_on_updates_multiplies_the_update(small, plain_update):
    """The chosen block's update is larger by the factor that is logged, the other's is not."""
    updates, metrics = update_of(prepared(small, **UPDATE, **HERE, **AT_ONCE))
    factor_L = metrics["mur/multiplier"]
    assert factor_L[0] == 1 and 1.1 < factor_L[1] < 1.4
    # One step: the running mean is the step's own utility.
    assert factor_L[1] == pytest.approx(1 + 0.4 * (0.5 - metrics["mur/mean"][1]), rel=1e-5)

    def expected(u):
        return u * factor_L.reshape(-1, *[1] * (u.ndim - 1))

    expected_updates = plain_update | {"blocks": jax.tree.map(expected, plain_update["blocks"])}
    assert largest(updates, expected_updates) < 1e-4
    for a, b in zip(
        jax.tree.leaves(updates["embed"]), jax.tree.leaves(plain_update["embed"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_factor_on_gradients_is_cancelled_by_adam(small, plain_update):
    """The original's form: the same factor, and the update stays what it was."""
    changes = UPDATE | {"mur__apply_to": "grads"} | HERE | AT_ONCE
    updates, metrics = update_of(prepared(small, **changes))
    assert metrics["mur/multiplier"][1] > 1.1
    assert largest(updates, plain_update) < 1e-4


def test_running_means_and_thresholds(small):
    """ū is the mean with decay, corrected for its beginning; tau from it, before the step."""
    run = prepared(
        small, **UPDATE, mur__decay=0.5, mur__tau_kind="quantile", mur__start=0.0, mur__end=1.0
    )
    state = run.begin()
    take = TrainStep(run)
    sums, weight, last_tau = 0.0, 0.0, np.zeros(2)
    for t in range(3):
        batch = mesh.put_batch(run.batches.at(t), run.mesh)
        state, metrics = take(state, batch, measure=("mur",))
        np.testing.assert_allclose(metrics["mur/tau"], last_tau, rtol=1e-5)
        sums, weight = 0.5 * sums + 0.5 * metrics["mur/p50"].mean(), 0.5 * weight + 0.5
        last_tau = np.full(2, sums / weight)
    means = state.utility
    assert set(means["sums"]) == {"quantile", "utility"}
    mean_L = means["sums"]["utility"][:, 0] / means["weight"]
    # The factor in force is that of the means with this step's own.
    low_L = np.maximum(0, last_tau - np.asarray(mean_L))
    strength = 1.0 if run.config.train.steps == 0 else min(1, max(0, (2 - 1) / 2))
    np.testing.assert_allclose(metrics["mur/multiplier"], 1 + 0.4 * strength * low_L, rtol=1e-5)


def test_off_costs_nothing(small):
    """Without the mode, and on steps that do not report in diagnose mode, the same program."""

    def program(**changes):
        run = prepared(small, **changes)
        return run.lower_step().as_text()

    assert program() == program(mur__mode="diagnose")


@pytest.mark.slow
def test_runs_log_the_utility(train, tmp_path):
    """A run in loss mode, stopped nowhere: lists by layer, null where a layer is not watched."""
    workdir = tmp_path / "run"
    changes = LOSS | {"mur__first_block": 1, "mur__last_block": 1, "eval__redundancy_every": "4"}
    status, _, err = finish(train(workdir, **changes, log__tensorboard=False, eval__sample=0))
    assert status == 0, err
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("mean", "p10", "p50", "p90", "frac_below_tau", "delta_norm", "hinge"):
            first, second = line[f"mur/{name}"]
            assert first is None and second is not None
        t = line["step"] - 1
        wanted = 0.1 * min(1.0, max(0.0, (t - 2) / 4))
        assert line["mur/lambda"] == pytest.approx(wanted, abs=1e-7)
        # A hinge is never below 0, and here the utility is always below tau.
        assert line["mur/hinge"][1] == pytest.approx(0.5 - line["mur/mean"][1], rel=1e-4)
        assert ("block_influence" in line) == (line["step"] % 4 == 0)
    assert len(lines[-1]["layer_drop"]) == len(lines[-1]["block_influence"]) == 2
    line = record(workdir)["choices"]["mur"]
    assert line == "loss: cos, blocks 1 to 1 of 2, λ 0.1 from step 2 to 6"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loss", "update"])
def test_eight_devices_and_a_restart_train_alike(train, tmp_path, mode):
    """One device; eight, interrupted after half of the steps."""
    changes = (LOSS if mode == "loss" else UPDATE) | {"mur__reduce": "sample_k"}
    changes |= {"mur__sample_k": 4, "log__tensorboard": False, "eval__sample": 0}
    grid = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__cpu_devices": 8}
    single, eight = tmp_path / "single", tmp_path / "eight"
    assert finish(train(single, **changes, mesh__cpu_devices=1))[0] == 0
    assert finish(train(eight, **changes, **grid))[0] == 0
    # As a kill after the first checkpoints would leave it.
    import shutil

    for later in (8, 12):
        shutil.rmtree(eight / "checkpoints" / str(later))
    kept = json.loads((eight / "run.json").read_text())
    (eight / "run.json").write_text(json.dumps(kept | {"status": "running"}))
    if (eight / "checkpoints" / "4").exists():
        assert finish(train(eight, **changes, **grid))[0] == 0
    ours, theirs = (
        [json.loads(x) for x in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (eight, single)
    )
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        for name in ("train_loss", "mur/mean", "mur/p90", "mur/delta_norm"):
            a_L, b_L = (np.array(x[name], float) for x in (a, b))
            np.testing.assert_allclose(a_L, b_L, rtol=2e-4, atol=1e-6, err_msg=name)


def test_strength():
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.configs import base
    from lmscale_jax.mur import objective

    config = base.get_config()
    config.mur.update({"mode": "loss", "warmup": "10", "ramp": "20"})
    mur = objective.make_objective(resolve(config, 64))
    strengths = [float(mur.strength(jnp.int32(t))) for t in (0, 9, 10, 20, 30, 500)]
    assert strengths == [0, 0, 0, 0.5, 1, 1]
    config.mur.ramp = "0"
    mur = objective.make_objective(resolve(config, 64))
    assert [float(mur.strength(jnp.int32(t))) for t in (9, 10)] == [0, 1]
