"""Transformer++, 50M size: lmscale_jax/config/families.py; `:embedded` needs no network."""

from lmscale_jax.config import families


def get_config(corpus: str = families.WEB):
    return families.transformer_pp("50m", corpus)
