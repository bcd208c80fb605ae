"""Muon against AdamW, each at its own best rate, on the embedded corpus.

    python -m lmscale_jax.ladder --config=configs/ladders/muon_vs_adamw.py --workdir=runs/muon

Every anchor tries three rates in each arm: AdamW's own, and the one that Muon gives the matrices.
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering


def get_config():
    run = small_decoder()

    c = laddering.get_config(run)
    c.question = "Does Muon need less compute than AdamW, and does the gain last?"
    c.switch = ("optim.name",)
    c.arms = {"adamw": {}, "muon": {"optim": {"name": "muon"}}}
    c.baseline = "adamw"
    c.rungs.sizes, c.rungs.held_out = (1e5, 2e5, 4e5, 8e5), 2e6
    c.rungs.head_dim, c.rungs.aspect = 16, 32.0
    c.tokens.amounts = (10.0,)
    c.tune = {
        "adamw": {"optim": {"lr": (2e-3, 4e-3, 8e-3)}},
        "muon": {"optim": {"muon_lr": (0.01, 0.02, 0.04)}},
    }
    c.seeds = 2
    return c
