"""A coordinate check of a few minutes: two blocks on one repeated batch of real text.

    python -m lmscale_jax.coord_check --config=configs/coord_check.py:gpt2 --workdir=runs/coords

Families: llama (default) and gpt2. The learning rate is large on purpose, so that a wrong scale
shows within ten steps.
"""

from lmscale_jax.configs import base

FAMILIES = {
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "head": "untied"},
    "gpt2": {"norm": "layernorm", "mlp": "gelu", "positions": "learned", "bias": True},
}


def get_config(family: str = "llama"):
    c = base.get_config()
    c.model.update(FAMILIES[family])
    c.model.n_layers, c.model.d_model, c.model.n_heads = 2, 256, 8
    c.parametrization.name, c.parametrization.base_width = "mup", 256
    c.parametrization.residual_init = "plain"
    # One update must not replace the residual stream: embeddings have a std of 0.4, and the first
    # updates add about as much.
    c.parametrization.embed_scale = 20.0
    # Few tokens: an update is coherent with each of them by 1 / sqrt(tokens), and that must exceed
    # the incoherent part, 1 / sqrt(width), at the smallest width.
    c.data.vocab_size, c.data.seq_len = 1024, 16
    c.optim.lr = 3e-3
    c.schedule.name, c.schedule.warmup = "constant", "0"
    c.train.steps, c.train.batch_size = 10, 2
    # Populations run in one program on one device.
    c.mesh.cpu_devices = 1
    return c
