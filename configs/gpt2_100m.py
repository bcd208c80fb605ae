"""GPT-2, 100M size. Shape and recipe: configs/families.py."""

from configs import families


def get_config():
    return families.gpt2("100m")
