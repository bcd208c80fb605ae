"""Llama, 300M size. Shape and recipe: configs/families.py."""

from configs import families


def get_config():
    return families.llama("300m")
