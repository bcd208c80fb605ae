"""Taps, slopes and the coordinate check, its deliberate mistakes included."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import coord_check as family
from lmscale_jax.errors import InputError
from lmscale_jax.model import build
from lmscale_jax.sweeps import coord_check, slopes


def make(name="llama", **changes):
    config = family.get_config(name)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return build.build_model(resolve(config, 40), platform="cpu")


TINY = {"model__d_model": 128, "model__n_heads": 4, "parametrization__base_width": 64}


@pytest.mark.parametrize("stack", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_taps_are_the_activations(name, stack):
    """Each tap against what the forward pass or plain numpy makes of the others."""
    model = make(name, **TINY, model__n_kv_heads=2, model__stack=stack)
    params = model.init(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)))
    taps = jax.jit(lambda p: model.taps(p, ids, lambda _, x: x))(params)
    blocks = taps["blocks"]
    assert set(blocks) == {
        "query", "key", "value", "scores", "attention", "mlp_hidden", "mlp", "residual",
    }  # fmt: skip
    np.testing.assert_allclose(taps["logits"], model.logits(params, ids).reshape(16, 40), atol=1e-6)
    np.testing.assert_array_equal(taps["final"], blocks["residual"][-1])
    for layer, before in enumerate([taps["embed"], *blocks["residual"][:-1]]):
        after = before + blocks["attention"][layer] + blocks["mlp"][layer]
        np.testing.assert_allclose(after, blocks["residual"][layer], atol=1e-6)
    q, k = np.array(blocks["query"][1]), np.array(blocks["key"][1])
    scale = 32**-0.5
    for t, s in ((0, 0), (5, 2), (7, 7)):
        row = t * (t + 1) // 2 + s
        wanted = scale * (q[1, t, 3] @ k[1, s, 1])
        assert blocks["scores"][1, 1, 3, row] == pytest.approx(wanted, abs=1e-6)
    # What is kept is the caller's choice, made inside the stack.
    means = model.taps(params, ids, lambda _, x: jnp.abs(x).mean())
    np.testing.assert_allclose(
        means["blocks"]["mlp"], np.abs(blocks["mlp"]).mean(axis=(1, 2)), rtol=1e-5
    )


def test_slopes_of_known_powers():
    widths = [64, 128, 256, 512]
    noise = np.exp(np.random.default_rng(0).normal(0, 0.05, (4, 2, 3)))
    power = np.array(widths, float)[:, None, None] ** np.array([0.0, 0.5])[:, None]
    exact = slopes.coordinate_slopes(widths, 3 * power * np.ones((4, 2, 3)))
    assert [e["slope"] for e in exact] == pytest.approx([0, 0.5], abs=1e-12)
    assert [e["se"] for e in exact] == pytest.approx([0, 0], abs=1e-12)
    for entry, wanted in zip(
        slopes.coordinate_slopes(widths, power * noise), (0, 0.5), strict=True
    ):
        assert entry["se"] > 0 and abs(entry["slope"] - wanted) < 4 * entry["se"]
    broken = np.ones((4, 2, 3))
    broken[2, 1, 0], broken[1, 0, 0] = np.nan, 0.0
    assert slopes.coordinate_slopes(widths, broken) == [{"slope": None, "se": None}] * 2


def steps_of(*values):
    return {str(t): {"slope": v, "se": 0.01} for t, v in enumerate(values, 1)}


def test_bounds_are_those_of_the_protocol():
    good = {
        "embed": steps_of(0.5, 0.1, -0.1),  # the first step of a hidden tensor is not judged
        "logits": steps_of(-0.5, -0.4, -0.3, -0.2, 0.15, -0.15),
        "blocks/1/scores": steps_of(0.0, 0.14, 0.14),
        "change/embed": steps_of(None, 0.9, 0.9, 0.9, 0.15),
        "update/blocks/mlp/up/weight": steps_of(0.15, -0.15, 0.0, 0.0, 0.0, 0.9),
    }
    assert slopes.slope_failures(good) == []
    bad = {
        "blocks/0/mlp": steps_of(0.0, 0.11),
        "logits": steps_of(-0.3, 0.0, 0.0, 0.0, None),
        "change/logits": steps_of(None, 0.0, 0.0, 0.0, -0.5),
        "update/readout/weight": steps_of(-0.2),
    }
    failed = [(f["tensor"], f["step"]) for f in slopes.slope_failures(bad)]
    assert failed == [
        ("logits", 5), ("change/logits", 5), ("logits", 1), ("update/readout/weight", 1),
        ("blocks/0/mlp", 2),
    ]  # fmt: skip
    assert ("logits", 1) not in [
        (f["tensor"], f["step"]) for f in slopes.slope_failures(bad, sweep="depth")
    ]


def verdict_of_a_simulated_check(rng, wrong: float) -> str:
    """Of 38 tensors, all at their bound of 0.10 but one. Two are as noisy as attention is."""
    table, widths = {}, np.array([64.0, 128, 256])
    for number in range(38):
        slope, noise = wrong if number == 5 else 0.0999, 0.12 if number < 2 else 0.03
        # Half of the noise lasts for all steps.
        scatter = (rng.normal(0, noise, (3, 10, 3)) + rng.normal(0, noise, (3, 1, 3))) / 2**0.5
        values = np.exp2(np.log2(widths)[:, None, None] * slope + scatter)
        entries = slopes.coordinate_slopes(widths, values)
        table[f"blocks/{number}/mlp"] = {str(t): entry for t, entry in enumerate(entries, 1)}
    return slopes.coordinate_verdict(slopes.slope_failures(table))


def test_a_verdict_keeps_its_level_and_finds_what_is_wrong():
    rng = np.random.default_rng(0)
    right = [verdict_of_a_simulated_check(rng, 0.0999) for _ in range(150)]
    # Without errors none would pass; the level is 0.05, with four standard errors of 150 draws.
    assert right.count("failed") <= 150 * 0.05 + 4 * (150 * 0.05 * 0.95) ** 0.5
    assert right.count("undetermined") >= 130
    wrong = [verdict_of_a_simulated_check(rng, 0.75) for _ in range(50)]
    assert wrong.count("failed") >= 45
    assert slopes.coordinate_verdict([]) == "passed"


def test_scores_may_fall_until_heads_align():
    """Where heads grow: as head_dim^-1/2 at first; a rise, as of the wrong scale, is a failure."""
    falling = {"blocks/0/scores": steps_of(-0.5, -0.34, -0.2)}
    assert slopes.slope_failures(falling, sweep="head_dim") == []
    assert len(slopes.slope_failures(falling)) == 2
    flat = slopes.slope_failures({"blocks/0/scores": steps_of(0.0, 0.0)}, sweep="head_dim")
    assert [f["step"] for f in flat] == [1]
    for wrong in (0.2, -0.4):
        failed = slopes.slope_failures({"blocks/0/scores": steps_of(-0.5, wrong)}, sweep="head_dim")
        assert [f["step"] for f in failed] == [2]


def test_depths_are_compared_at_the_ends():
    def tensors(n_layers):
        names = [f"blocks/{i}/mlp" for i in range(n_layers)] + ["change/blocks/1/mlp", "final"]
        return {name: name for name in names}

    two, four = (coord_check._stack_ends(tensors(n), n) for n in (2, 4))
    assert two == {"blocks/last/mlp": "blocks/1/mlp", "final": "final",
                   "change/blocks/last/mlp": "change/blocks/1/mlp"}  # fmt: skip
    assert four == {"blocks/last/mlp": "blocks/3/mlp", "final": "final"}


def test_predictions_look_at_the_steepest_step():
    table = {
        "blocks/0/attention": steps_of(0, 0.9, 0.1), "change/blocks/0/mlp": steps_of(0, 9),
        "blocks/0/mlp": steps_of(9, 0.3, 0.2), "logits": steps_of(0, None, 0.1),
    }  # fmt: skip
    predicted = slopes.compare_with_prediction(table, "sp")
    assert {kind: entry["shown"] for kind, entry in predicted.items()} == {
        "attention": True, "mlp": False, "logits": True,
    }  # fmt: skip


def test_a_prediction_may_be_a_fall():
    slopes_of = {"update/blocks/attention/key/weight": steps_of(-0.1, -0.3, -0.5),
                 "update/blocks/attention/query/weight": steps_of(-0.9, 0.9, -0.3)}  # fmt: skip
    predicted = slopes.compare_with_prediction(slopes_of, "no_eps_scaling")
    shown = {kind: (entry["slope"], entry["shown"]) for kind, entry in predicted.items()}
    assert shown == {"key/weight": (-0.5, True), "query/weight": (-0.3, False)}


def test_a_sweep_resizes_what_it_names():
    config = family.get_config()
    config.model.n_kv_heads = 4
    plan = coord_check.plan_sizes(config, "width", [64, 512])
    sizes = [(c.model.d_model, c.model.n_heads, c.model.n_kv_heads) for c in plan.configs]
    assert sizes == [(64, 2, 1), (512, 16, 8)]
    plan = coord_check.plan_sizes(family.get_config(), "head_dim", [16, 64])
    assert [(c.model.d_model, c.model.head_dim) for c in plan.configs] == [(128, 16), (512, 64)]
    assert {c.parametrization.base_head_dim for c in plan.configs} == {32}
    plan = coord_check.plan_sizes(family.get_config(), "width", [64, 128], "sp")
    assert {c.parametrization.name for c in plan.configs} == {"sp"}


BAD = {
    "heads": (("width", [64, 100], {}), ["--widths=100", "head size 32", "use 96"]),
    "groups": (
        ("width", [64, 96], {"model.n_kv_heads": 4}),
        ["--widths=96", "3 heads", "use 64"],
    ),
    "depth of mup": (("depth", [2, 4], {}), ["parametrization.name='mup'", "completep"]),
    "two scales": (
        ("width", [64, 128], {"model.logit_scale": "inverse_sqrt_width"}),
        ["model.logit_scale", "does already", "use 'one'"],
    ),
    "no base": (("width", [64, 128], {"parametrization.base_width": 0}), ["base_width=0", "256"]),
}


@pytest.mark.parametrize(("asked", "message"), BAD.values(), ids=BAD)
def test_bad_sweeps_are_named(asked, message):
    sweep, sizes, changes = asked
    config = family.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError) as caught:
        coord_check.plan_sizes(config, sweep, sizes)
    for part in message:
        assert part in str(caught.value), str(caught.value)


def test_the_command_refuses_in_one_line(tmp_path):
    for flags, message in (
        (["--widths=64,128"], "three different sizes"),
        (["--widths=64,x,128"], "--widths=x is no size"),
        (["--widths=64,128,256", "--depths=2,4,8"], "two sweeps"),
    ):
        status, _, err = run("coord_check", f"--workdir={tmp_path / 'c'}", *flags)
        assert status == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_small_check_writes_what_it_measured(tmp_path, settings):
    """Two steps on small widths: the files, and that another check may not take their place."""
    data = [f"--config.{k}={v}" for k, v in settings.items() if k.startswith("data.")]
    data += ["--config.data.vocab_size=4096", "--config.model.n_layers=1"]
    arguments = [f"--workdir={tmp_path}", "--widths=32,64,96", "--steps=2", "--seeds=2", *data]
    status, out, err = run("coord_check", *arguments, "--config.parametrization.base_width=64")
    result = json.loads((tmp_path / "coord_check.json").read_text())
    assert status == (1 if result["verdict"] == "failed" else 0), err
    assert set(result["slopes"]["logits"]) == {"1", "2"} and "blocks/0/scores" in result["slopes"]
    first = result["slopes"]["logits"]["1"]
    assert first["se"] > 0 and f"{first['slope']:+.2f}" in out
    # Adam's first update is the learning rate, divided here by its factor.
    np.testing.assert_allclose(
        np.array(result["values"]["update/readout/weight"])[:, 0], 3e-3, 0.01
    )
    assert (tmp_path / "coord_check.png").stat().st_size > 10_000
    status, _, err = run("coord_check", *arguments, "--control=sp")
    assert status == 2 and "another control" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("control", ["none", "sp", "logits_sqrt", "no_lr_scaling"])
def test_mup_passes_and_every_mistake_shows(control, tmp_path):
    # It takes four octaves for slopes as exact as the bounds (docs/mup.md).
    widths = [64, 256, 1024] if control == "none" else [64, 192, 512]
    plan = coord_check.plan_sizes(family.get_config(), "width", widths, control)
    result = coord_check.check_coordinates(plan, 3, tmp_path, print)
    assert (result["verdict"] == "failed") == (control != "none"), result["failures"]
    if control != "none":
        assert all(entry["shown"] for entry in result["predicted"].values()), result["predicted"]
