"""Tables of the modes of `mur.*`. Imports no JAX, so that configs are checked without it."""

from collections.abc import Callable
from typing import NamedTuple

from lmscale_jax.config.key import Modes


class Mode(NamedTuple):
    """One choice of mur.mode.

    Attributes:
      measures: utilities are measured in the backward pass of logged steps.
      acts: they change what is trained, so every step measures them.
      adds_hinge: a hinge on them is part of the objective.
      scales_updates: a factor that follows their running mean multiplies a layer's update, or its
        gradient, by mur.apply_to.
    """

    measures: bool
    acts: bool = False
    adds_hinge: bool = False
    scales_updates: bool = False


MODES = Modes(
    "mur.mode",
    {
        "off": Mode(measures=False),
        "diagnose": Mode(measures=True),
        "loss": Mode(measures=True, acts=True, adds_hinge=True),
        "update": Mode(measures=True, acts=True, scales_updates=True),
    },
)


class Granularity(NamedTuple):
    """One choice of mur.granularity: the parts of a block that have a utility each.

    Attributes:
      names: of the parts.
      prefixes: of their statistics in metrics.jsonl.
    """

    names: tuple[str, ...]
    prefixes: tuple[str, ...]


GRANULARITIES = Modes(
    "mur.granularity",
    {
        "block": Granularity(("block",), ("",)),
        "branch": Granularity(("attention", "mlp"), ("attention/", "mlp/")),
    },
)


class Threshold(NamedTuple):
    """One choice of mur.tau_kind: the unit of mur.tau.

    Attributes:
      value: (objective, running means) -> [L, P], the thresholds of a step.
      averaged: statistics whose running means it needs.
      level: mur.tau -> level of the statistic "quantile".
      allows: mur.tau -> whether it is in range.
      is_utility: mur.tau is a utility, known before the run.
    """

    value: Callable
    averaged: tuple[str, ...] = ()
    level: Callable = lambda tau: 0.5
    allows: Callable = lambda tau: True
    is_utility: bool = False


THRESHOLDS = Modes(
    "mur.tau_kind",
    {
        "absolute": Threshold(lambda objective, means: objective.fixed_tau(), is_utility=True),
        "quantile": Threshold(
            lambda objective, means: objective.quantile_tau(means),
            averaged=("quantile",),
            level=lambda tau: tau,
            allows=lambda tau: 0 < tau < 1,
        ),
        "stderr": Threshold(
            lambda objective, means: objective.stderr_tau(means), averaged=("stderr",)
        ),
    },
)
