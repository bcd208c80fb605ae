"""One process's own step, taken apart: what breakdown.py and overheads.py put in turns."""

import dataclasses
from collections.abc import Callable

from benchmarks.interleave import Turns


@dataclasses.dataclass
class Program:
    """A config's model, optimizer and shardings over some devices, and random batches."""

    config: object
    grid: object
    model: object
    transform: object
    placed: object
    batches: list

    def initial(self):
        import jax

        from lmscale_jax.train import step

        def first():
            return step.initial_state(self.config, self.model, self.transform, 0)

        return jax.jit(first, out_shardings=self.placed)()

    def batch(self, number: int = 0):
        """A batch on the devices."""
        from lmscale_jax.model import mesh

        return mesh.put_batch(self.batches[number % len(self.batches)], self.grid)

    def device(self) -> dict:
        first = self.grid.devices.flat[0]
        return {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": self.grid.devices.size,
        }


def program(config, devices: list | None = None) -> Program:
    """Of a resolved config; `mesh.start_jax` comes before it."""
    import numpy as np

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model import mesh
    from lmscale_jax.model.build import build_model
    from lmscale_jax.optim import build as optim
    from lmscale_jax.train import step

    grid = mesh.make_mesh(config, devices)
    platform = grid.devices.flat[0].platform
    # Where documents are masked, token 0 marks their beginning; some batches hold several.
    bos_id = 0 if config.model.mask == "document" else None
    model = build_model(config, platform=platform, bos_id=bos_id, mesh=grid)
    transform = optim.build_optimizer(config, model.rows, grid, platform)
    placed = step.train_state_shardings(config, model, transform, grid)
    size = (8, config.train.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, size, np.int32)
    tokens[:, :, :: max(1, config.data.seq_len // 4)] = 0
    batches = [Batch(t[:, :-1].copy(), t[:, 1:].copy()) for t in tokens]
    return Program(config, grid, model, transform, placed, batches)


class Steps(Turns):
    """Training steps on one batch, with what is measured in each of them."""

    def __init__(self, label: str, of: Program, measure: tuple[str, ...] = ()):
        from lmscale_jax.train import step

        super().__init__(label, self._steps)
        self._batch, self._state = of.batch(), of.initial()
        take = step.TrainStep(of.config, of.model, of.grid, of.placed)
        self._take, self._hparams = (
            take.lower(self._state, self._batch, measure).compile(),
            take.hparams,
        )
        memory = self._take.memory_analysis()
        self.bytes = memory.temp_size_in_bytes if memory else None
        self._steps(2)

    def _steps(self, steps: int) -> float:
        for _ in range(steps):
            self._state, metrics = self._take(self._state, self._batch, self._hparams)
        return float(metrics["train_loss"])


def calls(label: str, function: Callable, *inputs) -> Turns:
    """A function of arrays again and again; only the last result is waited for."""
    import jax

    def run(times: int) -> float:
        for _ in range(times):
            result = function(*inputs)
        jax.block_until_ready(result)
        return 0.0

    run(2)
    return Turns(label, run)
