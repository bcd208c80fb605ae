"""Muon and NorMuon on stacked blocks: the matrices of the momentum are made orthogonal.

Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express, arXiv 2505.16932), Li et al. 2025
(NorMuon, arXiv 2510.05491). A parameter's annotation tells which axes make a matrix; scale and
learning rate come from `optim.rules`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale_jax.config.key import Modes
from lmscale_jax.model.param import HEADS, Spec, map_named, named
from lmscale_jax.optim import schedules


class Iteration(NamedTuple):
    """A Newton-Schulz iteration.

    Attributes:
      steps: (a, b, c) of each step X <- a X + (b A + c A A) X with A = X X'.
      margin: factor of the Frobenius norm that a matrix is divided by; Polar Express needs room
        above the largest singular value.
    """

    steps: tuple[tuple[float, float, float], ...]
    margin: float


COEFFICIENTS = Modes(
    "optim.muon_coefficients",
    {
        "quintic": Iteration(((3.4445, -4.7750, 2.0315),) * 5, margin=1.0),
        "polar_express": Iteration(
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            margin=1.02,
        ),
        "stable": Iteration(((2.0, -1.5, 0.5),) * 12, margin=1.0),
    },
)
# Spec -> factor from an orthogonal matrix to the update of a parameter. "spectral":
# the spectral condition (Yang et al. 2023); "kj": Jordan et al. 2024; "moonlight": Liu et al. 2025
# (arXiv 2502.16982), the root mean square of a typical update by AdamW.
SCALES = Modes(
    "optim.muon_scale",
    {
        "spectral": lambda spec: math.sqrt(spec.fan_out / spec.fan_in),
        "kj": lambda spec: math.sqrt(max(1.0, spec.fan_out / spec.fan_in)),
        "moonlight": lambda spec: 0.2 * math.sqrt(max(spec.fan_in, spec.fan_out)),
    },
)


class Unit(NamedTuple):
    """One choice of optim.muon_unit: what is made orthogonal as one matrix.

    Attributes:
      batch_axes: names of the axes that count matrices.
      count: Spec -> how many matrices a layer's parameter is cut into.
    """

    batch_axes: tuple[str, ...]
    count: Callable


UNITS = Modes(
    "optim.muon_unit",
    {
        "matrix": Unit((), lambda spec: 1),
        "head": Unit(HEADS, lambda spec: spec.n_heads),
    },
)
# Whether the neurons of a matrix [m, n], m <= n, are its n columns: (fan_in, fan_out) -> bool.
# "output": what a neuron computes, as in the paper; "longer": modded-nanogpt's variant.
NEURONS = Modes(
    "optim.muon_neurons",
    {
        "output": lambda fan_in, fan_out: fan_in <= fan_out,
        "longer": lambda fan_in, fan_out: True,
    },
)
# Platform -> type of Newton-Schulz products; "auto": bfloat16 where chips have units for it.
PRODUCT_DTYPES = Modes(
    "optim.muon_dtype",
    {
        "auto": lambda platform: "float32" if platform == "cpu" else "bfloat16",
        "float32": lambda platform: "float32",
        "bfloat16": lambda platform: "bfloat16",
    },
)
# Far below any gradient's norm; keeps a gradient of zero from becoming 0 / 0.
TINY = 1e-12


class Matrices(NamedTuple):
    """The layout of one parameter as a batch of matrices [B, m, n] with m <= n.

    Attributes:
      order: its axes, those of the batch first, then fan-in, then fan-out.
      batch: sizes of the batch axes.
      fan_in, fan_out: of each matrix; the larger one is n, for equal ones fan-out.
    """

    order: tuple[int, ...]
    batch: tuple[int, ...]
    fan_in: int
    fan_out: int

    @property
    def shape(self) -> tuple[int, int]:
        return min(self.fan_in, self.fan_out), max(self.fan_in, self.fan_out)

    def split(self, x: jax.Array) -> jax.Array:
        """Reshapes the parameter's array to [B, m, n]."""
        x_Bxixo = x.transpose(self.order).reshape(-1, self.fan_in, self.fan_out)
        return x_Bxixo if self.fan_in <= self.fan_out else x_Bxixo.swapaxes(1, 2)

    def join(self, x_Bxmxn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Inverts `split`, for a parameter of that shape."""
        x = x_Bxmxn if self.fan_in <= self.fan_out else x_Bxmxn.swapaxes(1, 2)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([shape[axis] for axis in self.order]).transpose(inverse)


def as_matrices(spec: Spec, unit: str) -> Matrices:
    """Returns the layout of an annotation; with unit "head" each attention head is a matrix."""
    batch = [0] if spec.axes[:1] == ("layers",) else []
    first_out = len(batch) + spec.n_in
    batch += [i for i, axis in enumerate(spec.axes) if axis in UNITS[unit].batch_axes]
    ins = [i for i in range(first_out) if i not in batch]
    outs = [i for i in range(first_out, len(spec.axes)) if i not in batch]

    def sizes(axes):
        return tuple(spec.shape[i] for i in axes)

    fans = math.prod(sizes(ins)), math.prod(sizes(outs))
    return Matrices((*batch, *ins, *outs), sizes(batch), *fans)


def newton_schulz(x_Bxmxn: jax.Array, coefficients: str, dtype) -> jax.Array:
    """Approximates the orthogonal factor of each matrix of a batch with m <= n, in `dtype`.

    Singular values end between 0.68 and 1.21 (quintic), 0.85 and 1.15 (polar_express) or at 1
    (stable) if they are at least 0.002 of the Frobenius norm. A matrix of zeros stays zero.
    """
    x = x_Bxmxn.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True))
    iteration = COEFFICIENTS[coefficients]
    x = (x / (iteration.margin * norm + TINY)).astype(dtype)
    # A loop would copy x at each turn, which in bfloat16 is a tenth of the iteration on a GPU.
    step, unroll = (_wide_step, 1) if jnp.dtype(dtype) == jnp.float32 else (_narrow_step, True)
    with jax.named_scope("newton_schulz"):
        return jax.lax.scan(step, x, jnp.asarray(iteration.steps, jnp.float32), unroll=unroll)[0]


def _product(form: str, x, y):
    """Computes a batch of products with float32 sums, rounded once to the type of x and y."""
    return jnp.einsum(form, x, y, preferred_element_type=x.dtype)


def _wide_step(x_Bxmxn, abc):
    """X <- a X + (b A + c A A) X in float32."""
    a, b, c = abc
    gram = _product("bmn,bkn->bmk", x_Bxmxn, x_Bxmxn)
    series = b * gram + c * _product("bmk,bkj->bmj", gram, gram)
    return a * x_Bxmxn + _product("bmk,bkn->bmn", series, x_Bxmxn), None


def _narrow_step(x_Bxmxn, abc):
    """X <- (a + b A + c A A) X in bfloat16.

    The terms nearly cancel, so they are summed in float32, on [m, m] alone: a X + (b A + c A A) X
    would need a product in float32 for that, which is most of the bytes of a step.
    """
    a, b, c = abc
    gram = _product("bmn,bkn->bmk", x_Bxmxn, x_Bxmxn)
    square = _product("bmk,bkj->bmj", gram, gram)
    series = (
        a * jnp.eye(gram.shape[1]) + b * gram.astype(jnp.float32) + c * square.astype(jnp.float32)
    )
    return _product("bmk,bkn->bmn", series.astype(gram.dtype), x_Bxmxn), None


class MuonState(NamedTuple):
    """The state of Muon.

    Attributes:
      momentum: like the parameters, float32.
      squares: {} for Muon; for NorMuon the mean square of each neuron's direction, [*batch,
        neurons].
    """

    momentum: dict
    squares: dict


def scale_by_muon(
    rules: dict,
    config,
    mesh: Mesh | None = None,
    platform: str = "cpu",
    beta2: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the direction of Muon for the matrices of a resolved config; NorMuon with `beta2`.

    `beta2` is the decay of the mean square of each neuron's direction (see `normalize_neurons`).
    `update` takes the keyword `step`, for the momentum's warm-up. On a mesh the matrices are
    distributed over the devices before the iteration and gathered after it, so that no product
    inside communicates.
    """
    optim, decay_at = config.optim, schedules.momentum_schedule(config)
    layouts = {p: as_matrices(r.spec, optim.muon_unit) for p, r in rules.items()}
    dtype = products_dtype(config, platform)
    columns = {p: NEURONS[optim.muon_neurons](x.fan_in, x.fan_out) for p, x in layouts.items()}

    def iterate(x_Bxmxn):
        return newton_schulz(x_Bxmxn, optim.muon_coefficients, dtype)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        if beta2 is None:
            return MuonState(zeros, {})

        def squares(path, p):
            if _is_masked(p):
                return p
            return jnp.zeros((*layouts[path].batch, layouts[path].shape[columns[path]]))

        return MuonState(zeros, map_named(squares, params))

    def update(grads, state, params=None, *, step, **_):
        decay = decay_at(step)

        def blend(m, g):
            return decay * m + (1 - decay) * g

        moments = jax.tree.map(blend, state.momentum, grads)
        nesterov = named(jax.tree.map(blend, moments, grads))
        nesterov = {path: x for path, x in nesterov.items() if not _is_masked(x)}
        stacks = {path: layouts[path].split(x).astype(dtype) for path, x in nesterov.items()}
        factors = {
            path: x.astype(jnp.float32) for path, x in orthogonalize(stacks, iterate, mesh).items()
        }
        squares = named(state.squares)
        for path in factors if squares else ():
            of_path = factors[path], squares[path], beta2, 2 if columns[path] else 1
            factors[path], squares[path] = normalize_neurons(*of_path)
        directions = {
            path: layouts[path].join(x, nesterov[path].shape) * rules[path].update_scale
            for path, x in factors.items()
        }
        new_state = MuonState(moments, map_named(lambda path, _: squares[path], state.squares))
        return map_named(lambda path, g: directions.get(path, g), grads), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def products_dtype(config, platform: str) -> str:
    """Returns the dtype of Newton-Schulz products of a resolved config."""
    return PRODUCT_DTYPES[config.optim.muon_dtype](platform)


def orthogonalize(
    stacks: dict[str, jax.Array], iterate: Callable, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Applies `iterate` to every [B, m, n], in one call for all with the same m and n."""
    factors = {}
    for shape in sorted({x.shape[1:] for x in stacks.values()}):
        members = {path: x for path, x in stacks.items() if x.shape[1:] == shape}
        stack = jnp.concatenate(list(members.values()))
        count = len(stack)
        if mesh is not None and mesh.size > 1:
            stack = jnp.pad(stack, ((0, -count % mesh.size), (0, 0), (0, 0)))
            spread = NamedSharding(mesh, P(mesh.axis_names))
            stack = jax.lax.with_sharding_constraint(stack, spread)
            result = jax.lax.with_sharding_constraint(iterate(stack), spread)[:count]
        else:
            result = iterate(stack)
        parts = jax.lax.split(result, [len(x) for x in members.values()])
        factors |= dict(zip(members, parts, strict=True))
    return factors


def normalize_neurons(
    x_Bxmxn: jax.Array, squares: jax.Array, beta2: float, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Divides each neuron's direction by the root of its running mean square, as NorMuon does.

    A neuron is an entry of `axis`, 1 or 2. The Frobenius norm is kept. Returns the new directions
    and the new mean squares, shaped like `squares`.
    """
    mean_BxN = jnp.square(x_Bxmxn).mean(axis=3 - axis)
    square_BxN = beta2 * squares.reshape(mean_BxN.shape) + (1 - beta2) * mean_BxN
    y_Bxmxn = x_Bxmxn / jnp.expand_dims(jnp.sqrt(square_BxN + TINY**2), 3 - axis)

    def norm(x):
        return jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True))

    return y_Bxmxn * (norm(x_Bxmxn) / (norm(y_Bxmxn) + TINY)), square_BxN.reshape(squares.shape)


def _is_masked(x) -> bool:
    """Tells whether a leaf belongs to another group of `optax.partition`."""
    return isinstance(x, optax.MaskedNode)
