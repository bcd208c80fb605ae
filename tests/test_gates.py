"""Gates of attention against plain numpy, by gradient, in the table of parametrizations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finish, train_losses
from test_model import Oracle, make, tokens

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.evals import attention_stats
from lmscale_jax.model import build, flops, param
from lmscale_jax.model.attention import earlier_input
from lmscale_jax.model.sharding import ShardingContext
from lmscale_jax.optim.rules import update_rules

CASES = {
    "headwise": {"attn_gate": "headwise"},
    "elementwise, GQA": {"attn_gate": "elementwise", "n_kv_heads": 2},
    "const": {"attn_gate": "const", "gate_bias_init": 0.3},
    "ns_sigmoid with a bias": {
        "attn_gate": "elementwise", "gate_activation": "ns_sigmoid", "gate_bias": True,
        "gate_bias_init": -1.0,
    },
    "value heads": {"attn_gate": "headwise", "gate_place": "value", "n_kv_heads": 2},
    "key channels": {"attn_gate": "elementwise", "gate_place": "key", "positions": "rope"},
    "query heads": {"attn_gate": "headwise", "gate_place": "query", "positions": "rope"},
    "output": {"attn_gate": "elementwise", "gate_place": "output", "bias": True},
    "free output": {"attn_gate": "const", "gate_place": "output"},
    "a control": {"attn_gate": "elementwise", "gate_input": "earlier"},
}  # fmt: skip


EIGHT = {"mesh__cpu_devices": 8, "mesh__fsdp": 2, "mesh__tensor": 2}


class Gated(Oracle):
    """The oracle of test_model.py with a gate, position by position."""

    def gate(self, y, x, q):
        m, q = self.m, q["gate"]
        if m.attn_gate == "const":
            z = np.broadcast_to(q["free"].reshape(-1), (len(x), q["free"].size))
        else:
            if m.gate_input == "earlier":
                draws = np.random.default_rng(0x67617465).random(len(x))
                x = np.stack([x[int(draws[t] * (t + 1))] for t in range(len(x))])
            z = x @ q["weight"].reshape(x.shape[1], -1)
            z = z + np.asarray(q.get("bias", 0.0)).reshape(-1)
        g = 1 / (1 + np.exp(-(z + m.gate_bias_init)))
        g = 0.5 + 0.5 * g if m.gate_activation == "ns_sigmoid" else g
        return y * (g.reshape(*y.shape[:2], -1) if y.ndim == 3 else g)

    def dense(self, x, q):
        """Queries, keys and values pass by here on their way into heads."""
        y = super().dense(x, q)
        kind = self.names.get(id(q))
        if kind is None or kind != self.m.gate_place:
            return y
        heads = {"query": self.m.n_heads, "output": None}.get(kind, self.m.n_kv_heads)
        shaped = y if heads is None else y.reshape(len(x), heads, self.m.head_dim)
        return self.gate(shaped, self.read, self.block).reshape(y.shape)

    def attend(self, x, q, segments):
        self.names = {id(q[n]): n for n in ("query", "key", "value")} | {id(q["out"]): "output"}
        self.read, self.block = x, q
        if self.m.gate_place != "sdpa":
            return super().attend(x, q, segments)
        # Before the projection: project a gated result by hand.
        identity = {"weight": np.eye(self.m.n_heads * self.m.head_dim)}
        heads = super().attend(x, q | {"out": identity}, segments)
        heads = heads.reshape(len(x), self.m.n_heads, self.m.head_dim)
        return Oracle.dense(self, self.gate(heads, x, q).reshape(len(x), -1), q["out"])


@pytest.mark.parametrize("case", CASES)
def test_a_gate_is_its_definition(case):
    config, model, params = make(**CASES[case])
    assert model.choices["gate"].startswith(CASES[case]["attn_gate"])
    ids = np.asarray(tokens(1))[0]
    wanted = Gated(config, params).logits(ids)
    logits = np.asarray(jax.jit(model.logits)(params, ids[None]))[0]
    np.testing.assert_allclose(logits, wanted, atol=2e-5, rtol=2e-5)
    plain = dict(CASES[case], attn_gate="none", gate_place="sdpa", gate_input="own",
                 gate_activation="sigmoid", gate_bias=False, gate_bias_init=0.0)  # fmt: skip
    without = make(**plain)
    shared = jax.tree.map(lambda x: x, params)
    shared["blocks"]["attention"] = {
        k: v for k, v in params["blocks"]["attention"].items() if k != "gate"
    }
    ungated = np.asarray(jax.jit(without[1].logits)(shared, ids[None]))[0]
    assert np.abs(ungated - logits).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_no_gate_sees_the_future(case):
    """By gradient: what comes out at t depends on learned positions up to t only."""
    _, model, params = make(**(CASES[case] | {"positions": "learned"}))
    ids, t = tokens(1), 5

    def at(table):
        changed_params = params | {"embed": params["embed"] | {"positions": table}}
        return jnp.square(model.logits(changed_params, ids)[0, t]).sum()

    grad = np.asarray(jax.grad(at)(params["embed"]["positions"]))
    assert np.all(grad[t + 1 :] == 0) and np.abs(grad[: t + 1]).max(axis=1).min() > 0


def test_the_control_reads_earlier_positions():
    x = jnp.arange(2 * 64.0).reshape(128, 1)
    context = build.model_context(make()[0], "cpu", ShardingContext()).replace(batch=2, length=64)
    read = np.asarray(earlier_input(x, context)).reshape(2, 64) - np.array([[0], [64]])
    assert np.all(read <= np.arange(64)) and np.all(read >= 0)
    assert np.mean(read == np.arange(64)) < 0.2


@pytest.mark.parametrize(
    ("kind", "role", "multiplier", "lr", "optimizer"),
    [
        ("headwise", "output", 0.25, 1.0, "adamw"),
        ("elementwise", "hidden", 1.0, 0.25, "muon"),
        ("const", "vector", 1.0, 1.0, "adamw"),
    ],
)
def test_rows_of_the_table(kind, role, multiplier, lr, optimizer):
    """At four times the base width: a gate for each head is a readout, one for each channel a
    matrix like any other; only the latter is made orthogonal."""
    for name in ("adamw", "muon"):
        config = base.get_config()
        config.model.d_model, config.model.n_heads, config.model.attn_gate = 128, 8, kind
        config.model.vocab_size, config.optim.name = 40, name
        config.parametrization.name, config.parametrization.base_width = "mup", 32
        config = resolve(config)
        model = build.build_model(config, platform="cpu")
        leaf = "free" if kind == "const" else "weight"
        row = model.param_rules[f"blocks/attention/gate/{leaf}"]
        assert row.spec.role == role and row.multiplier == multiplier
        update = update_rules(model.param_rules, config)[f"blocks/attention/gate/{leaf}"]
        assert update.optimizer == (optimizer if name == "muon" else "adamw")
        if name == "adamw":
            assert update.lr_factor == lr


def test_counts_and_flops_hold_the_gate():
    config, plain, _ = make()
    gated = make(attn_gate="headwise")[1]
    more = 3 * 32 * 4
    for model in (plain, gated):
        assert flops.parameter_counts(model.specs)["non_embedding"] == sum(
            spec.size for path, spec in param.named(model.specs).items() if "embed" not in path
        )
    dense_flops = [flops.forward_flops(config, m.specs)["dense"] for m in (plain, gated)]
    assert dense_flops[1] - dense_flops[0] == 2 * more


@pytest.mark.parametrize("kind", ["headwise", "elementwise", "const"])
def test_statistics_of_attention(kind):
    """Against the taps themselves; padding does not count."""
    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model.mesh import make_mesh

    config, model, params = make(attn_gate=kind)
    # As many windows as heads: a free gate has no axis of windows, whatever its shape.
    ids = np.asarray(tokens(4, seed=1), np.int32)
    targets = np.where(np.arange(4)[:, None] < 2, ids, -1).astype(np.int32)
    with config.unlocked():
        config.train.batch_size, config.mesh.cpu_devices = 1, 1
    mesh = make_mesh(config, jax.devices()[:1])
    stats = attention_stats.evaluate_attention(
        attention_stats.make_attention_stats(model, mesh), params, [Batch(ids, targets)], mesh
    )
    taps = model.taps(params, ids[:2], lambda _, x: x)["blocks"]
    gate = np.asarray(taps["gate"]).reshape(3, -1)
    if kind == "const":
        # Free parameters differ by channel, so all of them are in every window.
        assert gate.shape[1] == 32
    np.testing.assert_allclose(stats["gate"]["mean"], gate.mean(axis=1), atol=0.004)
    np.testing.assert_allclose(stats["gate"]["p50"], np.median(gate, axis=1), atol=0.03)
    np.testing.assert_allclose(stats["gate"]["frac_below_0.1"], (gate < 0.1).mean(axis=1))
    np.testing.assert_allclose(
        stats["largest"]["residual"], np.abs(taps["residual"]).max(axis=(1, 2)), rtol=1e-6
    )
    scores, sinks = np.asarray(taps["scores"]), []
    for layer in scores:
        rows = [layer[..., t * (t + 1) // 2 : (t + 1) * (t + 2) // 2] for t in range(1, 12)]
        sinks.append(
            np.mean([(np.exp(r) / np.exp(r).sum(-1, keepdims=True))[..., 0] for r in rows])
        )
    np.testing.assert_allclose(stats["sink"], sinks, rtol=1e-5)
    assert stats["windows"] == 2


def test_what_makes_no_sense_is_refused():
    for changes, message in (
        ({"attn_gate": "headwise", "gate_place": "output"}, "which has no heads"),
        ({"gate_place": "value"}, "is unused"),
        ({"attn_gate": "const", "gate_bias": True}, "is unused"),
        ({"attn_gate": "heads"}, "must be one of none, headwise, elementwise, const"),
    ):
        with pytest.raises(InputError, match=message):
            make(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["headwise", "elementwise", "const"])
def test_eight_devices_train_alike(train, tmp_path, kind):
    losses = []
    for name, grid in (("one", {"mesh__cpu_devices": 1}), ("eight", EIGHT)):
        changes = {"model__attn_gate": kind, "model__n_heads": 4, "log__tensorboard": False}
        status, _, err = finish(train(tmp_path / name, **changes, **grid))
        assert status == 0, err
        losses.append(train_losses(tmp_path / name))
    single, eight = losses
    np.testing.assert_allclose(eight, single, rtol=3e-5)
