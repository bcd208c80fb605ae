"""The model of modded-nanogpt's record 26 (2025), with its optimizer and schedule.

    python -m lmscale_jax.main --config=configs/speedrun_record26.py --workdir=runs/record26
    python -m lmscale_jax.main --config=configs/speedrun_record26.py:'shards/*.bin' --workdir=...

By default on the embedded corpus; with shards of GPT-2 tokens it is the original's task, where its
validation loss after 1,750 steps is 3.279. Micro-batches are the original's 8 rows. As there, block
7 has no attention.
"""

from lmscale_jax.config import recipes


def get_config(path: str = ""):
    c = recipes.speedrun_base()
    recipes.untie_readout(c)
    m, o = c.model, c.optim
    m.norm_gain, m.logit_scale = "none", "inverse_sqrt_width"
    m.embed_norm, m.skips, m.x0_mix, m.value_embeddings = "rmsnorm", "unet", "learned", 3
    m.attention_skip = "7"
    m.mask, m.window_layers, m.window, m.window_block = "document", "ends", 1728, 128
    m.window_growth = "100%"
    c.parametrization.init_std = 0.5 * 768**-0.5
    o.muon_lr, o.muon_coefficients, o.momentum_warmup = 0.05, "quintic", "300"
    o.lr, o.head_lr_factor, o.vector_lr_factor = 0.6, 0.22 / 0.6, 0.04 / 0.6
    c.schedule.cooldown, c.schedule.final = "45%", 0.05
    c.data.seq_len, c.train.steps, c.train.batch_size, c.train.accum = 8192, 1750, 48, 6
    return recipes.on_path(c, path)
