"""GPT-2, 50M size. Shape and recipe: configs/families.py; `:embedded` needs no network."""

from configs import families


def get_config(corpus: str = families.WEB):
    return families.gpt2("50m", corpus)
