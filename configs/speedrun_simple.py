"""The plain model on which modded-nanogpt compares optimizers (track 3), with its tuned Muon.

    python -m lmscale_jax.main --config=configs/speedrun_simple.py --workdir=runs/simple

By default on the embedded corpus; with shards of GPT-2 tokens (`:'fineweb10B/*.bin'`) it is the
original's task, where the validation loss after 3,250 steps is 3.279. There embeddings, readout and
vectors decay by 0.001 of their rate as well.
"""

from lmscale_jax.config import recipes


def get_config(path: str = ""):
    c = recipes.speedrun_base()
    recipes.untie_readout(c)
    o = c.optim
    c.model.bias, c.model.softcap_form = True, "algebraic"
    c.parametrization.init_std = (0.33 / 768) ** 0.5
    o.muon_lr, o.muon_coefficients = 0.025, "stable"
    o.weight_decay, o.decay_mode, o.decay_on = 0.05, "coupled", "hidden"
    o.lr, o.head_lr_factor, o.vector_lr_factor = 0.7, 0.004 / 0.7, 0.015 / 0.7
    c.schedule.cooldown, c.train.steps = "70%", 3250
    return recipes.on_path(c, path)
