"""Solves for shapes with a target number of parameters, and resizes a config.

Also the deliberate mistakes that the coordinate check must detect.
"""

import itertools
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.key import Modes
from lmscale_jax.config.keys import get_config as base_config
from lmscale_jax.config.resolve import resolve
from lmscale_jax.errors import InputError
from lmscale_jax.model import flops
from lmscale_jax.model.build import declare_specs
from lmscale_jax.model.parametrization import scheme_of

# Relative tolerance of a solved shape.
TOLERANCE = 0.02
# Relative tolerance of arms that are compared at one size.
MATCH = 0.005
MAX_DEPTH = 256
# Largest |ln(d_ff / its rule's)|.
STRETCH = math.log(1.3)


# (counts, FLOPs per token) -> the quantity that arms of one size share; None: only the shape.
MEASURES = Modes(
    "rungs.match",
    {
        "none": None,
        "parameters": lambda counts, flops_per_token: counts["non_embedding"],
        "flops": lambda counts, flops_per_token: flops_per_token,
    },
)


class Shape(NamedTuple):
    """A solved shape; `n` is its count by the convention, and d_ff 0 means its rule."""

    n_layers: int
    d_model: int
    n_heads: int
    n: int
    d_ff: int = 0


def solve_shape(
    config: ConfigDict,
    target: float,
    convention: str = "non_embedding",
    aspect: float = 64.0,
    head_dim: int = 64,
    vocab_size: int = 0,
) -> Shape:
    """Finds the shape within 2% of `target` with the most usual proportions.

    That is the least |ln(d_model / n_layers / aspect)| + 2 |ln(d_ff / its rule's)|; ties go to the
    count nearest to the target. Widths are multiples of `head_dim`. Where d_ff by its rule misses
    the target, d_ff is solved too, within 30% of the rule, as a multiple of 8 if that is within 2%.

    Args:
      config: unresolved; its n_layers, d_model and n_heads are ignored.
      target: number of parameters.
      convention: "total", "non_embedding" or "embedding", as in run.json's counts.
      aspect: width over depth; GPT-2 small has 64.
      head_dim: channels per head.
      vocab_size: the tokenizer's; used if the config leaves it open.

    Raises:
      InputError: no shape is within 2%; the message has the nearest.
    """
    # A block has about 12 d_model^2 parameters; other widths give unusual proportions.
    usual = (target * aspect / 12) ** (1 / 3)
    for low, high in ((usual / 3, usual * 2), (0.0, math.inf)):
        candidates = _candidates(config, target, convention, head_dim, vocab_size, low, high)
        near = [(s, rule) for s, rule in candidates if abs(s.n / target - 1) <= TOLERANCE]
        if near:
            break
    else:
        best = min(candidates, key=lambda pair: abs(math.log(pair[0].n / target)))[0]
        raise InputError(
            f"rungs: no model of {target:,.0f} {convention} parameters with heads of {head_dim} "
            f"channels; the nearest has {best.n:,} (n_layers={best.n_layers}, "
            f"d_model={best.d_model}); smaller heads reach more sizes"
        )

    def unusualness(candidate: tuple[Shape, int]) -> tuple[float, float]:
        shape, rule = candidate
        stretched = abs(math.log((shape.d_ff or rule) / rule))
        off = abs(math.log(shape.d_model / shape.n_layers / aspect))
        return round(off + 2 * stretched, 6), abs(shape.n - target)

    return min(near, key=unusualness)[0]


def match_parameters(
    config: ConfigDict, target: float, measure: str, vocab_size: int = 0
) -> ConfigDict:
    """Copies a config and solves its d_ff so that it has `target` of a measure within 0.5%.

    Args:
      config: unresolved; other dimensions are unchanged.
      target: another arm's value of `measure`.
      measure: "parameters" (non-embedding) or "flops" (FLOPs per token, "model" of
        `flops.flops_per_token`).

    Raises:
      InputError: the nearest d_ff is not within 0.5%.
    """

    def measured(d_ff: int) -> float:
        config.model.d_ff = d_ff
        counts, per_token = describe_shape(resolve(config, vocab_size))
        return MEASURES[measure](counts, per_token)

    config = ConfigDict(config.to_dict())
    # Both measures are linear in d_ff.
    low, high = measured(1), measured(1025)
    d_ff = max(1, round(1 + (target - low) / (high - low) * 1024))
    value = measured(d_ff)
    if abs(value / target - 1) > MATCH:
        raise InputError(
            f"config.rungs.match={measure!r}: with model.d_ff={d_ff} an arm has {value:,.0f} "
            f"{measure}, more than {MATCH:.1%} off the baseline's {target:,.0f}; use 'none' or a "
            f"larger size"
        )
    return config


def with_shape(config: ConfigDict, shape: Shape) -> ConfigDict:
    """Copies a config and sets its shape."""
    config = ConfigDict(config.to_dict())
    model = config.model
    model.n_layers, model.d_model, model.n_heads = shape.n_layers, shape.d_model, shape.n_heads
    model.head_dim = 0
    if shape.d_ff:
        model.d_ff = shape.d_ff
    return config


def count_parameters(config: ConfigDict, vocab_size: int = 0) -> dict[str, int]:
    """Counts the parameters of an unresolved config: {"total", "non_embedding", "embedding"}."""
    return describe_shape(resolve(config, vocab_size))[0]


_specs_by_shape: dict[str, dict] = {}


def describe_shape(resolved) -> tuple[dict, float]:
    """Returns (counts, "model" FLOPs per token) of a resolved config."""
    groups = (resolved.model, resolved.parametrization, resolved.own)
    key = repr(([group.to_dict() for group in groups], resolved.data.seq_len))
    if key not in _specs_by_shape:
        _specs_by_shape[key] = declare_specs(resolved, "cpu")
    specs = _specs_by_shape[key]
    return flops.parameter_counts(specs), flops.flops_per_token(resolved, specs)["model"]


def _candidates(
    config, target, convention, head_dim, vocab_size, low: float, high: float
) -> list[tuple[Shape, int]]:
    """Lists (shape, d_ff by its rule) for widths from low to high, until one block is too large.

    A count is base + n_layers (block + per_unit d_ff), so three models determine those of a width.
    """
    candidates = []
    for heads in itertools.count(max(1, math.floor(low / head_dim))):
        width = heads * head_dim

        def counted(depth: int, d_ff: int = 0, width=width, heads=heads) -> int:
            resized = with_shape(config, Shape(depth, width, heads, 0, d_ff))
            return count_parameters(resized, vocab_size)[convention]

        probe = with_shape(config, Shape(1, width, heads, 0))
        rule = resolve(probe, vocab_size).model.d_ff
        n_one = counted(1)
        block, per_unit = counted(2) - n_one, counted(1, rule + 1) - n_one
        for depth in range(1, MAX_DEPTH + 1):
            n = n_one + (depth - 1) * block
            candidates.append((Shape(depth, width, heads, n), rule))
            # The d_ff with exactly the target; 0 if the count does not include d_ff.
            exact = rule + (target - n) / (depth * per_unit) if per_unit else 0
            for d_ff in (round(exact / 8) * 8, round(exact)):
                size = n + depth * per_unit * (d_ff - rule)
                near = abs(size / target - 1) <= TOLERANCE
                if near and d_ff > 0 and abs(math.log(d_ff / rule)) <= STRETCH:
                    candidates.append((Shape(depth, width, heads, size, d_ff), rule))
                    break
            if n > 2 * target:
                break
        if (n_one > target * (1 + TOLERANCE) or width > high) and candidates:
            return candidates


def at_size(config: ConfigDict, sweep: str, size: int) -> ConfigDict:
    """Copies a config at another width, depth or head size, by `sweep`.

    Widths keep the head size and the ratio of query to key heads, head sizes keep the number of
    heads; d_ff follows by its rule, or in proportion if it was set. Raises InputError.
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
        if scheme_of(config).has_base and not base.base_head_dim:
            base.base_head_dim = head_dim
        model.head_dim = size
    else:
        if size % head_dim:
            raise InputError(
                f"--widths={size} is not a multiple of the head size {head_dim} (model.d_model / "
                f"model.n_heads); use {max(1, round(size / head_dim)) * head_dim}"
            )
        group = model.n_heads // (model.n_kv_heads or model.n_heads)
        heads = size // head_dim
        if heads % group:
            raise InputError(
                f"--widths={size} makes {heads} heads, not a multiple of the {group} query heads "
                f"per key head; use {group * head_dim}"
            )
        model.n_heads = heads
        model.n_kv_heads = heads // group if model.n_kv_heads else 0
    model.d_model = width
    return config


def with_mistake(parametrization: ConfigDict, control: str) -> None:
    """Sets the mistake of this name in a `parametrization` group, in place."""
    if control == "sp":
        initial = {name: parametrization[name] for name in ("init_std", "residual_init")}
        parametrization.update(base_config().parametrization)
        parametrization.update(initial)
    elif control != "none":
        parametrization.control = control
