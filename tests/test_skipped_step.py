"""A step whose loss is not finite leaves the whole state of training as it was."""

import jax
import numpy as np
import pytest
from test_modes import SMALL

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.data.batches import Batch
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.train import diagnostics
from lmscale_jax.train.setup import TrainStep, build_setup

# All that keeps something from step to step beside the optimizers.
KEPT = {
    "log.every": 1, "log.per_layer": False, "log.spectral_every": 1, "optim.ema_decay": 0.9,
    "freeze.mode": "unfreeze", "freeze.every": "1", "schedule.warmup": "0",
    "model.n_layers": 2, "model.d_model": 16, "model.n_heads": 2,
}  # fmt: skip
UPDATE = {"mur.mode": "update", "mur.tau_kind": "quantile", "mur.tau": 0.5}
CASES = {name: {"optim.name": name} | UPDATE for name in OPTIMIZERS} | {
    "loss, quantile": {"mur.mode": "loss", "mur.tau_kind": "quantile", "mur.tau": 0.5},
    "loss, stderr": {"mur.mode": "loss", "mur.tau_kind": "stderr"},
}
# They count this step like any other.
COUNTERS = ("step", "bad", "skipped")


FAST = ("normuon", "loss, stderr")


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_skipped_step_leaves_every_leaf_of_the_state(case):
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(SMALL | KEPT | CASES[case])
    setup = build_setup(resolve(config), None)
    take, measure = TrainStep(setup), diagnostics.due_measurements(setup.config, 1)
    tokens_BxT = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
    good, poisoned = Batch(tokens_BxT, tokens_BxT), Batch(tokens_BxT.copy(), tokens_BxT)
    poisoned.tokens_BxT[0, 0] = 64  # an id that no row has: its embedding is nan
    first = jax.device_get(setup.begin())
    before = jax.device_get(take(first, good, measure=measure)[0])
    for name in set(before._fields) - {"bad", "skipped"}:
        assert jax.tree.leaves(getattr(before, name)), f"nothing is kept as {name}"
        assert not same(getattr(first, name), getattr(before, name))
    state, metrics = take(before, poisoned, measure=measure)
    after = jax.device_get(state)
    assert np.isnan(metrics["train_loss"])
    assert (after.step, after.bad, after.skipped) == (2, 1, 1)
    changed = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
        if path[0].name not in COUNTERS and not np.array_equal(old, new)
    ]
    assert not changed
    _, metrics = take(after, good, measure=measure)
    spectral = [x for name, x in metrics.items() if name.startswith("spectral/")]
    assert spectral and all(np.isfinite(x).all() for x in spectral)


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
