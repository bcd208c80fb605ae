"""An arm of a ladder at the small size, and the programs that the guards compare.

A program is built and run once, whoever asks for it.
"""

import dataclasses
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from ml_collections import ConfigDict

from lmscale_jax.config import own_code
from lmscale_jax.config.own_keys import code_values
from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.guards import shrink
from lmscale_jax.guards.products import product_flops
from lmscale_jax.model.mesh import make_mesh, one_device_mesh, put_batch
from lmscale_jax.model.param import map_named, named
from lmscale_jax.mur import objective as mur
from lmscale_jax.train.setup import Setup, TrainStep, build_setup

# Programs of this size compile in half the time by the older way to emit fusions, where XLA has it.
QUICKLY = {"xla_cpu_use_fusion_emitters": False} if jaxlib.__version__.startswith("0.10.") else {}
# Past any warm-up, so that what it holds back is part of the gradient.
GRADIENT_STEP = shrink.STEPS // 2


class Finding(NamedTuple):
    """What a guard says of an arm.

    Attributes:
      fault: what is wrong and what would work; "": nothing.
      note: what was measured.
      skipped: why nothing was; "": it was.
    """

    fault: str = ""
    note: str = ""
    skipped: str = ""


class Gradient(NamedTuple):
    """One step: its loss, the norm of the gradient, {path: gradient}, and the products' FLOPs.

    Where loss or norm is not finite, the gradients are 0.
    """

    loss: float
    norm: float
    grads: dict[str, np.ndarray]
    flops: float


class Trajectory(NamedTuple):
    """A run of a few steps.

    Attributes:
      text: of the program.
      run: (state, first step, stop) -> (state, losses).
      half, end: states in the middle and after, of numpy arrays.
      losses: of all steps.
    """

    text: str
    run: object
    half: object
    end: object
    losses: list[float]


class _GradientSetup(Setup):
    """A setup whose optimizer keeps the gradient as its state."""

    def optimizer(self, config) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(
            lambda params: jax.tree.map(jnp.zeros_like, params),
            lambda grads, state, params=None, **_: (grads, grads),
        )


@dataclasses.dataclass(eq=False)
class SmallArm:
    """An arm at the small size.

    Attributes:
      name: in config.arms.
      trained: its config as `shrink.shrink` made it, unresolved.
      anchor: the unresolved config of one of its anchors as the ladder trains it, for time and
        memory; None: there is none.
      vocab_size: the tokenizer's, of `anchor`.
    """

    name: str
    trained: ConfigDict
    anchor: ConfigDict | None = None
    vocab_size: int = 0

    def __post_init__(self):
        self._gradients: dict[tuple, Gradient] = {}
        # What guards keep for another arm's comparison with this one.
        self.memory: dict = {}

    @functools.cached_property
    def exact(self) -> ConfigDict:
        """The config, unresolved, without rounding to fewer bits and without dropout."""
        return shrink.exact(self.trained)

    @functools.cached_property
    def setup(self) -> Setup:
        """Of `exact`, on one device."""
        return self.build(self.exact)

    def build(self, config, n_devices: int = 1) -> Setup:
        """Builds the setup of an unresolved small config."""
        resolved = resolve(config, shrink.VOCAB)
        mesh = one_device_mesh() if n_devices == 1 else None
        if mesh is None:
            mesh = make_mesh(resolved, jax.devices("cpu")[:n_devices])
        return build_setup(resolved, shrink.MARK, mesh)

    @functools.cached_property
    def drawn(self) -> dict:
        """Random parameters, none of them 0: {path: float32}. No branch is hidden by a zero."""
        return {path: _drawn(path, spec) for path, spec in named(self.setup.model.specs).items()}

    def params(self, by_path: dict) -> dict:
        """Returns the tree of parameters that `by_path` holds by path."""
        return map_named(lambda path, _: by_path[path], self.setup.model.specs)

    @functools.cached_property
    def trained_setup(self) -> Setup:
        """Of `trained`, on one device."""
        if self.trained.to_dict() == self.exact.to_dict():
            return self.setup
        return self.build(self.trained)

    @functools.cached_property
    def start(self):
        """The state before the first step, of numpy arrays."""
        setup = self.trained_setup
        initial = jax.jit(setup.initial, compiler_options=QUICKLY)
        return jax.device_get(initial(setup.config.seed))

    def gradient(self, changes: dict | None = None, n_devices: int = 1, drawn=True) -> Gradient:
        """Returns loss and gradient of the training step of `exact` with these changes.

        The parameters are `drawn`, or else the initial ones.
        """
        key = (tuple(sorted((changes or {}).items())), n_devices, drawn)
        if key not in self._gradients:
            config = apply_overrides(self.exact, changes or {})
            setup = self.build(config, n_devices) if key[0] else self.setup
            params = self.params(self.drawn) if drawn else self.start.params
            self._gradients[key] = _step_gradient(setup, params)
        return self._gradients[key]

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """The run of `trained`, on one device."""
        return self.train(self.trained_setup)

    def lower(self, setup: Setup):
        """Lowers the step of a setup on one device, without device placements in its text."""
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(setup.initial, 0))
        return TrainStep(setup).lower(state, shrink.shrunk_batch(setup.config, 0))

    def train(self, setup: Setup) -> Trajectory:
        """Trains a setup of `trained` from its beginning."""
        batches = [shrink.shrunk_batch(setup.config, t) for t in range(shrink.STEPS)]
        lowered = self.lower(setup)
        compiled, hparams = lowered.compile(QUICKLY), TrainStep(setup).hparams

        def run(state, first: int, stop: int):
            losses = []
            for batch in batches[first:stop]:
                state, metrics = compiled(state, batch, hparams)
                losses.append(float(metrics["train_loss"]))
            return jax.device_get(state), losses

        half, losses = run(self.start, 0, shrink.STEPS // 2)
        end, more = run(half, shrink.STEPS // 2, shrink.STEPS)
        return Trajectory(lowered.as_text(), run, half, end, losses + more)

    def code_at(self, path: str) -> str:
        """Returns the user's code at a key, as "poly.py:PolyMLP"; "" where it is none."""
        return code_values(self.trained).get(path, "").partition("/")[2]

    def describe_error(self, error: Exception) -> str:
        """Describes an error in one line, with the line of the user's code where it is there."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return own_code.fault_of_code(error) or text


def _step_gradient(setup: Setup, params: dict) -> Gradient:
    setup = _GradientSetup(setup.config, setup.mesh, setup.model)
    shapes = jax.eval_shape(setup.initial, 0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    objective = mur.make_objective(setup.config)
    state = state._replace(
        step=np.int32(GRADIENT_STEP),
        params=params,
        utility=jax.device_get(objective.init_means()) if objective else {},
    )
    state = jax.device_put(state, setup.shardings)
    batch = put_batch(shrink.shrunk_batch(setup.config, 0), setup.mesh)
    take = TrainStep(setup)
    traced = take.func.trace(state, batch, take.hparams, measure=())
    after, metrics = traced.lower().compile(QUICKLY)(state, batch, take.hparams)
    grads = {path: np.asarray(g) for path, g in named(after.opt_state).items()}
    flops = product_flops(traced.jaxpr.jaxpr)
    return Gradient(float(metrics["train_loss"]), float(metrics["grad_norm"]), grads, flops)


def _drawn(path: str, spec) -> np.ndarray:
    """Draws a parameter of a size at which activations keep theirs."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    x = rng.standard_normal(spec.shape).astype(np.float32)
    if spec.n_in and spec.role not in ("vector", "scalar"):
        return x / np.float32(np.sqrt(spec.fan_in)) if spec.role != "input" else x
    center = {"ones": 1.0, "zeros": 0.0, "normal": 0.0}.get(spec.init, spec.init)
    return np.float32(center) + np.float32(0.3) * x


def norm_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Computes |a - b| / |b|, Euclidean norms; 0 where both are 0."""
    size = float(np.linalg.norm(b))
    return (
        float(np.linalg.norm(np.asarray(a, np.float64) - b)) / size
        if size
        else float(np.any(a != b))
    )
