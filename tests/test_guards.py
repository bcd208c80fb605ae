"""Guards find planted faults, and nothing in what is shipped."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.ladder_keys import LADDER
from lmscale_jax.config.resolve import apply_overrides
from lmscale_jax.configs import base
from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import SmallArm
from lmscale_jax.guards.causality import check_causality
from lmscale_jax.guards.cost import judge_cost
from lmscale_jax.guards.counts import check_counts
from lmscale_jax.guards.difference import check_difference
from lmscale_jax.guards.gradients import check_gradients
from lmscale_jax.guards.held_out import suspect_arm
from lmscale_jax.guards.products import product_flops
from lmscale_jax.guards.repeat import check_repeat
from lmscale_jax.guards.table import GUARDS, run_guard
from lmscale_jax.guards.variants import check_accumulation, check_stack
from lmscale_jax.model import layers, stack
from lmscale_jax.train import setup as setups

ROWS, LENGTH = 2, shrink.LENGTH
SETTINGS = {name: key.default for name, key in LADDER["guards"].items()}


def arm_of(name: str = "poly", blocks: int = 1, **changes) -> SmallArm:
    config = base.get_config()
    config.model.norm, config.model.positions = "rmsnorm", "rope"
    named = {path.replace("__", "."): value for path, value in changes.items()}
    config = apply_overrides(config, named)
    return SmallArm(name, shrink.shrink(config, blocks, shrink.VOCAB))


@pytest.fixture(scope="module")
def sound() -> SmallArm:
    """An arm without a fault; tests that plant one ask for its programs first."""
    arm = arm_of("sound")
    assert arm.gradient().loss and arm.trajectory.losses
    return arm


def plant(monkeypatch, activation) -> None:
    """Gives the choice gelu another function of (form of GELU, [N, F])."""
    part = layers.Part(lambda config: layers.MLP(config.model, activation))
    monkeypatch.setitem(layers.MLPS, "gelu", part)


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


def next_token(gelu, up):
    return gelu(up) + jnp.roll(up, -1, axis=0)


def later_token_by_a_comparison(gelu, up):
    return jnp.where(up > jnp.roll(up, -1, axis=0), gelu(up), 0.0)


def mean_of_the_row(gelu, up):
    rows = up.reshape(-1, LENGTH, up.shape[1])
    return gelu(rows - rows.mean(axis=1, keepdims=True)).reshape(up.shape)


def mean_of_the_rows(gelu, up):
    rows = up.reshape(-1, LENGTH, up.shape[1])
    return gelu(rows - rows.mean(axis=0, keepdims=True)).reshape(up.shape)


def token_before(gelu, up):
    rows = up.reshape(-1, LENGTH, up.shape[1])
    before = jnp.concatenate([jnp.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
    return gelu(up + before.reshape(up.shape))


@pytest.mark.parametrize(
    "activation, mask, message",
    [
        (next_token, "causal", "at position 0 depend on the token at position 1 (block 0, through"),
        slow(later_token_by_a_comparison, "causal", "the model sees the future"),
        slow(mean_of_the_row, "causal", "at position 0 depend on the token at position 1"),
        (mean_of_the_rows, "causal", "of row 1 depend on the token at position 0 of row 0"),
        (token_before, "document", "at position 5 depend on the token at position 1 of an earlier"),
        (token_before, "causal", None),
    ],
)
def test_causality(monkeypatch, activation, mask, message):
    plant(monkeypatch, activation)
    fault = check_causality(arm_of(model__mask=mask), None).fault
    assert message in fault if message else fault == ""
    assert not message or "through mlp" in fault


def test_causality_names_attention(monkeypatch):
    from lmscale_jax.model import primitives

    monkeypatch.setattr(primitives, "visible", lambda q, k, *bounds: jnp.ones((1, q, k), bool))
    fault = check_causality(arm_of(model__attention="xla", model__mask="document"), None).fault
    assert "block 0, through attention" in fault


def stopped(gelu, up):
    return gelu(jax.lax.stop_gradient(up))


def rounded(gelu, up):
    return jnp.round(up)


def too_large(gelu, up):
    return jnp.exp(1e4 * jnp.square(up))


@pytest.mark.parametrize(
    "activation, message",
    [
        (stopped, "no gradient reaches blocks/mlp/up/weight"),
        slow(rounded, "no gradient reaches blocks/mlp/up/weight"),
        (too_large, "in float32 the loss is not finite"),
    ],
)
def test_gradients(monkeypatch, activation, message):
    plant(monkeypatch, activation)
    assert message in check_gradients(arm_of(), None).fault


@pytest.mark.slow
def test_gradients_in_bfloat16(monkeypatch):
    plain = layers.MLP.__call__

    def divided(self, x_NxD, context):
        # Exactly 0 where 1 + 1e-3 is rounded to 1.
        return plain(self, x_NxD, context) / jnp.log(jnp.ones((), x_NxD.dtype) + 1e-3)

    monkeypatch.setattr(layers.MLP, "__call__", divided)
    assert "in bfloat16 the loss is not finite" in check_gradients(arm_of(), None).fault


def test_stack_index_in_a_python_if(monkeypatch):
    plain = stack.skip_connections.layer_inputs

    def by_index(model, context, index):
        return plain(model, context, index if index > 0 else 0)

    monkeypatch.setattr(stack.skip_connections, "layer_inputs", by_index)
    fault = check_stack(arm_of(blocks=2), None).fault
    assert "under model.stack='scan' it does not compile (TracerBoolConversionError" in fault


@pytest.mark.slow
def test_stack_counter_in_python(monkeypatch):
    counter = itertools.count()
    plain = layers.MLP.__call__
    monkeypatch.setattr(
        layers.MLP, "__call__", lambda *inputs: plain(*inputs) * (1 + next(counter) % 3)
    )
    assert "under model.stack='scan' the loss is" in check_stack(arm_of(blocks=2), None).fault


def with_losses(monkeypatch, changed) -> None:
    """Trains on `changed(losses, params)` from now on."""
    plain = setups.build_model

    def build(*inputs, **options):
        model = plain(*inputs, **options)

        def losses(params, *others, **more):
            nll_BxT, handed_out = model.losses(params, *others, **more)
            return changed(nll_BxT, params), handed_out

        return model._replace(losses=losses)

    monkeypatch.setattr(setups, "build_model", build)


def with_penalty(nll_BxT, params):
    return nll_BxT.at[0, 0].add(sum(jnp.square(x).sum() for x in jax.tree.leaves(params)))


def by_the_mean_of_the_batch(nll_BxT, params):
    return nll_BxT / jax.lax.stop_gradient(nll_BxT.mean())


@pytest.mark.parametrize("changed", [with_penalty, slow(by_the_mean_of_the_batch)])
def test_accumulation(monkeypatch, changed):
    with_losses(monkeypatch, changed)
    fault = check_accumulation(arm_of(), None).fault
    assert "under train.accum=2 the" in fault


MATRIX = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) / 16


def test_counts_of_a_product_that_is_not_declared(monkeypatch, sound):
    plant(monkeypatch, lambda gelu, up: gelu(up @ MATRIX))
    fault = check_counts(arm_of(), sound).fault
    assert "x the FLOPs that it declares" in fault and "flops() is missing" in fault


def test_counts_of_a_product_that_is_not_computed(monkeypatch, sound):
    tiled = lambda self, x_NxD, context: self.down(jnp.tile(x_NxD, (1, 4)), context)  # noqa: E731
    monkeypatch.setattr(layers.MLP, "__call__", tiled)
    assert "some declared products are not computed" in check_counts(arm_of(), sound).fault


def test_products_are_counted_in_loops_and_branches():
    x, kernel = jnp.ones((4, 8)), jnp.ones((3, 8, 16))

    def program(x, w):
        x, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, length=5)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME",
                                            dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip

    jaxpr = jax.make_jaxpr(jax.jit(jax.checkpoint(program)))(x, jnp.ones((8, 8))).jaxpr
    product = 2 * 4 * 8 * 8
    assert product_flops(jaxpr) == 5 * product + 2 * product + 4 * 16 * 2 * 3 * 8


def test_difference_of_an_activation_without_effect(monkeypatch, sound):
    monkeypatch.setitem(layers.MLPS, "relu2", layers.MLPS["gelu"])
    fault = check_difference(arm_of(model__mlp="relu2"), sound).fault
    assert "it equals the baseline to the bit after 20 steps: model.mlp has no effect" in fault


@pytest.mark.slow
def test_difference_of_a_decay_without_weight():
    pair = [arm_of(optim__weight_decay=0.0, optim__decay_on=on) for on in ("all", "matrices")]
    assert "optim.decay_on has no effect" in check_difference(*pair).fault


def drawn_where_it_is_built(gelu, up):
    return gelu(up) * np.random.default_rng().uniform(1, 2)


def counted_in_python(gelu, up):
    calls = itertools.count()
    number = jax.pure_callback(
        lambda _: np.float32(next(calls) % 7), jax.ShapeDtypeStruct((), jnp.float32), 0.0
    )
    return gelu(up) * (1 + jax.lax.stop_gradient(number))


@pytest.mark.parametrize(
    "activation, message",
    [
        (drawn_where_it_is_built, "built a second time it is another program, whose loss differs"),
        slow(counted_in_python, "a second run differs at step"),
    ],
)
def test_repeat(monkeypatch, activation, message):
    plant(monkeypatch, activation)
    assert message in check_repeat(arm_of(), None).fault


@pytest.mark.slow
def test_a_sound_arm_passes(sound):
    other = arm_of("swiglu", model__mlp="swiglu")
    quick = [name for name in GUARDS if name not in ("devices", "cost", "gradients")]
    faults = {name: run_guard(name, other, sound).fault for name in quick}
    assert set(faults.values()) == {""}


def test_cost_is_judged_beside_the_flops():
    assert judge_cost(1.42, 1.0, 1.18).fault.startswith("1.42 x step time, 1.00 x FLOPs, 1.18 x")
    assert "train.accum" in judge_cost(1.1, 1.0, 1.4).fault
    assert judge_cost(1.42, 1.4, None).fault == ""


@pytest.mark.parametrize("control", ["logits_sqrt", "no_lr_scaling"])
@pytest.mark.slow
def test_coordinates(control):
    options = {
        "parametrization.name": "mup", "parametrization.base_width": 64, "model.head": "untied",
        "parametrization.residual_init": "plain", "optim.lr": 0.01,
    }  # fmt: skip
    options = {path.replace(".", "__"): value for path, value in options.items()}
    right, wrong = arm_of(**options), arm_of(**options, parametrization__control=control)
    assert run_guard("coordinates", right, right).fault == ""
    assert "grows as width^" in run_guard("coordinates", wrong, right).fault


def test_an_arm_a_nat_below_the_others_is_suspect():
    assert suspect_arm({"gelu": 4.86, "poly": 0.08, "swiglu": 4.84}) == ("poly", "swiglu")
    assert suspect_arm({"gelu": 4.86, "poly": 3.9}) is None
    assert suspect_arm({"poly": 0.08}) is None
