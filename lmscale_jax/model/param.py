"""`Spec`, the annotation of a parameter, from which its treatment is derived.

A module declares a parameter with `weight` or `vector`: its named axes, which of them are fan-in
and fan-out, and its role. `model.parametrization`, `optim` and `model.mesh` derive initial scale,
learning rate, decay, the matrix for Muon and the sharding from it; no other file does arithmetic on
widths or guesses by `ndim`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

ROLES = ("input", "hidden", "output", "vector", "scalar")
HEADS = ("heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Spec:
    """The annotation of one parameter.

    Attributes:
      axes: names of the dimensions, outermost first; "layers" leads those of the stacked blocks.
      shape: sizes of the same dimensions.
      n_in: how many of the axes after "layers" are fan-in; the rest are fan-out.
      role: input (finite to width), hidden (width to width), output (width to finite), vector
        (gains and biases) or scalar.
      init: "normal", "zeros", "ones", or the initial value of all entries.
      residual: the product is added to the residual stream.
      in_branch: its product passes through the multiplier of a branch; None: as parameters of
        blocks do and others do not.
      layers: the blocks that have it, one for each row of the axis "layers".
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    n_in: int
    role: str
    init: str | float = "normal"
    residual: bool = False
    in_branch: bool | None = None
    layers: tuple[int, ...] = ()

    def stacked(self, layers: tuple[int, ...]) -> "Spec":
        """Returns the annotation of this parameter for these blocks, under a leading axis."""
        axes, shape = ("layers", *self.axes), (len(layers), *self.shape)
        in_branch = self.in_branch is not False
        return dataclasses.replace(self, axes=axes, shape=shape, in_branch=in_branch, layers=layers)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape without the "layers" axis."""
        return self.shape[1:] if self.axes[:1] == ("layers",) else self.shape

    @property
    def axes_out(self) -> tuple[str, ...]:
        """The names of a matrix's fan-out; () of a vector."""
        axes = self.axes[1:] if self.axes[:1] == ("layers",) else self.axes
        return axes[self.n_in :] if self.n_in else ()

    @property
    def is_head(self) -> bool:
        """Whether this is the readout to the vocabulary; gates inside blocks are readouts too."""
        return self.role == "output" and self.axes[0] != "layers"

    @property
    def fan_in(self) -> int:
        return math.prod(self.matrix[: self.n_in])

    @property
    def fan_out(self) -> int:
        return math.prod(self.matrix[self.n_in :])

    @property
    def n_heads(self) -> int:
        """The number of heads that share the matrix; 1 if it has no axis of heads."""
        sizes = zip(self.axes, self.shape, strict=True)
        return math.prod(size for axis, size in sizes if axis in HEADS)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weight(fan_in: dict[str, int], fan_out: dict[str, int], role: str, **options) -> nnx.Param:
    """Declares a matrix [*fan_in, *fan_out], given sizes by axis name; `options` are of `Spec`."""
    assert role in ROLES, role
    axes = {**fan_in, **fan_out}
    return _param(Spec(tuple(axes), tuple(axes.values()), len(fan_in), role, **options))


def vector(init: str, **axes: int) -> nnx.Param:
    """Declares a gain or a bias over the named axes; `init` is "ones" or "zeros"."""
    return _param(Spec(tuple(axes), tuple(axes.values()), 0, "vector", init))


def scalar(init: float, **options) -> nnx.Param:
    """Declares a number, one for each block where it belongs to one; `options` are of `Spec`."""
    return _param(Spec((), (), 0, "scalar", init, **options))


def _param(spec: Spec) -> nnx.Param:
    # Only the shape: `Model.init` draws the values, so that a model can be counted and explained
    # without being allocated.
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, jnp.float32), spec=spec)


def specs(module: nnx.Module) -> dict:
    """Returns the nested dict of `Spec` of a module, with the paths of its parameters."""
    variables = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return nested({"/".join(path): v.get_metadata()["spec"] for path, v in variables})


def named(tree: dict, prefix: str = "") -> dict:
    """Flattens a nested dict to {"a/b": leaf}, in sorted order."""
    flat = {}
    for name in sorted(tree):
        node, path = tree[name], prefix + name
        flat.update(named(node, path + "/") if isinstance(node, dict) else {path: node})
    return flat


def row_layers(specs_blocks: dict, count: int) -> tuple[int, ...]:
    """Returns the block of each row of an array with `count` rows: all, or those with attention."""
    return next(s.layers for s in named(specs_blocks).values() if len(s.layers) == count)


def nested(flat: dict) -> dict:
    """Inverts `named`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree


def map_named(function, tree: dict, prefix: str = "") -> dict:
    """Maps `function(path, leaf)` over a nested dict, keeping its structure."""
    return {
        name: map_named(function, node, f"{prefix}{name}/")
        if isinstance(node, dict)
        else function(prefix + name, node)
        for name, node in tree.items()
    }
