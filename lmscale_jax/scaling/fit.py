"""Fits one law to one table, with intervals and diagnostics."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import diagnostics, intervals, laws, residuals, solve
from lmscale_jax.scaling.intervals import Draws, FloorProfile
from lmscale_jax.scaling.laws import Law, Problem
from lmscale_jax.scaling.summary import fit_as_json
from lmscale_jax.scaling.table import Table, as_table, fit_warning

# 95 % as efficient as least squares when errors are Gaussian (Huber 1964).
TUNING = 1.345
SMALLEST_DELTA = 1e-4
# Another minimum within this factor of the best objective counts as a rival answer.
RIVAL = 1.05
# Range of the search for R* of repeated data, in epochs.
R_STAR = (0.3, 1000.0)
R_STAR_POINTS = 20


@dataclass(frozen=True)
class FitResult:
    """A fitted law with its intervals, diagnostics and warnings.

    Attributes:
        params: natural units, L = E + A n^-alpha + B d^-beta or L = E + a c^-b, L in nats/token.
        compound: exponents of the compute optimum (`compound_exponents`), for laws in n and d.
        objective: sum of Huber's rho of ln residuals at `delta` (inf: half the squares).
        intervals: [low, high] of each parameter at `level`; None where too few draws are finite.
        alternatives: params, delta and objective of the fits at other widths, by name.
        diagnostics: numbers of every check; `warnings` come from the checks that failed.
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
    alternatives: dict
    diagnostics: dict
    warnings: tuple[dict, ...]
    draws: Draws | None = None
    profile: FloorProfile | None = None
    intervals: dict = field(default_factory=dict)

    @property
    def objective(self) -> float:
        return self.solution.objective

    def predict(self, n=None, d=None, c=None, unique=None) -> np.ndarray:
        """Predicts the loss (nats/token) at n, d or c, which broadcast.

        Raises:
            InputError: a column of the law is missing.
        """
        return laws.evaluate_law(self.law, self.params, **self._columns(n, d, c, unique))

    def predict_draws(self, n=None, d=None, c=None, unique=None) -> np.ndarray:
        """Predicts the loss [B, ...] by each bootstrap draw, at columns of equal shape."""
        if self.draws is None:
            raise InputError("bootstrap=0 gives no draws to predict from; use bootstrap=2000")
        params = laws.natural_parameters(
            self.law, self.problem.centre, self.draws.theta, self.floor
        )
        columns = self._columns(n, d, c, unique)
        extra = (None,) * max(np.ndim(x) for x in columns.values())
        by_draw = {k: np.asarray(v)[(slice(None), *extra)] for k, v in params.items()}
        return laws.evaluate_law(self.law, by_draw, **columns)

    def _columns(self, n, d, c, unique) -> dict:
        if c is None and n is not None and d is not None:
            c = self.table.flops(np.asarray(n, float), np.asarray(d, float))
        explicit = {"n": n, "d": d, "c": c}
        missing = [k for k in self.law.columns if explicit[k] is None]
        if missing:
            needs = ", ".join(self.law.columns)
            raise InputError(f"{self.law.name} predicts from {needs}; {missing[0]} is missing")
        columns = {k: np.asarray(explicit[k], float) for k in self.law.columns}
        if self.r_star is not None and "d" in columns and unique is not None:
            columns["d"] = laws.effective_tokens(columns["d"], unique, self.r_star)
        return columns

    def residuals(self) -> np.ndarray:
        """Computes ln loss minus its prediction [R]."""
        return self.problem.y - solve.predict_log_loss(self.problem, self.solution.theta)[0]

    def to_json(self) -> dict:
        """Returns the JSON of `fit --out`: plain values, None for non-finite numbers."""
        return fit_as_json(self)


def fit_law(
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
    say: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Fits a law by minimising Huber's loss of ln residuals from many starts.

    Args:
        table: a Table, a mapping of columns or a sequence of mappings (`as_table`).
        law: "chinchilla", "power" or "power_floor".
        delta: width of Huber's loss in ln L. None: 1.345 standard deviations, estimated from the
            median absolute residual. inf: least squares. Fits at 1e-3 and by least squares are
            always added as alternatives.
        floor: pins E, nats/token.
        repetition: R* of `effective_tokens`, or "fit"; needs the column `unique`.
        bootstrap: number of draws for the intervals; 0: no intervals.
        level: level of the intervals.
        cluster: unit of resampling: "run", "cell" (the seeds of one), "size" or "row".
        points, skip: see `as_table`.
        say: gets a line at each stage of a fit that takes long, one of a large table.

    Raises:
        InputError: the table or an argument is unusable.
    """
    _check_request(delta, level, bootstrap)
    table = as_table(table, points, skip)
    say = say if len(table) > solve.SUBSET else lambda line: None
    chosen = laws.choose_law(law, floor)
    warnings = diagnostics.check_table(table, chosen)
    r_star, r_interval, r_warnings = _repetition(table, chosen, floor, repetition, delta, level)
    problem = laws.fit_problem(table, chosen, floor, r_star)
    solutions = _solutions(problem, delta, say)
    best = solutions["chosen"]
    params = _natural(problem, best, floor)
    result = FitResult(
        law=chosen,
        table=table,
        problem=problem,
        solution=best,
        params=params,
        compound={k: float(v) for k, v in laws.compound_exponents(params).items()},
        delta=best.delta,
        level=level,
        floor=floor,
        r_star=r_star,
        alternatives={k: _alternative(s, problem, floor) for k, s in solutions.items()},
        diagnostics={"r_star_interval": r_interval} if r_star is not None else {},
        warnings=(*warnings, *r_warnings),
    )
    return _diagnosed(_with_intervals(result, bootstrap, cluster, seed, say), say)


def _with_intervals(result: FitResult, bootstrap: int, cluster: str, seed: int, say) -> FitResult:
    """Adds bootstrap draws, intervals and the floor's profile, if any residual is left over."""
    say(f"2 of 3: {result.law.name} is fitted; intervals")
    problem, theta, delta = result.problem, result.solution.theta, result.delta
    draws = profile = None
    # Refuses an unknown unit even if nothing is drawn.
    labels = intervals.cluster_labels(result.table, cluster)
    if len(result.table) > problem.size:
        if bootstrap:
            drawn = (bootstrap, cluster, seed)
            draws = intervals.bootstrap(problem, theta, delta, result.table, *drawn)
        if result.law.floor == "free":
            profile = intervals.profile_floor(problem, theta, delta, result.level, labels)
    spans = {}
    if draws:
        spans = intervals.intervals_of_draws(problem, theta, draws, result.floor, result.level)
    return dataclasses.replace(result, draws=draws, profile=profile, intervals=spans)


def _check_request(delta, level, bootstrap) -> None:
    if delta is not None and not delta > 0:
        raise InputError(f"--delta={delta} must be positive; use 1e-3")
    if not 0 < level < 1:
        raise InputError(f"--level={level} must be between 0 and 1; use 0.95")
    if bootstrap and bootstrap < 100:
        raise InputError(f"--bootstrap={bootstrap} is too few for intervals; use 2000, or 0")


def _solutions(problem: Problem, delta: float | None, say) -> dict[str, solve.Solution]:
    """Fits at three widths: "chosen", "least_squares" and "huber_1e-3"."""
    say(f"1 of 3: starts on {solve.SUBSET:,} of {len(problem.y):,} rows, then all at three widths")
    squares = solve.solve_many_starts(problem, np.inf)
    width = delta
    chosen = squares
    if delta is None:
        for _ in range(2):
            r = solve.predict_log_loss(problem, chosen.theta)[0] - problem.y
            width = max(TUNING * 1.4826 * float(np.median(np.abs(r))), SMALLEST_DELTA)
            chosen = solve.continue_from(problem, chosen, width)
    elif np.isfinite(delta):
        chosen = solve.continue_from(problem, squares, delta)
    wide = chosen if chosen.delta > 1e-3 else squares
    return {
        "chosen": chosen,
        "least_squares": squares,
        "huber_1e-3": chosen if width == 1e-3 else solve.continue_from(problem, wide, 1e-3),
    }


def _natural(problem: Problem, solution: solve.Solution, floor) -> dict:
    params = laws.natural_parameters(problem.law, problem.centre, solution.theta, floor)
    return {k: float(v) for k, v in params.items()}


def _alternative(solution: solve.Solution, problem: Problem, floor) -> dict:
    params = _natural(problem, solution, floor)
    return {"delta": solution.delta, "objective": solution.objective, "params": params}


def _repetition(table: Table, law: Law, floor, repetition, delta, level):
    """Returns (R*, its profile interval, warnings), set by the caller or fitted."""
    if repetition is None:
        return None, None, []
    if "d" not in law.columns:
        raise InputError(
            f"--repetition={repetition} does not apply to --law={law.name}; use --law=chinchilla"
        )
    table.column("unique")
    if repetition != "fit":
        try:
            value = float(repetition)
        except ValueError:
            value = np.nan
        if not value > 0:
            raise InputError(f"--repetition={repetition} must be positive or fit; use 15.4")
        return value, None, []
    if (table.d / table.unique).max() < 1.5:
        raise InputError("--repetition=fit needs a run of at least 1.5 epochs; leave the flag out")
    r_star, span = _profile_r_star(table, law, floor, np.inf if delta is None else delta, level)
    low, high = span
    if low > 0 and np.isfinite(high):
        return r_star, span, []
    fitting = f"from {low:.3g} up" if low > 0 else f"up to {high:.3g}"
    message = (
        f"every R* {fitting} fits about equally well (searched: {R_STAR[0]:g} to {R_STAR[1]:g}): "
        "these losses do not follow the law of repeated tokens (losses that rise again with more "
        "epochs cannot), or repeat their data too little; leave --repetition out, or set it"
    )
    return r_star, span, [fit_warning("at_bound", message)]


def _profile_r_star(table, law, floor, width: float, level: float) -> tuple[float, list[float]]:
    """Minimises F over R* and finds where it crosses the limit of its interval.

    An open end of the interval is 0 or inf.
    """
    from scipy.optimize import minimize_scalar
    from scipy.stats import f as f_distribution

    def solution(log_r: float, starts=None) -> solve.Solution:
        problem = laws.fit_problem(table, law, floor, float(np.exp(log_r)))
        return solve.solve_many_starts(problem, width, starts)

    x = np.linspace(*np.log(R_STAR), R_STAR_POINTS)
    solutions = [solution(v) for v in x]
    values = np.array([s.objective for s in solutions])
    i = int(values.argmin())

    def F(log_r: float) -> float:
        return solution(log_r, solutions[i].minima).objective

    bounds = (x[max(i - 1, 0)], x[min(i + 1, len(x) - 1)])
    minimum = minimize_scalar(F, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    x, values = np.append(x, minimum.x), np.append(values, minimum.fun)
    spare = max(len(table) - len(law.coordinates) - 1, 1)
    limit = values.min() * (1 + f_distribution.ppf(level, 1, spare) / spare)
    # Each pass adds the interpolated crossings to the points, so that the next are between nearer
    # ones.
    for _ in range(3):
        order = np.argsort(x)
        x, values = x[order], values[order]
        ends = intervals.crossings(x, values, limit)
        new = [v for v in ends if v is not None]
        x, values = np.append(x, new), np.append(values, [F(v) for v in new])
    low, high = ends
    return float(np.exp(minimum.x)), [
        0.0 if low is None else float(np.exp(low)),
        np.inf if high is None else float(np.exp(high)),
    ]


def _diagnosed(result: FitResult, say) -> FitResult:
    """Adds the diagnostics and warnings of every check."""
    say("3 of 3: checks")
    problem, theta, table = result.problem, result.solution.theta, result.table
    numbers, warnings = dict(result.diagnostics), list(result.warnings)
    for values, new_warnings in (
        diagnostics.check_ranges(table, result.law),
        _named_parameters("terms", *diagnostics.check_terms(problem, theta, table)),
        diagnostics.check_condition(problem, theta),
        residuals.check_residuals(problem, theta, table),
        residuals.check_largest(problem, theta, result.delta, table),
        _starting_points(result.solution, len(table)),
    ):
        numbers |= values
        warnings += new_warnings
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
        warnings += diagnostics.check_floor(p, table, result.level)
    if result.draws is not None:
        numbers["standard_errors"] = spread = _bootstrap_spread(result)
        warnings += diagnostics.check_clusters(result.draws) + diagnostics.check_delta(path, spread)
    return dataclasses.replace(result, diagnostics=numbers, warnings=tuple(warnings))


def _named_parameters(name: str, values: dict, warnings: list) -> tuple[dict, list]:
    return {name: values}, warnings


def _bootstrap_spread(result: FitResult) -> dict:
    """Computes half the central 68 % of E and the exponents over the draws.

    Their standard deviation is no measure of draws with the tails of t.
    """
    params = laws.natural_parameters(
        result.law, result.problem.centre, result.draws.theta, result.floor
    )
    names = [*result.law.exponents, *(["E"] if result.law.floor == "free" else [])]
    return {k: float(np.ptp(np.percentile(params[k], [15.87, 84.13]))) / 2 for k in names}


def _starting_points(solution: solve.Solution, rows: int) -> tuple[dict, list]:
    """Counts the starts that agree, with a warning where another minimum is nearly as good."""
    rivals = solution.objectives[1:] < RIVAL * solution.objective
    tried = {
        "tried": solution.n_starts,
        "agree": solution.n_agreeing,
        "rivals": int(rivals.sum()),
        "rows": min(rows, solve.SUBSET),
    }
    if not rivals.any():
        return {"starts": tried}, []
    gap = 100 * (float(solution.objectives[1]) / solution.objective - 1)
    return {"starts": tried}, [
        fit_warning(
            "starts_disagree",
            f"{solution.n_agreeing} of {solution.n_starts} starts reach the best objective, others "
            f"end {gap:.2g} % above it at another minimum, so two answers fit almost equally well; "
            "widen the range of the data or choose a law with fewer terms",
        )
    ]
