"""A whole question in a quarter of an hour on two cores: does SwiGLU beat GeLU at equal parameters?

    python -m lmscale_jax.ladder --config=configs/ladders/quickstart.py --workdir=runs/ladder

Three sizes of anchors and a held-out one on the Python standard library's source, two seeds.
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering


def get_config():
    run = small_decoder()
    run.model.mlp, run.eval.tokens = "gelu", 100_000
    run.checkpoint.every, run.log.per_layer = 200, False

    c = laddering.get_config(run)
    c.question = "Does SwiGLU beat GeLU at equal parameters, and does it at scale?"
    c.switch = ("model.mlp",)
    c.arms = {"gelu": {}, "swiglu": {"model": {"mlp": "swiglu"}}}
    c.baseline = "gelu"
    c.rungs.sizes, c.rungs.held_out = (5e4, 1e5, 2e5), 4e5
    c.rungs.head_dim, c.rungs.aspect, c.rungs.match = 16, 32.0, "parameters"
    c.tokens.amounts = (6.0,)
    c.seeds = 2
    return c
