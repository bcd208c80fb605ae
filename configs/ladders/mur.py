"""Marginal Utility Regularization against nothing: does it help, and at scale?

    python -m lmscale_jax.ladder --config=configs/ladders/mur.py --workdir=runs/mur_ladder

The arms differ in `mur.*` alone; warm-up, sequence length and everything else are the same.
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering

_ACTING = {"tau": 0.1, "warmup": "5%", "ramp": "10%"}


def get_config():
    run = small_decoder()
    run.model.d_model, run.model.n_heads = 64, 4

    c = laddering.get_config(run)
    c.question = "Does waking redundant layers lower the loss, and does it at scale?"
    c.switch = ("mur",)
    c.arms = {
        "baseline": {},
        "update": {"mur": {"mode": "update", "alpha": 5.0} | _ACTING},
        "loss": {"mur": {"mode": "loss", "lambda_max": 1.0} | _ACTING},
    }
    c.baseline = "baseline"
    c.rungs.by = "depth"
    c.rungs.sizes, c.rungs.held_out = (4.0, 6.0, 8.0), 16.0
    c.tokens.amounts = (10.0,)
    c.seeds = 3
    return c
