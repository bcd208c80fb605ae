"""From a parameter's annotation to its initial values and forward multiplier, by role and shape.

With m_in and m_out the ratios of a matrix's own fans to those at the base size, and m_L the ratio
of depths, a hidden matrix begins with a standard deviation of s m_in^-1/2, every other one with s.
Logits are multiplied by 1/m, attention scores by sqrt(base head size) / head size, branches by
m_L^-a. Learning rates and Adam's epsilon follow the same ratios: `optim.rules`. At the base size
every factor is exactly 1: there `mup` and `completep` are `sp`.

Sources: Yang et al. 2022 (arXiv 2203.03466, table 8: constant readout with a forward multiplier);
Dey et al. 2025 (CompleteP, arXiv 2505.01618, table 1) for depth.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.model.param import Spec, map_named, named
from lmscale_jax.modes import Modes
from lmscale_jax.parametrization.schemes import Scales, scheme

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


class Row(NamedTuple):
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
    """The model group of a resolved config at its base size; itself where sizes have no base."""
    model, base = ConfigDict(config.model.to_dict()), config.parametrization
    if not scheme(config).has_base:
        return model
    group = model.n_heads // model.n_kv_heads
    model.d_model, model.d_ff = base.base_width, base.base_d_ff
    model.head_dim, model.n_heads = base.base_head_dim, base.base_width // base.base_head_dim
    model.n_kv_heads = model.n_heads // group
    return model


def scales(config) -> Scales:
    """The forward multipliers of a resolved config."""
    return scheme(config).scales(config)


def table(specs: dict, base_specs: dict, config) -> dict[str, Row]:
    """{path: Row} of every parameter of a resolved config, from annotations here and at the base.

    Raises ValueError where the two do not name the same parameters.
    """
    here, base = named(specs), named(base_specs)
    if here.keys() != base.keys():
        raise ValueError(f"no base shape for {sorted(here.keys() ^ base.keys())}")
    return {path: _row(spec, base[path], config) for path, spec in here.items()}


def _row(spec: Spec, base: Spec, config) -> Row:
    m_L, a = scheme(config).depth(config)
    inside = spec.axes[0] == "layers"
    m_in, m_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
    ratios = Ratios(spec.role, m_in, m_out, m_L if inside else 1.0, a, inside)
    scale = scales(config)
    readout = scale.gate if inside else scale.logits
    multiplier = {"input": scale.embed, "output": readout}.get(spec.role, 1.0)
    if spec.residual:
        multiplier = scale.branch
    of_matrix = scheme(config).matrix_multiplier(spec, base, config)
    std = _std(spec, m_in, config)
    return Row(spec, base, ratios, std, multiplier * of_matrix, of_matrix)


def multiplied(rows: dict[str, Row], params: dict) -> dict:
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
        n_layers = scheme(config).init_layers(config)
        std = RESIDUAL_INITS[rules.residual_init](std, n_layers)
    if spec.is_head:
        std = HEAD_INITS[rules.head_init](std)
    return std * m_in**-0.5 if spec.role == "hidden" else std
