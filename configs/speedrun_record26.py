"""The model of modded-nanogpt's record 26 (2025), with its optimizer and schedule.

    python -m lmscale_jax.main --config=configs/speedrun_record26.py --workdir=runs/record26
    python -m lmscale_jax.main --config=configs/speedrun_record26.py:'shards/*.bin' --workdir=...

By default on the embedded corpus; with shards of GPT-2 tokens it is the original's task, where its
validation loss after 1,750 steps is 3.279. Block 7 has no attention there, and has here.
"""

from configs import base
from configs.ladders import corpora


def get_config(path: str = ""):
    c = base.get_config()
    m = c.model
    m.n_layers, m.d_model, m.n_heads, m.head_dim, m.vocab_size = 12, 768, 6, 128, 50_304
    m.mlp, m.norm, m.norm_gain, m.norm_eps = "relu2", "rmsnorm", "none", 1.2e-7
    m.positions, m.rope_channels, m.rope_theta, m.qk_norm = "rope", "half", 1024.0, "rmsnorm"
    m.embed_norm, m.skips, m.x0_mix, m.value_embeddings = "rmsnorm", "unet", "learned", 3
    m.head, m.logit_scale, m.logit_softcap = "untied", "inverse_sqrt_width", 15.0
    m.mask, m.window_layers, m.window, m.window_block = "document", "ends", 1728, 128
    m.window_growth, m.dtype = "100%", "bfloat16"
    p = c.parametrization
    p.init_std, p.embed_std, p.residual_init, p.head_init = 0.5 * 768**-0.5, 1.0, "zeros", "zeros"
    p.attention_scale = 0.12 * 128**0.5
    o = c.optim
    o.name, o.muon_lr, o.muon_scale, o.muon_coefficients = "muon", 0.05, "kj", "quintic"
    o.momentum_warmup, o.weight_decay, o.clip = "300", 0.0, 0.0
    o.lr, o.beta1, o.beta2, o.eps = 0.6, 0.8, 0.95, 1e-10
    o.head_lr_factor, o.vector_lr_factor = 0.22 / 0.6, 0.04 / 0.6
    c.schedule.name, c.schedule.warmup = "wsd", "0"
    c.schedule.cooldown, c.schedule.final = "45%", 0.05
    c.data.vocab_size, c.data.seq_len = 32_000, 8192
    c.train.steps, c.train.batch_size = 1750, 48
    return corpora.shards(c, path, vocab_size=50_304) if path else c
