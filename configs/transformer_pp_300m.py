"""Transformer++, 300M size: lmscale_jax/config/recipes.py; `:embedded` needs no network."""

from lmscale_jax.config import recipes


def get_config(corpus: str = recipes.WEB):
    return recipes.transformer_pp("300m", corpus)
