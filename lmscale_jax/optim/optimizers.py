"""The table of optimizers: one entry has everything that depends on `optim.name`.

Sources: AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. Lion: Chen et al. 2023, arXiv
2302.06675. The learning-rate factors: see `optim.rules`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import optax

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import ROLES, Spec
from lmscale_jax.model.parametrization import Ratios
from lmscale_jax.optim import muon


def _lr_per_entry(r: Ratios) -> float:
    """Returns the learning-rate factor where each entry's update is normalised: Adam, Lion."""
    depth_factor = r.m_L ** (r.a - 1)
    return depth_factor / r.m_in if r.role == "hidden" else depth_factor


def _lr_of_gradient(r: Ratios) -> float:
    """Returns the learning-rate factor where the update is proportional to the gradient."""
    return _lr_per_entry(r) / r.gradient_scale


def _lr_orthogonal(r: Ratios) -> float:
    """Returns the learning-rate factor for updates of spectral norm sqrt(fan_out / fan_in)."""
    return r.m_L ** (r.a - 1)


class Optimizer(NamedTuple):
    """One choice of optim.name.

    Attributes:
      direction: (config, rows of its parameters, mesh, platform) -> the optax transformation from
        gradients to directions; its `update` may take the keyword `step`.
      lr_factor: Ratios -> factor of the learning rate.
      others: optimizer of the parameters of other roles than `roles`; None: itself.
      roles: of the parameters that it updates; unused without `others`.
      peak: key of the group `optim` with its peak learning rate.
      divides_by_eps: it uses optim.eps, which follows the gradient's scale: gradients are divided
        by `Ratios.gradient_scale` before they reach it.
      counts_steps: its bias corrections depend on the number of its steps, which under freezing
        differs between blocks.
      update_scale: (optim, Spec) -> factor of its direction.
      norm: (optim, Spec) -> the ratio by which an update's spectral norm may exceed
        sqrt(fan_out / fan_in).
      around: (transformation to updates, with learning rate and decay; config) -> another one, such
        as an average of steps; None: the updates stay as they are.
      evaluated: (params, state of the whole transformation) -> the parameters that are evaluated,
        sampled and exported (`build.params_to_evaluate`); None: those that are trained.
      described: (config, platform) -> {name: text} for the run's choices.
    """

    direction: Callable
    lr_factor: Callable
    others: str | None = None
    roles: tuple[str, ...] = ("hidden",)
    peak: str = "lr"
    divides_by_eps: bool = False
    counts_steps: bool = False
    around: Callable | None = None
    update_scale: Callable = lambda optim, spec: 1.0
    norm: Callable = lambda optim, spec: 1.0
    evaluated: Callable | None = None
    described: Callable = lambda config, platform: {}

    def eps_factor(self, ratios: Ratios) -> float:
        """Returns the factor of epsilon relative to the base size; 1 without an epsilon."""
        return ratios.gradient_scale if self.divides_by_eps else 1.0


def _adam(config, rules: dict, mesh, platform: str) -> optax.GradientTransformation:
    optim = config.optim
    return optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)


def _sgd(config, rules: dict, mesh, platform: str) -> optax.GradientTransformation:
    return optax.trace(decay=config.optim.momentum)


def _lion(config, rules: dict, mesh, platform: str) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.optim.beta1, b2=config.optim.beta2)


def _muon(config, rules: dict, mesh, platform: str) -> optax.GradientTransformation:
    return muon.scale_by_muon(rules, config, mesh, platform)


def _normuon(config, rules: dict, mesh, platform: str) -> optax.GradientTransformation:
    return muon.scale_by_muon(rules, config, mesh, platform, beta2=config.optim.muon_beta2)


def _update_scale(optim, spec: Spec) -> float:
    return muon.SCALES[optim.muon_scale](spec)


def _norm(optim, spec: Spec) -> float:
    """Bounds the norm ratio: H orthogonal blocks together have at most sqrt(H) times one's norm."""
    blocks = muon.UNITS[optim.muon_unit].count(spec)
    return _update_scale(optim, spec) / muon.SCALES["spectral"](spec) * math.sqrt(blocks)


def _described(config, platform: str) -> dict[str, str]:
    dtype = muon.products_dtype(config, platform)
    return {"muon": f"Newton-Schulz {config.optim.muon_coefficients} in {dtype}"}


# Muon and its variants: hidden matrices are made orthogonal, adamw takes the other parameters.
_orthogonal = functools.partial(
    Optimizer,
    lr_factor=_lr_orthogonal,
    others="adamw",
    peak="muon_lr",
    update_scale=_update_scale,
    norm=_norm,
    described=_described,
)


def _own_optimizer(code: OwnCode) -> Optimizer:
    """Returns the entry of a user's function (settings, rules) -> optax transformation.

    Its attribute NORMALIZED says that updates are of size 1 an entry (True, as Adam's) or
    proportional to the gradient (False); ROLES, which roles it updates, adamw the others.
    """
    roles, normalized = getattr(code.entry, "ROLES", ROLES), getattr(code.entry, "NORMALIZED", None)
    code.require("a function (settings, rules)", callable(code.entry))
    if normalized not in (True, False):
        raise InputError(
            f"{code.where}: its attribute NORMALIZED is missing; use {code.entry.__name__}."
            f"NORMALIZED = True where updates are of size 1 an entry, False where they are "
            f"proportional to the gradient"
        )
    if not roles or not set(roles) <= set(ROLES):
        raise InputError(f"{code.where}: ROLES={roles} must be some of {', '.join(ROLES)}")
    return Optimizer(
        lambda config, rules, mesh, platform: code.entry(code.settings(config), rules),
        _lr_per_entry if normalized else _lr_of_gradient,
        others=None if set(roles) == set(ROLES) else "adamw",
        roles=tuple(roles),
    )


OPTIMIZERS = Modes(
    "optim.name",
    {
        "adamw": Optimizer(_adam, _lr_per_entry, divides_by_eps=True, counts_steps=True),
        "sgd": Optimizer(_sgd, _lr_of_gradient),
        "lion": Optimizer(_lion, _lr_per_entry),
        "muon": _orthogonal(_muon),
        "normuon": _orthogonal(_normuon),
    },
    _own_optimizer,
)


class DecayMode(NamedTuple):
    """One choice of optim.decay_mode: how weight decay follows the learning rate.

    Attributes:
      rate: (schedule's factor, learning rate before its factor of size) -> factor of the
        coefficient.
      wd_factor: (factor of the learning rate, the part of it that is of size) -> factor of the
        coefficient in PyTorch's form, p - lr * wd * p.
      follows_lr: a block's own learning-rate factor multiplies its decay too.
    """

    rate: Callable
    wd_factor: Callable
    follows_lr: bool


DECAY_MODES = Modes(
    "optim.decay_mode",
    {
        "independent": DecayMode(lambda s, rate: s, lambda lr, of_size: 1 / lr, False),
        # At every size the shrinkage of the base: with 1 / m_in in the learning rate, m_in here
        # (CompleteP, arXiv 2505.01618, table 1).
        "coupled": DecayMode(lambda s, rate: rate, lambda lr, of_size: 1 / of_size, True),
    },
)

# Value of optim.decay_on -> roles of the parameters that decay.
DECAYING = Modes(
    "optim.decay_on",
    {
        "matrices": ("input", "hidden", "output"),
        "hidden": ("hidden",),
        "all": ("input", "hidden", "output", "vector", "scalar"),
    },
)


def optimizer_of(name: str, spec: Spec) -> str:
    """Returns the name of the optimizer of a parameter where optim.name is `name`."""
    optimizer = OPTIMIZERS[name]
    return name if optimizer.others is None or spec.role in optimizer.roles else optimizer.others
