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
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.model.param import Spec, named
from lmscale_jax.modes import Modes

ORTHOGONAL = ("muon", "normuon")


class Scales(NamedTuple):
    """Forward multipliers: of embedding, logits, each branch, q·k, and readouts in blocks."""

    embed: float
    logits: float
    branch: float
    attention: float
    gate: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What one parameter gets.

    Attributes:
      spec, base: its annotation here and at the base size.
      init_std: of its initial values, where they are drawn.
      multiplier: what its product is multiplied by in the forward pass.
      lr_factor: of the learning rate.
      eps_factor: of Adam's epsilon.
      decay: 1 where it decays, else 0.
      optimizer: the one that updates it: only hidden matrices are made orthogonal.
      update_scale: of the direction that comes from it; other than 1 for orthogonal ones only.
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

    @property
    def m_in(self) -> float:
        return self.spec.fan_in / self.base.fan_in

    @property
    def m_out(self) -> float:
        return self.spec.fan_out / self.base.fan_out


def base_model(config):
    """The model group of a resolved config at its base size; itself under `sp`."""
    model, base = ConfigDict(config.model.to_dict()), config.parametrization
    if base.name == "sp":
        return model
    group = model.n_heads // model.n_kv_heads
    model.d_model, model.d_ff = base.base_width, base.base_d_ff
    model.head_dim, model.n_heads = base.base_head_dim, base.base_width // base.base_head_dim
    model.n_kv_heads = model.n_heads // group
    return model


def depth(config) -> tuple[float, float]:
    """(m_L, a): the ratio of depths and the exponent of the branch multiplier."""
    base = config.parametrization
    if base.name != "completep":
        return 1.0, 1.0
    return config.model.n_layers / base.base_depth, base.depth_exponent


# Width -> factor of the readout's product, under `sp`.
LOGIT_SCALES = Modes(
    "model.logit_scale", {"one": lambda width: 1.0, "inverse_sqrt_width": lambda width: width**-0.5}
)


def scales(config) -> Scales:
    """The forward multipliers of a resolved config."""
    base, model = config.parametrization, config.model
    size = model.head_dim
    if base.name == "sp":
        logits = LOGIT_SCALES[model.logit_scale](model.d_model)
        attention = base.attention_scale * size**-0.5
        return Scales(embed=1.0, logits=logits, branch=1.0, attention=attention, gate=1.0)
    m_L, a = depth(config)
    inverse_m = base.base_width / model.d_model
    return Scales(
        embed=base.embed_scale,
        logits=base.output_scale
        * (math.sqrt(inverse_m) if base.control == "logits_sqrt" else inverse_m),
        branch=m_L**-a,
        # At the base head size exactly what sp uses.
        attention=base.attention_scale * size**-0.5 * math.sqrt(base.base_head_dim / size),
        gate=inverse_m,
    )


def table(specs: dict, base_specs: dict, config) -> dict[str, Row]:
    """{path: Row} of every parameter of a resolved config, from annotations here and at the base.

    Raises ValueError where the two do not name the same parameters.
    """
    here, base = named(specs), named(base_specs)
    if here.keys() != base.keys():
        raise ValueError(f"no base shape for {sorted(here.keys() ^ base.keys())}")
    return {path: _row(path, spec, base[path], config) for path, spec in here.items()}


def _row(path: str, spec: Spec, base: Spec, config) -> Row:
    m_in, m_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
    m_L, a = depth(config)
    inside = spec.axes[0] == "layers"
    name, scaled = config.optim.name, 1.0
    optimizer = "adamw" if name in ORTHOGONAL and spec.role != "hidden" else name
    lr, eps = factors(optimizer, spec.role, m_in, m_out, m_L if inside else 1.0, a, inside)
    if optimizer in ORTHOGONAL:
        scaled = update_scale(config.optim.muon_scale, spec)
        lr *= _excess(config.optim, base) / _excess(config.optim, spec)
    if spec.role == "input" and config.parametrization.name != "sp":
        lr *= m_out**config.parametrization.embed_lr_exponent
    if config.parametrization.control == "no_lr_scaling":
        lr = 1.0
    lr *= _own_factor(config.optim, spec)
    scale = scales(config)
    readout = scale.gate if inside else scale.logits
    multiplier = {"input": scale.embed, "output": readout}.get(spec.role, 1.0)
    if spec.residual:
        multiplier = scale.branch
    decaying = {
        "matrices": ("input", "hidden", "output"),
        "hidden": ("hidden",),
        "all": ("input", "hidden", "output", "vector", "scalar"),
    }[config.optim.decay_on]
    decay = float(spec.role in decaying)
    std = _std(spec, m_in, config)
    return Row(spec, base, std, multiplier, lr, eps, decay, optimizer, scaled)


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


def update_scale(name: str, spec: Spec) -> float:
    """What an orthogonal matrix is multiplied by to be the update of a parameter.

    "spectral": the spectral condition (Yang et al. 2023); "kj": Jordan et al. 2024; "moonlight":
    Liu et al. 2025 (arXiv 2502.16982), the root mean square of a typical update by AdamW.
    """
    return {
        "spectral": math.sqrt(spec.fan_out / spec.fan_in),
        "kj": math.sqrt(max(1.0, spec.fan_out / spec.fan_in)),
        "moonlight": 0.2 * math.sqrt(max(spec.fan_in, spec.fan_out)),
    }[name]


def _excess(optim, spec: Spec) -> float:
    """By how much the spectral norm of an update may exceed sqrt(fan_out / fan_in).

    H blocks that are orthogonal each have together at most sqrt(H) times the norm of one.
    """
    blocks = spec.n_heads if optim.muon_unit == "head" else 1
    target = update_scale("spectral", spec)
    return update_scale(optim.muon_scale, spec) / target * math.sqrt(blocks)


def _std(spec: Spec, m_in: float, config) -> float:
    rules = config.parametrization
    zeros = spec.residual and rules.residual_init == "zeros"
    if spec.init != "normal" or zeros or (_is_head(spec) and rules.head_init == "zeros"):
        return 0.0
    std = (spec.role == "input" and rules.embed_std) or rules.init_std
    if spec.residual and rules.residual_init == "depth_scaled":
        # CompleteP scales the branch instead; GPT-2's factor stays that of the base depth.
        layers = rules.base_depth if rules.name == "completep" else config.model.n_layers
        std /= math.sqrt(2 * layers)
    return std * m_in**-0.5 if spec.role == "hidden" else std


def factors(
    optimizer: str,
    role: str,
    m_in: float,
    m_out: float,
    m_L: float = 1.0,
    a: float = 1.0,
    inside: bool = True,
) -> tuple[float, float]:
    """(learning rate, epsilon) of one class of parameters, relative to the base size.

    `optimizer` is "adamw", "lion" (which normalises each entry too, without an epsilon), "sgd", or
    "muon" and "normuon", for updates of the spectral norm sqrt(fan_out / fan_in). `inside`: it
    belongs to a block.
    """
    if optimizer in ORTHOGONAL and role == "hidden":
        return m_L ** (a - 1), 1.0
    depth_sgd = m_L ** (2 * a - 1)
    by_role = {
        "adamw": {
            "input": (1.0, 1.0),
            "hidden": (m_L ** (a - 1) / m_in, m_L**-a / m_in),
            "output": (1.0, 1.0),
            "vector": (m_L ** (a - 1), m_L**-a / m_out if inside else 1.0),
            "scalar": (1.0, 1.0),
        },
        "sgd": {
            "input": (m_out, 1.0),
            "hidden": (depth_sgd * m_out / m_in, 1.0),
            "output": (m_in, 1.0),
            "vector": (depth_sgd * m_out, 1.0),
            "scalar": (1.0, 1.0),
        },
    }
    if optimizer == "lion":
        return by_role["adamw"][role][0], 1.0
    return by_role["adamw" if optimizer in ORTHOGONAL else optimizer][role]


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
            "wd_factor": row.decay / (row.lr_factor if decay_mode == "independent" else 1.0),
            "eps_factor": row.eps_factor,
            "decay": row.decay,
            "optimizer": row.optimizer,
            "update_scale": row.update_scale,
            "sharding": sharding[path] if sharding else None,
        }
        for path, row in rows.items()
    ]
