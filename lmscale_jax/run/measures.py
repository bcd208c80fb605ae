"""What a step can say of its inside, beyond its loss: norms, activations, spectra by layer."""

import jax
import jax.numpy as jnp
import optax

from lmscale_jax.model.build import Model
from lmscale_jax.model.param import named
from lmscale_jax.mur.settings import MODES
from lmscale_jax.parametrization import spectral


def due(config, done: int) -> tuple[str, ...]:
    """What is measured in the step after which `done` steps are done. Lines carry it, so it falls
    on steps that write one."""
    log = config.log
    every = {
        "norms": log.every if log.per_layer else 0,
        "activations": log.activations_every,
        "spectral": log.spectral_every,
        "mur": log.every if MODES[config.mur.mode].measures else 0,
    }
    return tuple(name for name, n in every.items() if n and done % n == 0)


def begin(config, model: Model) -> dict:
    """What must be remembered from one measurement to the next."""
    return spectral.begin(model.specs) if config.log.spectral_every else {}


def take(what: tuple[str, ...], model: Model, batch, grads, params, updates, memory: dict):
    """(metrics, memory): {name: scalar or [L]} of everything in `what`."""
    metrics = {}
    if "norms" in what:
        metrics |= norms(model, grads, params, updates)
    if "activations" in what:
        metrics |= activations(model, batch, params)
    if "spectral" in what:
        found, memory = spectral.measure(model.specs, params, updates, memory)
        metrics |= found
    return metrics, memory


def norms(model: Model, grads: dict, params: dict, updates: dict) -> dict:
    """Euclidean norms for each block, [L], and of embedding and readout, by what and where."""
    n_layers = next(iter(named(model.specs["blocks"]).values())).shape[0]

    def blocks(tree):
        squares = [
            jnp.square(x.reshape(n_layers, -1)).sum(axis=1) for x in jax.tree.leaves(tree["blocks"])
        ]
        return jnp.sqrt(sum(squares))

    metrics = {}
    for what, tree in (("grad", grads), ("param", params), ("update", updates)):
        metrics[f"{what}_norm_layers"] = blocks(tree)
        for where in ("embed", "readout"):
            metrics[f"{what}_norm_{where}"] = optax.tree.norm(tree[where])
    return metrics


def activations(model: Model, batch, params: dict) -> dict:
    """{"activation/NAME/STATISTIC": scalar or [L]}: mean, rms and largest absolute value."""

    def keep(_, x):
        x = x.astype(jnp.float32)
        return jnp.stack([x.mean(), jnp.sqrt(jnp.square(x).mean()), jnp.abs(x).max()])

    metrics = {}
    for path, values in named(model.taps(params, batch.tokens_BxT, keep)).items():
        for index, statistic in enumerate(("mean", "rms", "max")):
            metrics[f"activation/{path.removeprefix('blocks/')}/{statistic}"] = values[..., index]
    return metrics
