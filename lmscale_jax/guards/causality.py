"""Guard: no logit depends on a later token, on another row or on another document.

Every token of a row is replaced in turn, and all logits of the batch are compared to the bit: a
dependence has a difference even where it has no gradient (a comparison, a rounding). Each variant
is one iteration of a loop of one program, so equal inputs give equal bits. The parameters are drawn
at random, so that no zero hides a branch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import QUICKLY, Finding, SmallArm
from lmscale_jax.model.skip_connections import MASKS

# The activations of a block in their order, and what they come from.
TAPS = {"attention": "attention", "mlp": "mlp", "residual": "the residual stream"}
# The key whose value may be a user's code.
KEYS = {"attention": "model.attention_module", "mlp": "model.mlp", "residual": "model.block"}


class Leak(NamedTuple):
    """A dependence that must not be: of (row, position) on the token at `source` of row 0."""

    row: int
    position: int
    source: int


def check_causality(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Replaces each token of the first row in turn and compares all logits to the bit."""
    model, tokens_VxBxT = arm.setup.model, replaced_tokens(arm.setup.config)
    params = arm.params(arm.drawn)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(params, tokens_VxBxT):
        return jax.lax.map(lambda tokens: model.logits(params, tokens), tokens_VxBxT)

    logits = np.asarray(run(params, tokens_VxBxT))
    if not np.isfinite(logits).all():
        return Finding(
            "its logits are not finite at random parameters, with activations of size 1; use a "
            "function that is finite for all inputs"
        )
    leak = first_leak(arm, logits)
    if leak is None:
        length = shrink.LENGTH
        return Finding(note=f"exact over {length * (length - 1) // 2} pairs of positions")
    return Finding(_explain(arm, leak, _through(arm, params, tokens_VxBxT)))


def replaced_tokens(config) -> np.ndarray:
    """Returns [V, B, T]: a batch of two rows, and for each position of row 0 another token."""
    tokens_BxT = shrink.shrunk_batch(config, 0).tokens_BxT[:2]
    variants = np.repeat(tokens_BxT[None], 1 + shrink.LENGTH, axis=0)
    ids = config.model.ids or shrink.VOCAB
    for position in range(shrink.LENGTH):
        token = tokens_BxT[0, position]
        # Neither the mark nor the token itself.
        variants[1 + position, 0, position] = 1 + (token + ids // 2) % (ids - 1)
    return variants


def first_leak(arm: SmallArm, values_VxBxTxF: np.ndarray) -> Leak | None:
    """Returns the first dependence that must not be, of values by variant, row and position."""
    values = values_VxBxTxF.reshape(*values_VxBxTxF.shape[:3], -1)
    changed_VxBxT = (values[1:] != values[:1]).any(axis=-1)
    allowed_VxBxT = np.zeros_like(changed_VxBxT)
    position_T = np.arange(shrink.LENGTH)
    allowed = position_T[None] >= position_T[:, None]
    if MASKS[arm.setup.config.model.mask] is not None:
        document_T = np.searchsorted(shrink.MARKED, position_T, side="right")
        # A mark that is replaced joins two documents.
        same = document_T[None] == document_T[:, None]
        allowed &= same | np.isin(position_T, shrink.MARKED)[:, None]
    allowed_VxBxT[:, 0] = allowed
    # By row first: a look into the future explains one into the next row.
    leaks = np.argwhere((changed_VxBxT & ~allowed_VxBxT).swapaxes(0, 1))
    if not len(leaks):
        return None
    row, source, position = map(int, leaks[0])
    return Leak(row, position, source)


def _through(arm: SmallArm, params: dict, tokens_VxBxT: np.ndarray) -> tuple[int, str] | None:
    """Returns (block, tap) of the first activation with a leak; None: it is in the readout."""
    model, shape = arm.setup.model, tokens_VxBxT.shape

    def taps(tokens):
        keep = lambda name, x: x.astype(jnp.float32) if name in TAPS else jnp.zeros(())  # noqa: E731
        return model.taps(params, tokens, keep)["blocks"]

    # On one device flat tokens are in the order of rows.
    by_name = jax.device_get(jax.jit(lambda t: jax.lax.map(taps, t))(tokens_VxBxT))
    for block in range(arm.setup.config.model.n_layers):
        for name in (n for n in TAPS if n in by_name):
            if first_leak(arm, by_name[name][:, block].reshape(*shape, -1)):
                return block, name
    return None


def _explain(arm: SmallArm, leak: Leak, through: tuple[int, str] | None) -> str:
    if through is None:
        place = "in the embedding or the readout"
    else:
        block, tap = through
        code = arm.code_at(f"model.{ {'mlp': 'mlp', 'attention': 'attention_module'}.get(tap) }")
        place = f"block {block}, through {TAPS[tap]}{f', {code}' if code else ''}"
    where = f"the logits at position {leak.position}"
    if leak.row:
        return (
            f"{where} of row {leak.row} depend on the token at position {leak.source} of row 0 "
            f"({place}): rows of a batch must not see each other; compute over positions and "
            f"channels, not over rows"
        )
    if leak.position >= leak.source:
        return (
            f"{where} depend on the token at position {leak.source} of an earlier document "
            f"({place}); mask it by context.visible() or context.first_key_BxT"
        )
    return (
        f"{where} depend on the token at position {leak.source} ({place}): the model sees the "
        f"future; let position t read positions up to t alone"
    )
