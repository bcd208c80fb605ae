"""The model in which the gating study compared gates: tied, with projections that begin at zero.

    python -m lmscale_jax.main --config=configs/speedrun_gate.py:elementwise --workdir=runs/gated

The argument is model.attn_gate. Muon takes the matrices; free gates and those of heads are AdamW's.
"""

from configs import base


def get_config(gate: str = "none"):
    c = base.get_config()
    m = c.model
    m.n_layers, m.d_model, m.n_heads, m.vocab_size = 12, 768, 6, 50_304
    m.mlp, m.norm, m.norm_gain, m.norm_eps = "relu2", "rmsnorm", "none", 1.2e-7
    m.positions, m.qk_norm, m.dtype, m.attn_gate = "rope", "rmsnorm", "bfloat16", gate
    c.parametrization.init_std = (3 * 768) ** -0.5
    c.parametrization.residual_init = "zeros"
    o = c.optim
    o.name, o.muon_lr, o.muon_scale, o.muon_coefficients = "muon", 0.0018, "moonlight", "quintic"
    o.momentum_warmup, o.weight_decay, o.clip, o.lr = "0", 0.0, 0.0, 3.6e-3
    c.schedule.name, c.schedule.warmup = "wsd", "0"
    c.schedule.cooldown, c.schedule.final = "28.4%", 0.0
    c.data.vocab_size, c.data.seq_len = 32_000, 1024
    c.train.steps, c.train.batch_size = 5100, 512
    return c
