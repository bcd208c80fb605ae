"""The laws, as sums of falling terms, and how a table becomes a problem for the solver.

Every law here is L = E + sum_k A_k x_k^-s_k with x_k one of n, d, c (Hoffmann et al. 2022,
approach 3, for n and d; Kaplan et al. 2020 for c alone). In ln L it is a log-sum-exp of terms that
are linear in (ln E, ln A_k, s_k), which the solver uses.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.science.table import Table

# |slope| and how far below the smallest loss a term may sink, in nats of ln L.
MAX_SLOPE = 50.0
DEPTH = 30.0


@dataclass(frozen=True)
class Law:
    """Falling terms by column, the names of their coefficients, and whether there is a floor E."""

    name: str
    columns: tuple[str, ...]
    coefficients: tuple[str, ...]
    exponents: tuple[str, ...]
    floor: str  # "free", "none" or "pinned"

    @property
    def names(self) -> tuple[str, ...]:
        """The solver's coordinates, in order."""
        first = ("ln_E",) if self.floor == "free" else ()
        pairs = zip(self.coefficients, self.exponents, strict=True)
        return first + tuple(x for a, s in pairs for x in (f"ln_{a}", s))


LAWS = {
    "chinchilla": Law("chinchilla", ("n", "d"), ("A", "B"), ("alpha", "beta"), "free"),
    "power": Law("power", ("c",), ("a",), ("b",), "none"),
    "power_floor": Law("power_floor", ("c",), ("a",), ("b",), "free"),
}


def choose(name: str, floor: float | None = None) -> Law:
    """The law of a name; with `floor` its E is pinned to that value, in nats/token."""
    if name not in LAWS:
        raise InputError(f"--law={name} is unknown; one of {', '.join(LAWS)}, isoflop would work")
    law = LAWS[name]
    if floor is None:
        return law
    if not floor > 0 or not np.isfinite(floor):
        raise InputError(f"--floor={floor} must be positive nats per token; 1.7 would work")
    return dataclasses.replace(law, floor="pinned")


@dataclass(frozen=True)
class Problem:
    """R rows and P coordinates: ln L = log-sum-exp over blocks of columns @ theta[index].

    Attributes:
        y: [R] ln loss.
        weight: [R], positive.
        blocks: for each free term (index into theta [q], columns [R, q]).
        pinned: ln E of a pinned floor, a number or [batch, 1]; None without one.
        low, high: [P] bounds of theta.
        centre: by column the mean of its logarithm, which the slopes are taken about.
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

    def rows(self, rows: np.ndarray) -> "Problem":
        """The same coordinates on some of the rows."""
        blocks = tuple((index, X_Rxq[rows]) for index, X_Rxq in self.blocks)
        return dataclasses.replace(self, y=self.y[rows], weight=self.weight[rows], blocks=blocks)

    def pin(self, floor) -> "Problem":
        """Without its floor term, at floors of ln E given as [batch, 1] or a number."""
        law = dataclasses.replace(self.law, floor="pinned")
        blocks = tuple((index - 1, X_Rxq) for index, X_Rxq in self.blocks[1:])
        return dataclasses.replace(
            self, law=law, blocks=blocks, pinned=floor, low=self.low[1:], high=self.high[1:]
        )


def problem(table: Table, law: Law, floor: float | None = None, r_star=None) -> Problem:
    """The table as the solver sees it.

    Args:
        floor: E of a pinned floor, nats/token; refused at or above the smallest loss.
        r_star: repetitions' half-life R*, see `effective_tokens`; None: every token counts.
    """
    y = np.log(table.loss)
    if law.floor == "pinned" and floor >= table.loss.min():
        raise InputError(
            f"--floor={floor} is not below the smallest loss, {table.loss.min():.4f}; "
            f"{0.8 * table.loss.min():.2f} would work"
        )
    blocks, low, high, centre = [], [], [], {}
    ones = np.ones((len(y), 1))
    if law.floor == "free":
        blocks.append((np.array([0]), ones))
        low.append(y.min() - DEPTH)
        high.append(y.max())
    for column in law.columns:
        x = np.log(values(table, column, r_star))
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


def values(table: Table, column: str, r_star=None) -> np.ndarray:
    """A column of the law; with `r_star`, tokens count for less when they were seen before."""
    if column == "d" and r_star is not None:
        return effective_tokens(table.column("d"), table.column("unique"), r_star)
    return table.column(column)


def effective_tokens(d, unique, r_star: float):
    """Tokens of unique data worth as much as `d` tokens drawn from `unique` distinct ones.

    D' = U + U R* (1 - exp(-R / R*)), R = d / U - 1 repetitions (Muennighoff et al. 2023, eq. 5;
    their R* is 15.4). Without repetition, D' = d.
    """
    d, unique = np.asarray(d, float), np.asarray(unique, float)
    repeats = np.maximum(d / unique - 1.0, 0.0)
    return np.where(repeats > 0, unique * (1 - r_star * np.expm1(-repeats / r_star)), d)


def natural(law: Law, centre: dict, theta: np.ndarray, floor: float | None = None) -> dict:
    """Natural parameters of theta [..., P]: E, coefficients at x = 1, exponents of x^-s.

    With n and d also what follows from them (Hoffmann et al. 2022, eq. 4): `a` = beta / (alpha +
    beta), the exponent of N* in C; `b` = 1 - a that of D*; `G`; `gamma`, that of the reducible
    loss along the optimum.
    """
    found: dict = {}
    at = 0
    if law.floor == "free":
        found["E"] = np.exp(theta[..., 0])
        at = 1
    elif law.floor == "pinned":
        found["E"] = np.full(theta.shape[:-1], floor) if theta.ndim > 1 else float(floor)
    for column, a, s in zip(law.columns, law.coefficients, law.exponents, strict=True):
        found[s] = theta[..., at + 1]
        with np.errstate(over="ignore"):
            found[a] = np.exp(theta[..., at] + found[s] * centre[column])
        at += 2
    return found


def compound(found: dict) -> dict:
    """The compound exponents of a law in n and d; NaN where alpha + beta is not positive."""
    if "alpha" not in found:
        return {}
    alpha, beta = np.asarray(found["alpha"]), np.asarray(found["beta"])
    with np.errstate(all="ignore"):
        total = np.where((alpha > 0) & (beta > 0), alpha + beta, np.nan)
        scale = (alpha * found["A"] / (beta * found["B"])) ** (1 / total)
        return {"a": beta / total, "b": alpha / total, "gamma": alpha * beta / total, "G": scale}


def compute_optimum(params: dict, product):
    """Finds the n and d that minimise the loss where n d equals `product`.

    Source: Hoffmann et al. 2022, eq. 4. NaN where no optimum exists.
    """
    exponents = compound(params)
    n = exponents["G"] * product ** exponents["a"]
    return n, product / n


def evaluate(law: Law, found: dict, **columns) -> np.ndarray:
    """Loss in nats/token at natural parameters and columns n, d or c, which broadcast."""
    total = found.get("E", 0.0)
    for column, a, s in zip(law.columns, law.coefficients, law.exponents, strict=True):
        # Through the logarithm: a large coefficient times a small power may overflow apart.
        total = total + np.exp(np.log(found[a]) - found[s] * np.log(columns[column]))
    return total
