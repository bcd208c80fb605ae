"""Shapes that meet a target number of parameters, or an honest word on the nearest.

A config at other sizes of its family, and the deliberate mistakes that checks must find.
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
from lmscale_jax.model.build import build_model
from lmscale_jax.model.parametrization import scheme_of

TOLERANCE = 0.02
# Of arms that are compared at one size.
MATCH = 0.005
MAX_DEPTH = 256
# ln of how far d_ff may be from its rule.
STRETCH = math.log(1.3)


# (counts, FLOPs per token) -> what arms at one size spend alike; None: no more than the shape.
MEASURES = Modes(
    "rungs.match",
    {
        "none": None,
        "parameters": lambda counts, flops_per_token: counts["non_embedding"],
        "flops": lambda counts, flops_per_token: flops_per_token,
    },
)


class Shape(NamedTuple):
    """A solved size: `n` is its count by the convention asked for; d_ff 0: by its rule."""

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
    """A shape within 2% of `target` of usual proportions: the least |ln(d_model / n_layers /
    aspect)| + 2 |ln(d_ff / its rule's)|.

    Widths are whole numbers of heads of `head_dim` channels. Where d_ff by its rule misses the
    target, d_ff is solved too, to a multiple of 8 if that is near enough, within 30% of the rule.
    Among equals the count nearest to the target wins.

    Args:
      config: not yet resolved; its own n_layers, d_model and n_heads do not matter.
      target: parameters.
      convention: "total", "non_embedding" or "embedding", as in run.json's counts.
      aspect: width over depth; 64 is about that of GPT-2 small.
      head_dim: channels per head.
      vocab_size: the tokenizer's, where the config leaves it open.

    Raises:
      InputError: no shape is near enough; names the nearest.
    """
    # A block has some 12 d_model^2 parameters; further off a shape is not usual.
    usual = (target * aspect / 12) ** (1 / 3)
    for low, high in ((usual / 3, usual * 2), (0.0, math.inf)):
        found = _candidates(config, target, convention, head_dim, vocab_size, low, high)
        near = [(s, rule) for s, rule in found if abs(s.n / target - 1) <= TOLERANCE]
        if near:
            break
    else:
        best = min(found, key=lambda one: abs(math.log(one[0].n / target)))[0]
        raise InputError(
            f"rungs: no model of {target:,.0f} {convention} parameters with heads of {head_dim} "
            f"channels; the nearest has {best.n:,} (n_layers={best.n_layers}, "
            f"d_model={best.d_model}), and smaller heads reach more sizes"
        )

    def unusual(one: tuple[Shape, int]) -> tuple[float, float]:
        shape, rule = one
        stretched = abs(math.log((shape.d_ff or rule) / rule))
        off = abs(math.log(shape.d_model / shape.n_layers / aspect))
        return round(off + 2 * stretched, 6), abs(shape.n - target)

    return min(near, key=unusual)[0]


def match_parameters(
    config: ConfigDict, target: float, measure: str, vocab_size: int = 0
) -> ConfigDict:
    """A copy whose d_ff makes it spend `target` within 0.5%, every other dimension kept.

    Args:
      config: not yet resolved.
      target: what another arm has of `measure`.
      measure: "parameters" (non-embedding) or "flops" (FLOPs per token, "model" of
        `flops.flops_per_token`).

    Raises:
      InputError: the nearest d_ff is not near enough.
    """

    def spent(d_ff: int) -> float:
        config.model.d_ff = d_ff
        counts, per_token = describe_shape(resolve(config, vocab_size))
        return MEASURES[measure](counts, per_token)

    config = ConfigDict(config.to_dict())
    # Both measures are linear in d_ff.
    one, many = spent(1), spent(1025)
    d_ff = max(1, round(1 + (target - one) / (many - one) * 1024))
    found = spent(d_ff)
    if abs(found / target - 1) > MATCH:
        raise InputError(
            f"config.rungs.match={measure!r}: with model.d_ff={d_ff} an arm has {found:,.0f} where "
            f"the baseline has {target:,.0f} {measure}, more than {MATCH:.1%} off; a larger size "
            f"or 'none' would work"
        )
    return config


def with_shape(config: ConfigDict, shape: Shape) -> ConfigDict:
    """A copy of the config with that shape."""
    config = ConfigDict(config.to_dict())
    model = config.model
    model.n_layers, model.d_model, model.n_heads = shape.n_layers, shape.d_model, shape.n_heads
    model.head_dim = 0
    if shape.d_ff:
        model.d_ff = shape.d_ff
    return config


def count_parameters(config: ConfigDict, vocab_size: int = 0) -> dict[str, int]:
    """{"total", "non_embedding", "embedding"} of an unresolved config, without allocating it."""
    return describe_shape(resolve(config, vocab_size))[0]


_known: dict[str, tuple[dict, float]] = {}


def describe_shape(resolved) -> tuple[dict, float]:
    """(counts, "model" FLOPs per token) of a resolved config; each shape is built once."""
    groups = (resolved.model.to_dict(), resolved.parametrization.to_dict(), resolved.data.seq_len)
    key = repr(groups)
    if key not in _known:
        specs = build_model(resolved, platform="cpu").specs
        per_token = flops.flops_per_token(resolved, specs)["model"]
        _known[key] = flops.counts(specs), per_token
    counts, per_token = _known[key]
    return dict(counts), per_token


def _candidates(
    config, target, convention, head_dim, vocab_size, low: float, high: float
) -> list[tuple[Shape, int]]:
    """(shape, d_ff by its rule) for widths low to high, up to that at which one block is too much.

    A count is base + n_layers (block + each d_ff), so three models of a width say all.
    """
    found = []
    for heads in itertools.count(max(1, math.floor(low / head_dim))):
        width = heads * head_dim

        def counted(depth: int, d_ff: int = 0, width=width, heads=heads) -> int:
            made = with_shape(config, Shape(depth, width, heads, 0, d_ff))
            return count_parameters(made, vocab_size)[convention]

        probe = with_shape(config, Shape(1, width, heads, 0))
        rule = resolve(probe, vocab_size).model.d_ff
        one, two, wider = counted(1), counted(2), counted(1, rule + 1)
        block, each = two - one, wider - one
        for depth in range(1, MAX_DEPTH + 1):
            n = one + (depth - 1) * block
            found.append((Shape(depth, width, heads, n), rule))
            # What d_ff would make it exact; 0 where d_ff is no part of the count.
            exact = rule + (target - n) / (depth * each) if each else 0
            for d_ff in (round(exact / 8) * 8, round(exact)):
                size = n + depth * each * (d_ff - rule)
                near = abs(size / target - 1) <= TOLERANCE
                if near and d_ff > 0 and abs(math.log(d_ff / rule)) <= STRETCH:
                    found.append((Shape(depth, width, heads, size, d_ff), rule))
                    break
            if n > 2 * target:
                break
        if (one > target * (1 + TOLERANCE) or width > high) and found:
            return found


def at_size(config: ConfigDict, sweep: str, size: int) -> ConfigDict:
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
        if scheme_of(config).has_base and not base.base_head_dim:
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


def with_mistake(parametrization: ConfigDict, control: str) -> None:
    """Puts the mistake of that name into a group of keys."""
    if control == "sp":
        kept = {name: parametrization[name] for name in ("init_std", "residual_init")}
        parametrization.update(base_config().parametrization)
        parametrization.update(kept)
    elif control != "none":
        parametrization.control = control
