"""Terms of the loss from a user's code, objective.terms, on top of language modelling."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import OwnCode, split_code
from lmscale_jax.errors import InputError

NEEDS = ("logz", "streams")


class TermInputs(NamedTuple):
    """What a term may read of the forward pass over a micro-batch of B rows of T tokens.

    Attributes:
      tokens, targets: int32 [B, T]; a target of -1 is not counted.
      counted: bool [B, T], the tokens with a target.
      nll: loss of each token in nats, float32 [B, T]; 0 where not counted.
      logz: log of the sum of exponentials of the logits, float32 [B, T]; with NEEDS "logz".
      streams: outputs of the L blocks, [L, B * T, D]; with NEEDS "streams". Its tokens are in the
        order of `ForwardContext.unflatten`, so only means over all of them make sense.
    """

    tokens: jax.Array
    targets: jax.Array
    counted: jax.Array
    nll: jax.Array
    logz: jax.Array | None = None
    streams: jax.Array | None = None


class Term(NamedTuple):
    """One term.

    Attributes:
      name: of its metric, term/NAME.
      value: (params, TermInputs, config, step) -> scalar.
      needs: of NEEDS.
      per_token: it is a mean over the counted tokens, so micro-batches weigh by their number;
        else it depends on the parameters alone, or is a mean over rows.
    """

    name: str
    value: Callable
    needs: tuple[str, ...]
    per_token: bool


def _own_term(code: OwnCode) -> Term:
    entry = code.entry
    code.require("a function (params, out, settings, step)", callable(entry))
    needs, per = getattr(entry, "NEEDS", ()), getattr(entry, "PER", None)
    if per not in ("token", "batch") or not set(needs) <= set(NEEDS):
        raise InputError(
            f"{code.where}: PER={per!r} and NEEDS={needs!r}; use PER = 'token' for a mean over "
            f"tokens, else 'batch', and NEEDS of {', '.join(NEEDS)}"
        )

    def value(params, out: TermInputs, config, step) -> jax.Array:
        term = entry(params, out, code.settings(config), step)
        if getattr(term, "shape", ()) != ():
            raise InputError(f"{code.where} returns the shape {term.shape}, and not a scalar")
        return term

    return Term(entry.__name__, value, tuple(needs), per == "token")


TERMS = Modes("objective.terms", {}, _own_term)


def loss_terms(config) -> list[Term]:
    """Returns the terms of a resolved config. Raises InputError where two have one name."""
    text = config.objective.terms
    terms = [TERMS[part] for part in split_code(text)] if text else []
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise InputError(
            f"config.objective.terms={text!r} has two terms of one name; use another name"
        )
    return terms
