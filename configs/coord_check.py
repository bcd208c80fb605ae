"""A coordinate check of a few minutes: two blocks on one repeated batch of real text.

    python -m lmscale_jax.coord_check --config=configs/coord_check.py:gpt2 --workdir=runs/coords

Families: llama (default) and gpt2. The learning rate is large on purpose, so that a wrong scale
shows within ten steps.
"""

from configs import base

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
    c.data.vocab_size, c.data.seq_len = 1024, 64
    c.optim.lr = 1e-2
    c.schedule.name, c.schedule.warmup = "constant", "0"
    c.train.steps, c.train.batch_size = 10, 8
    # Populations run in one program on one device.
    c.mesh.cpu_devices = 1
    return c
