"""Where arrays lie on the mesh: one table of rules, and the products that move what they need.

The mesh has five axes. `replica`, `data` and `fsdp` split the rows of a batch, `sequence` the
positions of a row, `tensor` heads, hidden channels and vocabulary. Parameters lie split over `fsdp`
(Zhao et al. 2023, arXiv 2304.11277) and `tensor` (Shoeybi et al. 2019, arXiv 1909.08053).

What must talk is written out under `shard_map` rather than left to the partitioner, which on some
platforms gathers activations instead of weights and sums whole gradients: a product gathers its
weight when it is used, forward and backward, in the type it is computed in, and hands back each
device's part of the gradient; attention gathers keys and values over `sequence`. What is
elementwise between them follows their layout. On one device there is none of it.
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

# Which mesh axis splits which named axis of a parameter, the more important first.
RULES = (
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    # Of matrices that do not touch the stream, such as tables of values.
    ("head_dim", "fsdp"),
)


def partition(spec: Spec, sizes: Mapping[str, int]) -> P:
    """The mesh axis that splits each dimension of a parameter; `sizes` are those of the mesh axes.

    A mesh axis is used once, and only where it divides. Gains and biases are too small to be worth
    gathering: `fsdp` leaves them whole.
    """
    parts: list[str | None] = [None] * len(spec.axes)
    for axis, over in RULES:
        whole = spec.role in ("vector", "scalar") and over == "fsdp"
        if axis not in spec.axes or over in parts or sizes.get(over, 1) == 1 or whole:
            continue
        at = spec.axes.index(axis)
        if spec.shape[at] % sizes[over] == 0:
            parts[at] = over
    return P(*parts)


class ShardingContext(NamedTuple):
    """The mesh that the forward pass runs on; None where it is one device or laid out by others."""

    mesh: Mesh | None = None

    def size(self, *names: str) -> int:
        return math.prod(self.mesh.shape[name] for name in names) if self.mesh else 1

    def parts(self, spec: Spec) -> tuple:
        return tuple(partition(spec, self.mesh.shape))

    def flatten(self, x_BxT: jax.Array) -> jax.Array:
        """[B, T, ...] as [N, ...]: row by row; where `sequence` splits rows, piece by piece, so
        that what a device holds stays together."""
        (B, T), rest, pieces = x_BxT.shape[:2], x_BxT.shape[2:], self.size("sequence")
        if pieces > 1:
            x_BxT = x_BxT.reshape(B, pieces, T // pieces, *rest).swapaxes(0, 1)
        return x_BxT.reshape(B * T, *rest)

    def unflatten(self, x_N: jax.Array, batch: int, length: int) -> jax.Array:
        """Returns flat activations as [B, T, ...], the inverse of `flatten`."""
        rest, pieces = x_N.shape[1:], self.size("sequence")
        if pieces > 1:
            x_N = x_N.reshape(pieces, batch, length // pieces, *rest).swapaxes(0, 1)
        return x_N.reshape(batch, length, *rest)

    def bind(self, product: Callable, w: jax.Array, spec: Spec) -> tuple[Callable, jax.Array]:
        """Returns (f, w) such that f(x_NxI, w) is the `product` of flat activations and a weight of
        that annotation, [N, O]."""
        if self.mesh is None:
            return product, w.reshape(spec.fan_in, -1)
        return functools.partial(_dense, self, product, spec), w

    def lookup(self, table: jax.Array, tokens_BxT: jax.Array, spec: Spec) -> jax.Array:
        """The rows of a table over the vocabulary, [B, T, ...]; what precedes that axis stays in
        front."""
        at = spec.axes.index("vocab")
        if self.mesh is None:
            return jnp.take(table, tokens_BxT, axis=at)
        parts = self.parts(spec)

        def local(table, tokens_BxT):
            table = gathered(table, parts)
            if parts[at] is None:
                return jnp.take(table, tokens_BxT, axis=at)
            index_BxT = tokens_BxT - lax.axis_index(parts[at]) * table.shape[at]
            here_BxT = (index_BxT >= 0) & (index_BxT < table.shape[at])
            rows = jnp.take(table, jnp.where(here_BxT, index_BxT, 0), axis=at)
            here = here_BxT.reshape(*here_BxT.shape, *(1,) * (rows.ndim - at - 2))
            return lax.psum(jnp.where(here, rows, 0), parts[at])

        kept = [None if part == "fsdp" else part for part in parts]
        out = P(*kept[:at], *BATCH, *kept[at + 1 :])
        return self.shard(local, (P(*parts), BATCH), out)(table, tokens_BxT)

    def add_positions(self, h_BxTxD: jax.Array, table_PxD: jax.Array, spec: Spec) -> jax.Array:
        """h with row t of a table added to position t."""
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
        """Returns `function` of what each device holds; collectives inside are its own business.

        Every program has this one mesh: JAX refuses to lower kernels that partition themselves,
        as cuDNN's do, where it meets two.

        Args:
          function: of local arrays.
          ins, outs: PartitionSpecs of the arguments and of the results.
          axes: mesh axes that `function` is local along; None: those of more than one device. The
            others are left out, because sums over them would be programs that do nothing.
        """
        if axes is None:
            axes = [name for name, size in self.mesh.shape.items() if size > 1]

        def layout(spec: P) -> P:
            names = [(part,) if isinstance(part, str) else part or () for part in spec]
            return P(*(tuple(n for n in several if n in axes) or None for several in names))

        ins, outs = jax.tree.map(layout, (ins, outs), is_leaf=lambda x: isinstance(x, P))
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=ins, out_specs=outs, axis_names=set(axes),
            check_vma=False,
        )  # fmt: skip


def gathered(w: jax.Array, parts: tuple) -> jax.Array:
    """Inside `shard`: a parameter whole along `fsdp`."""
    for axis, part in enumerate(parts):
        if part == "fsdp":
            w = lax.all_gather(w, part, axis=axis, tiled=True)
    return w


class Sides(NamedTuple):
    """How a product lies: its weight, and by their channels what goes in and what comes out.

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
    """The product of each device's tokens with the weight, which is gathered for it."""
    sides = _sides(sharding, spec)
    x_layout, w_layout, y_layout = sides.layouts

    def local(x_NxI, w):
        y_NxO = product(x_NxI, _matrix(x_NxI, w, sides.parts))
        return lax.psum(y_NxO, "tensor") if sides.into else y_NxO

    return sharding.shard(local, (x_layout, w_layout), y_layout)(x_NxI, w)


def _matrix(x_NxI, w, parts) -> jax.Array:
    """The whole weight as [I, O]. It travels in the type of the product."""
    return gathered(w.astype(x_NxI.dtype), parts).reshape(x_NxI.shape[-1], -1)


def _dense_forward(sharding, product, spec, x_NxI, w):
    # Of the weight only the part that lies here is kept: the backward pass gathers it again.
    return _dense(sharding, product, spec, x_NxI, w), (x_NxI, w)


def _dense_backward(sharding, product, spec, saved, dy_NxO):
    """Two programs, so that one whose result nobody reads is left out, its collectives too."""
    sides = _sides(sharding, spec)
    x_layout, w_layout, y_layout = sides.layouts

    def of_input(x_NxI, w, dy_NxO):
        w_IxO = _matrix(x_NxI, w, sides.parts)
        dx_NxI = jax.vjp(lambda x: product(x, w_IxO), x_NxI)[1](dy_NxO)[0]
        return lax.psum(dx_NxI, "tensor") if sides.out else dx_NxI

    def of_weight(x_NxI, w, dy_NxO):
        whole = [
            n * (sharding.size("fsdp") if part == "fsdp" else 1)
            for n, part in zip(w.shape, sides.parts, strict=True)
        ]
        # A product is linear in its weight: the gradient asks for no value of it.
        zero_IxO = jnp.zeros((x_NxI.shape[-1], math.prod(whole[spec.n_in :])), w.dtype)
        dw = jax.vjp(lambda w: product(x_NxI, w), zero_IxO)[1](dy_NxO)[0].reshape(whole)
        return _summed(dw, sides.parts, sharding)

    dx_NxI = sharding.shard(of_input, (x_layout, w_layout, y_layout), x_layout)(*saved, dy_NxO)
    dw = sharding.shard(of_weight, (x_layout, w_layout, y_layout), w_layout)(*saved, dy_NxO)
    return dx_NxI, dw


_dense.defvjp(_dense_forward, _dense_backward)


def _summed(dw: jax.Array, parts: tuple, sharding: ShardingContext) -> jax.Array:
    """Inside `shard`: the sum over all devices' tokens of a weight's gradient, each device's part
    of it."""
    for axis, part in enumerate(parts):
        if part == "fsdp":
            dw = lax.psum_scatter(dw, part, scatter_dimension=axis, tiled=True)
    over = [name for name in TOKENS if sharding.size(name) > 1 and name not in parts]
    return lax.psum(dw, over) if over else dw
