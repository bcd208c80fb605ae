"""Transformer++, 50M size. Shape and recipe: configs/families.py."""

from configs import families


def get_config():
    return families.transformer_pp("50m")
