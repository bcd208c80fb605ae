"""One process's own step, taken apart: what breakdown.py and overheads.py put in turns."""

import dataclasses
from collections.abc import Callable

from benchmarks.interleave import Turns


@dataclasses.dataclass
class Program:
    """What trains a config over some devices, and random batches."""

    setup: object
    batches: list

    def batch(self, number: int = 0):
        """A batch on the devices."""
        from lmscale_jax.model import mesh

        return mesh.put_batch(self.batches[number % len(self.batches)], self.setup.mesh)

    def device(self) -> dict:
        first = self.setup.mesh.devices.flat[0]
        return {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": self.setup.mesh.size,
        }


def program(config, devices: list | None = None) -> Program:
    """Of a resolved config; `mesh.start_jax` comes before it."""
    import numpy as np

    from lmscale_jax.data.batches import Batch
    from lmscale_jax.model import mesh
    from lmscale_jax.train.setup import build_setup

    # Token 0 marks the beginning of documents; some batches hold several.
    setup = build_setup(config, 0, mesh.make_mesh(config, devices))
    size = (8, config.train.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, size, np.int32)
    tokens[:, :, :: max(1, config.data.seq_len // 4)] = 0
    batches = [Batch(t[:, :-1].copy(), t[:, 1:].copy()) for t in tokens]
    return Program(setup, batches)


class Steps(Turns):
    """Training steps on one batch, with what is measured in each of them."""

    def __init__(self, label: str, of: Program, measure: tuple[str, ...] = ()):
        from lmscale_jax.train.setup import TrainStep

        super().__init__(label, self._steps)
        self._batch, self._state = of.batch(), of.setup.begin()
        take = TrainStep(of.setup)
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
