"""Transformer++, 50M size: lmscale_jax/config/recipes.py; `:embedded` needs no network, `:16gb`
fits accelerators with 16 GB, `:embedded,16gb` both.
"""

from lmscale_jax.config import recipes


def get_config(options: str = recipes.WEB):
    return recipes.transformer_pp("50m", options)
