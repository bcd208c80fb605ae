"""How much a trained model would miss each of its blocks: Block Influence and layer drop.

Block Influence (Men et al. 2024, arXiv 2403.03853) is 1 - cos(h before, h after) of the residual
stream, which never holds the final norm. Layer drop is the rise of the held-out loss when blocks
are skipped. One compiled program takes the mask of the blocks that stay, so every choice of blocks
costs a forward pass and no compilation.

Do several measures of a block rank the blocks alike? Rank correlations with intervals.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.build import Model
from lmscale_jax.mur.utility import masked_mean, safe_norms


class Thinned:
    """Skips the blocks whose `keep_L` is 0 and measures the influence of all; a `BlockWrapper`."""

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
    """Of each window: sum of losses, number of labels, mean influence of each block."""

    nll_B: jax.Array
    count_B: jax.Array
    influence_LxB: jax.Array


class LayerDrop(NamedTuple):
    """What skipping blocks did, by window.

    Attributes:
      drops: the tuples of blocks skipped, () first.
      nll_MxW: sums of losses, a row for each of `drops`.
      count_W: labels.
      influence_LxW: with no block skipped.
    """

    drops: list[tuple[int, ...]]
    nll_MxW: np.ndarray
    count_W: np.ndarray
    influence_LxW: np.ndarray

    def damage(self, weight_W: np.ndarray | None = None) -> np.ndarray:
        """[M]: rise of the loss in nats a token; windows may be weighted (for a bootstrap)."""
        weight_W = np.ones(len(self.count_W)) if weight_W is None else weight_W
        loss_M = self.nll_MxW @ weight_W / (self.count_W @ weight_W)
        return loss_M - loss_M[0]

    def damage_sem(self) -> np.ndarray:
        """[M]: standard errors, windows being the independent draws, paired with the whole."""
        change_MxW = self.nll_MxW - self.nll_MxW[0] - self.damage()[:, None] * self.count_W
        W = len(self.count_W)
        spread_M = W / max(1, W - 1) * np.square(change_MxW).sum(axis=1)
        return np.sqrt(spread_M) / self.count_W.sum()

    def influence(self, weight_W: np.ndarray | None = None) -> np.ndarray:
        """[L], every label counting alike."""
        weight_W = self.count_W if weight_W is None else weight_W * self.count_W
        return self.influence_LxW @ weight_W / weight_W.sum()


def make_drop_sums(model: Model, mesh) -> Callable:
    """The jitted (params, batch, keep_L) -> Sums."""

    def sums(params, batch, keep_L):
        nll_BxT, influence_LxN = model.losses(params, *batch, None, Thinned(keep_L))
        labelled_BxT = batch.targets_BxT >= 0
        influence_LxBxT = influence_LxN.reshape(-1, *nll_BxT.shape)
        each = jax.vmap(jax.vmap(masked_mean), in_axes=(0, None))(influence_LxBxT, labelled_BxT)
        return DropSums(nll_BxT.sum(axis=1), labelled_BxT.sum(axis=1), each)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(sums, out_shardings=replicated)


def measure_drops(
    sums: Callable, params, batches: Iterable, mesh, n_layers: int, drops: list[tuple[int, ...]]
) -> LayerDrop:
    """Skips each of `drops` in turn; () is put in front where it is missing."""
    drops = [(), *(drop for drop in drops if drop)]
    placed = [meshes.put_batch(batch, mesh) for batch in batches]
    rows, first = [], None
    for drop in drops:
        keep_L = ~np.isin(np.arange(n_layers), drop)
        found = [jax.device_get(sums(params, batch, keep_L)) for batch in placed]
        first = first or found
        rows.append(np.concatenate([f.nll_B for f in found]).astype(np.float64))
    count_W = np.concatenate([f.count_B for f in first])
    influence_LxW = np.concatenate([f.influence_LxB for f in first], axis=1).astype(np.float64)
    some_W = count_W > 0
    return LayerDrop(
        drops, np.stack(rows)[:, some_W], count_W[some_W].astype(float), influence_LxW[:, some_W]
    )


def single_blocks(n_layers: int) -> list[tuple[int, ...]]:
    return [(layer,) for layer in range(n_layers)]


def contiguous_blocks(n_layers: int) -> list[tuple[int, ...]]:
    """Every run of 2, 4, 8, ... neighbours, up to half of the blocks."""
    sizes = [2**k for k in range(1, n_layers.bit_length()) if 2 * 2**k <= n_layers]
    return [tuple(range(b, b + s)) for s in sizes for b in range(n_layers - s + 1)]


def cumulative_blocks(influence_L: np.ndarray) -> list[tuple[int, ...]]:
    """The least influential block, the two least, and so on to all but one (ShortGPT's pruning)."""
    order = [int(layer) for layer in np.argsort(influence_L, kind="stable")]
    return [tuple(order[: k + 1]) for k in range(len(order) - 1)]


def redundancy_line(sums: Callable, params, batches: Iterable, mesh, n_layers: int) -> dict:
    """{"block_influence", "layer_drop"}: lists of length L for a line of metrics.jsonl."""
    found = measure_drops(sums, params, batches, mesh, n_layers, single_blocks(n_layers))
    return {
        "block_influence": found.influence().tolist(),
        "layer_drop": found.damage()[1:].tolist(),
    }


def redundancy_steps(config) -> frozenset[int]:
    """After which steps of a resolved config training stops to look: early often, later seldom.

    Multiples of eval.redundancy_early until eval.redundancy_until, from there on every
    eval.redundancy_every, and the last step.
    """
    look, last = config.eval, config.train.steps
    late, early, until = look.redundancy_every, look.redundancy_early, look.redundancy_until
    if not late:
        return frozenset()
    until = min(until, last) if early else 0
    often = range(early, until + 1, early) if early else ()
    return frozenset([*often, *range(until + late, last, late), last])


DRAWS, LEVEL = 1000, 0.95


def rank_correlations(
    measures: dict[str, Callable[[np.ndarray], np.ndarray]], n_windows: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Spearman's rho over the blocks for every pair of measures.

    Args:
        measures: {name: weights of the windows -> [L]}.
        n_windows: of held-out tokens; they are drawn with replacement for the intervals, the same
          draws for all measures.
        seed: of the draws.

    Returns:
        {"A, B": {"rho", "low", "high"}}, the 95 % percentile interval of the bootstrap. It tells
        how well these blocks are ranked, not how other runs would come out.
    """
    chance = np.random.default_rng(seed)
    ones = np.ones(n_windows)
    draws = []
    for _ in range(DRAWS if n_windows > 1 else 0):
        draws.append(np.bincount(chance.integers(0, n_windows, n_windows), minlength=n_windows))
    ranks = {name: [_ranks(f(w)) for w in (ones, *draws)] for name, f in measures.items()}
    found = {}
    for a, b in itertools.combinations(measures, 2):
        rhos = np.array([_correlation(x, y) for x, y in zip(ranks[a], ranks[b], strict=True)])
        low, high = np.quantile(rhos[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if draws else (-1, 1)
        found[f"{a}, {b}"] = {"rho": float(rhos[0]), "low": float(low), "high": float(high)}
    return found


def _ranks(values_L: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values_L, kind="stable"), kind="stable").astype(float)


def _correlation(x_L: np.ndarray, y_L: np.ndarray) -> float:
    x_L, y_L = x_L - x_L.mean(), y_L - y_L.mean()
    size = np.sqrt((x_L @ x_L) * (y_L @ y_L))
    return float(x_L @ y_L / size) if size else 0.0
