"""Simulates the tables of small ladders whose truth is known: laws, errors and designs."""

from dataclasses import dataclass

import numpy as np

# Ladders take 10 tokens a parameter and double the parameters from one size to the next.
TOKENS_PER_PARAMETER = 10.0
SMALLEST, MIDDLE_C = 5e4, 6e11
# L(N, D) of Hoffmann et al. (2022), refitted by Besiroglu et al. (2024).
SURFACE = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


@dataclass(frozen=True)
class Truth:
    """A law in x = ln(C / MIDDLE_C): E + a exp(-b x), or another curve of ln L.

    `bend` is added to ln L as bend x^2; beyond x = 1.5 the exponent is `late` if that is set.
    """

    E: float = 0.0
    a: float = 3.2
    b: float = 0.08
    bend: float = 0.0
    late: float | None = None

    def loss(self, c, gain: float = 0.0, shift: float = 0.0, middle: float = 0.0):
        """Evaluates L(k C) with ln k = gain + shift (x - middle)."""
        x = np.log(np.asarray(c, float) / MIDDLE_C)
        x = x + gain + shift * (x - middle)
        fall = self.b * x
        if self.late is not None:
            # A smooth break, about one nat wide (Caballero et al. 2023).
            fall = fall - (self.b - self.late) * np.logaddexp(0.0, 2 * (x - 1.5)) / 2
        return (self.E + self.a * np.exp(-fall)) * np.exp(self.bend * x * x)


TRUTHS = {
    "power": Truth(),
    "floor": Truth(E=1.6, a=1.6, b=0.16),
    "steep floor": Truth(E=2.4, a=0.8, b=0.35),
    "concave": Truth(b=0.1, bend=-0.015),
    "broken": Truth(b=0.12, late=0.06),
}


@dataclass(frozen=True)
class Noise:
    """Errors of ln L: Gaussian of `sd` for each run, and what else goes wrong.

    `shared` is the sd of an error that all seeds of a cell have in common. `tails` takes Student's
    t with 3 degrees of freedom and the same sd. A share `undertuned` of the cells lie above the
    law by an exponential error of mean `excess`.
    """

    sd: float = 0.002
    shared: float = 0.0
    tails: bool = False
    undertuned: float = 0.0
    excess: float = 0.01

    def draw(self, cell: np.ndarray, rng) -> np.ndarray:
        """Draws the errors [R] of runs in numbered cells [R]."""
        cells = int(cell.max()) + 1
        if self.tails:
            error = self.sd * rng.standard_t(3, len(cell)) / np.sqrt(3)
        else:
            error = self.sd * rng.standard_normal(len(cell))
        if self.shared:
            error = error + self.shared * rng.standard_normal(cells)[cell]
        if self.undertuned:
            excess = rng.exponential(self.excess, cells) * (rng.random(cells) < self.undertuned)
            error = error + excess[cell]
        return error


NOISES = {
    "0.2 %": Noise(),
    "0.5 %": Noise(0.005),
    "1.5 %": Noise(0.015),
    "0.2 %, cells 0.4 %": Noise(0.002, shared=0.004),
    "0.2 %, heavy tails": Noise(0.002, tails=True),
    "0.2 %, 30 % undertuned": Noise(0.002, undertuned=0.3),
}


def ladder(sizes: int, seeds: int, smallest: float = SMALLEST) -> dict:
    """Lists the runs of one arm, without losses: `sizes` sizes by `seeds` seeds."""
    n = np.repeat(smallest * 2.0 ** np.arange(sizes), seeds)
    d = TOKENS_PER_PARAMETER * n
    seed = np.tile(np.arange(seeds), sizes)
    return {"n": n, "d": d, "c": 6 * n * d, "cell": np.repeat(np.arange(sizes), seeds),
            "seed": seed}  # fmt: skip


def table(runs: dict, loss, noise: Noise, rng, variant: str = "A", shared=None) -> dict:
    """Draws the table of one arm: columns as `lmscale_jax.scaling.as_table` takes them.

    `shared`: (errors [R], correlation) of runs of which these have a part.
    """
    labels = [f"{variant}{i}" for i in range(len(runs["n"]))]
    error = noise.draw(runs["cell"], rng)
    if shared is not None:
        common, correlation = shared
        error = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * error
    drawn = np.asarray(loss) * np.exp(error)
    columns = {k: runs[k] for k in ("n", "d", "c")}
    return columns | {"loss": drawn, "run_id": labels, "variant": [variant] * len(labels),
                      "seed": runs["seed"].astype(str)}  # fmt: skip


def both_arms(
    runs: dict, truth: Truth, noise: Noise, rng, other: Truth, gain, shift, correlation=0.0
) -> dict:
    """Draws two arms: B follows `other` with its compute multiplied by k(C).

    Runs of one size and seed have errors of that correlation.
    """
    middle = float(np.log(runs["c"] / MIDDLE_C).mean())
    shared = (noise.draw(runs["cell"], rng), correlation) if correlation else None
    first = table(runs, truth.loss(runs["c"]), noise, rng, "A", shared)
    shifted = other.loss(runs["c"], gain, shift, middle)
    second = table(runs, shifted, noise, rng, "B", shared)
    return {k: np.concatenate([first[k], second[k]]) for k in first}


def surface(n, d) -> np.ndarray:
    """Evaluates the law in n and d."""
    s = SURFACE
    return s["E"] + s["A"] * np.asarray(n) ** -s["alpha"] + s["B"] * np.asarray(d) ** -s["beta"]


def grid(sizes: int, tokens: int, seeds: int = 1) -> dict:
    """Lists the runs of a grid of sizes from 1e7 to 1e9 and tokens from 1e9 to 1e11."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 1e11, tokens))
    n, d = np.repeat(n.ravel(), seeds), np.repeat(d.ravel(), seeds)
    cell = np.repeat(np.arange(sizes * tokens), seeds)
    return {"n": n, "d": d, "c": 6 * n * d, "cell": cell, "seed": np.tile(np.arange(seeds),
            sizes * tokens)}  # fmt: skip


def isoflop_grid(budgets: int = 5, sizes: int = 7) -> dict:
    """Lists the runs of an isoFLOP grid: sizes from a quarter to four times the optimum."""
    s = SURFACE
    c = np.repeat(np.geomspace(1e17, 1e21, budgets), sizes)
    ratio = s["alpha"] * s["A"] / (s["beta"] * s["B"])
    best = (ratio ** (1 / (s["alpha"] + s["beta"]))) * (c / 6) ** (
        s["beta"] / (s["alpha"] + s["beta"])
    )
    n = best * np.tile(np.geomspace(0.25, 4.0, sizes), budgets)
    cell = np.arange(len(n))
    return {"n": n, "d": c / 6 / n, "c": c, "cell": cell, "seed": np.zeros(len(n), int)}
