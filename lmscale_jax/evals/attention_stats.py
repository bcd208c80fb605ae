"""What attention does, by layer: gates, the mass on the first token, the largest activations."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.attention import ACTIVATIONS
from lmscale_jax.model.build import Model

BINS = 200
SHUT = 0.1
QUANTILES = (0.1, 0.5, 0.9)
LARGEST = ("residual", "attention", "mlp", "mlp_hidden", "query", "key", "value")


def gate_range(model) -> tuple[float, float]:
    """Returns the range of the histogram of gates: at least 0 to 1, and all that the activation of
    a model group can make. Raises InputError where that has no bounds."""
    activation = ACTIVATIONS[model.gate_activation]
    low, high = min(0.0, activation.low), max(1.0, activation.high)
    if math.isinf(low) or math.isinf(high):
        raise InputError(
            f"--suites=attention counts gates in bins, and those of config.model.gate_activation="
            f"{model.gate_activation!r} have no bounds; --suites=perplexity would work"
        )
    return low, high


def make_attention_stats(model: Model, mesh, bounds: tuple[float, float] = (0.0, 1.0)) -> Callable:
    """The jitted (params, batch) -> {name: [L, B, ...]}, each window by itself.

    "gate": counts of gates in BINS equal bins between `bounds` (`gate_range`). "sink": probability
    on the first token, the mean over heads and later positions. The rest: largest absolute value.
    """

    free = "free" in model.specs["blocks"]["attention"].get("gate", {})

    def measure(params, batch):
        B, T = batch.tokens_BxT.shape

        def keep(name, x):
            if name == "gate":
                # A gate without an input is the same in every window.
                x_BxG = (
                    jnp.broadcast_to(x.reshape(1, -1), (B, x.size)) if free else x.reshape(B, -1)
                )
                return _histogram(x_BxG, *bounds)
            if name == "scores":
                return _sink(x, T)
            if name in LARGEST:
                return jnp.abs(x).astype(jnp.float32).reshape(B, -1).max(axis=1)
            return jnp.zeros(())

        found = model.taps(params, batch.tokens_BxT, keep)["blocks"]
        return {name: x for name, x in found.items() if x.ndim > 1}

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(measure, out_shardings=replicated)


def _histogram(gate_BxG, low: float, high: float) -> jax.Array:
    """[B, BINS]."""
    share_BxG = (gate_BxG - low) / (high - low)
    bins_BxG = jnp.clip((share_BxG * BINS).astype(jnp.int32), 0, BINS - 1)
    return jax.vmap(lambda row: jnp.bincount(row, length=BINS))(bins_BxG)


def _sink(scores_BxHxP: jax.Array, T: int) -> jax.Array:
    """[B] from the visible scores, rows of 1, 2, ... T entries; the first row sees nothing else."""
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
    """Lists by layer over host batches: {"sink", "largest": {name}, "gate": {"mean", "p10", "p50",
    "p90", "frac_below_0.1"}}, the last where there is one. Windows of padding do not count.
    `bounds` are those of `make`."""
    kept: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        real_B = (np.asarray(batch.targets_BxT) >= 0).any(axis=1)
        found = jax.device_get(measure(params, meshes.put_batch(batch, mesh)))
        for name, values in found.items():
            kept.setdefault(name, []).append(values[:, real_B])
    whole = {name: np.concatenate(parts, axis=1) for name, parts in kept.items()}
    result = {
        "sink": whole["scores"].mean(axis=1).tolist(),
        "largest": {name: whole[name].max(axis=1).tolist() for name in LARGEST},
        "windows": int(whole["scores"].shape[1]),
    }
    return result | (
        {"gate": gate_summary(whole["gate"].sum(axis=1), *bounds)} if "gate" in whole else {}
    )


def gate_summary(counts_LxQ: np.ndarray, low: float = 0.0, high: float = 1.0) -> dict:
    """Statistics of gates from their histograms between two bounds, good to half a bin."""
    centres_Q = low + (high - low) * ((np.arange(BINS) + 0.5) / BINS)
    share_LxQ = counts_LxQ / counts_LxQ.sum(axis=1, keepdims=True)
    below_LxQ = share_LxQ.cumsum(axis=1)
    result = {
        f"p{round(100 * q)}": centres_Q[(below_LxQ < q).sum(axis=1)].tolist() for q in QUANTILES
    }
    shut = share_LxQ[:, centres_Q < SHUT].sum(axis=1)
    return result | {"mean": (share_LxQ @ centres_Q).tolist(), "frac_below_0.1": shut.tolist()}
