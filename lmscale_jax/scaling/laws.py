"""Scaling laws, their natural parameters, and the optimisation problem of one law and one table.

A law is L = E + sum_k A_k x_k^-s_k, where x_k is n, d or c (Hoffmann et al. 2022, approach 3, for n
and d; Kaplan et al. 2020 for c alone). ln L is a log-sum-exp of terms that are linear in
(ln E, ln A_k, s_k). The solver works in these coordinates.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling.table import Table

# Bounds of the solver: the largest |slope|, and by how many nats of ln L a coefficient may lie
# outside the range of the losses.
MAX_SLOPE = 50.0
DEPTH = 30.0


@dataclass(frozen=True)
class Law:
    """A sum of power-law terms, one for each column, and an optional floor E."""

    name: str
    columns: tuple[str, ...]
    coefficients: tuple[str, ...]
    exponents: tuple[str, ...]
    floor: str  # "free", "none" or "pinned"

    @property
    def coordinates(self) -> tuple[str, ...]:
        """Names the solver's coordinates, in order."""
        first = ("ln_E",) if self.floor == "free" else ()
        pairs = zip(self.coefficients, self.exponents, strict=True)
        return first + tuple(x for a, s in pairs for x in (f"ln_{a}", s))


LAWS = {
    "chinchilla": Law("chinchilla", ("n", "d"), ("A", "B"), ("alpha", "beta"), "free"),
    "power": Law("power", ("c",), ("a",), ("b",), "none"),
    "power_floor": Law("power_floor", ("c",), ("a",), ("b",), "free"),
}


def choose_law(name: str, floor: float | None = None) -> Law:
    """Looks up a law by name; with `floor` (nats/token) its E is pinned.

    Raises:
        InputError: the name is unknown, or the floor is not positive.
    """
    if name not in LAWS:
        raise InputError(f"--law={name} is unknown; use {', '.join(LAWS)} or isoflop")
    law = LAWS[name]
    if floor is None:
        return law
    if not floor > 0 or not np.isfinite(floor):
        raise InputError(f"--floor={floor} must be positive nats per token; use 1.7")
    return dataclasses.replace(law, floor="pinned")


@dataclass(frozen=True)
class Problem:
    """A law on R rows in P coordinates: ln L = log-sum-exp over blocks of columns @ theta[index].

    Attributes:
        y: ln loss [R].
        weight: positive weights [R].
        blocks: for each free term, its indices into theta [q] and its columns [R, q].
        pinned: ln E of a pinned floor, a number or [batch, 1]; None if the floor is free or absent.
        low, high: bounds of theta [P].
        centre: mean logarithm of each column, subtracted before slopes are fitted.
    """

    law: Law
    y: np.ndarray
    weight: np.ndarray
    blocks: tuple[tuple[np.ndarray, np.ndarray], ...]
    pinned: np.ndarray | float | None
    low: np.ndarray
    high: np.ndarray
    centre: dict[str, float]

    @property
    def size(self) -> int:
        return len(self.low)

    def take(self, rows: np.ndarray) -> "Problem":
        """Restricts the problem to the rows of a mask or of indices."""
        blocks = tuple((index, X_Rxq[rows]) for index, X_Rxq in self.blocks)
        return dataclasses.replace(self, y=self.y[rows], weight=self.weight[rows], blocks=blocks)

    def pin(self, floor) -> "Problem":
        """Replaces the free floor term by pinned values of ln E, a number or [batch, 1]."""
        law = dataclasses.replace(self.law, floor="pinned")
        blocks = tuple((index - 1, X_Rxq) for index, X_Rxq in self.blocks[1:])
        return dataclasses.replace(
            self, law=law, blocks=blocks, pinned=floor, low=self.low[1:], high=self.high[1:]
        )


def fit_problem(table: Table, law: Law, floor: float | None = None, r_star=None) -> Problem:
    """Builds the optimisation problem of one law on one table.

    Args:
        floor: E of a pinned floor, nats/token.
        r_star: R* of `effective_tokens`; None counts every token fully.

    Raises:
        InputError: the floor is not below the smallest loss, or a column is missing.
    """
    y = np.log(table.loss)
    if law.floor == "pinned" and floor >= table.loss.min():
        raise InputError(
            f"--floor={floor} is not below the smallest loss, {table.loss.min():.4f}; "
            f"use {0.8 * table.loss.min():.2f}"
        )
    blocks, low, high, centre = [], [], [], {}
    ones = np.ones((len(y), 1))
    if law.floor == "free":
        blocks.append((np.array([0]), ones))
        low.append(y.min() - DEPTH)
        high.append(y.max())
    for column in law.columns:
        x = np.log(column_values(table, column, r_star))
        centre[column] = float(np.average(x, weights=table.weight))
        start = len(low)
        X_Rx2 = np.concatenate([ones, -(x - centre[column])[:, None]], axis=1)
        blocks.append((np.array([start, start + 1]), X_Rx2))
        low += [y.min() - DEPTH, -MAX_SLOPE]
        high += [y.max() + DEPTH, MAX_SLOPE]
    pinned = float(np.log(floor)) if law.floor == "pinned" else None
    return Problem(
        law, y, table.weight, tuple(blocks), pinned, np.array(low), np.array(high), centre
    )


def column_values(table: Table, column: str, r_star=None) -> np.ndarray:
    """Returns a column [R]; with `r_star`, `d` becomes the effective number of tokens."""
    if column == "d" and r_star is not None:
        return effective_tokens(table.column("d"), table.column("unique"), r_star)
    return table.column(column)


def effective_tokens(d, unique, r_star: float):
    """Converts `d` tokens drawn from `unique` distinct ones to an equivalent of fresh tokens.

    D' = U + U R* (1 - exp(-R / R*)) with R = d / U - 1 repetitions (Muennighoff et al. 2023,
    eq. 5; their R* is 15.4). Without repetition, D' = d.
    """
    d, unique = np.asarray(d, float), np.asarray(unique, float)
    repeats = np.maximum(d / unique - 1.0, 0.0)
    return np.where(repeats > 0, unique * (1 - r_star * np.expm1(-repeats / r_star)), d)


def natural_parameters(
    law: Law, centre: dict, theta: np.ndarray, floor: float | None = None
) -> dict:
    """Converts theta [..., P] to E, the coefficients at x = 1 and the exponents of x^-s."""
    params: dict = {}
    index = 0
    if law.floor == "free":
        params["E"] = np.exp(theta[..., 0])
        index = 1
    elif law.floor == "pinned":
        params["E"] = np.full(theta.shape[:-1], floor) if theta.ndim > 1 else float(floor)
    for column, a, s in zip(law.columns, law.coefficients, law.exponents, strict=True):
        params[s] = theta[..., index + 1]
        with np.errstate(over="ignore"):
            params[a] = np.exp(theta[..., index] + params[s] * centre[column])
        index += 2
    return params


def compound_exponents(params: dict) -> dict:
    """Computes the exponents of the compute optimum of a law in n and d.

    Hoffmann et al. 2022, eq. 4: `a` = beta / (alpha + beta) is the exponent of N* in C, `b` = 1 - a
    that of D*, `gamma` that of the reducible loss along the optimum, and N* = G (C / 6)^a. Values
    are NaN where alpha or beta is not positive; {} for laws without n and d.
    """
    if "alpha" not in params:
        return {}
    alpha, beta = np.asarray(params["alpha"]), np.asarray(params["beta"])
    with np.errstate(all="ignore"):
        total = np.where((alpha > 0) & (beta > 0), alpha + beta, np.nan)
        scale = (alpha * params["A"] / (beta * params["B"])) ** (1 / total)
        return {"a": beta / total, "b": alpha / total, "gamma": alpha * beta / total, "G": scale}


def compute_optimum(params: dict, product):
    """Finds the n and d that minimise the loss where n d equals `product`.

    Source: Hoffmann et al. 2022, eq. 4. NaN where no optimum exists.
    """
    exponents = compound_exponents(params)
    n = exponents["G"] * product ** exponents["a"]
    return n, product / n


def evaluate_law(law: Law, params: dict, **columns) -> np.ndarray:
    """Evaluates the loss (nats/token) at natural parameters and columns n, d or c (broadcast)."""
    total = params.get("E", 0.0)
    for column, a, s in zip(law.columns, law.coefficients, law.exponents, strict=True):
        # Through the logarithm: a large coefficient times a small power may overflow apart.
        total = total + np.exp(np.log(params[a]) - params[s] * np.log(columns[column]))
    return total
