"""Specifies the shapes and memory of each form of MLP. Imports no JAX, as configs read it."""

from collections.abc import Callable
from typing import NamedTuple

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode


def _four_widths(width: int) -> int:
    return 4 * width


def _gated_width(width: int) -> int:
    """Returns 8/3 of the width, rounded to a multiple of 64: as many parameters as 4 widths."""
    return max(64, round(8 * width / 3 / 64) * 64)


class MLPForm(NamedTuple):
    """One choice of model.mlp.

    Attributes:
      input_matrices: 1, or 2 with a gate.
      default_width: d_model -> d_ff.
      recomputed_on_cpu, recomputed: whether the compiled backward pass recomputes the activation's
        result, on CPU and elsewhere; measured.
    """

    input_matrices: int
    default_width: Callable[[int], int]
    recomputed_on_cpu: bool
    recomputed: bool


def _form_of_code(code: OwnCode) -> MLPForm:
    d_ff = getattr(code.entry, "d_ff", _four_widths)
    return MLPForm(1, d_ff, recomputed_on_cpu=False, recomputed=False)


MLP_FORMS = Modes(
    "model.mlp",
    {
        "gelu": MLPForm(1, _four_widths, recomputed_on_cpu=True, recomputed=False),
        "relu2": MLPForm(1, _four_widths, recomputed_on_cpu=False, recomputed=False),
        "swiglu": MLPForm(2, _gated_width, recomputed_on_cpu=False, recomputed=True),
        "geglu": MLPForm(2, _gated_width, recomputed_on_cpu=False, recomputed=True),
    },
    _form_of_code,
)
