"""Checkpoints by Orbax: asynchronous, atomic, verified, readable on another number of devices.

Each holds three items: `params`, `rest` (the other fields of the train state) and `host` (what the
host remembers, and a checksum of every array). A kill at any moment leaves the earlier ones intact.
"""

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lmscale_jax.errors import InputError
from lmscale_jax.train import distributed


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      workdir: of the run; they are under checkpoints/.
      keep: how many of the newest are kept.
      keep_every: those at multiples of so many steps are kept too; 0: none.
    """

    def __init__(self, workdir: Path, keep: int = 1, keep_every: int = 0):
        self._directory = (workdir / "checkpoints").absolute()
        self._options = {"max_to_keep": keep, "keep_period": keep_every or None}
        self._manager = None
        # The step of the checkpoint that was last handed to Orbax.
        self.writing: int | None = None
        self._checksums = jax.jit(checksums)

    @property
    def manager(self):
        """Orbax's manager, made on first use because Orbax is slow to import."""
        if self._manager is None:
            import orbax.checkpoint as ocp

            _silence_errors_raised_twice()
            options = ocp.CheckpointManagerOptions(**self._options, create=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps(read=True)) if self._directory.exists() else []

    def save(self, step: int, state, host: dict) -> None:
        """Copies the state and writes it in the background.

        Raises what an earlier write raised, and OSError where Orbax declines.
        """
        import orbax.checkpoint as ocp

        params, others = _split_state(state)
        sums = jax.tree.map(int, self._checksums(state))
        self.writing = step
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(others),
            host=ocp.args.JsonSave(host | {"step": step, "checksums": sums}),
        )
        if not self.manager.save(step, args=items):
            raise OSError(f"orbax declined to save step {step} after {self.steps()}")

    def wait(self) -> None:
        """Waits until the last save is on the disk. Raises what the write raised."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def restore(self, abstract, say: Callable[[str], None]):
        """Returns (state, host) of the newest readable checkpoint, or None if there is none at all.

        A checkpoint that cannot be read, or whose checksums differ, is moved to
        checkpoints_unreadable/ and the one before it is tried. Several processes take the newest
        one that all of them can read.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` with shardings.

        Raises:
          InputError: there are checkpoints and none can be read.
        """
        steps = distributed.broadcast(self.steps())
        for step in reversed(steps):
            restored, reason = None, ""
            try:
                restored = self._read(step, abstract)
            except Exception as error:
                reason = _read_error(error)
            reason = next(filter(None, distributed.gather(reason)), "")
            if not reason:
                return restored
            say(f"checkpoint {step} cannot be read ({reason}); trying the one before it")
            distributed.on_first(lambda step=step: self.set_aside(step))
            self.manager.reload()
        if steps:
            raise InputError(
                f"{self._directory}: none of the checkpoints {steps} can be read; they were moved "
                f"to checkpoints_unreadable; use a new --workdir"
            )
        return None

    def _read(self, step: int, abstract):
        import orbax.checkpoint as ocp

        params, others = _split_state(abstract)
        items = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                rest=ocp.args.StandardRestore(others),
                host=ocp.args.JsonRestore(),
            ),
        )
        state = abstract._replace(params=items.params, **items.rest)
        sums = jax.tree.map(int, self._checksums(state))
        if sums.keys() != items.host["checksums"].keys():
            raise ValueError("it holds other arrays")
        _compare_checksums(sums, items.host["checksums"])
        return state, items.host

    def restore_step(self, step: int, abstract):
        """Returns (state, host) of one checkpoint of a finished or another run; moves nothing.

        Raises InputError where it cannot be read completely.
        """
        try:
            return self._read(step, abstract)
        except Exception as error:
            raise InputError(
                f"{self._directory / str(step)} cannot be read ({_read_error(error)}); "
                f"use another step of {self.steps()}"
            ) from error

    def set_aside(self, step: int, folder: str = "checkpoints_unreadable") -> None:
        """Moves a checkpoint to another folder of the run directory."""
        parent = self._directory.with_name(folder)
        parent.mkdir(exist_ok=True)
        target = parent / str(step)
        while target.exists():
            target = target.with_name(target.name + "-again")
        (self._directory / str(step)).rename(target)
        self.manager.reload()

    def find_step(self, step: int = 0) -> int:
        """Returns the step of a checkpoint, by default of the newest.

        Raises InputError if there is none.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self._directory} holds no checkpoint; train the run first")
        if step and step not in steps:
            raise InputError(f"{self._directory} holds no checkpoint {step}; use one of {steps}")
        return step or steps[-1]

    def restore_params(self, abstract, step: int = 0):
        """Returns (step, params) of a checkpoint, by default of the newest; moves nothing.

        Raises InputError if there is none, or if it cannot be read completely.
        """
        import orbax.checkpoint as ocp

        step = self.find_step(step)
        try:
            items = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
            sums = {f".params{k}": int(v) for k, v in self._checksums(items.params).items()}
            _compare_checksums(sums, items.host["checksums"])
        except Exception as error:
            others = [s for s in self.steps() if s != step]
            raise InputError(
                f"{self._directory / str(step)} cannot be read ({_read_error(error)}); "
                f"other checkpoints: {others or 'none'}"
            ) from error
        return step, items.params

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()


@functools.cache
def _silence_errors_raised_twice() -> None:
    """Keeps stderr free of what Orbax raises too.

    It logs errors; when one array cannot be read it leaves the reads of the others behind, whose
    coroutines Python closes, and whose threads call a closed event loop, with tracebacks of their
    own.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show_ignored, show = sys.unraisablehook, sys.excepthook

    def show_other_ignored(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if code is None or "orbax" not in code.co_filename:
            show_ignored(unraisable)

    def show_other(kind, error, traceback) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            show(kind, error, traceback)

    sys.unraisablehook, sys.excepthook = show_other_ignored, show_other


def _split_state(state) -> tuple[dict, dict]:
    """Returns the parameters, and the other fields of a train state by name."""
    others = state._asdict()
    return others.pop("params"), others


def _read_error(error: Exception) -> str:
    """Returns an error's text on one line, shortened."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _compare_checksums(sums: dict[str, int], saved: dict[str, int]) -> None:
    """Raises ValueError where an array differs from the saved one of its name."""
    wrong = [name for name, value in sums.items() if value != saved.get(name)]
    if wrong:
        raise ValueError(f"checksum of {wrong[0]} differs")


def checksums(tree) -> dict[str, jax.Array]:
    """Returns {path: sum of the array's 32-bit words modulo 2^32}, equal however it is sharded."""

    def checksum(x):
        words = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): checksum(leaf) for path, leaf in leaves}
