"""Which part of a mixture each window of a run comes from, in exact shares."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class MixturePattern:
    """Which part of a mixture each row of the run's endless stream of windows comes from.

    Row j of a part of weight w, out of W, is due at (2 j + 1) / 2 w periods, and rows come in the
    order in which they are due (Webster's method of apportionment). So every W rows hold every part
    exactly w times, and after any number of rows a part of K is off its share by at most
    1/2 + (K - 2) w / 2 W rows: by half a row of two parts, by less than one of three. The index of
    a row within its part is computed without counting.

    Args:
        weights: positive integers or fractions, in lowest terms at most MOST together; only their
            ratios matter.

    Raises:
        ValueError: the weights have too many digits.

    Attributes:
        weights: whole numbers without a common divisor.
        period: their sum.
    """

    # Products of two weights stay below 2^63.
    MOST = 2**30

    def __init__(self, weights: Sequence[Fraction | int]):
        scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        whole = [weight // math.gcd(*whole) for weight in whole]
        self.period = sum(whole)
        if self.period > self.MOST:
            raise ValueError(f"weights are to one another as {', '.join(map(str, whole))}")
        self.weights = np.array(whole, np.int64)

    def rows(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the part of each row of a batch and its index within that part: [batch_size]."""
        position_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
        period_B, place_B = np.divmod(position_B, self.period)
        part_B, index_B = np.zeros_like(place_B), np.zeros_like(place_B)
        for part, weight in enumerate(self.weights):
            near_B = place_B * weight // self.period
            for away in range(-len(self.weights), len(self.weights) + 1):
                candidate_B = near_B + away
                is_row_B = (candidate_B >= 0) & (candidate_B < weight)
                is_row_B &= self._place(part, candidate_B) == place_B
                part_B[is_row_B], index_B[is_row_B] = part, candidate_B[is_row_B]
        return part_B, period_B * self.weights[part_B] + index_B

    def counts(self, n_rows: int) -> np.ndarray:
        """Counts the rows of each part among the first n_rows: int64 [parts]."""
        periods, rest = divmod(n_rows, self.period)
        counts = []
        for part, weight in enumerate(self.weights.tolist()):
            first = max(0, rest * weight // self.period - len(self.weights))
            near_N = np.arange(first, min(weight, first + 2 * len(self.weights)))
            earlier = int(np.sum(self._place(part, near_N) < rest))
            counts.append(periods * weight + first + earlier)
        return np.array(counts, np.int64)

    def _place(self, part: int, index_B: np.ndarray) -> np.ndarray:
        """Returns the place in its period of these rows of a part: the rows that are due before."""
        place_B = index_B.copy()
        for other, weight in enumerate(self.weights):
            if other != part:
                # Of two that are due together, the row of the earlier part comes first.
                due_B = (2 * index_B + 1) * weight - (other > part)
                place_B += (due_B // self.weights[part] + 1) // 2
        return place_B
