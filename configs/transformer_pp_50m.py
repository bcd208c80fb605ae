"""Transformer++, 50M size. Shape and recipe: configs/families.py; `:embedded` needs no network."""

from configs import families


def get_config(corpus: str = families.WEB):
    return families.transformer_pp("50m", corpus)
