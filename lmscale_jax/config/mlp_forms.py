"""What the form of an MLP means for its shapes and its memory; without JAX, for configs."""

from collections.abc import Callable
from typing import NamedTuple

from lmscale_jax.config.key import Modes


def _four_widths(width: int) -> int:
    return 4 * width


def _gated_width(width: int) -> int:
    """Returns 8/3 of the width in multiples of 64: three matrices with the parameters of two."""
    return max(64, round(8 * width / 3 / 64) * 64)


class MLPForm(NamedTuple):
    """One choice of model.mlp.

    Attributes:
      input_matrices: 1, or 2 with a gate.
      default_width: width of the stream -> d_ff.
      recomputed_on_cpu, recomputed: the backward pass computes the activation's result again, on
        CPU and elsewhere; as measured, the compiler decides.
    """

    input_matrices: int
    default_width: Callable[[int], int]
    recomputed_on_cpu: bool
    recomputed: bool


MLP_FORMS = Modes(
    "model.mlp",
    {
        "gelu": MLPForm(1, _four_widths, recomputed_on_cpu=True, recomputed=False),
        "relu2": MLPForm(1, _four_widths, recomputed_on_cpu=False, recomputed=False),
        "swiglu": MLPForm(2, _gated_width, recomputed_on_cpu=False, recomputed=True),
        "geglu": MLPForm(2, _gated_width, recomputed_on_cpu=False, recomputed=True),
    },
)
