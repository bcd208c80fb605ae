"""A term of the loss; `objective.terms = here(__file__) + "zloss.py:z_loss"`.

weight * mean(log^2 Z), which keeps the log of the softmax's denominator near 0 (PaLM, Chowdhery et
al. 2022, arXiv 2204.02311). Its value is in metrics.jsonl as term/z_loss; train_loss is without it.
"""

import jax.numpy as jnp

from lmscale_jax.api import Key

KEYS = {"weight": Key(1e-4, "of the mean of log^2 Z", above=0.0)}


def z_loss(params, out, settings, step):
    """Returns the term, a scalar; `out` is a TermInputs of a micro-batch [B, T]."""
    return settings.weight * jnp.square(out.logz).mean(where=out.counted)


z_loss.NEEDS = ("logz",)
# A mean over tokens, so that each micro-batch weighs by its tokens.
z_loss.PER = "token"
