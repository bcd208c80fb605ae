"""From a parameter's annotation to everything that depends on its role and its shape.

One row per parameter: initial standard deviation, factors of learning rate and decay. `sp` is the
standard parametrization, in which width changes nothing but the shapes.
"""

import dataclasses
import math
from typing import NamedTuple

from lmscale_jax.model.param import Spec, named


class Scales(NamedTuple):
    """Forward multipliers: of the embedding, the logits, each branch, and q·k."""

    embed: float
    logits: float
    branch: float
    attention: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What one parameter gets. `decay` is 0 where it does not decay."""

    spec: Spec
    init_std: float
    lr_factor: float
    decay: float


def scales(config) -> Scales:
    """The forward multipliers of a resolved config."""
    return Scales(embed=1.0, logits=1.0, branch=1.0, attention=config.model.head_dim**-0.5)


def table(specs: dict, config) -> dict[str, Row]:
    """{path: Row} of every parameter of a resolved config."""
    return {path: _row(spec, config) for path, spec in named(specs).items()}


def _row(spec: Spec, config) -> Row:
    std = config.parametrization.init_std if spec.init == "normal" else 0.0
    if spec.residual and config.parametrization.residual_init == "depth_scaled":
        std /= math.sqrt(2 * config.model.n_layers)
    decaying = {
        "matrices": ("input", "hidden", "output"),
        "hidden": ("hidden",),
        "all": ("input", "hidden", "output", "vector", "scalar"),
    }[config.optim.decay_on]
    return Row(spec, std, lr_factor=1.0, decay=float(spec.role in decaying))


def as_json(rows: dict[str, Row]) -> list[dict]:
    """The table as parametrization.json holds it."""
    return [
        {
            "path": path,
            "axes": list(row.spec.axes),
            "shape": list(row.spec.shape),
            "role": row.spec.role,
            "fan_in": row.spec.fan_in,
            "fan_out": row.spec.fan_out,
            "init": row.spec.init,
            "init_std": row.init_std,
            "lr_factor": row.lr_factor,
            "decay": row.decay,
        }
        for path, row in rows.items()
    ]
