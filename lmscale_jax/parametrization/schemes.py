"""Parametrizations: the forward multipliers and depth factors that each name stands for.

A scheme and a control are one entry each of the two tables below; the table that
`parametrization.rules` makes of parameters, the checks of a config and the sweeps read them here.
Imports no JAX, so that a config can be checked without it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from lmscale_jax.modes import Modes


class Scales(NamedTuple):
    """Forward multipliers: of embedding, logits, each branch, q·k, and readouts in blocks."""

    embed: float
    logits: float
    branch: float
    attention: float
    gate: float


class Scheme(NamedTuple):
    """What one parametrization is.

    Attributes:
      base_keys: keys of the group that give the size at which it is the identity, and that a config
        must set; () where sizes are not relative to a base.
      scales: resolved config -> Scales.
      depth: resolved config -> (m_L, a), the ratio of depths and the branch multiplier's exponent.
      init_layers: resolved config -> number of blocks that residual_init="depth_scaled" counts.
      matrix_multiplier: (Spec here, Spec at the base, resolved config) -> what the product with
        one parameter is multiplied by, beside `scales`.
    """

    base_keys: tuple[str, ...]
    scales: Callable
    depth: Callable = lambda config: (1.0, 1.0)
    init_layers: Callable = lambda config: config.model.n_layers
    matrix_multiplier: Callable = lambda spec, base, config: 1.0

    @property
    def has_base(self) -> bool:
        return bool(self.base_keys)

    @property
    def follows_depth(self) -> bool:
        return "base_depth" in self.base_keys


class Control(NamedTuple):
    """A deliberate mistake.

    Attributes:
      logits: 1 / (width ratio) -> the factor of the logits in its place.
      lr_factor: a parameter's learning-rate factor -> the one in its place.
      slopes: {end of a tensor's name: slope in the coordinate check that the mistake exceeds from
        step 2 on}; {} where there is no mistake.
    """

    logits: Callable
    lr_factor: Callable
    slopes: dict[str, float]


def _unscaled(config) -> Scales:
    base, model = config.parametrization, config.model
    logits = LOGIT_SCALES[model.logit_scale](model.d_model)
    attention = base.attention_scale * model.head_dim**-0.5
    return Scales(embed=1.0, logits=logits, branch=1.0, attention=attention, gate=1.0)


def _relative_to_base(config) -> Scales:
    base, model = config.parametrization, config.model
    size = model.head_dim
    m_L, a = SCHEMES[base.name].depth(config)
    inverse_m = base.base_width / model.d_model
    return Scales(
        embed=base.embed_scale,
        logits=base.output_scale * CONTROLS[base.control].logits(inverse_m),
        branch=m_L**-a,
        # At the base head size exactly what sp uses.
        attention=base.attention_scale * size**-0.5 * math.sqrt(base.base_head_dim / size),
        gate=inverse_m,
    )


def _depth_ratio(config) -> tuple[float, float]:
    base = config.parametrization
    return config.model.n_layers / base.base_depth, base.depth_exponent


SCHEMES = Modes(
    "parametrization.name",
    {
        "sp": Scheme(base_keys=(), scales=_unscaled),
        "mup": Scheme(base_keys=("base_width",), scales=_relative_to_base),
        "completep": Scheme(
            base_keys=("base_width", "base_depth"),
            scales=_relative_to_base,
            depth=_depth_ratio,
            # The branch is scaled instead; GPT-2's factor stays that of the base depth.
            init_layers=lambda config: config.parametrization.base_depth,
        ),
    },
)

# Theory: a slope of +1/2 for the logits of logits_sqrt, about +1 for each matrix that learns too
# fast.
CONTROLS = Modes(
    "parametrization.control",
    {
        "none": Control(lambda inverse_m: inverse_m, lambda factor: factor, {}),
        "logits_sqrt": Control(math.sqrt, lambda factor: factor, {"logits": 0.35}),
        "no_lr_scaling": Control(
            lambda inverse_m: inverse_m, lambda factor: 1.0, {"attention": 0.4, "mlp": 1.0}
        ),
    },
)

# Width -> factor of the logits.
LOGIT_SCALES = Modes(
    "model.logit_scale",
    {"one": lambda width: 1.0, "inverse_sqrt_width": lambda width: width**-0.5},
)


def scheme(config) -> Scheme:
    """The entry of a config's parametrization."""
    return SCHEMES[config.parametrization.name]
