"""GeLU against SwiGLU on TinyStories: anchors of 3M, 10M and 30M, a forecast for 85M parameters.

    python -m lmscale_jax.ladder --config=configs/ladders/gelu_vs_swiglu.py:tinystories/*.bin \\
        --workdir=runs/gelu_vs_swiglu --dry_run

Sizes are non-embedding parameters and exact to 2 %; the arms match within 0.5 %. Both are tuned
over the learning rate at every anchor, and three seeds vary initialisation and data order alike.
"""

from lmscale_jax.config.recipes import on_shards
from lmscale_jax.configs import base, laddering


def get_config(path: str = "tinystories/*.bin"):
    run = on_shards(base.get_config(), path)
    run.model.norm, run.model.positions, run.model.dtype = "rmsnorm", "rope", "bfloat16"
    run.data.seq_len, run.train.batch_size = 512, 64
    run.schedule.warmup = "5%"

    c = laddering.get_config(run)
    c.question = "Does SwiGLU beat GeLU at equal parameters: an exponent, or an offset?"
    c.switch = ("model.mlp",)
    c.arms = {"gelu": {}, "swiglu": {"model": {"mlp": "swiglu"}}}
    c.baseline = "gelu"
    c.rungs.sizes, c.rungs.held_out = (3e6, 1e7, 3e7), 8.5e7
    c.rungs.head_dim, c.rungs.match = 32, "parameters"
    c.tune = {"all": {"optim": {"lr": (1e-3, 2e-3, 4e-3)}}}
    c.seeds = 3
    return c
