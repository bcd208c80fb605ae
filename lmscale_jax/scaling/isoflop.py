"""Finds the compute-optimal size from runs of equal compute (Hoffmann et al. 2022, approach 2).

A polynomial in ln N is fitted to L at each budget; its minimum is N*. On a wide grid a parabola's
minimum is biased because the true curve is not symmetric. Each method's bias is measured on the law
in n and d fitted to the same runs.
"""

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.scaling import laws
from lmscale_jax.scaling.fit import fit_law
from lmscale_jax.scaling.intervals import percentiles
from lmscale_jax.scaling.summary import plain
from lmscale_jax.scaling.table import FLOPS_FACTOR, Table, as_table, fit_warning

DEGREES = {"parabola": 2, "cubic": 3}
# Neighbouring runs whose ln C differ by less than this share a budget.
BUDGET_GAP = 0.15
MIN_SIZES = 5
WIDE_GRID = 4.0
# The surface misfits where its residuals exceed those of a cubic at each budget by this factor.
MISFIT = 3.0


def fit_isoflop(
    table, bootstrap: int = 1000, level: float = 0.95, seed: int = 0, **settings
) -> tuple[dict, dict]:
    """Fits N* = k C^a by parabola, cubic and surface.

    Args:
        table: needs n and d; rows are grouped by c.
        bootstrap: number of draws of rows within budgets; each repeats the whole estimate.
        level: level of the intervals.
        settings: further arguments of `fit_law` for the surface.

    Returns:
        (summary, curves): the summary has a, k, intervals, and N* and its bias at each budget, for
        each of `methods`; the curves have the groups of rows, the table and the surface, for plots.

    Raises:
        InputError: fewer than two budgets have a minimum inside their grid.
    """
    table = as_table(table)
    groups = rows_by_budget(table)
    if len(groups) < 2:
        raise InputError(
            f"{table.name} has {len(groups)} compute budgets of {MIN_SIZES} and more sizes, "
            f"--law=isoflop needs 2; train {MIN_SIZES} sizes at equal c, or use --law=chinchilla"
        )
    surface = fit_law(table, law="chinchilla", level=level, **settings)
    warnings = list(surface.warnings)
    rng = np.random.Generator(np.random.PCG64(seed))
    methods = {}
    for name, degree in DEGREES.items():
        method = _method(table, groups, degree, surface, bootstrap, level, rng)
        if method is None:
            warnings.append(
                fit_warning(
                    f"no_{name}",
                    f"the {name} has an inner minimum at fewer than 2 budgets; widen the grids of "
                    "sizes to both sides",
                )
            )
        else:
            methods[name] = method
            warnings += _isoflop_warnings(name, method)
    methods["surface"] = _fit_surface(surface, [_budget(table, g) for g in groups])
    warnings += _disagreements(methods)
    if len(methods) == 1:
        raise InputError(
            f"no budget of {table.name} has a minimum inside its sizes; widen the grids of n"
        )
    curves = {"groups": groups, "table": table, "surface": surface}
    return plain({"methods": methods, "surface_fit": surface.params, "warnings": warnings}), curves


def rows_by_budget(table: Table) -> list[np.ndarray]:
    """Groups the rows by budget, cheapest first; omits budgets with fewer than 5 sizes."""
    table.column("n")
    order = np.argsort(table.c)
    cuts = np.flatnonzero(np.diff(np.log(table.c[order])) > BUDGET_GAP) + 1
    groups = np.split(order, cuts)
    return [g for g in groups if len(set(np.round(np.log(table.n[g]), 2))) >= MIN_SIZES]


def _budget(table: Table, rows: np.ndarray) -> float:
    """Computes the geometric mean of the rows' FLOPs."""
    return float(np.exp(np.log(table.c[rows]).mean()))


def polynomial_minimum(ln_n, y, degree: int, weight=None) -> tuple[float, bool]:
    """Finds (ln N*, inside): the polynomial's minimum in ln n, and whether it is on the grid."""
    centre = ln_n.mean()
    x = ln_n - centre
    root = np.ones(len(x)) if weight is None else np.sqrt(weight)
    if np.unique(np.round(x[root > 0], 3)).size <= degree:
        return np.nan, False
    p = np.polyfit(x, y, degree, w=root)
    turns = np.roots(np.polyder(p))
    turns = turns[np.isreal(turns)].real
    turns = turns[np.polyval(np.polyder(p, 2), turns) > 0]
    if not len(turns):
        return np.nan, False
    best = turns[np.abs(turns).argmin()]
    return float(best + centre), bool(x.min() < best < x.max())


def _chain(table: Table, groups, degree: int, y, weight=None):
    """Fits N* = k C^a: (a, ln k, ln N* of each budget or NaN if its minimum is off the grid)."""
    stars = np.full(len(groups), np.nan)
    for i, rows in enumerate(groups):
        row_weight = None if weight is None else weight[rows]
        value, inside = polynomial_minimum(np.log(table.n[rows]), y[rows], degree, row_weight)
        stars[i] = value if inside else np.nan
    valid = np.isfinite(stars)
    if valid.sum() < 2:
        return np.nan, np.nan, stars
    ln_c = np.log([_budget(table, g) for g in groups])
    a, ln_k = np.polyfit(ln_c[valid], stars[valid], 1)
    return float(a), float(ln_k), stars


def _method(table, groups, degree, surface, bootstrap, level, rng) -> dict | None:
    """Summarises the fit by one polynomial degree; None with fewer than two inner minima."""
    a, ln_k, stars = _chain(table, groups, degree, table.loss)
    if not np.isfinite(a):
        return None
    if _describes_minima(surface, table, groups):
        smooth = surface.predict(n=table.n, d=table.c / (FLOPS_FACTOR * table.n))
        _, _, on_surface = _chain(table, groups, degree, smooth)
        true = np.log([surface_optimum(surface, _budget(table, g)) for g in groups])
    else:
        on_surface = true = np.full(len(groups), np.nan)
    drawn = []
    for _ in range(bootstrap):
        weight = np.zeros(len(table))
        for rows in groups:
            weight[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
        drawn.append(_chain(table, groups, degree, table.loss, weight)[:2])
    drawn = np.array(drawn).reshape(-1, 2)
    budgets = [
        {"c": _budget(table, g), "n_star": float(np.exp(s)), "bias": float(np.exp(b - t)),
         "reach": float(np.exp(np.ptp(np.log(table.n[g])) / 2))}
        for g, s, b, t in zip(groups, stars, on_surface, true, strict=True)
    ]  # fmt: skip
    return {
        "a": a,
        "k": float(np.exp(ln_k)),
        "intervals": {"a": percentiles(drawn[:, 0], level) if len(drawn) else None},
        "budgets": budgets,
    }


def _describes_minima(surface, table: Table, groups) -> bool:
    """Tells whether the surface fits about as well as a cubic in ln n at each budget.

    The bias of a method on a surface that is itself wrong says nothing about the method.
    """
    cubic = []
    for rows in groups:
        x, y = np.log(table.n[rows]), np.log(table.loss[rows])
        if len(np.unique(np.round(x, 3))) > 4:
            left = y - np.polyval(np.polyfit(x - x.mean(), y, 3), x - x.mean())
            cubic.append((left**2).sum() / (len(rows) - 4))
    r_R = surface.residuals()[np.concatenate(groups)]
    if not cubic:
        return True
    return float((r_R**2).mean()) < MISFIT**2 * float(np.mean(cubic))


def _disagreements(methods: dict) -> list[dict]:
    """Warns where the intervals of two methods for the exponent exclude each other."""
    spans = {k: m["intervals"]["a"] for k, m in methods.items() if m["intervals"].get("a")}
    names = sorted(spans, key=lambda k: spans[k][0])
    apart = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]
             if spans[a][1] < spans[b][0]]  # fmt: skip
    if not apart:
        return []
    shown = ", ".join(f"{k} {methods[k]['a']:.3f}" for k in names)
    first, second = apart[0]
    return [
        fit_warning(
            "methods_disagree",
            f"the exponent a is {shown}, and the intervals of {first} and {second} exclude each "
            "other: at least one method does not describe these runs; trust the cubic on grids "
            f"within {WIDE_GRID:.0f}x, and check the residuals of the surface",
        )
    ]


def surface_optimum(surface, c: float) -> float:
    """Computes N* of a fitted law in n and d at a budget, with c = 6 n d."""
    return float(laws.compute_optimum(surface.params, c / FLOPS_FACTOR)[0])


def _fit_surface(surface, budgets: list[float]) -> dict:
    """Summarises the compute optimum of the fitted law like that of a polynomial."""
    stars = [{"c": c, "n_star": surface_optimum(surface, c), "bias": 1.0} for c in budgets]
    k = surface.compound["G"] / FLOPS_FACTOR ** surface.compound["a"]
    spans = {"a": surface.intervals.get("a")}
    return {"a": surface.compound["a"], "k": k, "intervals": spans, "budgets": stars}


def _isoflop_warnings(name: str, method: dict) -> list[dict]:
    """Warns about budgets without a minimum and about the bias of the method."""
    warnings = []
    dropped = [b["c"] for b in method["budgets"] if not np.isfinite(b["n_star"])]
    if dropped:
        warnings.append(
            fit_warning(
                "minimum_at_edge",
                f"the {name} has no minimum inside the sizes at {len(dropped)} of "
                f"{len(method['budgets'])} budgets (first {dropped[0]:.3g} FLOPs), which are "
                "omitted; add sizes beyond that edge",
            )
        )
    bias = [b["bias"] for b in method["budgets"] if np.isfinite(b["bias"])]
    worst = max(bias, key=lambda v: abs(np.log(v)), default=1.0)
    if abs(np.log(worst)) > 0.03:
        reach = max(b["reach"] for b in method["budgets"])
        warnings.append(
            fit_warning(
                f"{name}_bias",
                f"even without noise the {name} puts N* at {worst:.3f} times the true value "
                f"(grids reach {reach:.2g}x to either side); use grids within {WIDE_GRID:.0f}x, or "
                "the cubic",
            )
        )
    return warnings
