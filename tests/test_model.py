"""The forward pass against plain numpy in float64, its gradient, and every way to execute it."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build, loss, param, primitives

VOCAB, T = 50, 12


def make(platform="cpu", bos_id=0, **changes):
    config = base.get_config()
    sizes = {"n_layers": 3, "d_model": 32, "n_heads": 4, "vocab_size": VOCAB}
    for name, value in (sizes | changes).items():
        config.model[name] = value
    config.data.seq_len = T
    config = resolve(config)
    model = build.build_model(config, platform=platform, bos_id=bos_id)
    # Gains and biases away from 1 and 0, and larger matrices: so that no term is idle.
    chance = np.random.default_rng(1)
    params = param.map_named(
        lambda path, spec: jnp.asarray(
            (spec.init == "ones") + 0.15 * chance.normal(size=spec.shape), jnp.float32
        ),
        model.specs,
    )
    return config, model, params


def tokens(batch=2, length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)))


class Oracle:
    """The forward pass by loops over layers, heads and positions, in float64."""

    def __init__(self, config, params):
        self.m = config.model
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(self, x, q):
        if self.m.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.m.norm_eps)
        return x * q["scale"] + q.get("bias", 0)

    def gelu(self, x):
        if self.m.gelu == "erf":
            return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def dense(self, x, q):
        w = q["weight"].reshape(x.shape[-1], -1)
        return x @ w + np.asarray(q.get("bias", 0.0)).reshape(-1)

    def rope(self, x_TxHxd):
        half = self.m.head_dim // 2
        t = np.arange(x_TxHxd.shape[0])[:, None]
        angle = t / self.m.rope_theta ** (2 * np.arange(half) / self.m.head_dim)
        z = (x_TxHxd[..., :half] + 1j * x_TxHxd[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def attend(self, x, q, segments):
        m, n = self.m, x.shape[0]
        Q = self.dense(x, q["query"]).reshape(n, m.n_heads, m.head_dim)
        K = self.dense(x, q["key"]).reshape(n, m.n_kv_heads, m.head_dim)
        V = self.dense(x, q["value"]).reshape(n, m.n_kv_heads, m.head_dim)
        if m.positions == "rope":
            Q, K = self.rope(Q), self.rope(K)
        out = np.zeros_like(Q)
        for head in range(m.n_heads):
            kv = head // (m.n_heads // m.n_kv_heads)
            for i in range(n):
                seen = [j for j in range(i + 1) if segments[j] == segments[i]]
                s = np.array([Q[i, head] @ K[j, kv] for j in seen]) / np.sqrt(m.head_dim)
                w = np.exp(s - s.max())
                out[i, head] = (w / w.sum()) @ V[seen, kv]
        return self.dense(out.reshape(n, -1), q["out"])

    def mlp(self, x, q):
        up = self.dense(x, q["up"])
        if self.m.mlp == "gelu":
            hidden = self.gelu(up)
        elif self.m.mlp == "relu2":
            hidden = np.maximum(up, 0) ** 2
        else:
            gate = self.dense(x, q["gate"])
            hidden = (
                gate / (1 + np.exp(-gate)) if self.m.mlp == "swiglu" else self.gelu(gate)
            ) * up
        return self.dense(hidden, q["down"])

    def logits(self, ids) -> np.ndarray:
        """[T, V] of one sequence."""
        m, p = self.m, self.p
        h = p["embed"]["tokens"][ids]
        if m.positions == "learned":
            h = h + p["embed"]["positions"][: len(ids)]
        segments = np.cumsum(ids == 0) if m.mask == "document" else np.zeros(len(ids))
        for layer in range(m.n_layers):
            q = jax.tree.map(lambda x, i=layer: x[i], p["blocks"])
            h = h + self.attend(self.norm(h, q["attention_norm"]), q["attention"], segments)
            h = h + self.mlp(self.norm(h, q["mlp_norm"]), q["mlp"])
        x = self.norm(h, p["readout"]["norm"])
        return x @ (p["embed"]["tokens"].T if m.head == "tied" else p["readout"]["weight"])


def oracle(config, params, ids_BxT) -> np.ndarray:
    """Logits [B, T, V], float64."""
    return np.stack([Oracle(config, params).logits(ids) for ids in np.asarray(ids_BxT)])


VARIANTS = {
    "gpt2": {"bias": True},
    "gpt2 erf, no positions": {"gelu": "erf", "mlp": "gelu", "positions": "none"},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "head": "untied"},
    "llama, grouped queries": {
        "norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2,
        "rope_theta": 100.0,
    },
    "transformer++": {"norm": "rmsnorm", "mlp": "swiglu", "bias": True},
    "geglu, wide heads, documents": {"mlp": "geglu", "head_dim": 16, "mask": "document"},
    "relu2, one kv head, documents": {"mlp": "relu2", "n_kv_heads": 1, "mask": "document"},
}  # fmt: skip


@pytest.mark.parametrize(
    "variant, kernel",
    [(variant, "saved") for variant in VARIANTS]
    + [("geglu, wide heads, documents", kernel) for kernel in ("plain", "xla")],
)
def test_logits_equal_numpy(variant, kernel):
    config, model, params = make(**VARIANTS[variant], attention=kernel)
    ids = tokens()
    ours = jax.jit(model.logits)(params, ids)
    theirs = oracle(config, params, ids)
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    nll = jax.jit(model.losses)(params, ids[:, :-1], ids[:, 1:])
    logp = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(logp[:, :-1], np.asarray(ids)[:, 1:, None], -1)[..., 0]
    # Losses of a shorter input: causality makes them the same.
    assert np.abs(nll - wanted).max() < 1e-4 * np.abs(wanted).max()


def loss_and_gradient(model, params, ids, key=None):
    def loss(p):
        return model.losses(p, ids, jnp.roll(ids, -1, 1), key).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("how, dropout", [
    ({"loss_chunk": 8}, 0.0), ({"attention": "plain"}, 0.0), ({"attention": "xla"}, 0.0),
    ({"stack": "scan", "remat": "block", "loss_chunk": 2}, 0.2),
    pytest.param({"remat": "dots"}, 0.0, marks=pytest.mark.slow),
    pytest.param({"stack": "scan"}, 0.2, marks=pytest.mark.slow),
    pytest.param({"stack": "unroll", "remat": "block"}, 0.2, marks=pytest.mark.slow),
])  # fmt: skip
def test_execution_changes_no_number(how, dropout):
    key = jax.random.key(5) if dropout else None
    kind = VARIANTS["llama, grouped queries"] | {"dropout": dropout}
    _, reference, params = make(**kind)
    _, model, _ = make(**(kind | how))
    value, gradient = loss_and_gradient(reference, params, tokens(), key)
    value2, gradient2 = loss_and_gradient(model, params, tokens(), key)
    assert abs(value - value2) < 1e-6 * value
    for path, value in param.named(gradient).items():
        other = param.named(gradient2)[path]
        assert jnp.abs(value - other).max() < 1e-5 * jnp.abs(value).max() + 1e-9, path


def test_chunks_need_not_divide_the_sequence():
    """A prime number of positions has chunks of nearly equal length, not of one position."""
    model = types.SimpleNamespace(loss_chunk=256)
    lengths = {T: loss.chunk_length(model, (2, T), 50304, 2**28) for T in (1021, 1022, 1024, 100)}
    assert lengths == {1021: 128, 1022: 73, 1024: 128, 100: 100}
    chance = np.random.default_rng(0)
    x, w = chance.normal(size=(2 * 13, 4)), chance.normal(size=(4, 7))
    targets = chance.integers(-1, 7, (2, 13))

    def total(x, w, length):
        nll = loss.next_token_losses(
            lambda x: x @ w, x, targets, length, primitives.plain.cross_entropy
        )
        return (nll * np.arange(13)).sum()

    whole, parts = (jax.value_and_grad(total, (0, 1))(x, w, length) for length in (13, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


@pytest.mark.parametrize("how", [
    {"head": "tied", "norm": "layernorm", "bias": True, "logit_softcap": 3.0},
    {"stack": "scan", "remat": "dots", "loss_chunk": 8, "softcap_form": "algebraic",
     "logit_softcap": 3.0},
])  # fmt: skip
def test_the_rules_of_accelerators_change_no_number(how):
    """The program of a GPU, run here: its loss has padding, missing labels and a softcap."""
    kind = VARIANTS["llama, grouped queries"] | {"vocab_multiple": 32} | how
    config, on_cpu, params = make(**(kind | {"stack": "scan", "remat": "none"}))
    _, on_gpu, _ = make("gpu", **(kind | {"attention": "xla"}))
    assert config.model.vocab_size == 64
    ids = tokens()
    targets = jnp.where(ids % 5 == 0, -1, jnp.roll(ids, -1, 1))
    weight = jnp.linspace(-1, 1, ids.size).reshape(ids.shape)
    (value, gradient), (value2, gradient2) = (
        jax.jit(jax.value_and_grad(lambda p, m=model: (weight * m.losses(p, ids, targets)).sum()))(
            params
        )
        for model in (on_cpu, on_gpu)
    )
    assert abs(value - value2) < 2e-6 * float(abs(weight).sum())
    for path, expected in param.named(gradient).items():
        other = param.named(gradient2)[path]
        assert jnp.abs(expected - other).max() < 2e-5 * jnp.abs(expected).max() + 1e-9, path


def test_a_residual_stream_in_bfloat16_is_rounded_and_learns_alike():
    """The stream has the type; loss and gradients stay within what roundings of sums explain."""
    kind = VARIANTS["llama, grouped queries"] | {"dtype": "bfloat16"}
    _, wide, params = make(**kind)
    _, narrow, _ = make(**kind, residual_dtype="dtype")
    types = {}

    def keep(name, x):
        types.setdefault(name, x.dtype)
        return x

    jax.eval_shape(lambda p: narrow.taps(p, tokens(), keep), params)
    assert types["residual"] == types["embed"] == types["final"] == jnp.bfloat16
    value, gradient = loss_and_gradient(wide, params, tokens())
    value2, gradient2 = loss_and_gradient(narrow, params, tokens())
    # Three blocks round the stream six times by 2^-9 of it, and each gradient as often.
    assert 0 < abs(value - value2) < 0.01 * value
    for path, expected in param.named(gradient).items():
        error = jnp.linalg.norm(expected - param.named(gradient2)[path])
        assert error < 0.05 * jnp.linalg.norm(expected), path


@pytest.mark.parametrize("variant", ["gpt2", "llama", "geglu, wide heads, documents"])
def test_gradient_equals_finite_differences(variant):
    """Along random directions, with the oracle's float64 losses on both sides."""
    config, model, params = make(**VARIANTS[variant])
    ids = tokens()
    targets = np.roll(np.asarray(ids), -1, 1)
    _, gradient = loss_and_gradient(model, params, ids)

    def loss(p):
        z = oracle(config, p, ids)
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, targets[..., None], -1).mean()

    for path in param.named(params):
        chance = np.random.default_rng(len(path))
        direction = param.map_named(
            lambda p, x, path=path, chance=chance: (
                chance.normal(size=x.shape) if p == path else np.zeros(x.shape)
            ),
            params,
        )
        step = 1e-5
        moved = [
            jax.tree.map(lambda x, d, s=s: np.asarray(x, np.float64) + s * d, params, direction)
            for s in (step, -step)
        ]
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        ours = sum(
            float((np.asarray(g, np.float64) * d).sum())
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        assert abs(ours - slope) < 2e-4 * abs(slope) + 1e-6, path


@pytest.mark.parametrize(
    "variant", ["gpt2", "llama, grouped queries", "geglu, wide heads, documents"]
)
def test_no_position_sees_the_future(variant):
    """The gradient of one position's loss with respect to later embeddings is exactly zero."""
    # An untied table of one row a position, so that each row's gradient is that of a position.
    _, model, params = make(**VARIANTS[variant] | {"head": "untied"})
    ids = jnp.arange(1, T + 1)[None]

    @jax.jit
    def gradient_at(t):
        def loss(tokens_VxD):
            changed = params | {"embed": params["embed"] | {"tokens": tokens_VxD}}
            return model.losses(changed, ids, jnp.roll(ids, -1, 1))[0, t]

        return jax.grad(loss)(params["embed"]["tokens"])[1 : T + 1]

    for t in range(T):
        gradient_TxD = np.abs(gradient_at(t))
        assert gradient_TxD[: t + 1].max(axis=1).min() > 0
        assert gradient_TxD[t + 1 :].max(initial=0.0) == 0


def test_bfloat16_is_near_float32():
    _, full, params = make(**VARIANTS["llama"])
    _, half, _ = make(**VARIANTS["llama"], dtype="bfloat16")
    value, gradient = loss_and_gradient(full, params, tokens())
    value2, gradient2 = loss_and_gradient(half, params, tokens())
    assert 0 < abs(value - value2) < 2e-2 * value
    error = sum(jnp.square(a - b).sum() for a, b in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True))  # fmt: skip
    size = sum(jnp.square(a).sum() for a in jax.tree.leaves(gradient))
    assert 0 < jnp.sqrt(error / size) < 5e-2
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient2))


def test_targets_of_minus_one_do_not_count():
    _, model, params = make()
    ids = tokens()
    targets = jnp.roll(ids, -1, 1).at[0, 3:7].set(-1)
    nll = jax.jit(model.losses)(params, ids, targets)
    assert (nll[0, 3:7] == 0).all() and (nll[1] > 0).all()
    nothing = jnp.full_like(ids, -1)
    gradient = jax.jit(jax.grad(lambda p: model.losses(p, ids, nothing).sum()))(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradient))


def test_initial_values_follow_the_table():
    _config, model, _ = make(n_layers=4, d_model=128, bias=True)
    params = param.named(jax.jit(model.init)(jax.random.key(0)))
    for path, row in model.param_rules.items():
        values = np.asarray(params[path])
        if row.spec.init == "normal":
            assert abs(values.std() / row.init_std - 1) < 0.05, path
            expected = 0.02 / np.sqrt(8) if path.endswith(("out/weight", "down/weight")) else 0.02
            assert row.init_std == pytest.approx(expected)
        else:
            assert (values == (1 if row.spec.init == "ones" else 0)).all(), path


def test_a_layer_starts_the_same_in_a_deeper_model():
    shallow, deep = make(n_layers=2)[1], make(n_layers=4)[1]
    a = param.named(jax.jit(shallow.init)(jax.random.key(3)))
    b = param.named(jax.jit(deep.init)(jax.random.key(3)))
    for path, values in a.items():
        if path.startswith("blocks/") and "norm" not in path:
            scale = shallow.param_rules[path].init_std / deep.param_rules[path].init_std
            np.testing.assert_allclose(values, b[path][:2] * scale, rtol=1e-6)


def test_paths_are_a_contract():
    """Checkpoints and tools rely on these names."""
    _, model, _ = make(bias=True, mlp="swiglu", head="untied")
    dense = {f"attention/{n}" for n in ("query", "key", "value", "out")}
    dense |= {f"mlp/{n}" for n in ("gate", "up", "down")}
    blocks = {f"blocks/{d}/{w}" for d in dense for w in ("weight", "bias")}
    blocks |= {f"blocks/{n}_norm/{w}" for n in ("attention", "mlp") for w in ("scale", "bias")}
    rest = {"embed/tokens", "embed/positions", "readout/weight"}
    rest |= {"readout/norm/scale", "readout/norm/bias"}
    assert set(param.named(model.specs)) == blocks | rest
    assert param.named(model.specs)["blocks/attention/query/weight"].axes == (
        "layers", "embed", "heads", "head_dim",
    )  # fmt: skip
