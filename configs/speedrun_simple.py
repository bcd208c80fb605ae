"""The plain model on which modded-nanogpt compares optimizers (track 3), with its tuned Muon.

    python -m lmscale_jax.main --config=configs/speedrun_simple.py --workdir=runs/simple

By default on the embedded corpus; with shards of GPT-2 tokens (`:'fineweb10B/*.bin'`) it is the
original's task, where the validation loss after 3,250 steps is 3.279. There embeddings, readout and
vectors decay by 0.001 of their rate as well.
"""

from configs import base
from configs.ladders import corpora


def get_config(path: str = ""):
    c = base.get_config()
    m = c.model
    m.n_layers, m.d_model, m.n_heads, m.head_dim, m.vocab_size = 12, 768, 6, 128, 50_304
    m.mlp, m.norm, m.norm_eps, m.bias = "relu2", "rmsnorm", 1.2e-7, True
    m.positions, m.rope_channels, m.rope_theta, m.qk_norm = "rope", "half", 1024.0, "rmsnorm"
    m.head, m.logit_softcap, m.softcap_form, m.dtype = "untied", 15.0, "algebraic", "bfloat16"
    p = c.parametrization
    p.init_std, p.embed_std = (0.33 / 768) ** 0.5, 1.0
    p.residual_init, p.head_init = "zeros", "zeros"
    p.attention_scale = 0.12 * 128**0.5
    o = c.optim
    o.name, o.muon_lr, o.muon_scale, o.muon_coefficients = "muon", 0.025, "kj", "stable"
    o.weight_decay, o.decay_mode, o.decay_on, o.clip = 0.05, "coupled", "hidden", 0.0
    o.lr, o.beta1, o.beta2, o.eps = 0.7, 0.8, 0.95, 1e-10
    o.head_lr_factor, o.vector_lr_factor = 0.004 / 0.7, 0.015 / 0.7
    c.schedule.name, c.schedule.warmup = "wsd", "0"
    c.schedule.cooldown, c.schedule.final = "70%", 0.0
    c.data.vocab_size, c.data.seq_len = 32_000, 1024
    c.train.steps, c.train.batch_size = 3250, 512
    return corpora.shards(c, path, vocab_size=50_304) if path else c
