"""What a user's own code may import; docs/own_change.md has the contract of each kind of code.

These names, and what the contract says of them, do not change between releases of one major
version. Everything else in the package may.
"""

from flax import nnx

from lmscale_jax.config.key import Key
from lmscale_jax.config.own_code import here
from lmscale_jax.model.attention import rotate
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.layers import Dense, LayerNorm, RMSNorm, pointwise
from lmscale_jax.model.param import Spec, scalar, vector, weight
from lmscale_jax.model.transformer import BlockParts
from lmscale_jax.train.terms import TermInputs

__all__ = [
    "BlockParts", "Dense", "ForwardContext", "Key", "LayerNorm", "RMSNorm", "Spec", "TermInputs",
    "here", "nnx", "pointwise", "rotate", "scalar", "vector", "weight",
]  # fmt: skip
