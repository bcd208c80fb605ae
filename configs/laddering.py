"""The keys of a ladder; lmscale_jax/config/ladder_keys.py says what each of them means."""

from lmscale_jax.config.ladder_keys import FREE, LADDER, get_ladder_config

__all__ = ["FREE", "LADDER", "get_ladder_config"]
