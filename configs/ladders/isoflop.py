"""Compute-optimal sizes: one arm, a grid of sizes at each of four budgets of FLOPs.

python -m lmscale_jax.ladder --config=configs/ladders/isoflop.py --workdir=runs/isoflop
python -m lmscale_jax.fit --input=runs/isoflop --law=isoflop --out=runs/isoflop/isoflop.json
"""

from configs import base, laddering


def get_config():
    run = base.get_config()
    run.model.norm, run.model.mlp, run.model.positions = "rmsnorm", "swiglu", "rope"
    run.data.vocab_size, run.data.seq_len = 1024, 128
    run.optim.lr, run.train.batch_size = 4e-3, 16
    run.eval.every, run.eval.tokens, run.eval.sample, run.eval.baselines = 0, 200_000, 0, False
    run.log.tensorboard = False

    c = laddering.get_config(run)
    c.question = "How should a budget be split between parameters and tokens?"
    c.arms, c.baseline = {"llama": {}}, "llama"
    c.rungs.sizes = (5e4, 1e5, 2e5, 4e5, 8e5)
    c.rungs.head_dim, c.rungs.aspect = 16, 32.0
    c.tokens.rule, c.tokens.amounts = "flops", (5e11, 1e12, 2e12, 4e12)
    c.seeds = 1
    return c
