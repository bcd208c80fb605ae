"""From a parameter's annotation to everything that depends on its role and its shape.

One row per parameter: initial standard deviation, forward multiplier, and factors of learning rate,
weight decay and Adam's epsilon. With m_in and m_out the ratios of this matrix's own fans to those
at the base size, and m_L that of the depths:

              init std      learning rate                                     Adam epsilon
                            adamw, lion         sgd                    muon
  input       s             m_out^e             m_out                  -       1
  hidden      s m_in^-1/2   m_L^(a-1) / m_in    m_L^(2a-1) m_out/m_in  below   m_L^-a / m_in
  output      s             1                   m_in                   -       1
  vector      -             m_L^(a-1) in blocks m_L^(2a-1) m_out       -       m_L^-a / m_out
                                                in blocks                      in blocks

Muon's updates have the spectral norm of their scale (`update_scale`); the learning rate makes up
for the difference from sqrt(fan_out / fan_in), relative to the base size, times m_L^(a-1). So it is
1 for the scale "spectral" when a = 1, and m^-1/2 for "moonlight" and square matrices.

Logits are multiplied by 1/m, attention scores by sqrt(base head size) / head size, branches by
m_L^-a. At the base size every factor is exactly 1: there `mup` and `completep` are `sp`.

Sources: Yang et al. 2022 (arXiv 2203.03466, table 8: constant readout with a forward multiplier);
Dey et al. 2025 (CompleteP, arXiv 2505.01618, table 1) for depth and epsilon; Yang et al. 2023
(arXiv 2310.17813) for the spectral norm of updates. The depth factor of sgd is our own: a branch's
multiplier enters its gradient and its output, and L branches add up.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from lmscale_jax.model.param import Spec, map_named, named
from lmscale_jax.modes import Modes
from lmscale_jax.optim.optimizers import DECAY_MODES, DECAYING, OPTIMIZERS, Ratios, optimizer_of
from lmscale_jax.parametrization.schemes import CONTROLS, Scales, scheme

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


@dataclasses.dataclass(frozen=True)
class Row:
    """What one parameter gets.

    Attributes:
      spec, base: its annotation here and at the base size.
      init_std: of its initial values, where they are drawn.
      multiplier: what its product is multiplied by in the forward pass, `matrix_multiplier`
        included.
      lr_factor: of the learning rate.
      eps_factor: of Adam's epsilon.
      decay: 1 where it decays, else 0.
      optimizer: the one that updates it: only hidden matrices are made orthogonal.
      update_scale: of the direction that comes from it; other than 1 for orthogonal ones only.
      matrix_multiplier: the part of `multiplier` that the parametrization gives this parameter
        alone, beside `scales`.
    """

    spec: Spec
    base: Spec
    init_std: float
    multiplier: float
    lr_factor: float
    eps_factor: float
    decay: float
    optimizer: str
    update_scale: float
    matrix_multiplier: float = 1.0

    @property
    def m_in(self) -> float:
        return self.spec.fan_in / self.base.fan_in

    @property
    def m_out(self) -> float:
        return self.spec.fan_out / self.base.fan_out


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
    return {path: _row(path, spec, base[path], config) for path, spec in here.items()}


def _row(path: str, spec: Spec, base: Spec, config) -> Row:
    optim, rules = config.optim, config.parametrization
    m_in, m_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
    m_L, a = scheme(config).depth(config)
    inside = spec.axes[0] == "layers"
    name = optimizer_of(optim.name, spec)
    optimizer = OPTIMIZERS[name]
    ratios = Ratios(spec.role, m_in, m_out, m_L if inside else 1.0, a, inside)
    lr = optimizer.lr_factor(ratios) * (optimizer.norm(optim, base) / optimizer.norm(optim, spec))
    if spec.role == "input" and scheme(config).has_base:
        lr *= m_out**rules.embed_lr_exponent
    lr = CONTROLS[rules.control].lr_factor(lr) * _own_factor(optim, spec)
    scale = scales(config)
    readout = scale.gate if inside else scale.logits
    multiplier = {"input": scale.embed, "output": readout}.get(spec.role, 1.0)
    if spec.residual:
        multiplier = scale.branch
    alone = scheme(config).matrix_multiplier(spec, base, config)
    return Row(
        spec,
        base,
        init_std=_std(spec, m_in, config),
        multiplier=multiplier * alone,
        lr_factor=lr,
        eps_factor=optimizer.eps_factor(ratios),
        decay=float(spec.role in DECAYING[optim.decay_on]),
        optimizer=name,
        update_scale=optimizer.update_scale(optim, spec),
        matrix_multiplier=alone,
    )


def multiplied(rows: dict[str, Row], params: dict) -> dict:
    """The parameters times their `matrix_multiplier`, as the forward pass reads them."""
    if all(row.matrix_multiplier == 1.0 for row in rows.values()):
        return params
    return map_named(lambda path, p: p * rows[path].matrix_multiplier, params)


def _own_factor(optim, spec: Spec) -> float:
    """The factor that the config gives parameters of that kind, at every size."""
    return {
        "input": optim.embed_lr_factor,
        "output": optim.head_lr_factor if _is_head(spec) else 1.0,
        "vector": optim.vector_lr_factor,
        "scalar": optim.vector_lr_factor,
    }.get(spec.role, 1.0)


def _is_head(spec: Spec) -> bool:
    """The readout to the vocabulary; gates in blocks are readouts too."""
    return spec.role == "output" and spec.axes[0] != "layers"


def _std(spec: Spec, m_in: float, config) -> float:
    rules = config.parametrization
    if spec.init != "normal":
        return 0.0
    std = (spec.role == "input" and rules.embed_std) or rules.init_std
    if spec.residual:
        n_layers = scheme(config).init_layers(config)
        std = RESIDUAL_INITS[rules.residual_init](std, n_layers)
    if _is_head(spec):
        std = HEAD_INITS[rules.head_init](std)
    return std * m_in**-0.5 if spec.role == "hidden" else std


def as_json(
    rows: dict[str, Row],
    decay_mode: str = "independent",
    sharding: dict[str, list] | None = None,
) -> list[dict]:
    """The table as parametrization.json holds it.

    `sharding`: {path: for each dimension the mesh axis that splits it, or None}. wd_factor is the
    factor of the decay coefficient in PyTorch's form, p - lr * wd * p: under independent decay it
    undoes that of the learning rate.
    """
    return [
        {
            "path": path,
            "axes": list(row.spec.axes),
            "shape": list(row.spec.shape),
            "role": row.spec.role,
            "fan_in": row.spec.fan_in,
            "fan_out": row.spec.fan_out,
            "base_fan_in": row.base.fan_in,
            "base_fan_out": row.base.fan_out,
            "init": row.spec.init,
            "init_std": row.init_std,
            "multiplier": row.multiplier,
            "lr_factor": row.lr_factor,
            "wd_factor": row.decay * DECAY_MODES[decay_mode].wd_factor(row.lr_factor),
            "eps_factor": row.eps_factor,
            "decay": row.decay,
            "optimizer": row.optimizer,
            "update_scale": row.update_scale,
            "sharding": sharding[path] if sharding else None,
        }
        for path, row in rows.items()
    ]
