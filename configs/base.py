"""Every configuration key at its default; other configs only say in what they differ.

The keys, each with its default, unit, range and reason, are in lmscale_jax/config/: `model` in
model_keys.py; `parametrization` in parametrization_keys.py; `objective`, `optim`, `schedule`,
`freeze` and `mur` in optim_keys.py; all others in keys.py. The keys of a ladder are in
ladder_keys.py.
"""

from lmscale_jax.config.keys import SPEC, Key, get_config
from lmscale_jax.config.own_code import here

__all__ = ["SPEC", "Key", "get_config", "here"]
