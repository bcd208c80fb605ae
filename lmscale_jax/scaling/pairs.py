"""Cells of two arms that share size, tokens and seeds, and what their correlation is worth.

Runs of one seed start from the same values and see the same data in every arm of a ladder, and
cells of one size share what a curve misses there, so that errors of a pair are correlated and its
difference varies less. For every baseline the derivatives by tau and s lie in the span of those by
the curve, so that the estimate of the shift is that of a regression of the K pairs' differences;
these leave K - 2 degrees of freedom, fewer than the 2 K cells do. Shapes: B fits, R cells, P
parameters, K pairs.
"""

from dataclasses import dataclass, replace

import numpy as np

from lmscale_jax.scaling.table import Table

# Largest |difference| of ln n, and of ln d or ln c, between the cells of a pair.
NEAR_N, NEAR_D = 0.1, 0.05
# Correlation that is expected where seeds do not tell, as if from so many degrees of freedom. Small
# models had .6 on average over sizes and two changes, and 0 at one size
# (benchmarks/results/paired_arms.json).
USUAL_CORRELATION, USUAL_DEGREES = 0.3, 2
LEVEL = 0.95


@dataclass(frozen=True)
class Pairs:
    """Pairs of cells.

    Attributes:
        label: number of each cell's pair [R].
        correlation: between the arms, of the seeds' deviations from the means of their cells, with
            `degrees` degrees of freedom; None where no pair shares two seeds.
    """

    label: np.ndarray
    correlation: float | None
    degrees: int

    def take(self, rows: np.ndarray) -> "Pairs | None":
        """Selects cells by a mask or by indices; None unless whole pairs are left."""
        label = self.label[rows]
        _, label, count = np.unique(label, return_inverse=True, return_counts=True)
        return Pairs(label, self.correlation, self.degrees) if (count == 2).all() else None

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the pairs' cells (first [K], second [K])."""
        order = np.argsort(self.label, kind="stable")
        return order[::2], order[1::2]

    def pay(self, size: int) -> bool:
        """Tells whether the correlation outweighs the degrees of freedom that pairing costs.

        That the seeds' deviations decide it does not affect the size of either test, as they are
        independent of the means that are tested.
        """
        from scipy.stats import f

        cells = len(self.label)
        of_pairs, of_cells = cells // 2 - 2, cells - size
        if of_pairs < 1:
            return False
        if of_cells < 1:
            return True
        measured = 0.0 if self.correlation is None else self.correlation * self.degrees
        expected = (measured + USUAL_CORRELATION * USUAL_DEGREES) / (self.degrees + USUAL_DEGREES)
        return expected > 1 - f.ppf(LEVEL, 2, of_cells) / f.ppf(LEVEL, 2, of_pairs)


def average_seeds(table: Table) -> tuple[Table, np.ndarray, float | None]:
    """Averages ln loss over the seeds of each cell: (table of R cells, cell of each run, variance).

    A cell's weight is the sum of its runs'. The variance of one run is pooled over cells; None
    without repeated cells.
    """
    _, first, cell = np.unique(table.cells(), return_index=True, return_inverse=True)
    weight = np.bincount(cell, table.weight)

    def mean(values):
        return np.exp(np.bincount(cell, table.weight * np.log(values)) / weight)

    loss = mean(table.loss)
    spare = len(table) - len(first)
    within = (table.weight * np.log(table.loss / loss[cell]) ** 2).sum() / table.weight.mean()
    means = replace(table.take(first), loss=loss, c=mean(table.c), weight=weight)
    return means, cell, float(within / spare) if spare else None


def match_cells(runs: Table, means: Table, cell: np.ndarray) -> Pairs | None:
    """Pairs the cells of two variants that have equal n and d (or c) and a seed in common.

    Args:
        runs: of both variants; `cell` is the number of each run's row of `means`.

    Returns:
        None unless every cell has exactly one partner.
    """
    first, second = (np.flatnonzero(means.variant == v) for v in means.variants())
    near = [(means.c, NEAR_D)]
    if means.n is not None and means.d is not None:
        near = [(means.n, NEAR_N), (means.d, NEAR_D)]
    alike = np.ones((len(first), len(second)), bool)
    for values, most in near:
        alike &= np.abs(np.log(values[first])[:, None] - np.log(values[second])) <= most
    if not ((alike.sum(axis=1) == 1).all() and (alike.sum(axis=0) == 1).all()):
        return None
    label = np.zeros(len(means), int)
    products, squares, degrees = 0.0, 0.0, 0
    for k, (i, j) in enumerate(zip(first, second[alike.argmax(axis=1)], strict=True)):
        label[[i, j]] = k
        by_seed = [_losses_by_seed(runs.take(cell == number)) for number in (i, j)]
        if None in by_seed or not (common := sorted(set(by_seed[0]) & set(by_seed[1]))):
            return None
        a, b = (np.array([losses[seed] for seed in common]) for losses in by_seed)
        a, b = a - a.mean(), b - b.mean()
        products, squares = products + 2 * (a @ b), squares + a @ a + b @ b
        degrees += len(common) - 1
    return Pairs(label, float(products / squares) if squares > 0 else None, degrees)


def _losses_by_seed(runs: Table) -> dict | None:
    """Returns {seed: ln loss}; None where seeds are not named or not distinct."""
    if not all(runs.seed) or len(set(runs.seed)) < len(runs):
        return None
    return dict(zip(runs.seed, np.log(runs.loss), strict=True))


def difference_squares(pairs: Pairs, weight: np.ndarray, r_BxR: np.ndarray) -> np.ndarray:
    """Sums the squares [B] of the pairs' differences, each over its variance at weight 1."""
    i, j = pairs.members()
    return ((r_BxR[:, j] - r_BxR[:, i]) ** 2 / (1 / weight[i] + 1 / weight[j])).sum(axis=1)


def error_variance(pairs: Pairs | None, weight: np.ndarray, r_BxR: np.ndarray, size: int):
    """Estimates the variance of ln L at weight 1 [B] that a shift has to do with, and its degrees.

    It is that of the pairs' differences where these pay, and else that of all cells. Negative
    correlations do not occur, so the latter is at least as large.
    """
    if pairs is not None and pairs.pay(size):
        degrees = len(pairs.label) // 2 - 2
        squares = difference_squares(pairs, weight, r_BxR)
    else:
        degrees = r_BxR.shape[1] - size
        squares = (weight * r_BxR**2).sum(axis=1)
    return np.maximum(squares / max(degrees, 1), 1e-300), degrees


def residual_correlation(pairs: Pairs, weight: np.ndarray, r_R: np.ndarray, size: int):
    """Estimates the correlation of the cells of a pair about the curve; None with too few."""
    count = len(pairs.label) // 2
    apart, along = count - 2, count - (size - 2)
    if min(apart, along) < 1:
        return None
    of_differences = float(difference_squares(pairs, weight, r_R[None])[0])
    of_means = float((weight * r_R**2).sum()) - of_differences
    apart, along = of_differences / apart, max(of_means, 0.0) / along
    return (along - apart) / max(along + apart, 1e-300)
