"""The rows of benchmarks.calibration: what each simulates, and the statements that it scores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks import calibration_tables as made
from benchmarks.calibration_tables import NOISES, SURFACE, TRUTHS

BOOTSTRAP = 300


@dataclass(frozen=True)
class Outcome:
    """One stated interval or verdict in one draw.

    `hit` tells whether it was true, None where nothing was stated; `error` and `width` are
    relative to the truth, or absolute for s.
    """

    hit: bool | None
    error: float = np.nan
    width: float = np.nan


@dataclass(frozen=True)
class Row:
    """One row: `draw(rng)` simulates a table and returns {statement: Outcome}.

    `nominal` is the share of hits that is stated; for power and for false claims it is the bound
    that is aimed at. `kind` is that of --only.
    """

    kind: str
    truth: str
    noise: str
    design: str
    nominal: float
    draw: Callable

    @property
    def name(self) -> str:
        return " | ".join((self.kind, self.truth, self.noise, self.design))


def interval_outcome(span, true: float, estimate: float, scale: float = 1.0) -> Outcome:
    """Scores an interval [low, high] of a parameter; None is an interval that was refused."""
    error = (estimate - true) / scale
    if span is None or None in span:
        return Outcome(None, error)
    low, high = span
    return Outcome(bool(low <= true <= high), error, (high - low) / scale)


def law_row(truth: str, noise: str, sizes: int, seeds: int, **settings) -> Row:
    """Makes a row for the intervals of the law in c that is true."""
    from lmscale_jax.scaling import fit_law

    law, runs = TRUTHS[truth], made.ladder(sizes, seeds)
    name = "power_floor" if law.E else "power"

    def draw(rng) -> dict:
        columns = made.table(runs, law.loss(runs["c"]), NOISES[noise], rng)
        result = fit_law(columns, law=name, bootstrap=BOOTSTRAP, **settings)
        outcomes = {
            "b": interval_outcome(result.intervals.get("b"), law.b, result.params["b"], law.b)
        }
        if law.E:
            span, E = result.intervals.get("E"), result.params["E"]
            outcomes["E"] = interval_outcome(span, law.E, E, law.E)
            profile = [result.profile.low, result.profile.high]
            outcomes["E, profile"] = interval_outcome(profile, law.E, E, law.E)
        return outcomes

    unit = "".join(f", {k}={v}" for k, v in settings.items())
    return Row("law", truth, noise, f"{sizes} x {seeds}{unit}", 0.95, draw)


def surface_row(noise: str, design: str, runs: dict) -> Row:
    """Makes a row for the intervals of the law in n and d."""
    from lmscale_jax.scaling import fit_law

    s, loss = SURFACE, made.surface(runs["n"], runs["d"])

    def draw(rng) -> dict:
        result = fit_law(made.table(runs, loss, NOISES[noise], rng), bootstrap=BOOTSTRAP)
        outcomes = {
            k: interval_outcome(result.intervals.get(k), s[k], result.params[k], s[k])
            for k in ("E", "alpha", "beta")
        }
        profile = [result.profile.low, result.profile.high]
        outcomes["E, profile"] = interval_outcome(profile, s["E"], result.params["E"], s["E"])
        return outcomes

    return Row("surface", "Chinchilla", noise, design, 0.95, draw)


def repetition_row(noise: str, r_star: float = 15.4) -> Row:
    """Makes a row for the interval of R* where tokens are repeated up to 100 times."""
    from lmscale_jax.scaling import fit_law, laws

    axes = (np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4), (1e9, 1e10))
    n, d, unique = (x.ravel() for x in np.meshgrid(*axes, indexing="ij"))
    cell = np.arange(len(n))
    runs = {"n": n, "d": d, "c": 6 * n * d, "cell": cell, "seed": 0 * cell}
    loss = made.surface(n, laws.effective_tokens(d, unique, r_star))

    def draw(rng) -> dict:
        columns = made.table(runs, loss, NOISES[noise], rng) | {"unique": unique}
        result = fit_law(columns, repetition="fit", bootstrap=0)
        span = result.diagnostics["r_star_interval"]
        return {"R*": interval_outcome(span, r_star, result.r_star, r_star)}

    return Row("repetition", "Chinchilla, R* 15.4", noise, "4 x 4 x 2", 0.95, draw)


def isoflop_row(noise: str) -> Row:
    """Makes a row for the exponent of N* by each method."""
    from lmscale_jax.scaling import fit_isoflop

    runs = made.isoflop_grid()
    loss = made.surface(runs["n"], runs["d"])
    a = SURFACE["beta"] / (SURFACE["alpha"] + SURFACE["beta"])

    def draw(rng) -> dict:
        columns = made.table(runs, loss, NOISES[noise], rng)
        methods = fit_isoflop(columns, bootstrap=100)[0]["methods"]
        return {
            f"a, {name}": interval_outcome(method["intervals"]["a"], a, method["a"], a)
            for name, method in methods.items()
        }

    return Row("isoflop", "Chinchilla", noise, "5 budgets x 7", 0.95, draw)


# Verdicts that name a difference, and those that say that it changes with scale.
CHANGES = ("exponent shift", "changes with scale")
CLAIMS = ("constant offset", *CHANGES)


def arms_row(truth: str, noise: str, sizes: int, seeds: int, gain=0.0, shift=0.0,
             floor=0.0, name: str = "", correlation: float = 0.0) -> Row:  # fmt: skip
    """Makes a row for the verdict on two arms, s, and the band of k at the largest compute.

    Args:
        gain, shift: the truth of ln k(C) = gain + shift x.
        floor: by how much E of the second arm is lower, nats/token.
        correlation: of the errors of the arms' runs of one size and seed.
    """
    from lmscale_jax.scaling import compare_arms

    law, runs = TRUTHS[truth], made.ladder(sizes, seeds)
    other = replace(law, E=law.E - floor)
    middle = np.log(runs["c"]).mean()

    def draw(rng) -> dict:
        columns = made.both_arms(runs, law, NOISES[noise], rng, other, gain, shift, correlation)
        comparison = compare_arms(columns, "A", "B", bootstrap=99)
        verdict, s = comparison["verdict"], comparison["shift"]["s"]
        if floor:
            return {"exponent shift claimed": Outcome(verdict == "exponent shift"),
                    "changes with scale": Outcome(verdict in CHANGES)}  # fmt: skip
        scores = {}
        if shift:
            scores["power: changes with scale"] = Outcome(verdict in CHANGES)
            scores["exponent shift claimed"] = Outcome(verdict == "exponent shift")
        elif gain:
            scores["power: constant offset"] = Outcome(verdict == "constant offset")
            scores["false claim: changes with scale"] = Outcome(verdict in CHANGES)
        else:
            scores["false claim"] = Outcome(verdict in CLAIMS)
            scores["no difference said"] = Outcome(verdict == "no detectable difference")
        scores["s"] = interval_outcome(comparison["shift"]["interval"], shift, s)
        last = comparison["gain"][-1]
        k = float(np.exp(gain + shift * (np.log(last["c"]) - middle)))
        span = [last["low"], last["high"]]
        scores["k at the high end"] = interval_outcome(span, k, last["k"], k)
        return scores

    effect = "".join(f", {k} {v:g}" for k, v in
                     (("offset", gain), ("shift", shift), ("E", -floor)) if v)  # fmt: skip
    noise_text = _correlated(noise, correlation)
    design = name or f"{sizes} x {seeds}"
    return Row("arms", truth + (effect or ", A/A"), noise_text, design, 0.95, draw)


def _correlated(noise: str, correlation: float) -> str:
    return f"{noise}, pairs {correlation:g}" if correlation else noise


def test_row(truth: str, noise: str, sizes: int, seeds: int, correlation: float = 0.0) -> Row:
    """Makes a row for the joint test alone, that bounds the claims of equal arms; 8 ms a draw."""
    from lmscale_jax.scaling import as_table, shift

    law, runs = TRUTHS[truth], made.ladder(sizes, seeds)

    def draw(rng) -> dict:
        columns = made.both_arms(runs, law, NOISES[noise], rng, law, 0.0, 0.0, correlation)
        data = shift.two_arms(as_table(columns), "A", "B")
        fits = [shift.estimate_shift(kind, data) for kind in ("quadratic", "cubic")]
        main = min((fit for fit in fits if fit is not None), key=lambda fit: fit.aicc)
        return {"false claim": Outcome(main.p_both < 0.05)}

    noise_text = _correlated(noise, correlation)
    return Row("test", f"{truth}, A/A", noise_text, f"{sizes} x {seeds}", 0.95, draw)


def forecast_row(truth: str, noise: str, sizes: int, seeds: int) -> Row:
    """Makes a row for the forecast of the next size, twice the parameters of the largest."""
    from lmscale_jax.scaling import forecast_loss

    law, runs = TRUTHS[truth], made.ladder(sizes, seeds)
    target = made.ladder(sizes + 1, 1)
    n, d, c = (float(target[k][-1]) for k in ("n", "d", "c"))

    def draw(rng) -> dict:
        columns = made.table(runs, law.loss(runs["c"]), NOISES[noise], rng)
        prediction = forecast_loss(columns, n=n, d=d, c=c, bootstrap=200)
        true = float(law.loss(c))
        came = true * float(np.exp(NOISES[noise].draw(np.zeros(1, int), rng))[0])
        span = (prediction["low"], prediction["high"])
        inside = bool(span[0] <= came <= span[1])
        error = prediction["loss"] / true - 1
        return {"loss": Outcome(inside, error, (span[1] - span[0]) / true)}

    # Three anchors end where the exponent changes, so that no interval from them can include it.
    kind = "beyond a break" if TRUTHS[truth].late and sizes == 3 else "forecast"
    return Row(kind, truth, noise, f"{sizes} x {seeds}", 0.90, draw)


def all_rows() -> list[Row]:
    """Lists the rows of the table."""
    usual, cells, tails, undertuned = (
        "0.2 %", "0.2 %, cells 0.4 %", "0.2 %, heavy tails", "0.2 %, 30 % undertuned"
    )  # fmt: skip
    rows = [law_row("power", usual, k, seeds)
            for k, seeds in ((3, 1), (4, 1), (3, 2), (6, 1), (4, 2), (6, 3))]  # fmt: skip
    rows += [law_row("floor", usual, k, seeds)
             for k, seeds in ((4, 1), (5, 1), (6, 1), (4, 2), (6, 2), (6, 3))]  # fmt: skip
    rows += [law_row("power", noise, 4, 2) for noise in (cells, tails, undertuned)]
    rows += [law_row("floor", noise, 6, 2) for noise in ("0.5 %", "1.5 %", cells, tails)]
    rows += [law_row("power", cells, 4, 2, cluster="cell"),
             law_row("floor", cells, 6, 2, cluster="cell")]  # fmt: skip
    rows += [surface_row("0.2 %", "7 runs", _part(made.grid(3, 3), (0, 1, 3, 4, 5, 7, 8)))]
    rows += [surface_row("0.5 %", "3 x 3", made.grid(3, 3)),
             surface_row("0.5 %", "3 x 3 x 3 seeds", made.grid(3, 3, 3)),
             surface_row("0.5 %", "isoFLOP, 35 runs", made.isoflop_grid())]  # fmt: skip
    rows += [repetition_row("0.2 %"), repetition_row("0.5 %"), isoflop_row("0.5 %")]
    rows += [arms_row(truth, usual, 4, 2) for truth in TRUTHS]
    rows += [arms_row("floor", usual, 4, 2, name="quickstart (4 x 2)"),
             arms_row("floor", usual, 5, 2, name="muon_vs_adamw (5 x 2)"),
             arms_row("floor", usual, 4, 3, name="gate (4 x 3)")]  # fmt: skip
    rows += [arms_row("floor", usual, 6, seeds) for seeds in (1, 3)]
    rows += [arms_row("floor", noise, 4, 2) for noise in ("0.5 %", "1.5 %", tails, undertuned)]
    rows += [arms_row("floor", cells, k, seeds) for k, seeds in ((4, 2), (6, 3))]
    rows += [arms_row("floor", usual, k, seeds, shift=0.08) for k, seeds in ((4, 2), (6, 2))]
    rows += [arms_row("power", usual, 6, 3, shift=0.08), arms_row("floor", usual, 6, 3, shift=0.08)]
    rows += [arms_row("floor", usual, 6, 2, gain=0.2), arms_row("floor", usual, 4, 2, gain=0.2)]
    rows += [arms_row("floor", usual, 6, 2, floor=floor) for floor in (0.02, 0.05)]
    rows += [test_row(truth, usual, 4, 2) for truth in TRUTHS]
    rows += [test_row("floor", noise, 6, seeds) for noise in (usual, cells) for seeds in (1, 3)]
    rows += [test_row("floor", noise, 4, 2) for noise in (cells, tails, undertuned, "1.5 %")]
    rows += [test_row("floor", noise, k, seeds, correlation) for correlation in (0.5, 0.9)
             for noise, k, seeds in ((usual, 4, 2), (usual, 6, 1), (usual, 6, 2), (cells, 4, 2),
                                     (cells, 6, 3))]  # fmt: skip
    rows += [arms_row("floor", "0.5 %", 4, 2, shift=0.08, correlation=correlation)
             for correlation in (0.0, 0.5, 0.9)]  # fmt: skip
    rows += [forecast_row(truth, usual, 3, 2) for truth in TRUTHS]
    rows += [forecast_row("floor", noise, 3, 3) for noise in ("0.5 %", "1.5 %", cells)]
    rows += [forecast_row(truth, usual, 5, 2) for truth in TRUTHS]
    return rows


def _part(runs: dict, indices) -> dict:
    """Takes some runs of a design and numbers their cells anew."""
    taken = {k: v[list(indices)] for k, v in runs.items()}
    return taken | {"cell": np.arange(len(indices))}
