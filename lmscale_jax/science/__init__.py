"""Fits scaling laws to tables of results, compares arms, and forecasts and plans runs.

The functions accept a Table, a mapping of columns or a sequence of rows.
"""

from lmscale_jax.science.advice import advise, plan
from lmscale_jax.science.compare import compare
from lmscale_jax.science.fit import FitResult, fit
from lmscale_jax.science.forecast import forecast
from lmscale_jax.science.isoflop import isoflop
from lmscale_jax.science.sources import read
from lmscale_jax.science.table import Table, as_table

__all__ = [
    "FitResult",
    "Table",
    "advise",
    "as_table",
    "compare",
    "fit",
    "forecast",
    "isoflop",
    "plan",
    "read",
]
