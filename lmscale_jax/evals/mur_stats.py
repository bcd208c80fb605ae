"""Measures the marginal utility of every block over all labelled held-out tokens."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.model.build import Model
from lmscale_jax.model.mesh import put_batch
from lmscale_jax.mur import streams
from lmscale_jax.mur.settings import GRANULARITIES
from lmscale_jax.mur.utility import Measure


class TokenUtilities(NamedTuple):
    """Utilities of the n labelled tokens.

    Attributes:
      values: {part: [L, 3, n] float64}, utility, |δ| and |g|.
      window: [n], the number of each token's window.
    """

    values: dict[str, np.ndarray]
    window: np.ndarray

    def utility(self, part: str, weight_W: np.ndarray | None = None) -> np.ndarray:
        """Returns the mean over tokens, [L]; windows may be weighted (for a bootstrap)."""
        u_Lxn = self.values[part][:, 0]
        weight_n = np.ones(len(self.window)) if weight_W is None else weight_W[self.window]
        return u_Lxn @ weight_n / weight_n.sum()


def make_token_utilities(model: Model, config, granularity: str, mesh) -> Callable:
    """Returns the jitted (params, batch) -> (values [L, P, 3, B, T], labelled [B, T]).

    The values of every token are utility, |δ| and |g|.
    """
    spec = streams.UtilitySpec(Measure(config.mur.metric, config.mur.eps), ())
    n_layers, names = config.model.n_layers, GRANULARITIES[granularity].names
    parts = len(names)

    def tokens(params, batch):
        labelled_BxT = batch.targets_BxT >= 0
        # The sum itself is differentiated, so the factor back to it is 1.
        inputs = streams.BackwardInputs(labelled_BxT, 1.0, jnp.zeros((n_layers, parts)), 0.0, None)

        def total(stat_buffers):
            probe = streams.UtilityProbe(spec, stat_buffers, inputs, range(n_layers), names)
            return model.losses(params, *batch, None, probe).sum()

        values = jax.grad(total)(spec.stat_buffers(n_layers, parts, labelled_BxT.size))
        return values.reshape(n_layers, parts, 3, *labelled_BxT.shape), labelled_BxT

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(tokens, out_shardings=replicated)


def measure_utilities(
    tokens: Callable, params, batches: Iterable, mesh, granularity: str
) -> TokenUtilities:
    """Measures host batches; "block" has one part, "branch" has attention and MLP."""
    names = GRANULARITIES[granularity].names
    parts, windows, n_windows = [], [], 0
    for batch in batches:
        values, labelled_BxT = jax.device_get(tokens(params, put_batch(batch, mesh)))
        parts.append(values[..., labelled_BxT].astype(np.float64))
        is_window_B = labelled_BxT.any(axis=1)
        number_B = n_windows + np.cumsum(is_window_B) - 1
        windows.append(np.broadcast_to(number_B[:, None], labelled_BxT.shape)[labelled_BxT])
        n_windows += is_window_B.sum()
    values = np.concatenate(parts, axis=-1)
    return TokenUtilities(
        {name: values[:, p] for p, name in enumerate(names)}, np.concatenate(windows).astype(int)
    )


def utility_summary(utilities: TokenUtilities, part: str, tau: float) -> dict[str, list]:
    """Returns the lists by layer for eval.json; quantiles are over all tokens together.

    "stderr" is that of the mean utility, with windows as the independent draws.
    """
    u_Lxn, delta_Lxn, g_Lxn = np.moveaxis(utilities.values[part], 1, 0)
    p10_L, p50_L, p90_L = np.quantile(u_Lxn, [0.1, 0.5, 0.9], axis=1)
    mean_L, n = u_Lxn.mean(axis=1), len(utilities.window)
    W = utilities.window.max() + 1
    residual_LxW = np.stack(
        [np.bincount(utilities.window, u_n - m, W) for u_n, m in zip(u_Lxn, mean_L, strict=True)]
    )
    spread_L = W / max(1, W - 1) * np.square(residual_LxW).sum(axis=1)
    lists = {
        "mean": mean_L,
        "p10": p10_L,
        "p50": p50_L,
        "p90": p90_L,
        "frac_below_tau": (u_Lxn < tau).mean(axis=1),
        "delta_norm": delta_Lxn.mean(axis=1),
        "grad_norm": g_Lxn.mean(axis=1),
        "stderr": np.sqrt(spread_L) / n,
    }
    return {name: values.tolist() for name, values in lists.items()}
