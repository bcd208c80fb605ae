"""A config at other sizes of its family, and the deliberate mistakes that checks must find."""

from ml_collections import ConfigDict

from lmscale_jax.config.keys import get_config as base_config
from lmscale_jax.errors import InputError
from lmscale_jax.parametrization.schemes import scheme


def resized(config: ConfigDict, sweep: str, size: int) -> ConfigDict:
    """A copy at another size of the family.

    Widths keep the head size and the ratio of query to key heads, head sizes keep the number of
    heads; d_ff follows by its rule, or in proportion where it was given.
    """
    config = ConfigDict(config.to_dict())
    model = config.model
    if sweep == "depth":
        model.n_layers = size
        return config
    head_dim = model.head_dim or model.d_model // model.n_heads
    width = size if sweep == "width" else size * model.n_heads
    model.d_ff = round(model.d_ff * width / model.d_model)
    if sweep == "head_dim":
        base = config.parametrization
        if scheme(config).has_base and not base.base_head_dim:
            base.base_head_dim = head_dim
        model.head_dim = size
    else:
        if size % head_dim:
            raise InputError(
                f"--widths={size} is no multiple of the head size {head_dim} (model.d_model / "
                f"model.n_heads); {max(1, round(size / head_dim)) * head_dim} would work"
            )
        group = model.n_heads // (model.n_kv_heads or model.n_heads)
        heads = size // head_dim
        if heads % group:
            raise InputError(
                f"--widths={size} makes {heads} heads, which {group} query heads to a key head do "
                f"not divide; {group * head_dim} would work"
            )
        model.n_heads = heads
        model.n_kv_heads = heads // group if model.n_kv_heads else 0
    model.d_model = width
    return config


def deliberately_wrong(parametrization: ConfigDict, control: str) -> None:
    """Puts the mistake of that name into a group of keys."""
    if control == "sp":
        kept = {name: parametrization[name] for name in ("init_std", "residual_init")}
        parametrization.update(base_config().parametrization)
        parametrization.update(kept)
    elif control != "none":
        parametrization.control = control
