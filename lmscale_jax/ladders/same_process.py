"""Trains a ladder's jobs in this process, where it holds the accelerator that they need."""

import os
import signal
import sys
from pathlib import Path

from lmscale_jax.config import own_code
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.ladders import executors, plan, worker
from lmscale_jax.ladders.executors import EndedJob, Job


class SameProcess:
    """An executor whose `submit` returns when its first job has ended; its lines are printed."""

    slots = 1

    def __init__(self, workdir: Path):
        self._workdir, self._ended = workdir, []

    def submit(self, jobs: list[Job]) -> list[Job]:
        if not jobs:
            return []
        job, status, message = jobs[0], 0, ""
        own_code.look_in(self._workdir)
        ladder_plan = plan.read_plan(self._workdir)
        try:
            worker.train_cells(ladder_plan, [ladder_plan.cell(name) for name in job], self._workdir)
        except (InputError, RunFailed, OSError) as error:
            status, message = 1, " ".join(str(error).split())
        except SystemExit as stop:
            # The run took the signal for itself; the scheduler must hear of it too.
            status, message = stop.code, "stopped"
            os.kill(os.getpid(), signal.Signals(stop.code - 128))
        self._ended.append(EndedJob(job, status, message))
        return jobs[1:]

    def poll(self) -> list[EndedJob]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        """Does nothing: when it is called no job is running."""


def executor_beside_jax(settings, workdir: Path):
    """Makes the executor of a ladder in a process that may have used JAX, such as a notebook's."""
    if settings["name"] == "local" and holds_accelerator():
        return SameProcess(workdir)
    return executors.make_executor(settings, workdir)


def holds_accelerator() -> bool:
    """Returns whether this process uses an accelerator already. Does not start JAX."""
    if "jax" not in sys.modules:
        return False
    import jax

    try:
        # JAX refuses to change it once a device is in use.
        before = jax.config.jax_num_cpu_devices
        jax.config.update("jax_num_cpu_devices", max(before, 0) + 1)
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        return jax.default_backend() != "cpu"
    return False
