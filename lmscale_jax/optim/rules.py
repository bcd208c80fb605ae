"""Derives learning rate, epsilon, decay and update scale of each parameter.

With m_in and m_out the ratios of a matrix's fans to those at the base size, m_L the ratio of the
depths and a the exponent of the branch multiplier (`model.parametrization`):

              learning rate of           gradient, so
              adamw, lion         muon   epsilon of adamw
  input       m_out^e             -      1 / m_out
  hidden      1 / m_in            below  1 / m_out
  output      1                   -      1 / (m_in m_out)
  vector      1                   -      1 / m_out
  scalar      1                   -      1

In branches (all of a block but the weights of its skips, and the value tables) the rates are
multiplied by m_L^(a-1) and the gradients by m_L^-a. An output in a block is a gate for each head,
of which m_out is the number. sgd's rate is adamw's over the gradient's scale.

Muon's updates have the spectral norm of their scale (`update_scale`); the learning rate makes up
for the difference from sqrt(fan_out / fan_in), relative to the base size, times m_L^(a-1). So it is
1 for the scale "spectral" when a = 1, and m^-1/2 for "moonlight" and square matrices.

Sources: Yang et al. 2022 (arXiv 2203.03466, table 8); Dey et al. 2025 (CompleteP, arXiv 2505.01618,
table 1) for depth; Yang et al. 2023 (arXiv 2310.17813) for spectral norms of updates. CompleteP's
table scales epsilon in blocks only; its equation 40 and nanoGPT-mup, since a correction, scale that
of embeddings, readout and final norm too. Tests measure the gradients of every parameter.
"""

from typing import NamedTuple

from lmscale_jax.model.param import Spec
from lmscale_jax.model.parametrization import CONTROLS, ParamRule, scheme_of
from lmscale_jax.optim.optimizers import DECAY_MODES, DECAYING, OPTIMIZERS, optimizer_of


class UpdateRule(NamedTuple):
    """How one parameter is updated.

    Attributes:
      spec: its annotation.
      lr_factor: factor of the learning rate.
      lr_factor_of_size: the part of it that differs from 1 only away from the base size.
      eps_factor: factor of Adam's epsilon.
      decay: 1 where it decays, else 0.
      optimizer: the one that updates it: only hidden matrices are made orthogonal.
      update_scale: factor of the direction; 1 unless it is orthogonal.
    """

    spec: Spec
    lr_factor: float
    lr_factor_of_size: float
    eps_factor: float
    decay: float
    optimizer: str
    update_scale: float


def update_rules(param_rules: dict[str, ParamRule], config) -> dict[str, UpdateRule]:
    """Derives {path: UpdateRule} from the parametrization of a resolved config's parameters."""
    return {path: _update_rule(rule, config) for path, rule in param_rules.items()}


def _update_rule(rule: ParamRule, config) -> UpdateRule:
    optim, base, spec = config.optim, config.parametrization, rule.spec
    name = optimizer_of(optim.name, spec)
    optimizer = OPTIMIZERS[name]
    lr = optimizer.lr_factor(rule.ratios)
    lr *= optimizer.norm(optim, rule.base) / optimizer.norm(optim, spec)
    if spec.role == "input" and scheme_of(config).has_base:
        lr *= rule.ratios.m_out**base.embed_lr_exponent
    lr = CONTROLS[base.control].lr_factor(lr) * rule.lr_factor
    return UpdateRule(
        spec,
        lr_factor=lr * _lr_factor_of_role(optim, spec),
        lr_factor_of_size=lr,
        eps_factor=CONTROLS[base.control].eps_factor(optimizer.eps_factor(rule.ratios)),
        decay=float(spec.role in DECAYING[optim.decay_on]),
        optimizer=name,
        update_scale=optimizer.update_scale(optim, spec),
    )


def _lr_factor_of_role(optim, spec: Spec) -> float:
    """Returns the factor that the config gives parameters of this role, at every size."""
    return {
        "input": optim.embed_lr_factor,
        "output": optim.head_lr_factor if spec.is_head else 1.0,
        "vector": optim.vector_lr_factor,
        "scalar": optim.vector_lr_factor,
    }.get(spec.role, 1.0)


def rules_as_json(
    param_rules: dict[str, ParamRule], config, sharding: dict[str, list] | None = None
) -> list[dict]:
    """Lists initial values, multipliers and updates of all parameters, for parametrization.json.

    `sharding`: {path: for each dimension the mesh axis that splits it, or None}. wd_factor is the
    factor of the decay coefficient in PyTorch's form, p - lr * wd * p: it undoes the learning
    rate's factor, under coupled decay that of the size only.
    """
    updates, decay_mode = update_rules(param_rules, config), DECAY_MODES[config.optim.decay_mode]
    return [
        {
            "path": path,
            "axes": list(rule.spec.axes),
            "shape": list(rule.spec.shape),
            "role": rule.spec.role,
            "fan_in": rule.spec.fan_in,
            "fan_out": rule.spec.fan_out,
            "base_fan_in": rule.base.fan_in,
            "base_fan_out": rule.base.fan_out,
            "init": rule.spec.init,
            "init_std": rule.init_std,
            "multiplier": rule.multiplier,
            "lr_factor": update.lr_factor,
            "wd_factor": update.decay
            * decay_mode.wd_factor(update.lr_factor, update.lr_factor_of_size),
            "eps_factor": update.eps_factor,
            "decay": update.decay,
            "optimizer": update.optimizer,
            "update_scale": update.update_scale,
            "sharding": sharding[path] if sharding else None,
        }
        for (path, rule), update in zip(param_rules.items(), updates.values(), strict=True)
    ]
