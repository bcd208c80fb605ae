"""Samples text from a model, token by token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def sample(
    logits: Callable,
    params,
    prompt: np.ndarray,
    n_tokens: int,
    *,
    length: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> np.ndarray:
    """Continues `prompt` (ids) by `n_tokens`; returns the new ids, int32 [n_tokens].

    The model reads the last `length` tokens, so a text may be of any length. Ids from `vocab_size`
    on (padding rows of the embedding) are never drawn. `temperature` 0 takes the likeliest token;
    `top_k` 0 draws from all.
    """
    text = list(map(int, prompt))
    run = _runner(logits, length, vocab_size, temperature, top_k)
    key = jax.random.key(seed)
    window_1xT = np.zeros((1, length), np.int32)
    used = min(len(text), length)
    window_1xT[0, :used] = text[len(text) - used :]
    new, state = [], (jnp.asarray(window_1xT), jnp.int32(used))
    for index in range(n_tokens):
        *state, token = run(params, *state, jax.random.fold_in(key, index))
        new.append(token)
    return np.asarray(jnp.stack(new), np.int32) if new else np.zeros(0, np.int32)


@functools.lru_cache(maxsize=4)
def _runner(logits: Callable, length: int, vocab_size: int, temperature: float, top_k: int):
    def run(params, window_1xT, used, key):
        z_V = logits(params, window_1xT)[0, used - 1].astype(jnp.float32)
        z_V = jnp.where(jnp.arange(z_V.size) < vocab_size, z_V, -jnp.inf)
        if top_k:
            least = jax.lax.top_k(z_V, min(top_k, vocab_size))[0][-1]
            z_V = jnp.where(z_V >= least, z_V, -jnp.inf)
        token = (
            jax.random.categorical(key, z_V / temperature) if temperature else jnp.argmax(z_V)
        ).astype(jnp.int32)
        full = used == length
        moved_1xT = jnp.where(full, jnp.roll(window_1xT, -1, axis=1), window_1xT)
        position = jnp.where(full, length - 1, used)
        return moved_1xT.at[0, position].set(token), position + 1, token

    return jax.jit(run, donate_argnums=1)
