"""Muon in a few minutes on a CPU; benchmarks/optimizer_sweep.py sweeps its rates and AdamW's."""

from lmscale_jax.configs import base


def get_config():
    c = base.get_config()
    c.model.n_layers, c.model.d_model, c.model.n_heads = 3, 96, 4
    c.model.norm, c.model.mlp, c.model.positions = "rmsnorm", "swiglu", "rope"
    # About 1 / sqrt(width); GPT-2's 0.02 is meant for 768 channels.
    c.parametrization.init_std = 0.08
    c.data.vocab_size, c.data.seq_len = 1024, 128
    c.train.steps, c.train.batch_size = 300, 16
    c.optim.name = "muon"
    # Each the best of a sweep by factors of two (docs/optimizers.md). Both are the schedule's peak;
    # muon_lr is that of the matrices in blocks.
    c.optim.lr, c.optim.muon_lr = 8e-3, 0.02
    c.eval.every, c.eval.tokens = 20, 40_000
    return c
