"""A learning-rate sweep over widths on real text: small enough for minutes on two cores.

python -m lmscale_jax.lr_transfer --config=configs/lr_transfer.py --workdir=runs/transfer
"""

from lmscale_jax.configs import coord_check


def get_config(family: str = "llama"):
    c = coord_check.get_config(family)
    c.data.seq_len, c.parametrization.embed_scale = 64, 1.0
    c.model.n_layers, c.model.d_model, c.model.n_heads = 2, 64, 4
    c.parametrization.base_width = 64
    # About 1 / sqrt(width). From GPT-2's 0.02, meant for 768 channels, two hundred steps go into
    # growing, and width 256 comes out behind 128.
    c.parametrization.init_std = 0.1
    c.schedule.name, c.schedule.warmup, c.schedule.final = "linear", "10%", 0.0
    c.train.steps, c.train.batch_size = 200, 8
    c.optim.lr = 2.0**-6
    c.eval.tokens, c.eval.batch_size = 16_384, 32
    return c
