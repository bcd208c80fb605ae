"""What the backward pass recomputes in place of storing it: `REMAT`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from lmscale_jax.config.key import Modes
from lmscale_jax.model.layers import PRODUCT


class Remat(NamedTuple):
    """One choice of model.remat.

    Attributes:
      wrap: function -> the same function, whose backward pass recomputes what is not stored.
      stored: `memory.BlockBytes` -> bytes stored per token and block.
      recomputed: FLOPs of a token by part (`flops.forward_flops`) -> FLOPs done a second time.
      weight_uses: how often a step reads a block's weight: forward, for the input's gradient, and
        where the block is recomputed.
      more_sweeps: additional reads and writes of a stored activation.
    """

    wrap: Callable[[Callable], Callable]
    stored: Callable
    recomputed: Callable[[dict], float]
    weight_uses: int
    more_sweeps: int


REMAT = Modes(
    "model.remat",
    {
        "none": Remat(lambda block: block, lambda b: b.total, lambda parts: 0.0, 2, 0),
        "block": Remat(
            jax.checkpoint,
            lambda b: b.stream,
            lambda parts: parts["dense"] + parts["attention"],
            3,
            2,
        ),
        "dots": Remat(
            functools.partial(
                jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)
            ),
            lambda b: b.stream + b.products,
            lambda parts: parts["attention"],
            2,
            2,
        ),
    },
)
