"""The model in which the gating study compared gates: tied, with projections that begin at zero.

    python -m lmscale_jax.main --config=configs/speedrun_gate.py:elementwise --workdir=runs/gated

The argument is model.attn_gate. Muon takes the matrices; free gates and those of heads are AdamW's.
"""

from lmscale_jax.config import recipes


def get_config(gate: str = "none"):
    c = recipes.speedrun_base()
    c.model.norm_gain, c.model.attn_gate = "none", gate
    c.parametrization.init_std = (3 * 768) ** -0.5
    o = c.optim
    o.lr, o.muon_lr, o.muon_scale, o.muon_coefficients = 3.6e-3, 0.0018, "moonlight", "quintic"
    o.momentum_warmup = "0"
    c.schedule.cooldown, c.train.steps = "28.4%", 5100
    return c
