"""The three families at 50M and 100M parameters as anchors, 300M held out, on FineWeb-Edu.

    python -m lmscale_jax.ladder --config=configs/ladders/families.py:fineweb_edu/*.bin \\
        --workdir=runs/families --dry_run

The arms differ in the block; shape, tokens, batch and rate at one size are the same. The sizes are
totals of the GPT-2 family with GPT-2's tokenizer; each arm's exact counts are in the plan.
"""

from lmscale_jax.config import recipes
from lmscale_jax.config.recipes import on_shards
from lmscale_jax.configs import laddering


def get_config(path: str = "fineweb_edu/*.bin"):
    run = on_shards(recipes.gpt2("50m", recipes.EMBEDDED), path)
    run.parametrization.residual_init = "plain"
    run.model.max_seq_len = 0
    run.data.seq_len = 512

    c = laddering.get_config(run)
    c.question = "GPT-2, Llama or Transformer++: which block is worth its compute?"
    c.switch = ("model",)
    llama = {
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "positions": "rope",
        "head": "untied",
        "bias": False,
    }
    plus = {"norm": "rmsnorm", "mlp": "swiglu"}
    c.arms = {"gpt2": {}, "llama": {"model": llama}, "transformer_pp": {"model": plus}}
    c.baseline = "gpt2"
    c.rungs.by, c.rungs.sizes, c.rungs.held_out = "total", (5e7, 1e8), 3e8
    c.rungs.match = "parameters"
    c.per_rung = {"optim": {"lr": (1e-3, 6e-4, 3e-4)}}
    c.seeds = 2
    return c
