"""Minutes on a laptop CPU: a small decoder on the Python standard library's source text."""

from lmscale_jax.configs import base


def get_config():
    c = base.get_config()
    c.model.n_layers, c.model.d_model, c.model.n_heads = 4, 128, 4
    c.model.norm, c.model.mlp, c.model.positions = "rmsnorm", "swiglu", "rope"
    c.data.vocab_size, c.data.seq_len = 1024, 128
    c.optim.lr = 4e-3
    c.train.steps, c.train.batch_size = 600, 32
    c.eval.every, c.checkpoint.every = 200, 200
    return c
