"""Do several measures of a block rank the blocks alike? Rank correlations with intervals."""

import itertools
from collections.abc import Callable

import numpy as np

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
