"""The parts of a training step as this project computes them, forward and backward: JSON.

One device with all threads. Each part is a compiled program of its own, so what XLA fuses across
parts in a whole step is not seen here.
"""

import json

from absl import flags

from benchmarks.shapes import GPT2_WITHOUT_READOUT, SHAPES
from benchmarks.turns import timed
from lmscale_jax import cli
from lmscale_jax.optim.build import clip_by_global_norm

DTYPE = flags.DEFINE_string("dtype", "float32", "type of products")


def both_ways(function, *inputs):
    """Forward and backward of `function` with a gradient of ones, one compiled program."""
    import jax
    import jax.numpy as jnp

    differentiable = [i for i, x in enumerate(inputs) if x.dtype != jnp.int32]

    @jax.jit
    def program(inputs):
        def of(*some):
            full = list(inputs)
            for i, x in zip(differentiable, some, strict=True):
                full[i] = x
            return function(*full)

        y, pull = jax.vjp(of, *(inputs[i] for i in differentiable))
        return pull(jnp.ones_like(y))

    return lambda: jax.block_until_ready(program(inputs))


def pieces(shape: dict, dtype: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import optax

    from lmscale_jax.model import layers, primitives

    D, T, B, H, V = (shape[name] for name in "DTBHV")
    N, half, cpu = B * T, jnp.dtype(dtype), primitives.cpu
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw(*size, dtype=jnp.float32):
        return jax.random.normal(next(keys), size, dtype)

    def product(outputs, I, O):  # noqa: E741
        def function(x, *weights):
            return jnp.concatenate([cpu.dense(x, w) for w in weights], axis=1)

        return timed(
            both_ways(function, draw(N, I, dtype=half), *(draw(I, O) for _ in range(outputs)))
        )

    def attention(q, k, v):
        def flat(x):
            return x.reshape(B, T, H, D // H).transpose(0, 2, 1, 3).reshape(B * H, T, D // H)

        o = cpu.attention(flat(q), flat(k), flat(v), scale=(D // H) ** -0.5)
        return o.reshape(B, H, T, D // H).transpose(0, 2, 1, 3).reshape(N, D)

    gelu = layers.pointwise(layers.GELUS[shape["gelu"]])

    def loss(x, w, y):
        return cpu.cross_entropy(cpu.dense(x, w), y)

    weights = [draw(D, D) for _ in range(shape["L"] * 12)]
    transform = optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3))
    moments = transform.init(weights)

    @jax.jit
    def update(gradients, moments, weights):
        updates, moments = transform.update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), moments

    return {
        "q, k and v": product(3, D, D),
        "output projection": product(1, D, D),
        "MLP up": product(1, D, 4 * D),
        "MLP down": product(1, 4 * D, D),
        "attention": timed(both_ways(attention, *(draw(N, D, dtype=half) for _ in range(3)))),
        "GELU": timed(both_ways(gelu, draw(N, 4 * D, dtype=half))),
        "norm": timed(
            both_ways(lambda x, s: cpu.layer_norm(x, s, None, 1e-5), draw(N, D), draw(D))
        ),
        "readout and loss": timed(
            both_ways(loss, draw(N, D, dtype=half), draw(D, V), jnp.zeros(N, jnp.int32))
        ),
        "clip and AdamW": timed(lambda: jax.block_until_ready(update(weights, moments, weights))),
    }


def main() -> None:
    print(json.dumps({n: pieces(SHAPES[n], DTYPE.value) for n in GPT2_WITHOUT_READOUT}))


if __name__ == "__main__":
    cli.run_command(main)
