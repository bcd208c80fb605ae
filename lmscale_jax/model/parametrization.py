"""Parametrizations: initial scale and forward multipliers from a parameter's role and shape.

`SCHEMES` and `CONTROLS` have one entry for each choice of parametrization.name and .control.

m_in and m_out are the ratios of a matrix's fans to those at the base size, m_L the ratio of depths.
A hidden matrix has the initial standard deviation s m_in^-1/2, every other one s. Logits are
multiplied by 1/m, attention scores by sqrt(base head size) / head size, branches by m_L^-a.
Learning rates and Adam's epsilon follow the same ratios, in `optim.rules`. At the base size every
factor is exactly 1: there `mup` and `completep` are `sp`.

Sources: Yang et al. 2022 (arXiv 2203.03466, table 8: constant readout with a forward multiplier);
Dey et al. 2025 (CompleteP, arXiv 2505.01618, table 1) for depth.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import Spec, map_named, named


class Scales(NamedTuple):
    """Forward multipliers of embedding, logits, each branch, q·k, and readouts in blocks."""

    embed: float
    logits: float
    branch: float
    attention: float
    gate: float


class Scheme(NamedTuple):
    """One choice of parametrization.name.

    Attributes:
      base_keys: keys of the base size, which a config must set; () for a scheme without a base.
      scales: resolved config -> Scales.
      depth: resolved config -> (m_L, a), the ratio of depths and the branch multiplier's exponent.
      init_layers: resolved config -> number of blocks that residual_init="depth_scaled" counts.
      matrix_multiplier: (Spec, Spec at the base, resolved config) -> multiplier of the product with
        one parameter, on top of `scales`.
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
    """One choice of parametrization.control: a deliberate mistake, or none.

    Attributes:
      logits: 1 / (width ratio) -> factor of the logits.
      lr_factor, eps_factor: a parameter's factor of the learning rate, of epsilon -> the factor
        that is used.
      slopes: {end of a tensor's name: slope beyond which it is in the coordinate check, on that
        side of 0, from step 2 on}; {} without a mistake.
    """

    slopes: dict[str, float]
    logits: Callable = lambda inverse_m: inverse_m
    lr_factor: Callable = lambda factor: factor
    eps_factor: Callable = lambda factor: factor


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
            # The branch multiplier covers depth; GPT-2's factor remains that of the base depth.
            init_layers=lambda config: config.parametrization.base_depth,
        ),
    },
)

# In theory the logits of logits_sqrt have a slope of +1/2, and each matrix with too high a learning
# rate one of about +1. Where epsilon is above the gradients, updates have their slope of -1.
CONTROLS = Modes(
    "parametrization.control",
    {
        "none": Control({}),
        "logits_sqrt": Control({"logits": 0.35}, logits=math.sqrt),
        "no_lr_scaling": Control({"attention": 0.4, "mlp": 1.0}, lr_factor=lambda factor: 1.0),
        "no_eps_scaling": Control(
            {"query/weight": -0.4, "key/weight": -0.4}, eps_factor=lambda factor: 1.0
        ),
    },
)

# Width -> factor of the logits.
LOGIT_SCALES = Modes(
    "model.logit_scale",
    {"one": lambda width: 1.0, "inverse_sqrt_width": lambda width: width**-0.5},
)


def scheme_of(config) -> Scheme:
    """Returns the scheme of a config's parametrization."""
    return SCHEMES[config.parametrization.name]


# Projections into the residual stream: (std of other matrices, number of blocks) -> std.
RESIDUAL_INITS = Modes(
    "parametrization.residual_init",
    {
        "depth_scaled": lambda std, n_layers: std / math.sqrt(2 * n_layers),
        "plain": lambda std, n_layers: std,
        "zeros": lambda std, n_layers: 0.0,
    },
)
# An untied readout: std of other matrices -> std.
HEAD_INITS = Modes(
    "parametrization.head_init", {"normal": lambda std: std, "zeros": lambda std: 0.0}
)


def _own_rule(code: OwnCode) -> Callable:
    """Returns a user's function (spec, base, settings) as one of (spec, base, config).

    Raises InputError, at its call, where it returns anything but positive factors by these names.
    """
    code.require("a function (spec, base, settings)", callable(code.entry))

    def factors(spec: Spec, base: Spec, config) -> dict[str, float]:
        values = code.entry(spec, base, code.settings(config))
        names = {"init_std", "lr", "multiplier"}
        if (
            not isinstance(values, dict)
            or not values.keys() <= names
            or min(values.values(), default=1) < 0
        ):
            raise InputError(
                f"{code.where} returns {values!r} for a parameter of the role {spec.role!r}; use "
                f"factors of {', '.join(sorted(names))}, such as {{'lr': 0.5}}"
            )
        return values

    return factors


# (Spec, Spec at the base, config) -> factors of its initial values, learning rate and product.
RULES = Modes("parametrization.rule", {"": lambda spec, base, config: {}}, _own_rule)


class Ratios(NamedTuple):
    """A parameter's size relative to the base.

    Attributes:
      role: its `Spec.role`.
      m_in, m_out: ratios of its fans.
      m_L, a: ratio of depths (1 outside branches) and exponent of the branch multiplier.
    """

    role: str
    m_in: float
    m_out: float
    m_L: float = 1.0
    a: float = 1.0

    @property
    def gradient_scale(self) -> float:
        """The size of an entry's gradient relative to the base.

        The loss depends on all outputs of a product together, so on each as 1 / m_out. Multipliers
        of the forward pass come back in the gradient: m_L^-a of a branch, 1 / m_in of a readout.
        """
        readout = self.m_in if self.role == "output" else 1.0
        return self.m_L**-self.a / (self.m_out * readout)


class ParamRule(NamedTuple):
    """The parametrization of one parameter.

    Attributes:
      spec, base: its annotation, in this model and at the base size.
      ratios: its size relative to the base; `optim.rules` derives the learning rate from it.
      init_std: standard deviation of its initial values, if they are drawn.
      multiplier: factor of its product in the forward pass, including `matrix_multiplier`.
      matrix_multiplier: the part of `multiplier` for this parameter alone, on top of `scales`.
      lr_factor: of parametrization.rule, on top of what `optim.rules` derives.
    """

    spec: Spec
    base: Spec
    ratios: Ratios
    init_std: float
    multiplier: float
    matrix_multiplier: float
    lr_factor: float = 1.0


def base_config(config) -> ConfigDict:
    """Copies a resolved config at its base size; an equal copy if it has no base.

    Raises InputError where the parametrization needs a size of the base that is not used with it.
    """
    config = ConfigDict(config.to_dict())
    model, base = config.model, config.parametrization
    if not scheme_of(config).has_base:
        return config
    for name in scheme_of(config).base_keys:
        if not base[name]:
            raise InputError(
                f"config.parametrization.{name}=0 must be given for {base.name!r}, which SCHEMES "
                f"says is relative to it; its `when` in config/parametrization_keys.py must name "
                f"{base.name!r} too"
            )
    group = model.n_heads // model.n_kv_heads
    model.d_model, model.d_ff = base.base_width, base.base_d_ff
    model.head_dim, model.n_heads = base.base_head_dim, base.base_width // base.base_head_dim
    model.n_kv_heads = model.n_heads // group
    return config


def forward_scales(config) -> Scales:
    """Returns the forward multipliers of a resolved config."""
    return scheme_of(config).scales(config)


def param_rules(specs: dict, base_specs: dict, config) -> dict[str, ParamRule]:
    """Returns {path: ParamRule} of a resolved config, given annotations of the model and its base.

    Raises ValueError if the two do not have the same parameters.
    """
    flat, base = named(specs), named(base_specs)
    if flat.keys() != base.keys():
        raise ValueError(f"no base shape for {sorted(flat.keys() ^ base.keys())}")
    return {path: _param_rule(spec, base[path], config) for path, spec in flat.items()}


def _param_rule(spec: Spec, base: Spec, config) -> ParamRule:
    m_L, a = scheme_of(config).depth(config)
    inside = spec.axes[0] == "layers"
    m_in, m_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
    ratios = Ratios(spec.role, m_in, m_out, m_L if spec.in_branch else 1.0, a)
    scale = forward_scales(config)
    readout = scale.gate if inside else scale.logits
    multiplier = {"input": scale.embed, "output": readout}.get(spec.role, 1.0)
    if spec.residual:
        multiplier = scale.branch
    factors = RULES[config.parametrization.rule](spec, base, config)
    of_matrix = scheme_of(config).matrix_multiplier(spec, base, config)
    of_matrix *= factors.get("multiplier", 1.0)
    std = _std(spec, m_in, config) * factors.get("init_std", 1.0)
    lr_factor = factors.get("lr", 1.0)
    return ParamRule(spec, base, ratios, std, multiplier * of_matrix, of_matrix, lr_factor)


def multiplied_params(rules: dict[str, ParamRule], params: dict) -> dict:
    """Multiplies the parameters by their `matrix_multiplier`, for the forward pass."""
    if all(rule.matrix_multiplier == 1.0 for rule in rules.values()):
        return params
    return map_named(lambda path, p: p * rules[path].matrix_multiplier, params)


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
