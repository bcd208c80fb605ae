"""Splits arrays over the mesh: one table of rules, and products with explicit collectives.

The mesh has five axes. `replica`, `data` and `fsdp` split the rows of a batch, `sequence` the
positions of a row, `tensor` heads, hidden channels and vocabulary. Parameters are split over `fsdp`
(Zhao et al. 2023, arXiv 2304.11277) and `tensor` (Shoeybi et al. 2019, arXiv 1909.08053).

Collectives are explicit, under `shard_map`: the partitioner gathers activations instead of weights
on some platforms, and sums entire gradients. A product gathers its weight in its own type, forward
and backward, and returns each device's part of the gradient; attention gathers keys and values over
`sequence`. Elementwise operations follow the layout of their inputs. On one device there are no
collectives.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lmscale_jax.model.param import Spec

AXES = ("replica", "data", "fsdp", "sequence", "tensor")
# The mesh axes that split the rows of a batch, and its flat tokens (see `ShardingContext.flatten`).
ROWS = ("replica", "data", "fsdp")
TOKENS = ("sequence", *ROWS)
BATCH = P(ROWS, "sequence")

# (named axis of a parameter, the mesh axis that splits it), the more important first.
RULES = (
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    # For matrices without an "embed" axis, such as value tables.
    ("head_dim", "fsdp"),
)


def partition(spec: Spec, sizes: Mapping[str, int]) -> P:
    """Returns the mesh axis that splits each dimension of a parameter, given sizes of mesh axes.

    A mesh axis is used at most once, and only if it divides the dimension. `fsdp` does not split
    vectors and scalars: they are too small to be worth gathering.
    """
    parts: list[str | None] = [None] * len(spec.axes)
    for axis, over in RULES:
        too_small = spec.role in ("vector", "scalar") and over == "fsdp"
        if axis not in spec.axes or over in parts or sizes.get(over, 1) == 1 or too_small:
            continue
        dimension = spec.axes.index(axis)
        if spec.shape[dimension] % sizes[over] == 0:
            parts[dimension] = over
    return P(*parts)


class ShardingContext(NamedTuple):
    """The mesh of the forward pass; None on one device, inside `shard`, or to leave the layout to
    the partitioner."""

    mesh: Mesh | None = None

    def size(self, *names: str) -> int:
        """Returns the product of these axes' sizes; 1 without a mesh."""
        return math.prod(self.mesh.shape[name] for name in names) if self.mesh else 1

    def parts(self, spec: Spec) -> tuple:
        """Returns the mesh axis, or None, that splits each dimension of a parameter."""
        return tuple(partition(spec, self.mesh.shape))

    def flatten(self, x_BxT: jax.Array) -> jax.Array:
        """Reshapes [B, T, ...] to [N, ...], row by row; if `sequence` splits rows, piece by piece,
        so that the tokens of one device are consecutive."""
        (B, T), inner, pieces = x_BxT.shape[:2], x_BxT.shape[2:], self.size("sequence")
        if pieces > 1:
            x_BxT = x_BxT.reshape(B, pieces, T // pieces, *inner).swapaxes(0, 1)
        return x_BxT.reshape(B * T, *inner)

    def unflatten(self, x_N: jax.Array, batch: int, length: int) -> jax.Array:
        """Reshapes flat activations to [B, T, ...], the inverse of `flatten`."""
        inner, pieces = x_N.shape[1:], self.size("sequence")
        if pieces > 1:
            x_N = x_N.reshape(pieces, batch, length // pieces, *inner).swapaxes(0, 1)
        return x_N.reshape(batch, length, *inner)

    def bind(self, product: Callable, w: jax.Array, spec: Spec) -> tuple[Callable, jax.Array]:
        """Returns (f, w) such that f(x_NxI, w) is the `product` [N, O] of flat activations and a
        weight with this annotation, on the mesh."""
        if self.mesh is None:
            return product, w.reshape(spec.fan_in, -1)
        return functools.partial(_dense, self, product, spec), w

    def lookup(self, table: jax.Array, tokens_BxT: jax.Array, spec: Spec) -> jax.Array:
        """Looks up the tokens in a table over the vocabulary, [B, T, ...]; axes before that of the
        vocabulary remain in front."""
        axis = spec.axes.index("vocab")
        if self.mesh is None:
            return jnp.take(table, tokens_BxT, axis=axis)
        parts = self.parts(spec)

        def local(table, tokens_BxT):
            table = gathered(table, parts)
            if parts[axis] is None:
                return jnp.take(table, tokens_BxT, axis=axis)
            index_BxT = tokens_BxT - lax.axis_index(parts[axis]) * table.shape[axis]
            is_local_BxT = (index_BxT >= 0) & (index_BxT < table.shape[axis])
            rows = jnp.take(table, jnp.where(is_local_BxT, index_BxT, 0), axis=axis)
            is_local = is_local_BxT.reshape(*is_local_BxT.shape, *(1,) * (rows.ndim - axis - 2))
            return lax.psum(jnp.where(is_local, rows, 0), parts[axis])

        after_gather = [None if part == "fsdp" else part for part in parts]
        out = P(*after_gather[:axis], *BATCH, *after_gather[axis + 1 :])
        return self.shard(local, (P(*parts), BATCH), out)(table, tokens_BxT)

    def add_positions(self, h_BxTxD: jax.Array, table_PxD: jax.Array, spec: Spec) -> jax.Array:
        """Adds row t of a table to position t of h."""
        if self.mesh is None:
            return h_BxTxD + table_PxD[: h_BxTxD.shape[1]]
        parts, stream = self.parts(spec), P(*BATCH, None)

        def local(h_BxTxD, table_PxD):
            table_PxD, length = gathered(table_PxD, parts), h_BxTxD.shape[1]
            if self.size("sequence") == 1:
                return h_BxTxD + table_PxD[:length]
            begin = lax.axis_index("sequence") * length
            return h_BxTxD + lax.dynamic_slice_in_dim(table_PxD, begin, length)

        return self.shard(local, (stream, P(*parts)), stream)(h_BxTxD, table_PxD)

    def shard(self, function: Callable, ins, outs, axes: Collection[str] | None = None) -> Callable:
        """Maps a function, which may use collectives, over the devices' parts of its arguments.

        Every program has this one mesh: JAX refuses to lower kernels that partition themselves,
        such as cuDNN's, if it finds two.

        Args:
          function: of local arrays.
          ins, outs: PartitionSpecs of the arguments and of the results.
          axes: mesh axes along which arrays are local; None: those of size above 1. Collectives
            over the others would be programs that do nothing.
        """
        if axes is None:
            axes = [name for name, size in self.mesh.shape.items() if size > 1]

        def layout(spec: P) -> P:
            names = [(part,) if isinstance(part, str) else part or () for part in spec]
            return P(*(tuple(n for n in group if n in axes) or None for group in names))

        ins, outs = jax.tree.map(layout, (ins, outs), is_leaf=lambda x: isinstance(x, P))
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=ins, out_specs=outs, axis_names=set(axes),
            check_vma=False,
        )  # fmt: skip


def gathered(w: jax.Array, parts: tuple) -> jax.Array:
    """Gathers a parameter along `fsdp`, inside `shard`."""
    for axis, part in enumerate(parts):
        if part == "fsdp":
            w = lax.all_gather(w, part, axis=axis, tiled=True)
    return w


class Sides(NamedTuple):
    """Layout of a product: its weight, and the channels of its input and output.

    Attributes:
      parts: the mesh axis of each of the weight's dimensions.
      into, out: "tensor" where it splits those channels, else None.
    """

    parts: tuple
    into: str | None
    out: str | None

    @property
    def layouts(self) -> tuple[P, P, P]:
        return P(TOKENS, self.into), P(*self.parts), P(TOKENS, self.out)


def _sides(sharding: ShardingContext, spec: Spec) -> Sides:
    parts = sharding.parts(spec)
    into, out = (
        "tensor" if "tensor" in side else None for side in (parts[: spec.n_in], parts[spec.n_in :])
    )
    return Sides(parts, into, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(sharding: ShardingContext, product: Callable, spec: Spec, x_NxI, w):
    """Multiplies each device's tokens with the gathered weight."""
    sides = _sides(sharding, spec)
    x_layout, w_layout, y_layout = sides.layouts

    def local(x_NxI, w):
        y_NxO = product(x_NxI, _matrix(x_NxI, w, sides.parts))
        return lax.psum(y_NxO, "tensor") if sides.into else y_NxO

    return sharding.shard(local, (x_layout, w_layout), y_layout)(x_NxI, w)


def _matrix(x_NxI, w, parts) -> jax.Array:
    """Gathers a weight as [I, O], in the type of the product."""
    return gathered(w.astype(x_NxI.dtype), parts).reshape(x_NxI.shape[-1], -1)


def _dense_forward(sharding, product, spec, x_NxI, w):
    # Only this device's part of the weight is stored: the backward pass gathers it again.
    return _dense(sharding, product, spec, x_NxI, w), (x_NxI, w)


def _dense_backward(sharding, product, spec, saved, dy_NxO):
    """Two separate programs, so that XLA removes an unused one with its collectives."""
    sides = _sides(sharding, spec)
    x_layout, w_layout, y_layout = sides.layouts

    def of_input(x_NxI, w, dy_NxO):
        w_IxO = _matrix(x_NxI, w, sides.parts)
        dx_NxI = jax.vjp(lambda x: product(x, w_IxO), x_NxI)[1](dy_NxO)[0]
        return lax.psum(dx_NxI, "tensor") if sides.out else dx_NxI

    def of_weight(x_NxI, w, dy_NxO):
        shape = [
            n * (sharding.size("fsdp") if part == "fsdp" else 1)
            for n, part in zip(w.shape, sides.parts, strict=True)
        ]
        # A product is linear in its weight, so its gradient does not depend on the values.
        zero_IxO = jnp.zeros((x_NxI.shape[-1], math.prod(shape[spec.n_in :])), w.dtype)
        dw = jax.vjp(lambda w: product(x_NxI, w), zero_IxO)[1](dy_NxO)[0].reshape(shape)
        return _summed(dw, sides.parts, sharding)

    dx_NxI = sharding.shard(of_input, (x_layout, w_layout, y_layout), x_layout)(*saved, dy_NxO)
    dw = sharding.shard(of_weight, (x_layout, w_layout, y_layout), w_layout)(*saved, dy_NxO)
    return dx_NxI, dw


_dense.defvjp(_dense_forward, _dense_backward)


def _summed(dw: jax.Array, parts: tuple, sharding: ShardingContext) -> jax.Array:
    """Sums a weight's gradient over all devices' tokens, inside `shard`; returns this device's
    part."""
    for axis, part in enumerate(parts):
        if part == "fsdp":
            dw = lax.psum_scatter(dw, part, scatter_dimension=axis, tiled=True)
    over = [name for name in TOKENS if sharding.size(name) > 1 and name not in parts]
    return lax.psum(dw, over) if over else dw
