"""Llama, 300M size. Shape and recipe: configs/families.py; `:embedded` needs no network."""

from configs import families


def get_config(corpus: str = families.WEB):
    return families.llama("300m", corpus)
