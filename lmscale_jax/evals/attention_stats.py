"""Measures attention by layer: gates, probability on the first token, largest activations."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.model.attention import ACTIVATIONS
from lmscale_jax.model.build import Model
from lmscale_jax.model.mesh import put_batch

BINS = 200
SHUT = 0.1
QUANTILES = (0.1, 0.5, 0.9)
LARGEST = ("residual", "attention", "mlp", "mlp_hidden", "query", "key", "value")


def gate_range(model) -> tuple[float, float]:
    """Returns the range of the histogram of gates: 0 to 1, or wider as the activation's range is.

    `model` is the config group. Raises InputError where the activation has no bounds.
    """
    activation = ACTIVATIONS[model.gate_activation]
    low, high = min(0.0, activation.low), max(1.0, activation.high)
    if math.isinf(low) or math.isinf(high):
        raise InputError(
            f"--suites=attention does not support config.model.gate_activation="
            f"{model.gate_activation!r}, whose gates have no bounds; use --suites=perplexity"
        )
    return low, high


def make_attention_stats(model: Model, mesh, bounds: tuple[float, float] = (0.0, 1.0)) -> Callable:
    """Returns the jitted (params, batch) -> {name: [L, B, ...]}, for each window of the batch.

    "gate": counts of gates in BINS equal bins between `bounds` (`gate_range`). "scores":
    probability on the first token, averaged over heads and later positions. Names of LARGEST:
    largest absolute value.
    """
    no_input = "free" in model.specs["blocks"]["attention"].get("gate", {})

    def measure(params, batch):
        B, T = batch.tokens_BxT.shape

        def keep(name, x):
            if name == "gate":
                # A gate without an input is the same in every window.
                x_BxG = (
                    jnp.broadcast_to(x.reshape(1, -1), (B, x.size))
                    if no_input
                    else x.reshape(B, -1)
                )
                return _histogram(x_BxG, *bounds)
            if name == "scores":
                return _sink(x, T)
            if name in LARGEST:
                return jnp.abs(x).astype(jnp.float32).reshape(B, -1).max(axis=1)
            return jnp.zeros(())

        taps = model.taps(params, batch.tokens_BxT, keep)["blocks"]
        return {name: x for name, x in taps.items() if x.ndim > 1}

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(measure, out_shardings=replicated)


def _histogram(gate_BxG, low: float, high: float) -> jax.Array:
    """Counts gates in BINS equal bins, [B, BINS]."""
    share_BxG = (gate_BxG - low) / (high - low)
    bins_BxG = jnp.clip((share_BxG * BINS).astype(jnp.int32), 0, BINS - 1)
    return jax.vmap(lambda row: jnp.bincount(row, length=BINS))(bins_BxG)


def _sink(scores_BxHxP: jax.Array, T: int) -> jax.Array:
    """Averages the first token's probability over heads and later positions, [B].

    `scores_BxHxP` holds the visible scores: rows of 1, 2, ... T entries.
    """
    rows, columns = np.tril_indices(T)
    full = jnp.full((*scores_BxHxP.shape[:2], T, T), -jnp.inf)
    p_BxHxTxT = jax.nn.softmax(full.at[:, :, rows, columns].set(scores_BxHxP), axis=-1)
    return p_BxHxTxT[:, :, 1:, 0].mean(axis=(1, 2))


def evaluate_attention(
    measure: Callable,
    params,
    batches: Iterable,
    mesh,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> dict:
    """Evaluates host batches and returns lists by layer.

    They are {"sink", "largest": {name}, "gate": {"mean", "p10", "p50", "p90", "frac_below_0.1"},
    "windows": count}, "gate" where the model has gates. Windows of padding do not count. `bounds`
    are those of `make_attention_stats`.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        real_B = (np.asarray(batch.targets_BxT) >= 0).any(axis=1)
        measured = jax.device_get(measure(params, put_batch(batch, mesh)))
        for name, values in measured.items():
            parts.setdefault(name, []).append(values[:, real_B])
    stats = {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}
    result = {
        "sink": stats["scores"].mean(axis=1).tolist(),
        "largest": {name: stats[name].max(axis=1).tolist() for name in LARGEST},
        "windows": int(stats["scores"].shape[1]),
    }
    return result | (
        {"gate": gate_summary(stats["gate"].sum(axis=1), *bounds)} if "gate" in stats else {}
    )


def gate_summary(counts_LxQ: np.ndarray, low: float = 0.0, high: float = 1.0) -> dict:
    """Computes statistics of gates from their histograms, to half a bin."""
    centres_Q = low + (high - low) * ((np.arange(BINS) + 0.5) / BINS)
    share_LxQ = counts_LxQ / counts_LxQ.sum(axis=1, keepdims=True)
    below_LxQ = share_LxQ.cumsum(axis=1)
    result = {
        f"p{round(100 * q)}": centres_Q[(below_LxQ < q).sum(axis=1)].tolist() for q in QUANTILES
    }
    shut = share_LxQ[:, centres_Q < SHUT].sum(axis=1)
    return result | {"mean": (share_LxQ @ centres_Q).tolist(), "frac_below_0.1": shut.tolist()}
