"""Shapes that meet a target number of parameters, or an honest word on the nearest."""

import itertools
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax import config as configs
from lmscale_jax.errors import InputError
from lmscale_jax.model import flops
from lmscale_jax.model.build import build

TOLERANCE = 0.02
# Of arms that are compared at one size.
MATCH = 0.005
MAX_DEPTH = 256


class Shape(NamedTuple):
    """A solved size: `n` is its count under the convention that was asked for."""

    n_layers: int
    d_model: int
    n_heads: int
    n: int


def solve(
    config: ConfigDict,
    target: float,
    convention: str = "non_embedding",
    aspect: float = 64.0,
    head_dim: int = 64,
    vocab_size: int = 0,
) -> Shape:
    """The shape within 2% of `target` whose d_model / n_layers is nearest to `aspect`.

    Widths are whole numbers of heads of `head_dim` channels; d_ff follows by the config's own rule.
    Nearness is by the logarithm of the ratio; among equals the count nearest to the target wins.

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
    found = _candidates(config, target, convention, head_dim, vocab_size)
    near = [s for s in found if abs(s.n / target - 1) <= TOLERANCE]
    if not near:
        best = min(found, key=lambda s: abs(math.log(s.n / target)))
        raise InputError(
            f"rungs: no model of {target:,.0f} {convention} parameters with heads of {head_dim} "
            f"channels; the nearest has {best.n:,} (n_layers={best.n_layers}, "
            f"d_model={best.d_model}), and smaller heads reach more sizes"
        )
    return min(
        near, key=lambda s: (abs(math.log(s.d_model / s.n_layers / aspect)), abs(s.n - target))
    )


def matched(config: ConfigDict, target: float, measure: str, vocab_size: int = 0) -> ConfigDict:
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
        resolved = configs.resolve(config, vocab_size)
        specs = build(resolved, platform="cpu").specs
        if measure == "flops":
            return flops.flops_per_token(resolved, specs)["model"]
        return flops.counts(specs)["non_embedding"]

    config = ConfigDict(config.to_dict())
    # Both measures are linear in d_ff.
    one, many = spent(1), spent(1025)
    d_ff = max(1, round(1 + (target - one) / (many - one) * 1024))
    found = spent(d_ff)
    if abs(found / target - 1) > MATCH:
        raise InputError(
            f"config.rungs.match={measure!r}: with model.d_ff={d_ff} an arm has {found:,.0f} where "
            f"the baseline has {target:,.0f} {measure}, more than {MATCH:.1%} off; a larger size or "
            f"'none' would work"
        )
    return config


def resized(config: ConfigDict, shape: Shape) -> ConfigDict:
    """A copy of the config with that shape."""
    config = ConfigDict(config.to_dict())
    model = config.model
    model.n_layers, model.d_model, model.n_heads = shape.n_layers, shape.d_model, shape.n_heads
    model.head_dim = 0
    return config


def count(config: ConfigDict, vocab_size: int = 0) -> dict[str, int]:
    """{"total", "non_embedding", "embedding"} of an unresolved config, without allocating it."""
    resolved = configs.resolve(config, vocab_size)
    return flops.counts(build(resolved, platform="cpu").specs)


def _candidates(config, target, convention, head_dim, vocab_size) -> list[Shape]:
    """Every width up to that at which one block is too much, with the depths around the target.

    At one width the count is linear in the depth, so two models say all.
    """
    found = []
    for heads in itertools.count(1):
        width = heads * head_dim
        one, two = (
            count(resized(config, Shape(depth, width, heads, 0)), vocab_size)[convention]
            for depth in (1, 2)
        )
        block = max(1, two - one)
        exact = 1 + (target - one) / block
        for depth in {max(1, math.floor(exact)), max(1, math.ceil(exact))}:
            found.append(Shape(depth, width, heads, one + (depth - 1) * (two - one)))
        if one > target * (1 + TOLERANCE):
            return [shape for shape in found if shape.n_layers <= MAX_DEPTH]
