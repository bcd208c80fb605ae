"""GPT-2, 100M size: lmscale_jax/config/families.py; `:embedded` needs no network."""

from lmscale_jax.config import families


def get_config(corpus: str = families.WEB):
    return families.gpt2("100m", corpus)
