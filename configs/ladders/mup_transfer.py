"""Does the best learning rate of a small model serve a large one? sp against mup, over widths.

    python -m lmscale_jax.ladder --config=configs/ladders/mup_transfer.py --workdir=runs/mup_ladder

Every anchor tries every rate. The held-out width takes the rate that the largest anchor found best,
so the arm whose rate moves with width pays for it there.
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering


def get_config():
    run = small_decoder()
    run.model.head, run.model.n_layers = "untied", 2
    run.model.d_model, run.model.n_heads = 64, 4
    run.parametrization.residual_init = "plain"
    run.schedule.name, run.schedule.warmup, run.schedule.final = "linear", "10%", 0.0

    c = laddering.get_config(run)
    c.question = "Does a rate tuned on small widths serve a wide model better under mup than sp?"
    c.switch = ("parametrization.name", "parametrization.base_width")
    c.arms = {"sp": {}, "mup": {"parametrization": {"name": "mup", "base_width": 64}}}
    c.baseline = "sp"
    c.rungs.by = "width"
    c.rungs.sizes, c.rungs.held_out = (32.0, 64.0, 128.0), 512.0
    c.tokens.rule, c.tokens.amounts = "budgets", (1e6,)
    c.tune = {"all": {"optim": {"lr": tuple(2.0**e for e in (-10, -9, -8, -7, -6))}}}
    c.seeds = 2
    return c
