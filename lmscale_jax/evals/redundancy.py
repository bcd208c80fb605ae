"""Measures the redundancy of each block of a trained model: Block Influence and layer drop.

Block Influence (Men et al. 2024, arXiv 2403.03853) is 1 - cos(h before, h after) of the residual
stream, before the final norm. Layer drop is the rise of the held-out loss when blocks are skipped.
One compiled program takes the mask of the remaining blocks as an argument, so each choice of blocks
costs a forward pass and no compilation.

Rank correlations, with intervals, tell whether several measures rank the blocks alike.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.model.build import Model
from lmscale_jax.model.mesh import put_batch
from lmscale_jax.mur.utility import masked_mean, safe_norms


class BlockSkipper:
    """A `BlockWrapper` that skips the blocks with `keep_L` 0 and measures the influence of all."""

    part_names, first = ("block",), 0

    def __init__(self, keep_L: jax.Array):
        self.keep_L, self.stop = keep_L, len(keep_L)

    def begin(self, h_NxD):
        return h_NxD, jnp.zeros((self.stop, len(h_NxD)))

    def wrap(self, part, number: int, remat: str):
        def run(shared, carry, layer):
            x_NxD, influence_LxN = carry
            index = layer[1]
            y_NxD = jnp.where(self.keep_L[index], part(shared, x_NxD, layer), x_NxD)
            size_N = safe_norms(x_NxD) * safe_norms(y_NxD)
            dot_N = (x_NxD.astype(jnp.float32) * y_NxD.astype(jnp.float32)).sum(axis=-1)
            influence_N = 1 - dot_N / jnp.where(size_N > 0, size_N, 1.0)
            return y_NxD, influence_LxN.at[index].set(influence_N)

        return run

    def end(self, carry):
        return carry

    def close(self, nll_BxT, influence_LxN):
        return nll_BxT, influence_LxN


class DropSums(NamedTuple):
    """Sums of each window: losses, number of labels, and mean influence of each block."""

    nll_B: jax.Array
    count_B: jax.Array
    influence_LxB: jax.Array


class LayerDrop(NamedTuple):
    """The losses with blocks skipped, by window.

    Attributes:
      drops: tuples of skipped blocks, () first.
      nll_MxW: sums of losses, a row for each of `drops`.
      count_W: labels.
      influence_LxW: with no block skipped.
    """

    drops: list[tuple[int, ...]]
    nll_MxW: np.ndarray
    count_W: np.ndarray
    influence_LxW: np.ndarray

    def damage(self, weight_W: np.ndarray | None = None) -> np.ndarray:
        """Returns the rise of the loss in nats per token, [M]; windows may be weighted."""
        weight_W = np.ones(len(self.count_W)) if weight_W is None else weight_W
        loss_M = self.nll_MxW @ weight_W / (self.count_W @ weight_W)
        return loss_M - loss_M[0]

    def damage_sem(self) -> np.ndarray:
        """Returns standard errors [M], windows being draws paired with those of the full model."""
        change_MxW = self.nll_MxW - self.nll_MxW[0] - self.damage()[:, None] * self.count_W
        W = len(self.count_W)
        spread_M = W / max(1, W - 1) * np.square(change_MxW).sum(axis=1)
        return np.sqrt(spread_M) / self.count_W.sum()

    def influence(self, weight_W: np.ndarray | None = None) -> np.ndarray:
        """Returns the mean influence over labels, [L]; windows may be weighted."""
        weight_W = self.count_W if weight_W is None else weight_W * self.count_W
        return self.influence_LxW @ weight_W / weight_W.sum()


def make_drop_sums(model: Model, mesh) -> Callable:
    """Returns the jitted (params, batch, keep_L) -> DropSums."""

    def sums(params, batch, keep_L):
        nll_BxT, influence_LxN = model.losses(params, *batch, None, BlockSkipper(keep_L))
        labelled_BxT = batch.targets_BxT >= 0
        influence_LxBxT = influence_LxN.reshape(-1, *nll_BxT.shape)
        window_mean = jax.vmap(jax.vmap(masked_mean), in_axes=(0, None))
        influence_LxB = window_mean(influence_LxBxT, labelled_BxT)
        return DropSums(nll_BxT.sum(axis=1), labelled_BxT.sum(axis=1), influence_LxB)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(sums, out_shardings=replicated)


def measure_drops(
    sums: Callable, params, batches: Iterable, mesh, n_layers: int, drops: list[tuple[int, ...]]
) -> LayerDrop:
    """Evaluates the model without each of `drops`, after the full model."""
    drops = [(), *(drop for drop in drops if drop)]
    device_batches = [put_batch(batch, mesh) for batch in batches]
    nll_rows, full_model = [], None
    for drop in drops:
        keep_L = ~np.isin(np.arange(n_layers), drop)
        window_sums = [jax.device_get(sums(params, batch, keep_L)) for batch in device_batches]
        full_model = full_model or window_sums
        nll_rows.append(np.concatenate([s.nll_B for s in window_sums]).astype(np.float64))
    count_W = np.concatenate([s.count_B for s in full_model])
    influence_LxW = np.concatenate([s.influence_LxB for s in full_model], axis=1)
    labelled_W = count_W > 0
    return LayerDrop(
        drops,
        np.stack(nll_rows)[:, labelled_W],
        count_W[labelled_W].astype(float),
        influence_LxW[:, labelled_W].astype(np.float64),
    )


def single_blocks(n_layers: int) -> list[tuple[int, ...]]:
    """Lists the drops of one block each."""
    return [(layer,) for layer in range(n_layers)]


def contiguous_blocks(n_layers: int) -> list[tuple[int, ...]]:
    """Lists every run of 2, 4, 8, ... neighbours, up to half of the blocks."""
    sizes = [2**k for k in range(1, n_layers.bit_length()) if 2 * 2**k <= n_layers]
    return [tuple(range(b, b + s)) for s in sizes for b in range(n_layers - s + 1)]


def cumulative_blocks(influence_L: np.ndarray) -> list[tuple[int, ...]]:
    """Lists the least influential block, the two least, ... to all but one (ShortGPT's pruning)."""
    order = [int(layer) for layer in np.argsort(influence_L, kind="stable")]
    return [tuple(order[: k + 1]) for k in range(len(order) - 1)]


def redundancy_line(sums: Callable, params, batches: Iterable, mesh, n_layers: int) -> dict:
    """Returns {"block_influence", "layer_drop"}, lists of length L for a line of metrics.jsonl."""
    layer_drop = measure_drops(sums, params, batches, mesh, n_layers, single_blocks(n_layers))
    return {
        "block_influence": layer_drop.influence().tolist(),
        "layer_drop": layer_drop.damage()[1:].tolist(),
    }


def redundancy_steps(config) -> frozenset[int]:
    """Returns the steps of a resolved config after which training measures redundancy.

    They are the multiples of eval.redundancy_early until eval.redundancy_until, from there on every
    eval.redundancy_every, and the last step.
    """
    keys, last = config.eval, config.train.steps
    late, early, until = keys.redundancy_every, keys.redundancy_early, keys.redundancy_until
    if not late:
        return frozenset()
    until = min(until, last) if early else 0
    early_steps = range(early, until + 1, early) if early else ()
    return frozenset([*early_steps, *range(until + late, last, late), last])


DRAWS, LEVEL = 1000, 0.95


def rank_correlations(
    measures: dict[str, Callable[[np.ndarray], np.ndarray]], n_windows: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Computes Spearman's rho over the blocks for every pair of measures.

    Args:
        measures: {name: weights of the windows -> [L]}.
        n_windows: windows of held-out tokens, resampled with replacement for the intervals, the
          same way for all measures.
        seed: of the draws.

    Returns:
        {"A, B": {"rho", "low", "high"}}, with the 95 % percentile interval of the bootstrap. It
        covers the ranking of these blocks, not the variation between runs.
    """
    rng = np.random.default_rng(seed)
    ones = np.ones(n_windows)
    resamples = []
    for _ in range(DRAWS if n_windows > 1 else 0):
        resamples.append(np.bincount(rng.integers(0, n_windows, n_windows), minlength=n_windows))
    ranks = {name: [_ranks(f(w)) for w in (ones, *resamples)] for name, f in measures.items()}
    correlations = {}
    for a, b in itertools.combinations(measures, 2):
        rhos = np.array([_correlation(x, y) for x, y in zip(ranks[a], ranks[b], strict=True)])
        low, high = (
            np.quantile(rhos[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if resamples else (-1, 1)
        )
        correlations[f"{a}, {b}"] = {"rho": float(rhos[0]), "low": float(low), "high": float(high)}
    return correlations


def _ranks(values_L: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values_L, kind="stable"), kind="stable").astype(float)


def _correlation(x_L: np.ndarray, y_L: np.ndarray) -> float:
    x_L, y_L = x_L - x_L.mean(), y_L - y_L.mean()
    size = np.sqrt((x_L @ x_L) * (y_L @ y_L))
    return float(x_L @ y_L / size) if size else 0.0
