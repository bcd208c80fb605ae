"""Parametrizations: the forward multipliers and depth factors that each name stands for.

A scheme and a control are one entry each of the two tables below; the table that
`model.parametrization` makes of parameters, the checks of a config and the sweeps read them here.
Imports no JAX, so that a config can be checked without it.

From a parameter's annotation to its initial values and forward multiplier, by role and shape.

With m_in and m_out the ratios of a matrix's own fans to those at the base size, and m_L the ratio
of depths, a hidden matrix begins with a standard deviation of s m_in^-1/2, every other one with s.
Logits are multiplied by 1/m, attention scores by sqrt(base head size) / head size, branches by
m_L^-a. Learning rates and Adam's epsilon follow the same ratios: `optim.rules`. At the base size
every factor is exactly 1: there `mup` and `completep` are `sp`.

Sources: Yang et al. 2022 (arXiv 2203.03466, table 8: constant readout with a forward multiplier);
Dey et al. 2025 (CompleteP, arXiv 2505.01618, table 1) for depth.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import Spec, map_named, named


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


def scheme_of(config) -> Scheme:
    """The entry of a config's parametrization."""
    return SCHEMES[config.parametrization.name]


# Projections into the residual stream: (std of the others, blocks that are counted) -> std.
RESIDUAL_INITS = Modes(
    "parametrization.residual_init",
    {
        "depth_scaled": lambda std, n_layers: std / math.sqrt(2 * n_layers),
        "plain": lambda std, n_layers: std,
        "zeros": lambda std, n_layers: 0.0,
    },
)
# An untied readout: std of the others -> std.
HEAD_INITS = Modes(
    "parametrization.head_init", {"normal": lambda std: std, "zeros": lambda std: 0.0}
)


class Ratios(NamedTuple):
    """A parameter's size relative to the base.

    Attributes:
      role: its `Spec.role`.
      m_in, m_out: ratios of its fans.
      m_L, a: ratio of depths (1 outside blocks) and exponent of the branch multiplier.
      inside: it belongs to a block.
    """

    role: str
    m_in: float
    m_out: float
    m_L: float = 1.0
    a: float = 1.0
    inside: bool = True


class ParamRule(NamedTuple):
    """The parametrization of one parameter.

    Attributes:
      spec, base: its annotation here and at the base size.
      ratios: its size relative to the base, from which `optim.rules` derives the learning rate.
      init_std: standard deviation of its initial values, where they are drawn.
      multiplier: factor of its product in the forward pass, `matrix_multiplier` included.
      matrix_multiplier: the part of `multiplier` that belongs to this parameter alone, beside
        `scales`.
    """

    spec: Spec
    base: Spec
    ratios: Ratios
    init_std: float
    multiplier: float
    matrix_multiplier: float


def base_model(config):
    """The model group of a resolved config at its base size; itself where sizes have no base.

    Raises InputError where the parametrization needs a size of the base that is not used with it.
    """
    model, base = ConfigDict(config.model.to_dict()), config.parametrization
    if not scheme_of(config).has_base:
        return model
    for name in scheme_of(config).base_keys:
        if not base[name]:
            raise InputError(
                f"config.parametrization.{name}=0 must be given for {base.name!r}, which SCHEMES "
                f"says is relative to it; its `when` in lmscale_jax/config/keys.py must name "
                f"{base.name!r} too"
            )
    group = model.n_heads // model.n_kv_heads
    model.d_model, model.d_ff = base.base_width, base.base_d_ff
    model.head_dim, model.n_heads = base.base_head_dim, base.base_width // base.base_head_dim
    model.n_kv_heads = model.n_heads // group
    return model


def forward_scales(config) -> Scales:
    """The forward multipliers of a resolved config."""
    return scheme_of(config).scales(config)


def param_rules(specs: dict, base_specs: dict, config) -> dict[str, ParamRule]:
    """{path: Row} of every parameter of a resolved config, from annotations here and at the base.

    Raises ValueError where the two do not name the same parameters.
    """
    here, base = named(specs), named(base_specs)
    if here.keys() != base.keys():
        raise ValueError(f"no base shape for {sorted(here.keys() ^ base.keys())}")
    return {path: _row(spec, base[path], config) for path, spec in here.items()}


def _row(spec: Spec, base: Spec, config) -> ParamRule:
    m_L, a = scheme_of(config).depth(config)
    inside = spec.axes[0] == "layers"
    m_in, m_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
    ratios = Ratios(spec.role, m_in, m_out, m_L if inside else 1.0, a, inside)
    scale = forward_scales(config)
    readout = scale.gate if inside else scale.logits
    multiplier = {"input": scale.embed, "output": readout}.get(spec.role, 1.0)
    if spec.residual:
        multiplier = scale.branch
    of_matrix = scheme_of(config).matrix_multiplier(spec, base, config)
    std = _std(spec, m_in, config)
    return ParamRule(spec, base, ratios, std, multiplier * of_matrix, of_matrix)


def multiplied_params(rows: dict[str, ParamRule], params: dict) -> dict:
    """The parameters times their `matrix_multiplier`, as the forward pass reads them."""
    if all(row.matrix_multiplier == 1.0 for row in rows.values()):
        return params
    return map_named(lambda path, p: p * rows[path].matrix_multiplier, params)


def _std(spec: Spec, m_in: float, config) -> float:
    rules = config.parametrization
    if spec.init != "normal":
        return 0.0
    std = (spec.role == "input" and rules.embed_std) or rules.init_std
    if spec.residual:
        n_layers = scheme_of(config).init_layers(config)
        std = RESIDUAL_INITS[rules.residual_init](std, n_layers)
    if spec.is_head:
        std = HEAD_INITS[rules.head_init](std)
    return std * m_in**-0.5 if spec.role == "hidden" else std
