"""Fits one law to one table and says how far it can be trusted."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.science import diagnose, intervals, laws, solve
from lmscale_jax.science.describe import as_json
from lmscale_jax.science.intervals import Draws, Profile
from lmscale_jax.science.laws import Law, Problem
from lmscale_jax.science.table import Table, as_table, warning

# 95 % as efficient as least squares when errors are Gaussian (Huber 1964).
TUNING = 1.345
SMALLEST_DELTA = 1e-4
# Another minimum whose objective is below this many times the best is a second answer.
RIVAL = 1.05
# Bounds of the search for the half-life of repetitions, in epochs.
R_STAR = (0.3, 1000.0)


@dataclass(frozen=True)
class FitResult:
    """A fitted law.

    Attributes:
        params: natural units, L = E + A n^-alpha + B d^-beta or L = E + a c^-b, L in nats/token.
        compound: exponents of the compute optimum (`laws.natural`), for laws in n and d.
        objective: sum of Huber's rho of ln residuals at `delta` (inf: half the squares).
        intervals: by parameter [low, high] at `level`; None where the draws do not give one.
        alternatives: the fits at other widths: params, delta and objective by name.
        diagnostics: numbers by check; `warnings` are the checks that found something.
    """

    law: Law
    table: Table
    problem: Problem
    solution: solve.Solution
    params: dict
    compound: dict
    delta: float
    level: float
    floor: float | None
    r_star: float | None
    draws: Draws | None
    profile: Profile | None
    intervals: dict
    alternatives: dict
    diagnostics: dict
    warnings: tuple[dict, ...]

    @property
    def objective(self) -> float:
        return self.solution.objective

    def predict(self, n=None, d=None, c=None, unique=None) -> np.ndarray:
        """Loss, nats/token, at parameters, tokens or FLOPs, which broadcast."""
        return laws.evaluate(self.law, self.params, **self._columns(n, d, c, unique))

    def predict_draws(self, n=None, d=None, c=None, unique=None) -> np.ndarray:
        """Loss [B, ...] by every draw of the bootstrap at columns of one shape."""
        if self.draws is None:
            raise InputError("bootstrap=0 leaves nothing to draw from; bootstrap=2000 would work")
        found = laws.natural(self.law, self.problem.centre, self.draws.theta, self.floor)
        columns = self._columns(n, d, c, unique)
        extra = (None,) * max(np.ndim(x) for x in columns.values())
        by_draw = {k: np.asarray(v)[(slice(None), *extra)] for k, v in found.items()}
        return laws.evaluate(self.law, by_draw, **columns)

    def _columns(self, n, d, c, unique) -> dict:
        if c is None and n is not None and d is not None:
            c = self.table.flops(np.asarray(n, float), np.asarray(d, float))
        given = {"n": n, "d": d, "c": c}
        lacks = [k for k in self.law.columns if given[k] is None]
        if lacks:
            needs = ", ".join(self.law.columns)
            raise InputError(f"{self.law.name} predicts from {needs}; {lacks[0]} is missing")
        columns = {k: np.asarray(given[k], float) for k in self.law.columns}
        if self.r_star is not None and "d" in columns and unique is not None:
            columns["d"] = laws.effective_tokens(columns["d"], unique, self.r_star)
        return columns

    def residuals(self) -> np.ndarray:
        """ln loss minus its prediction, by row."""
        return self.problem.y - solve.predict(self.problem, self.solution.theta)[0]

    def to_json(self) -> dict:
        """What `fit --out` writes; plain values, None for what is not finite."""
        return as_json(self)


def fit(
    table,
    law: str = "chinchilla",
    delta: float | None = None,
    floor: float | None = None,
    repetition: float | str | None = None,
    bootstrap: int = 2000,
    level: float = 0.95,
    cluster: str = "run",
    seed: int = 0,
    points: str = "final",
    skip: float = 0.0,
) -> FitResult:
    """Fits a law by a robust loss of ln residuals from many starts.

    Args:
        table: a Table, a mapping of columns or a sequence of mappings (`table.as_table`).
        law: "chinchilla", "power" or "power_floor".
        delta: width of Huber's loss in ln L; None: 1.345 standard deviations by the median absolute
            residual; inf: least squares. 1e-3 and least squares are fitted beside it.
        floor: pins E, nats/token.
        repetition: R* of `laws.effective_tokens`, or "fit"; needs the column `unique`.
        bootstrap: draws for the intervals; 0: no intervals.
        level: of the intervals.
        cluster: what is resampled: "run", "size" or "row".
        points, skip: see `as_table`.

    Raises:
        InputError: the table or an argument cannot be used; the message names one that can.
    """
    _check(delta, level, bootstrap)
    table = as_table(table, points, skip)
    chosen = laws.choose(law, floor)
    warnings = diagnose.check_table(table, chosen)
    r_star, r_interval = _repetition(table, chosen, floor, repetition, delta, level)
    problem = laws.problem(table, chosen, floor, r_star)
    solutions = _solutions(problem, delta)
    main = solutions["chosen"]
    params = _natural(problem, main, floor)
    result = FitResult(
        law=chosen,
        table=table,
        problem=problem,
        solution=main,
        params=params,
        compound={k: float(v) for k, v in laws.compound(params).items()},
        delta=main.delta,
        level=level,
        floor=floor,
        r_star=r_star,
        draws=None,
        profile=None,
        intervals={},
        alternatives={k: _alternative(s, problem, floor) for k, s in solutions.items()},
        diagnostics={"r_star_interval": r_interval} if r_star is not None else {},
        warnings=tuple(warnings),
    )
    return _diagnosed(_with_intervals(result, bootstrap, cluster, seed))


def _with_intervals(result: FitResult, bootstrap: int, cluster: str, seed: int) -> FitResult:
    """The same with draws and the floor's profile, where a residual is left to draw from."""
    problem, theta, delta = result.problem, result.solution.theta, result.delta
    draws = profile = None
    intervals.labels(result.table, cluster)
    if len(result.table) > problem.size:
        if bootstrap:
            drawn = (bootstrap, cluster, seed)
            draws = intervals.bootstrap(problem, theta, delta, result.table, *drawn)
        if result.law.floor == "free":
            profile = intervals.profile(problem, theta, delta, result.level)
    spans = intervals.of_draws(problem, draws, result.floor, result.level) if draws else {}
    return dataclasses.replace(result, draws=draws, profile=profile, intervals=spans)


def _check(delta, level, bootstrap) -> None:
    if delta is not None and not delta > 0:
        raise InputError(f"--delta={delta} must be positive; 1e-3 would work")
    if not 0 < level < 1:
        raise InputError(f"--level={level} must be between 0 and 1; 0.95 would work")
    if bootstrap and bootstrap < 100:
        raise InputError(f"--bootstrap={bootstrap} draws give no interval; 2000 would work, or 0")


def _solutions(problem: Problem, delta: float | None) -> dict[str, solve.Solution]:
    """Fits by name: "chosen", "least_squares", "huber_1e-3"; all starts go through all of them."""
    squares = solve.solve(problem, np.inf)
    width = delta
    found = squares
    if delta is None:
        for _ in range(2):
            r = solve.predict(problem, found.theta)[0] - problem.y
            width = max(TUNING * 1.4826 * float(np.median(np.abs(r))), SMALLEST_DELTA)
            found = narrower(problem, found, width)
    elif np.isfinite(delta):
        found = narrower(problem, squares, delta)
    base = found if found.delta > 1e-3 else squares
    return {
        "chosen": found,
        "least_squares": squares,
        "huber_1e-3": found if width == 1e-3 else narrower(problem, base, 1e-3),
    }


def narrower(problem: Problem, before: solve.Solution, delta: float) -> solve.Solution:
    """The fit at a smaller delta from the minima of a wider one, their starts still counted."""
    found = solve.solve(problem, delta, before.minima)
    scale = before.starts / found.starts
    return dataclasses.replace(found, starts=before.starts, agree=round(found.agree * scale)
                               if found.starts > 1 else before.agree)  # fmt: skip


def _natural(problem: Problem, solution: solve.Solution, floor) -> dict:
    found = laws.natural(problem.law, problem.centre, solution.theta, floor)
    return {k: float(v) for k, v in found.items()}


def _alternative(solution: solve.Solution, problem: Problem, floor) -> dict:
    params = _natural(problem, solution, floor)
    return {"delta": solution.delta, "objective": solution.objective, "params": params}


def _repetition(table: Table, law: Law, floor, repetition, delta, level):
    """(R*, its profile interval) as given, or where the objective is least."""
    if repetition is None:
        return None, None
    if "d" not in law.columns:
        raise InputError(f"--repetition: {law.name} has no d; --law=chinchilla would work")
    table.column("unique")
    if repetition != "fit":
        try:
            value = float(repetition)
        except ValueError:
            value = np.nan
        if not value > 0:
            raise InputError(f"--repetition={repetition} must be positive or fit; 15.4 would work")
        return value, None
    if (table.d / table.unique).max() < 1.5:
        raise InputError("--repetition=fit: no run sees its data 1.5 times; leave the flag out")
    grid = np.geomspace(*R_STAR, 60)
    width, F = np.inf if delta is None else delta, []
    theta = None
    for r_star in grid:
        problem = laws.problem(table, law, floor, float(r_star))
        solution = solve.solve(problem, width, theta)
        theta = solve.starts(problem) if theta is None else solution.minima
        F.append(solution.objective)
    best = int(np.argmin(F))
    spare = max(len(table) - len(law.names) - 1, 1)
    from scipy.stats import chi2

    inside = np.array(F) <= F[best] * (1 + chi2.ppf(level, 1) / spare)
    interval = [float(grid[inside].min()), float(grid[inside].max())]
    return _refine(table, law, floor, width, grid, best), interval


def _refine(table, law, floor, width, grid, best: int) -> float:
    """R* between the neighbours of the best on the grid."""
    from scipy.optimize import minimize_scalar

    low, high = np.log(grid[max(best - 1, 0)]), np.log(grid[min(best + 1, len(grid) - 1)])

    def F(log_r: float) -> float:
        return solve.solve(laws.problem(table, law, floor, float(np.exp(log_r))), width).objective

    found = minimize_scalar(F, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _diagnosed(result: FitResult) -> FitResult:
    """The same with every check made."""
    problem, theta, table = result.problem, result.solution.theta, result.table
    numbers, found = dict(result.diagnostics), list(result.warnings)
    for values, warnings in (
        diagnose.ranges(table, result.law),
        _named("terms", *diagnose.terms(problem, theta, table)),
        diagnose.condition(problem, theta),
        diagnose.residuals(problem, theta, table),
        diagnose.largest_left_out(problem, result.delta, table),
        _starts(result.solution),
    ):
        numbers |= values
        found += warnings
    path = [result.alternatives[k] for k in ("least_squares", "chosen", "huber_1e-3")]
    path = sorted(path, key=lambda p: -p["delta"])
    numbers["delta_path"] = path
    if result.profile is not None:
        p = result.profile
        numbers["floor_profile"] = {
            "E": p.E.tolist(),
            "objective": p.objective.tolist(),
            "interval": [p.low, p.high],
            "exponents": p.theta[:, 1::2].tolist(),
        }
        found += diagnose.floor(p, table, result.level)
    if result.draws is not None:
        numbers["standard_errors"] = spread = _spread(result)
        found += diagnose.clusters(result.draws) + diagnose.moved(path, spread)
    return dataclasses.replace(result, diagnostics=numbers, warnings=tuple(found))


def _named(name: str, values: dict, warnings: list) -> tuple[dict, list]:
    return {name: values}, warnings


def _spread(result: FitResult) -> dict:
    """Standard deviation of E and the exponents over the draws."""
    found = laws.natural(result.law, result.problem.centre, result.draws.theta, result.floor)
    kept = [*result.law.exponents, *(["E"] if result.law.floor == "free" else [])]
    return {k: float(np.std(found[k])) for k in kept}


def _starts(solution: solve.Solution) -> tuple[dict, list]:
    rivals = solution.objectives[1:] < RIVAL * solution.objective
    tried = {"tried": solution.starts, "agree": solution.agree, "rivals": int(rivals.sum())}
    if not rivals.any():
        return {"starts": tried}, []
    gap = 100 * (float(solution.objectives[1]) / solution.objective - 1)
    return {"starts": tried}, [
        warning(
            "starts_disagree",
            f"{solution.agree} of {solution.starts} starts reach the best objective and others end "
            f"elsewhere, {gap:.2g} % above it: two answers fit alike; widen the range of the data "
            "or take a law with fewer terms",
        )
    ]
