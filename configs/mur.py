"""Baseline and Marginal Utility Regularization, alike in all but `mur.*`.

    python -m lmscale_jax.main --config=configs/mur.py:llama_50m,update --workdir=runs/llama_update

FAMILY_SIZE: gpt2, llama or transformer_pp, 50m, 100m or 300m; shape and recipe are those of
lmscale_jax/config/recipes.py. The data are shards of FineWeb-Edu in GPT-2's tokens,
fineweb_edu/*.bin, those with `val` in their name held out; --config.data.path names others.
`llama_50m,update,16gb` fits accelerators with 16 GB.
"""

from lmscale_jax.config import recipes

FAMILIES = {
    "gpt2": recipes.gpt2,
    "llama": recipes.llama,
    "transformer_pp": recipes.transformer_pp,
}

# The middle third, where the original looked for redundancy, with its tau, s and λ. Its warm-up and
# ramp of 1000 and 2000 steps were for runs of 61,000: the same shares here.
_ACTING = {"tau": 0.1, "start": 0.33, "end": 0.67, "warmup": "2%", "ramp": "3%"}
MODES = {
    "baseline": {},
    "diagnose": {"mode": "diagnose", "tau": 0.1},
    "loss": {"mode": "loss", "lambda_max": 0.1} | _ACTING,
    "update": {"mode": "update", "alpha": 0.2} | _ACTING,
}


def get_config(which: str = "gpt2_50m,baseline"):
    which, memory = recipes.split_options(which)
    name, _, mode = which.partition(",")
    family, _, size = name.rpartition("_")
    c = FAMILIES[family](size, f"{recipes.EMBEDDED},{memory}")
    c.data.source, c.data.path = "bin", "fineweb_edu/*.bin"
    # GPT-2's 50,257 ids, up to a multiple of 64.
    c.model.vocab_size, c.data.vocab_size = 50_304, 4096
    c.mur.update(MODES[mode or "baseline"])
    # From the first 1% on, as the original did: often while the blocks find their roles.
    c.eval.redundancy_every, c.eval.redundancy_early = "5%", "0.5%"
    c.eval.redundancy_until = "5%"
    return c
