"""Windows, skips, tables of values and the rest of the speedrun models against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finish, train_losses
from test_model import Oracle, make, tokens

from lmscale_jax.config.resolve import resolve, validate
from lmscale_jax.configs import base, speedrun_gate, speedrun_record26, speedrun_simple
from lmscale_jax.errors import InputError
from lmscale_jax.evals import suites
from lmscale_jax.model import attention, build, flops, param, skip_connections
from lmscale_jax.model.sharding import ShardingContext
from lmscale_jax.optim.rules import update_rules

PLAIN = {"norm": "rmsnorm", "mlp": "relu2", "positions": "rope"}
ALL = PLAIN | {
    "n_layers": 5, "norm_gain": "none", "qk_norm": "rmsnorm", "rope_channels": "half",
    "rope_theta": 64.0, "embed_norm": "rmsnorm", "skips": "unet", "x0_mix": "learned",
    "value_embeddings": 2, "head": "untied", "logit_softcap": 3.0, "mask": "document",
    "window_layers": "ends", "window": 7, "window_block": 2, "n_kv_heads": 2,
}  # fmt: skip
CASES = {
    "unit queries and keys": {"qk_norm": "rmsnorm", "positions": "rope", "n_kv_heads": 2},
    "half of the channels": {"positions": "rope", "rope_channels": "half", "rope_theta": 64.0},
    "a window": {"window_layers": "all", "window": 3},
    "two windows in blocks": {
        "window_layers": "ends", "window": 7, "window_block": 4, "n_layers": 6,
        "mask": "document",
    },
    "every fourth": {"window_layers": "fourth", "window": 6, "n_layers": 6, "n_kv_heads": 1},
    "one block": {"window_layers": "fourth", "window": 4, "window_block": 4},
    "skips": {"skips": "unet"},
    "skips, four blocks": {"skips": "unet", "n_layers": 4},
    "the embedding again": {"x0_mix": "learned"},
    "tables of values": {"value_embeddings": 1, "n_kv_heads": 2},
    "no gains": {"norm_gain": "none", "bias": True},
    "a normed embedding": {"embed_norm": "rmsnorm", "positions": "rope"},
    "bounded logits": {"logit_softcap": 2.0},
    "bounded otherwise": {"logit_softcap": 2.0, "softcap_form": "algebraic"},
    "no attention in some": {"attention_skip": "1,2", "n_layers": 4, "bias": True},
    "everything": ALL,
    "everything, attention not": ALL | {"attention_skip": "1,3"},
}  # fmt: skip
WHOLE = {"all": lambda L: set(range(L)), "ends": lambda L: {0, round(L / 3), L - 1},
         "fourth": lambda L: {*range(3, L, 4), L - 1}}  # fmt: skip


def unit(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class Wired(Oracle):
    """The oracle of test_model.py with every wiring, by loops."""

    def norm(self, x, q):
        return super().norm(x, {"scale": 1.0} | q)

    def rope(self, x_TxHxd):
        if self.m.rope_channels == "all":
            return super().rope(x_TxHxd)
        d, y = self.m.head_dim, x_TxHxd.copy()
        for j in range(d // 4):
            speed = self.m.rope_theta ** -(j / (d // 4 - 1))
            for t in range(len(y)):
                c, s = np.cos(t * speed), np.sin(t * speed)
                a, b = x_TxHxd[t, :, j], x_TxHxd[t, :, j + d // 2]
                y[t, :, j], y[t, :, j + d // 2] = a * c - b * s, a * s + b * c
        return y

    def attend(self, x, q, segments, layer, ids):
        m, n = self.m, len(x)
        Q = self.dense(x, q["query"]).reshape(n, m.n_heads, m.head_dim)
        K = self.dense(x, q["key"]).reshape(n, m.n_kv_heads, m.head_dim)
        V = self.dense(x, q["value"]).reshape(n, m.n_kv_heads, m.head_dim)
        if m.value_embeddings:
            V = q["value_share"] * V
            count = m.value_embeddings
            for table in range(count):
                if layer in (table, m.n_layers - count + table):
                    V = V + q["row_share"] * self.p["embed"]["values"][table][ids]
        if m.qk_norm == "rmsnorm":
            Q, K = unit(Q, m.norm_eps), unit(K, m.norm_eps)
        if m.positions == "rope":
            Q, K = self.rope(Q), self.rope(K)
        blocks = n
        if m.window_layers != "none":
            blocks = int(np.ceil(m.window / m.window_block))
            if layer not in WHOLE[m.window_layers](m.n_layers):
                blocks = max(1, blocks // 2)
        out = np.zeros_like(Q)
        for head in range(m.n_heads):
            kv = head // (m.n_heads // m.n_kv_heads)
            for i in range(n):
                seen = [j for j in range(i + 1) if segments[j] == segments[i]
                        and i // m.window_block - j // m.window_block < blocks]  # fmt: skip
                s = np.array([Q[i, head] @ K[j, kv] for j in seen]) / np.sqrt(m.head_dim)
                w = np.exp(s - s.max())
                out[i, head] = (w / w.sum()) @ V[seen, kv]
        return self.dense(out.reshape(n, -1), q["out"])

    def logits(self, ids):
        m, p = self.m, self.p
        h = p["embed"]["tokens"][ids]
        if m.positions == "learned":
            h = h + p["embed"]["positions"][: len(ids)]
        if m.embed_norm == "rmsnorm":
            h = unit(h, m.norm_eps)
        segments = np.cumsum(ids == 0) if m.mask == "document" else np.zeros(len(ids))
        x0, stack = h, []
        without = [int(block) for block in m.attention_skip.split(",") if block]
        attending = [layer for layer in range(m.n_layers) if layer not in without]
        for layer in range(m.n_layers):
            q = {}
            for name, rows in p["blocks"].items():
                owners = attending if name.startswith("attention") else range(m.n_layers)
                if layer in owners:
                    row = owners.index(layer)
                    q[name] = jax.tree.map(lambda x, row=row: x[row], rows)
            if m.skips == "unet" and layer >= m.n_layers - m.n_layers // 2:
                h = h + q["skip"] * stack.pop()
            if m.x0_mix == "learned":
                h = q["stream_share"] * h + q["origin_share"] * x0
            if layer in attending:
                read = self.norm(h, q.get("attention_norm", {}))
                h = h + self.attend(read, q["attention"], segments, layer, ids)
            h = h + self.mlp(self.norm(h, q.get("mlp_norm", {})), q["mlp"])
            if layer < m.n_layers // 2:
                stack.append(h)
        x = self.norm(h, p["readout"].get("norm", {}))
        z = x @ (p["embed"]["tokens"].T if m.head == "tied" else p["readout"]["weight"])
        if not m.logit_softcap:
            return z
        c = m.logit_softcap
        return c * np.tanh(z / c) if m.softcap_form == "tanh" else c * z / np.sqrt(z**2 + c**2)


@pytest.mark.parametrize("case", CASES)
def test_each_wiring_is_its_definition(case):
    config, model, params = make(**CASES[case])
    ids = np.asarray(tokens(1))
    wanted = Wired(config, params).logits(ids[0])
    logits = np.asarray(jax.jit(model.logits)(params, ids))[0]
    np.testing.assert_allclose(logits, wanted, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("how", [{"stack": "scan"}, {"remat": "block"}, {"attention": "plain"},
                                 {"attention": "xla", "stack": "scan"},
                                 {"stack": "scan", "remat": "dots", "attention_skip": "1,3"},
                                 ])  # fmt: skip
def test_execution_changes_no_number(how):
    ids, skipped = tokens(2), how.get("attention_skip", "")

    def run(changes):
        _, model, params = make(**(ALL | {"attention_skip": skipped} | changes))
        value = jax.value_and_grad(lambda p: model.losses(p, ids, jnp.roll(ids, -1, 1)).mean())
        return jax.jit(value)(params)

    (loss, grad), (other_loss, grad_other) = run({}), run(how)
    assert abs(loss - other_loss) < 1e-6 * loss
    for path, wanted in param.named(grad).items():
        assert jnp.abs(wanted).max() > 0, path
        actual = param.named(grad_other)[path]
        assert jnp.abs(actual - wanted).max() < 2e-5 * jnp.abs(wanted).max() + 1e-9, path


@pytest.mark.parametrize("case", CASES)
def test_no_position_sees_the_future(case):
    """By gradient, with a row of its own for each token."""
    changes = {"vocab_size": 50, "mask": "causal", "head": "untied"} | {
        k: v for k, v in CASES[case].items() if k not in ("mask", "head")
    }
    _, model, params = make(**changes)
    ids, t = jnp.arange(12)[None] + 7, 5

    def at(embed):
        return jnp.square(model.logits(params | {"embed": embed}, ids)[0, t]).sum()

    for path, grad in param.named(jax.grad(at)(params["embed"])).items():
        rows = np.moveaxis(np.asarray(grad), 1, 0) if path == "values" else np.asarray(grad)
        later = rows[t + 1 :] if path == "positions" else rows[7 + t + 1 :]
        now = rows[t] if path == "positions" else rows[7 + t]
        assert np.all(later == 0) and np.abs(now).max() > 0, path


def test_half_of_the_rotation():
    """The values that the original has at 128 channels; norms and relative positions are kept."""
    cos, sin = attention.rope_tables(16, 128, 1024.0, "half")
    speed = np.arctan2(np.asarray(sin), np.asarray(cos))[1]
    np.testing.assert_allclose(speed[[0, 1, 15, 31]], [1, 0.79964, 0.03495, 1 / 1024], rtol=2e-4)
    assert np.all(speed[32:] == 0)
    chance = np.random.default_rng(0)
    q, k = (np.tile(chance.normal(size=(1, 1, 1, 128)), (1, 16, 1, 1)) for _ in range(2))
    turned = [np.asarray(attention.rotate(jnp.asarray(x), (cos, sin)))[0, :, 0] for x in (q, k)]
    np.testing.assert_allclose(
        np.linalg.norm(turned[0], axis=-1), np.linalg.norm(q[0, 0, 0]), rtol=1e-5
    )
    scores = turned[0] @ turned[1].T
    for lag in range(4):
        np.testing.assert_allclose(np.diag(scores, -lag), scores[lag, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_rows_that_fill_up_the_vocabulary_get_no_probability(head):
    """Losses are those of the model without them, and they get no gradient as a readout."""
    config, model, params = make(vocab_multiple=64, head=head)
    assert (config.model.vocab_size, config.model.ids) == (64, 50)
    plain = make(head=head)[1]
    without = jax.tree.map(lambda x: x, params)
    without["embed"] = params["embed"] | {"tokens": params["embed"]["tokens"][:50]}
    if head == "untied":
        without["readout"] = params["readout"] | {"weight": params["readout"]["weight"][:, :50]}
    ids = tokens(2)
    np.testing.assert_allclose(
        model.losses(params, ids, ids), plain.losses(without, ids, ids), rtol=1e-5
    )
    assert np.all(np.asarray(model.logits(params, ids))[..., 50:] == -np.inf)
    grads = jax.grad(lambda p: model.losses(p, ids, ids).sum())(params)
    rows = grads["embed"]["tokens"] if head == "tied" else grads["readout"]["weight"].T
    assert np.all(np.asarray(rows)[50:] == 0) and np.all(np.isfinite(rows))


def test_windows_grow_and_are_whole_at_the_end():
    config = speedrun_record26.get_config()
    config.data.path = ""
    config = resolve(config)
    assert skip_connections.full_window_blocks(config.model) == [0, 4, 11]
    assert skip_connections.value_tables(config.model) == [0, 1, 2, *[-1] * 6, 0, 1, 2]
    at = [
        tuple(int(w) for w in skip_connections.attention_windows(config, jnp.asarray(s)))
        for s in (0, 130, 875, 1750)
    ]
    # Blocks of 128: ceil(1728 share / 128), its half rounded down, at least one.
    assert at == [(1, 1), (2, 1), (7, 3), (14, 7)] and skip_connections.attention_windows(
        config
    ) == (14, 7)


def test_growing_windows_are_those_of_the_step():
    changes = {"window_layers": "all", "window": 8, "window_growth": "10 steps"}
    _, growing, params = make(**changes)
    fixed = [make(window_layers="all", window=w)[1] for w in (4, 8)]
    ids = tokens(2)
    for step, model in ((5, fixed[0]), (10, fixed[1]), (900, fixed[1]), (None, fixed[1])):
        losses = growing.losses(params, ids, ids, step=step)
        np.testing.assert_allclose(losses, model.losses(params, ids, ids), rtol=1e-6)


def test_the_reach_of_a_block_is_a_number():
    """Under a scan too, where blocks are counted by a traced number: cudnn and splash want it."""

    def reach(index, step=None, **changes):
        config = make(**changes)[0]
        context = build.model_context(config, "cpu", ShardingContext()).replace(length=16)
        context = context.replace(windows=skip_connections.attention_windows(config, step))
        return skip_connections.layer_inputs(config.model, context, index).reach

    def traced(**changes):
        reaches = []
        jax.jit(lambda i: reaches.append(reach(i, **changes)))(0)
        return reaches[0]

    assert reach(0) is None and traced() is None
    assert traced(window_layers="all", window=5) == 5
    ends = {"window_layers": "ends", "window": 7, "window_block": 2, "n_layers": 6}
    assert [reach(i, **ends) for i in (0, 1)] == [8, 4] and traced(**ends) == 8
    # Of growing windows it is that of the final one: a bound, since the window is traced.
    assert reach(1, step=1, **ends, window_growth="10 steps") == 4


def test_rows_of_the_table():
    config = base.get_config()
    for name, value in (ALL | {"d_model": 128, "n_heads": 16, "head_dim": 8}).items():
        config.model[name] = value
    config.model.vocab_size, config.optim.name = 40, "muon"
    config.parametrization.name, config.parametrization.base_width = "mup", 32
    config.parametrization.head_init, config.optim.head_lr_factor = "zeros", 0.5
    config.parametrization.embed_std, config.optim.vector_lr_factor = 1.0, 0.25
    config.model.n_kv_heads = 4
    config = resolve(config)
    rows = build.build_model(config, platform="cpu", bos_id=0).param_rules
    updates = update_rules(rows, config)
    values, update = rows["embed/values"], updates["embed/values"]
    assert (values.spec.role, update.optimizer, values.init_std) == ("input", "adamw", 1.0)
    assert update.lr_factor == 1 and values.ratios.m_out == 4
    head = rows["readout/weight"]
    assert (head.init_std, updates["readout/weight"].lr_factor, head.multiplier) == (0.0, 0.5, 0.25)
    for path in ("skip", "stream_share", "origin_share", "attention/value_share"):
        update = updates[f"blocks/{path}"]
        assert (update.spec.role, update.optimizer) == ("scalar", "adamw")
        assert update.lr_factor == 0.25 and update.spec.shape == (5,) and update.decay == 0


def test_counts_are_those_of_the_originals():
    def counted(module, *arguments):
        config = resolve(module.get_config(*arguments))
        return flops.parameter_counts(build.build_model(config, platform="cpu", bos_id=0).specs)

    counts = counted(speedrun_record26)
    # Matrices: 50,304 rows of embedding, readout and three tables; 12 MLPs, attention in 11 blocks.
    # Scalars: 12 skips, 12 x 2 shares of the stream and 11 x 2 of values.
    assert counts["total"] == 5 * 50_304 * 768 + (12 * 8 + 11 * 4) * 768**2 + 12 + 24 + 22
    # The published count has 64 scalars: 2 in block 7, which reads none, and 4 that fill them up to
    # a multiple of its 8 GPUs.
    assert counts["total"] == 275_742_784 - 2 - 4
    assert counts["embedding"] == 154_533_888 + 50_304 * 768
    none = counted(speedrun_gate)
    assert none["total"] == 123_568_128
    for gate, more in (("elementwise", 7_077_888), ("headwise", 55_296), ("const", 9_216)):
        assert counted(speedrun_gate, gate)["total"] - none["total"] == more


@pytest.mark.slow
@pytest.mark.parametrize(("module", "loss", "within"), [
    (speedrun_record26, 10.8258, 1e-4), (speedrun_simple, 10.8258, 1e-4),
    (speedrun_gate, 16.03, 0.15),
])  # fmt: skip
def test_first_losses_of_the_originals(module, loss, within):
    """With a readout of zeros ln 50304; tied to what enters, each token predicts itself."""
    config = module.get_config()
    with config.unlocked():
        config.model.dtype = "float32"
    config = resolve(config)
    model = build.build_model(config, platform="cpu", bos_id=50256)
    params = model.init(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50_257, (1, 257)))
    first_loss = float(jax.jit(model.losses)(params, ids[:, :-1], ids[:, 1:]).mean())
    assert abs(first_loss - loss) < within


def test_what_makes_no_sense_is_refused():
    for changes, message in (
        ({"value_embeddings": 2}, "value_embeddings=2 needs twice as many blocks.*; use 1"),
        ({"softcap_form": "algebraic"}, "is unused with model.logit_softcap=0"),
        ({"ids": 60}, "model.ids=60 is above model.vocab_size"),
        ({"window": 5}, "is unused with model.window_layers"),
        ({"positions": "rope", "rope_channels": "half", "head_dim": 4}, "at least 8; use 8"),
    ):
        with pytest.raises(InputError, match=message):
            make(**changes)
    config = base.get_config()
    config.model.skips, config.mur.mode = "unet", "diagnose"
    with pytest.raises(InputError, match=r"model\.skips='unet' does not support mur\.mode"):
        validate(config)
    config.model.skips, config.model.x0_mix = "none", "learned"
    validate(config)
    config.mur.mode = "loss"
    with pytest.raises(InputError, match=r"model\.x0_mix='learned' does not support mur\.mode"):
        validate(config)


def test_suites_that_cannot_measure_a_wiring_are_refused():
    suites.check_suite(["redundancy", "mur", "attention"], make(x0_mix="learned")[0].model)
    for changes, name, message in (
        ({"skips": "unet"}, "redundancy", "skips='unet' does not support --suites=redundancy"),
        ({"skips": "unet"}, "mur", "skips='unet' does not support --suites=mur"),
        ({"window_layers": "ends"}, "attention", "window_layers='ends'"),
        ({"mask": "document"}, "attention", "mask='document'"),
    ):
        with pytest.raises(InputError, match=message):
            suites.check_suite(["perplexity", name], make(**changes)[0].model)
        suites.check_suite(["perplexity"], make(**changes)[0].model)


@pytest.mark.slow
def test_eight_devices_train_alike(train, tmp_path):
    losses = []
    eight = {"mesh__cpu_devices": 8, "mesh__fsdp": 2, "mesh__tensor": 2}
    for name, grid in (("one", {"mesh__cpu_devices": 1}), ("eight", eight)):
        changes = {f"model__{k}": v for k, v in ALL.items() if k not in ("n_layers", "n_kv_heads")}
        changes |= {"model__n_heads": 4, "model__n_layers": 4, "log__tensorboard": False}
        changes |= {"model__window_growth": "50%", "parametrization__residual_init": "zeros"}
        status, _, err = finish(train(tmp_path / name, **changes, **grid))
        assert status == 0, err
        losses.append(train_losses(tmp_path / name))
    single, eight = losses
    np.testing.assert_allclose(eight, single, rtol=3e-5)
