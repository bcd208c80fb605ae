"""Measures norms, activations and spectral norms by layer in a training step.

Spectral norms come from a warm-started power iteration on stacked matrices. Under the spectral
condition (Yang et al. 2023, arXiv 2310.17813) the norm of a matrix and of its update, times
sqrt(fan_in / fan_out), keep their size as the model grows.
"""

import zlib

import jax
import jax.numpy as jnp
import optax

from lmscale_jax.model.build import Model
from lmscale_jax.model.param import Spec, map_named, named, row_layers
from lmscale_jax.mur.settings import MODES


def due_measurements(config, done: int) -> tuple[str, ...]:
    """Returns the names of the measurements of step number `done`, counted from 1.

    They are due on steps that write a line of metrics.jsonl.
    """
    log = config.log
    every = {
        "norms": log.every if log.per_layer else 0,
        "activations": log.activations_every,
        "spectral": log.spectral_every,
        "mur": log.every if MODES[config.mur.mode].measures else 0,
    }
    return tuple(name for name, n in every.items() if n and done % n == 0)


def begin_diagnostics(config, model: Model) -> dict:
    """Returns the start vectors of the spectral measurements; {} without them."""
    return begin_spectral(model.specs) if config.log.spectral_every else {}


def take_diagnostics(measure: tuple[str, ...], model: Model, batch, grads, state, updates):
    """Takes the measurements named in `measure` of a step from `state`.

    Returns ({name: scalar or [L]}, new start vectors).
    """
    metrics, vectors = {}, state.memory
    if "norms" in measure:
        metrics |= layer_norms(model, grads, state.params, updates)
    if "activations" in measure:
        metrics |= activation_stats(model, batch, state.params, state.step)
    if "spectral" in measure:
        spectral, vectors = measure_spectral(model.specs, state.params, updates, vectors)
        metrics |= spectral
    return metrics, vectors


def layer_norms(model: Model, grads: dict, params: dict, updates: dict) -> dict:
    """Computes Euclidean norms of each block, [L], and of embedding and readout.

    Names are "QUANTITY_norm_PLACE", quantities grad, param and update.
    """

    def blocks(tree):
        squares = [
            by_layer(model.specs, jnp.square(x.reshape(len(x), -1)).sum(axis=1), missing=0.0)
            for x in jax.tree.leaves(tree["blocks"])
        ]
        return jnp.sqrt(sum(squares))

    metrics = {}
    for quantity, tree in (("grad", grads), ("param", params), ("update", updates)):
        metrics[f"{quantity}_norm_layers"] = blocks(tree)
        for place in ("embed", "readout"):
            metrics[f"{quantity}_norm_{place}"] = optax.tree.norm(tree[place])
    return metrics


def by_layer(specs: dict, values_R: jax.Array, missing: float = jnp.nan) -> jax.Array:
    """Returns [L, ...] from a row for each block that has one (`param.row_layers`)."""
    n_layers = max(len(spec.layers) for spec in named(specs["blocks"]).values())
    if len(values_R) == n_layers:
        return values_R
    layers = jnp.array(row_layers(specs["blocks"], len(values_R)))
    return jnp.full((n_layers, *values_R.shape[1:]), missing).at[layers].set(values_R)


def activation_stats(model: Model, batch, params: dict, step: jax.Array) -> dict:
    """Computes {"activation/NAME/STATISTIC": scalar or [L]}: mean, rms, largest absolute value.

    They are those of a pass without dropout, with the windows of this step; nan in a block without
    that activation.
    """

    def keep(_, x):
        x = x.astype(jnp.float32)
        return jnp.stack([x.mean(), jnp.sqrt(jnp.square(x).mean()), jnp.abs(x).max()])

    metrics = {}
    for path, values in named(model.taps(params, batch.tokens_BxT, keep, step)).items():
        if path.startswith("blocks/"):
            values = by_layer(model.specs, values)
        for index, statistic in enumerate(("mean", "rms", "max")):
            metrics[f"activation/{path.removeprefix('blocks/')}/{statistic}"] = values[..., index]
    return metrics


# From a cold start the estimate of a Gaussian matrix is then within 2%. It is always a lower bound.
ITERATIONS = 40


def begin_spectral(specs: dict) -> dict[str, dict[str, jax.Array]]:
    """Draws unit start vectors of all matrices, {"weight", "update": {path: [layers, fan_in]}}."""

    def vector(path: str, spec: Spec):
        layers = spec.shape[0] if spec.axes[0] == "layers" else 1
        key = jax.random.key(zlib.crc32(path.encode()) & 0x7FFFFFFF)
        return _unit(jax.random.normal(key, (layers, spec.fan_in)))

    matrices = {path: spec for path, spec in named(specs).items() if _is_matrix(spec)}
    return {
        what: {path: vector(f"{what}/{path}", spec) for path, spec in matrices.items()}
        for what in ("weight", "update")
    }


def _is_matrix(spec: Spec) -> bool:
    return spec.role in ("input", "hidden", "output")


def _unit(v_LxI: jax.Array) -> jax.Array:
    return v_LxI / jnp.maximum(jnp.linalg.norm(v_LxI, axis=1, keepdims=True), 1e-30)


def top_singular(w_LxIxO: jax.Array, v_LxI: jax.Array, iterations: int = ITERATIONS):
    """Estimates (sigma [L], v [L, I]): largest singular value, from below, and its vector.

    Power iteration on W W^T. A matrix of zeros gives 0 and keeps its vector.
    """
    w_LxIxO = w_LxIxO.astype(jnp.float32)

    def iterate(_, v_LxI):
        u_LxO = jnp.einsum("lio,li->lo", w_LxIxO, v_LxI)
        new_LxI = jnp.einsum("lio,lo->li", w_LxIxO, u_LxO)
        return jnp.where(jnp.any(new_LxI != 0, axis=1, keepdims=True), _unit(new_LxI), v_LxI)

    v_LxI = jax.lax.fori_loop(0, iterations, iterate, v_LxI)
    return jnp.linalg.norm(jnp.einsum("lio,li->lo", w_LxIxO, v_LxI), axis=1), v_LxI


def measure_spectral(specs: dict, params: dict, updates: dict, vectors: dict) -> tuple[dict, dict]:
    """Computes {"spectral/QUANTITY/PATH": [layers]} of a step, and new start vectors.

    Quantities: "weight" and "update", sigma times sqrt(fan_in / fan_out); "relative", the ratio of
    the two; "stable_rank" of the weight, its squared Frobenius norm over sigma squared.

    Args:
      specs, params, updates: trees with the same paths; params from before the update.
      vectors: of `begin_spectral` or of the last call.
    """
    metrics, new_vectors = {}, {"weight": {}, "update": {}}

    def measure(path: str, spec: Spec):
        if not _is_matrix(spec):
            return
        size = (-1, spec.fan_in, spec.fan_out)
        w, u = (named(tree)[path].reshape(size) for tree in (params, updates))
        sigma_L, new_vectors["weight"][path] = top_singular(w, vectors["weight"][path])
        of_update_L, new_vectors["update"][path] = top_singular(u, vectors["update"][path])
        shape = (spec.fan_in / spec.fan_out) ** 0.5
        square_L = jnp.square(w.astype(jnp.float32)).sum(axis=(1, 2))
        floor_L = jnp.maximum(sigma_L, 1e-30)
        measured = {
            "weight": sigma_L * shape,
            "update": of_update_L * shape,
            "relative": of_update_L / floor_L,
            "stable_rank": square_L / jnp.square(floor_L),
        }
        for quantity, x_L in measured.items():
            x_L = by_layer(specs, x_L) if spec.layers else x_L
            metrics[f"spectral/{quantity}/{path}"] = x_L

    map_named(measure, specs)
    return metrics, new_vectors
