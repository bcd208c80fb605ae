"""Populations against solo runs, and the optimum of a sweep."""

import json

import numpy as np
import pytest
from conftest import run

from lmscale_jax.errors import InputError
from lmscale_jax.sweeps import lr_transfer as transfer
from lmscale_jax.sweeps import population
from lmscale_jax.train.run import build_run


@pytest.mark.parametrize(
    ("parametrization", "optimizer"),
    [("mup", "adamw"), ("mup", "muon")],
)
@pytest.mark.slow
def test_members_are_the_runs_they_stand_for(small, parametrization, optimizer):
    """Losses of a population against train/step.py on each member's own config."""
    from lmscale_jax.model import mesh
    from lmscale_jax.train.setup import TrainStep

    changes = {"train__steps": 30, "mesh__cpu_devices": 1, "optim__name": optimizer}
    changes["model__n_layers"] = 1
    if optimizer == "adamw":  # blocks drawn by freeze.seed are the same for all seeds
        changes |= {"model__n_layers": 2, "freeze__mode": "random", "freeze__seed": 2}
    if parametrization == "mup":
        changes |= {"parametrization__name": "mup", "parametrization__base_width": 16}
    numbers = [
        {"seed": 0, "optim__lr": 1e-3, "data__seed": 0, "optim__weight_decay": 0.0},
        {"seed": 3, "optim__lr": 4e-3, "data__seed": 5, "optim__weight_decay": 1e-3},
    ]
    if optimizer == "muon":
        numbers[0]["optim__muon_lr"], numbers[1]["optim__muon_lr"] = 0.01, 0.03
    runs = [build_run(small(**changes, **n), None, say=lambda line: None) for n in numbers]
    result = population.train_population([alone.config for alone in runs], runs[0].data)
    assert result.train_loss_KxS.shape == (2, 30)
    for k, alone in enumerate(runs):
        state, take = alone.begin(), TrainStep(alone)
        losses = []
        for t in range(30):
            state, metrics = take(state, mesh.put_batch(alone.batches.at(t), alone.mesh))
            losses.append(float(metrics["train_loss"]))
        np.testing.assert_allclose(result.train_loss_KxS[k], losses, rtol=3e-5)
        assert result.val_loss_K[k] == pytest.approx(
            alone.validate(state.params)["val_loss"], rel=3e-5
        )


def test_a_population_has_no_parent(small):
    config = small(train__parent="runs/stable", train__parent_step=4)
    with pytest.raises(InputError, match=r"train\.parent='runs/stable'.*use ''"):
        population.check_members([config])


def test_members_share_all_but_numbers(small):
    with pytest.raises(InputError, match=r"config\.model\.d_model=16 and 32 differs between"):
        population.check_members([small(model__d_model=16), small(model__d_model=32)])


def test_the_optimum_of_a_known_valley():
    x = np.arange(-10.0, -2.0)
    centres = np.array([-6.3, -6.1, -6.2])
    loss = 3 + 0.1 * (x[:, None] - centres) ** 2
    best = transfer.optimum(x, loss)
    assert best["log2_lr"] == pytest.approx(-6.2) and best["grid"] == -6
    assert best["se"] == pytest.approx(0.1 / np.sqrt(3)) and not best["at_edge"]
    loss[-2:] = np.nan  # diverged beyond the optimum
    assert transfer.optimum(x, loss)["log2_lr"] == pytest.approx(-6.2)
    edge = transfer.optimum(x, np.tile(x[:, None], (1, 3)))
    assert edge["at_edge"] and edge["log2_lr"] == -10


def test_drift_is_in_octaves():
    def at(place, grid):
        return {"log2_lr": place, "se": 0.3, "grid": grid, "at_edge": False}

    drift = transfer.optimum_drift([at(-4.0, -4), at(-4.5, -5), at(-6.4, -6)])
    assert drift["octaves"] == pytest.approx(-2.4) and drift["grid_range"] == 2
    assert drift["se"] == pytest.approx(0.3 * 2**0.5) and drift["range"] == pytest.approx(2.4)
    assert "-2.40" in transfer.transfer_headline(drift, [32, 256])


@pytest.mark.slow
def test_a_small_sweep_writes_and_never_overwrites(settings, tmp_path):
    data = [f"--config.{k}={v}" for k, v in settings.items() if k.startswith("data.")]
    data.append("--config.data.vocab_size=4096")
    arguments = [
        f"--workdir={tmp_path}", "--widths=16,32", "--log2_lrs=-8,-6,-4", "--seeds=2", *data,
        "--config.train.steps=10", "--config.parametrization.base_width=16",
        "--config.model.n_layers=1",
    ]  # fmt: skip
    status, out, err = run("lr_transfer", *arguments)
    assert status == 0, err
    result = json.loads((tmp_path / "lr_transfer.json").read_text())
    assert set(result["arms"]) == {"sp", "mup"} and out.count("octaves") == 2
    assert np.array(result["arms"]["mup"]["val_loss"]).shape == (2, 3, 2)
    assert (tmp_path / "lr_transfer.png").exists()
    # At the base width the two are the same model.
    assert result["arms"]["sp"]["val_loss"][0] == result["arms"]["mup"]["val_loss"][0]
    status, _, err = run("lr_transfer", *arguments)
    assert status == 2 and "holds a sweep already" in err and err.count("\n") == 1
    status, _, err = run("lr_transfer", f"--workdir={tmp_path / 'b'}", "--log2_lrs=a,b,c")
    assert status == 2 and "--log2_lrs=a,b,c" in err


@pytest.mark.slow
def test_wider_is_better_under_mup(tmp_path):
    """The training loss at a fixed step falls with width, at one base learning rate."""
    from ml_collections import ConfigDict

    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.configs import lr_transfer
    from lmscale_jax.data import prepare
    from lmscale_jax.model.sizes import at_size

    config = lr_transfer.get_config()
    config.train.steps, config.optim.lr = 120, 2.0**-8
    data = prepare.prepare_data(config.data, 0, log=print)
    losses = []
    for width in (32, 64, 128):
        resolved = resolve(at_size(config, "width", width), data.vocab_size)
        members = [ConfigDict(resolved.to_dict() | {"seed": seed}) for seed in range(3)]
        result = population.train_population(members, data)
        mean_S = result.train_loss_KxS.mean(axis=0)
        losses.append((mean_S[55:65].mean(), mean_S[-20:].mean()))
    assert np.all(np.diff(np.array(losses), axis=0) < 0), losses
