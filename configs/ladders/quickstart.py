"""A whole question in a quarter of an hour on two cores: does SwiGLU beat GeLU at equal parameters?

    python -m lmscale_jax.ladder --config=configs/ladders/quickstart.py --workdir=runs/ladder

Three sizes of anchors and a held-out one on the Python standard library's source, two seeds.
"""

from configs import base, laddering


def get_config():
    run = base.get_config()
    run.model.norm, run.model.positions = "rmsnorm", "rope"
    run.data.vocab_size, run.data.seq_len = 1024, 128
    run.optim.lr = 6e-3
    # About 1 / sqrt(width): with GPT-2's 0.02, meant for 768 channels, arms lose 0.2 to 0.7 nats
    # at 100k parameters, not the same amount, and not the same at every rate.
    run.parametrization.init_std = 0.08
    run.train.batch_size = 16
    run.eval.every, run.eval.tokens, run.eval.sample, run.eval.baselines = 0, 100_000, 0, False
    run.checkpoint.every = 200
    run.log.tensorboard, run.log.per_layer = False, False

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
