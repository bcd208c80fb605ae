"""Builds the model and the optimizer of a config, and the programs that initialize and train it.

`build_setup` is the one way to them: single runs, packs, populations, coordinate checks, --explain,
other commands and the benchmarks call it, so that a key means the same for all.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lmscale_jax.data.batches import Batch
from lmscale_jax.model.build import Model, build_model
from lmscale_jax.model.mesh import make_mesh, state_shardings
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.optim import build as optim
from lmscale_jax.train import step
from lmscale_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What trains a config. It holds no arrays, and nothing of it changes while a run trains.

    Attributes:
      config: resolved.
      mesh: a `jax.sharding.Mesh`; or sizes alone (`aot.MeshSizes`), which only describe a model.
    """

    config: object
    mesh: Mesh
    model: Model

    @property
    def platform(self) -> str:
        """JAX's name of the platform that runs the model."""
        return self.mesh.devices.flat[0].platform

    def optimizer(self, config) -> object:
        """Builds the optax transformation of `config`, whose numbers may be traced."""
        return optim.build_optimizer(config, self.model.param_rules, self.mesh, self.platform)

    @functools.cached_property
    def transform(self):
        """The optimizer, an optax transformation."""
        return self.optimizer(self.config)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """The shardings of the training state, a tree like it."""
        shapes = jax.eval_shape(self.initial, 0)
        return state_shardings(shapes, self.model.specs, self.mesh)

    def initial(self, seed) -> TrainState:
        """Computes the state before the first step; `seed` may be traced."""
        return step.initial_state(self.config, self.model, self.transform, seed)

    def begin(self) -> TrainState:
        """Initializes the state on the mesh; one compiled program serves all seeds."""
        return jax.jit(self.initial, out_shardings=self.shardings)(self.config.seed)

    def abstract_state(self) -> TrainState:
        """Describes the state and its shardings, for a checkpoint to be read into."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(self.initial, self.config.seed),
            self.shardings,
        )

    def abstract_batch(self) -> Batch:
        """Describes a batch and its sharding."""
        shape = self.config.train.batch_size, self.config.data.seq_len
        sharding = NamedSharding(self.mesh, BATCH)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        return Batch(tokens, tokens)

    def train_step(self) -> Callable:
        """Returns the pure step, `step.make_train_step`."""
        return step.make_train_step(self.config, self.model, self.optimizer, self.mesh)

    def lower_step(self, measure: tuple[str, ...] = ()):
        """Lowers the training step for abstract arrays; the mesh may be of described chips."""
        # tokamax chooses its kernels for the default device, not for that of the program.
        with jax.default_device(self.mesh.devices.flat[0]):
            return TrainStep(self).lower(self.abstract_state(), self.abstract_batch(), measure)


def build_setup(config, boundary: int | None, mesh: Mesh | None = None) -> Setup:
    """Builds the setup of a resolved config.

    Args:
      config: resolved.
      boundary: id of the token that begins a document; None: the data has no such mark.
      mesh: by default that of the config, over all devices.

    Raises:
      InputError: the config does not fit the devices, or cannot be honoured with this data.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    platform = mesh.devices.flat[0].platform
    return Setup(config, mesh, build_model(config, platform=platform, bos_id=boundary, mesh=mesh))


class TrainStep(functools.partial):
    """The jitted `step(state, batch, measure=())` of a setup, which donates its state.

    A program compiled from `lower` is called with (state, batch, hparams).
    """

    def __new__(cls, setup: Setup):
        jitted = jax.jit(
            setup.train_step(),
            static_argnames="measure",
            donate_argnums=0,
            out_shardings=(setup.shardings, None),
        )
        return super().__new__(cls, jitted, hparams=step.traced_hparams(setup.config))

    @property
    def hparams(self) -> dict[str, int | float]:
        return self.keywords["hparams"]

    def lower(self, state: TrainState, batch, measure: tuple[str, ...] = ()):
        """Lowers as `jax.jit` does, for arrays or their descriptions."""
        return self.func.lower(state, batch, self.hparams, measure=measure)
