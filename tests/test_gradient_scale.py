"""The gradient of every parameter grows with the model as its epsilon, measured at four sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build
from lmscale_jax.model.param import map_named, named
from lmscale_jax.optim.rules import update_rules

pytestmark = pytest.mark.slow

# Together they have every role: gates for each head, each channel and without input; biases, gains,
# tables of positions and values, scalars; a tied and an untied readout.
SCALARS = {"model__value_embeddings": 1, "model__x0_mix": "learned"}
HEADS = SCALARS | {
    "model__bias": True, "model__attn_gate": "headwise", "model__gate_bias": True,
    "model__skips": "unet", "model__head": "untied",
}  # fmt: skip
CHANNELS = {"model__norm": "rmsnorm", "model__positions": "rope", "model__attn_gate": "elementwise"}
FREE = {"model__positions": "rope", "model__attn_gate": "const", "model__gate_place": "output"}
WIDTHS, DEPTHS = (16, 32, 64, 128), (2, 4, 8, 16)
# A row of the table that is wrong is off by 1 / m or 1 / m_L. At these sizes slopes are up to 0.34
# away: at depths of 2 to 16 branches still fill a part of the stream, which falls with depth. Sums
# over coordinates that have not aligned yet, as gradients of scalars are, differ by up to m^1/2.
NEAR, NEAR_OF_SCALARS = 0.45, 0.75


def built(scheme: str, width: int, depth: int, changes: dict):
    config = base.get_config()
    config.parametrization.base_width, config.parametrization.name = 16, scheme
    if scheme == "completep":
        config.parametrization.base_depth = 2
    config.model.d_model, config.model.n_heads, config.model.n_layers = width, width // 8, depth
    config.model.stack = "scan"
    # Activations near 1 at every width, so that no part of the gradient is small by chance.
    config.parametrization.init_std, config.parametrization.embed_std = 0.25, 1.0
    config.parametrization.residual_init = "plain"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    config = resolve(config, 24)
    return config, build.build_model(config, platform="cpu")


def gradient_sizes(config, model, steps: int = 3, seeds: int = 4) -> dict[str, float]:
    """{path: log2 of the rms gradient over all but the first of `steps` signed steps, and seeds}.

    The first knows nothing yet: activations and what the loss wants of them are not aligned.
    """
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)))
    rules = update_rules(model.param_rules, config)

    def train(key):
        def step(params, _):
            grads = jax.grad(lambda p: model.losses(p, ids[:, :-1], ids[:, 1:]).mean())(params)
            moved = map_named(lambda path, g: 3e-3 * rules[path].lr_factor * jnp.sign(g), grads)
            squares = {path: jnp.square(g).mean() for path, g in named(grads).items()}
            return jax.tree.map(jnp.subtract, params, moved), squares

        return jax.lax.scan(step, model.init(key), length=steps)[1]

    squares = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), seeds))
    return {path: 0.5 * np.log2(np.asarray(x)[:, 1:].mean()) for path, x in squares.items()}


@pytest.mark.parametrize(
    ("scheme", "sweep", "changes"),
    [
        pytest.param("mup", "width", HEADS, id="width, a gate for each head"),
        pytest.param("mup", "width", CHANNELS, id="width, a gate for each channel"),
        pytest.param("mup", "width", FREE, id="width, free gates"),
        pytest.param("completep", "depth", SCALARS | CHANNELS, id="depth"),
    ],
)
def test_epsilon_follows_the_gradient(scheme, sweep, changes):
    sizes, measured, factors = {"width": WIDTHS, "depth": DEPTHS}[sweep], [], []
    for size in sizes:
        width, depth = (size, 2) if sweep == "width" else (32, size)
        config, model = built(scheme, width, depth, changes)
        measured.append(gradient_sizes(config, model))
        factors.append(
            {p: r.eps_factor for p, r in update_rules(model.param_rules, config).items()}
        )
    x, wrong = np.log2(sizes), {}
    for path, spec in named(model.specs).items():
        if measured[0][path] < -20:
            continue  # a bias of keys: softmax cancels it, and what is left is rounding
        slope = np.polyfit(x, [m[path] for m in measured], 1)[0]
        wanted = np.polyfit(x, np.log2([f[path] for f in factors]), 1)[0]
        if abs(slope - wanted) > (NEAR_OF_SCALARS if spec.role == "scalar" else NEAR):
            wrong[path] = f"gradient {slope:+.2f}, epsilon {wanted:+.2f}"
    assert not wrong
