"""Fits scaling laws to tables of results, compares arms, and forecasts and plans runs.

The functions accept a Table, a mapping of columns or a sequence of rows.
"""

from lmscale_jax.scaling.compare import compare_arms
from lmscale_jax.scaling.fit import FitResult, fit_law
from lmscale_jax.scaling.forecast import forecast_loss
from lmscale_jax.scaling.isoflop import fit_isoflop
from lmscale_jax.scaling.next_runs import plan_optimum, rank_next_runs
from lmscale_jax.scaling.read import read_table
from lmscale_jax.scaling.table import Table, as_table

__all__ = [
    "FitResult",
    "Table",
    "as_table",
    "compare_arms",
    "fit_isoflop",
    "fit_law",
    "forecast_loss",
    "plan_optimum",
    "rank_next_runs",
    "read_table",
]
