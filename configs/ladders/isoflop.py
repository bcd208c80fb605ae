"""Compute-optimal sizes: one arm, a grid of sizes at each of four budgets of FLOPs.

python -m lmscale_jax.ladder --config=configs/ladders/isoflop.py --workdir=runs/isoflop
python -m lmscale_jax.fit --input=runs/isoflop --law=isoflop --out=runs/isoflop/isoflop.json
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering


def get_config():
    run = small_decoder()

    c = laddering.get_config(run)
    c.question = "How should a budget be split between parameters and tokens?"
    c.arms, c.baseline = {"llama": {}}, "llama"
    c.rungs.sizes = (5e4, 1e5, 2e5, 4e5, 8e5)
    c.rungs.head_dim, c.rungs.aspect = 16, 32.0
    c.tokens.rule, c.tokens.amounts = "flops", (5e11, 1e12, 2e12, 4e12)
    c.seeds = 1
    return c
