"""The keys of a ladder; lmscale_jax/config/ladder_keys.py says what each of them means."""

from lmscale_jax.config.ladder_keys import FREE, LADDER
from lmscale_jax.config.ladder_keys import get_ladder_config as get_config
from lmscale_jax.config.own_code import here

__all__ = ["FREE", "LADDER", "get_config", "here"]
