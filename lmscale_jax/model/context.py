"""`ForwardContext`: what a layer reads besides its input and its parameters."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmscale_jax.config.key import Modes
from lmscale_jax.model import primitives
from lmscale_jax.model.parametrization import Scales
from lmscale_jax.model.primitives import Primitives
from lmscale_jax.model.sharding import ShardingContext

# The type that products are computed in.
DTYPES = Modes("model.dtype", {"float32": jnp.dtype("float32"), "bfloat16": jnp.dtype("bfloat16")})
# model -> type of the residual stream.
RESIDUAL_DTYPES = Modes(
    "model.residual_dtype",
    {"float32": lambda model: jnp.dtype("float32"), "dtype": lambda model: DTYPES[model.dtype]},
)

# Arrays of a pass and of a layer. The other fields are static, so that a context may be an argument
# of `jax.checkpoint` and of a `jax.custom_vjp`.
ARRAYS = (
    "key", "rope", "document_starts_BxT", "origin_NxD", "value_rows_SxBxTxKxd", "windows",
    "skips_SxNxD", "first_key_BxT", "last_key_1xT", "skip_NxD", "values_BxTxKxd",
)  # fmt: skip
STATIC = (
    "ops", "product", "sharding", "dtype", "scales", "window_block", "dropout_rate", "batch",
    "length", "reach", "keep", "taps",
)  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=STATIC)
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The context of a forward pass and of a layer in it. An unused field is None.

    Attributes of a model:
      ops: the primitives of this platform.
      product: (x, w) -> x w, for the weights of blocks.
      sharding: how arrays are split over the mesh.
      dtype: type that products are computed in.
      scales: the forward multipliers.
      window_block: tokens per unit of a window.
      dropout_rate: of embedding, attention and residual.

    Attributes of a pass:
      batch, length: B and T of the N = B*T flat tokens, in the order of `sharding.flatten`.
      key: random key of the pass, and in a layer that layer's; None turns dropout off.
      rope: cosines and sines, each [T, head_dim / 2].
      document_starts_BxT: position at which each token's document begins in its row; None: masks
        know no documents.
      origin_NxD: the embedding, for model.x0_mix.
      value_rows_SxBxTxKxd: the row of each value table for each token.
      windows: (full, half), in units of `window_block` tokens.
      skips_SxNxD: the outputs of the first blocks, for model.skips.

    Attributes of a layer:
      first_key_BxT, last_key_1xT: the keys that each query sees, int32 [1 or B, T], both included;
        None: from key 0, and up to the query's own position. Every mask has this form.
      reach: most keys that a query sees, its own included, as a Python int; None: all before it.
      skip_NxD: the output of an earlier block, for this block's skip.
      values_BxTxKxd: added to this block's values.
      keep: (name, activation) -> the array that a tap stores; None: no taps.
      taps: {name: array}, where this layer's taps are stored; its caller returns them.
    """

    ops: Primitives
    product: Callable
    sharding: ShardingContext
    dtype: jnp.dtype
    scales: Scales
    window_block: int
    dropout_rate: float
    batch: int = 0
    length: int = 0
    key: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None
    document_starts_BxT: jax.Array | None = None
    origin_NxD: jax.Array | None = None
    value_rows_SxBxTxKxd: jax.Array | None = None
    windows: tuple | None = None
    skips_SxNxD: jax.Array | None = None
    first_key_BxT: jax.Array | None = None
    last_key_1xT: jax.Array | None = None
    reach: int | None = None
    skip_NxD: jax.Array | None = None
    values_BxTxKxd: jax.Array | None = None
    keep: Callable | None = None
    taps: dict | None = None

    def replace(self, **changes) -> "ForwardContext":
        """Returns a copy with changed fields."""
        return dataclasses.replace(self, **changes)

    def tap(self, name: str, make: Callable[[], jax.Array]) -> None:
        """Stores `keep(name, make())` if there is a `keep`; else nothing is computed."""
        if self.keep is not None:
            self.taps[name] = self.keep(name, make())

    def dropout(self, x_NxD: jax.Array, stream: int) -> jax.Array:
        """Applies dropout with the layer's random stream of this number, [N, D]."""
        if self.key is None or not self.dropout_rate:
            return x_NxD
        rate, shape = self.dropout_rate, (self.batch, self.length, x_NxD.shape[1])
        key = jax.random.fold_in(self.key, stream)
        keep = self.sharding.flatten(jax.random.bernoulli(key, 1 - rate, shape))
        return jnp.where(keep, x_NxD / (1 - rate), jnp.zeros_like(x_NxD))

    def unflatten(self, x_N: jax.Array) -> jax.Array:
        """Reshapes flat activations to [B, T, ...]."""
        return self.sharding.unflatten(x_N, self.batch, self.length)

    def flatten(self, x_BxT: jax.Array) -> jax.Array:
        """Reshapes [B, T, ...] to flat activations [N, ...], the inverse of `unflatten`."""
        return self.sharding.flatten(x_BxT)

    def visible(self) -> jax.Array:
        """Returns the keys that each query of this layer sees, bool [1 or B, T, T]."""
        bounds = self.first_key_BxT, self.last_key_1xT
        mask = primitives.visible(self.length, self.length, *bounds)
        return mask if mask.ndim == 3 else mask[None]
