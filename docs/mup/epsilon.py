"""Measures how updates change with width at an epsilon that is not small: docs/mup/epsilon.py OUT

Writes OUT/epsilon.json: {"of the gradient", epsilon's factor; "none", with one epsilon for all
widths: {parameter: slope of its updates over width}}.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import coord_check as family
from lmscale_jax.files import write_json
from lmscale_jax.model.build import build_model
from lmscale_jax.model.param import map_named, named
from lmscale_jax.model.parametrization import Ratios
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.rules import update_rules

WIDTHS, STEPS, SEEDS, EPSILON, VOCABULARY = [32, 64, 128, 256], 6, 3, 1e-5, 256


def small(width: int):
    config = family.get_config("llama")
    config.model.d_model, config.model.n_heads = width, width // 16
    config.model.attn_gate, config.model.value_embeddings = "headwise", 1
    config.model.x0_mix = "learned"
    config.parametrization.base_width, config.parametrization.name = WIDTHS[0], "mup"
    config.optim.eps, config.optim.weight_decay, config.optim.clip = EPSILON, 0.0, 0.0
    return resolve(config, VOCABULARY)


def update_sizes(config) -> dict[str, float]:
    """Returns {path: log2 of the rms update over its learning rate}, means of steps and seeds."""
    model = build_model(config, platform=jax.default_backend())
    transform = optim.build_optimizer(config, model.param_rules)
    rules = update_rules(model.param_rules, config)
    ids_BxT = np.random.default_rng(0).integers(0, VOCABULARY, (2, config.data.seq_len + 1))

    def step(carry, t):
        params, state = carry
        loss = lambda p: model.losses(p, ids_BxT[:, :-1], ids_BxT[:, 1:]).mean()  # noqa: E731
        updates, state = transform.update(jax.grad(loss)(params), state, params, step=t)

        def size(path, u):
            return jnp.sqrt(jnp.square(u).mean()) / (config.optim.lr * rules[path].lr_factor)

        sizes = named(map_named(size, updates))
        return (optim.apply_updates(params, updates), state), sizes

    def train(key):
        params = model.init(key)
        return jax.lax.scan(step, (params, transform.init(params)), jnp.arange(STEPS))[1]

    sizes = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), SEEDS))
    return {path: float(np.log2(np.asarray(x)).mean()) for path, x in sizes.items()}


def slopes() -> dict[str, float]:
    by_width = [update_sizes(small(width)) for width in WIDTHS]
    x = np.log2(WIDTHS)
    return {
        path: round(float(np.polyfit(x, [sizes[path] for sizes in by_width], 1)[0]), 3)
        for path in by_width[0]
    }


def main(out: Path) -> None:
    results = {"of the gradient": slopes()}
    with mock.patch.object(Ratios, "gradient_scale", 1.0):
        results["none"] = slopes()
    write_json(out / "epsilon.json", results)
    for path, slope in results["of the gradient"].items():
        print(f"{path:<34}{slope:+.2f}   same epsilon at every width {results['none'][path]:+.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
