"""Checkpoints by Orbax: asynchronous, atomic, verified, readable on another number of devices.

Each holds three items: `params`, `rest` (the other fields of the train state) and `host` (what the
host remembers, and a checksum of every array). A kill at any moment leaves the earlier ones whole.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lmscale_jax.errors import InputError
from lmscale_jax.run import cluster


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, workdir: Path, keep: int = 1, keep_every: int = 0):
        self._directory = (workdir / "checkpoints").absolute()
        self._options = {"max_to_keep": keep, "keep_period": keep_every or None}
        self._manager = None
        self.writing: int | None = None
        self._checksums = jax.jit(checksums)

    @property
    def manager(self):
        """Orbax is slow to import, so it is only when the first checkpoint is due."""
        if self._manager is None:
            import orbax.checkpoint as ocp

            # What it reports as an error it also raises, at times from several tasks at once.
            for name in ("absl", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            options = ocp.CheckpointManagerOptions(**self._options, create=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps(read=True)) if self._directory.exists() else []

    def save(self, step: int, state, host: dict) -> None:
        """Copies the state out, writes it in the background. Raises what an earlier write met."""
        import orbax.checkpoint as ocp

        params, rest = _split(state)
        sums = jax.tree.map(int, self._checksums(state))
        self.writing = step
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            host=ocp.args.JsonSave(host | {"step": step, "checksums": sums}),
        )
        if not self.manager.save(step, args=items):
            raise OSError(f"orbax declined to save step {step} after {self.steps()}")

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises what the write met."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def restore(self, abstract, say: Callable[[str], None]):
        """(state, host) of the newest checkpoint that is whole, or None if there is none at all.

        `abstract` is the state as `jax.ShapeDtypeStruct` with shardings. One that cannot be read or
        whose checksums differ is set aside under checkpoints_unreadable/ and the one before it is
        tried. Raises InputError if there are checkpoints and none can be read. Several processes
        go on from the newest one that all of them can read.
        """
        steps = cluster.shared(self.steps())
        for step in reversed(steps):
            found, reason = None, ""
            try:
                found = self._read(step, abstract)
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            reason = next(filter(None, cluster.gather(reason)), "")
            if not reason:
                return found
            say(f"checkpoint {step} cannot be read ({reason}); trying the one before it")
            cluster.on_first(lambda step=step: self.set_aside(step))
            self.manager.reload()
        if steps:
            raise InputError(
                f"{self._directory}: none of the checkpoints {steps} can be read; they were moved "
                f"to checkpoints_unreadable, and a new --workdir starts afresh"
            )
        return None

    def _read(self, step: int, abstract):
        import orbax.checkpoint as ocp

        params, rest = _split(abstract)
        read = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                rest=ocp.args.StandardRestore(rest),
                host=ocp.args.JsonRestore(),
            ),
        )
        state = abstract._replace(params=read.params, **read.rest)
        found = jax.tree.map(int, self._checksums(state))
        if found != read.host["checksums"]:
            wrong = [k for k, v in found.items() if v != read.host["checksums"].get(k)]
            raise ValueError(f"checksum of {wrong[0]} differs")
        return state, read.host

    def at(self, step: int, abstract):
        """(state, host) of one checkpoint of a finished or another run; moves nothing.

        Raises InputError where it cannot be read whole.
        """
        try:
            return self._read(step, abstract)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{self._directory / str(step)} cannot be read ({reason}); another step of "
                f"{self.steps()} may work"
            ) from error

    def set_aside(self, step: int, where: str = "checkpoints_unreadable") -> None:
        """Moves a checkpoint out of the way, to a directory beside."""
        aside = self._directory.with_name(where)
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "-again")
        (self._directory / str(step)).rename(target)
        self.manager.reload()

    def params(self, abstract, step: int = 0):
        """(step, params) of a checkpoint, the newest by default; moves nothing.

        Raises InputError if there is none, or if it cannot be read whole.
        """
        import orbax.checkpoint as ocp

        steps = self.steps()
        if not steps:
            raise InputError(f"{self._directory} holds no checkpoint; train the run first")
        if step and step not in steps:
            raise InputError(f"{self._directory} holds no checkpoint {step}, but {steps}")
        step = step or steps[-1]
        try:
            read = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
            found = {f".params{k}": int(v) for k, v in self._checksums(read.params).items()}
            wrong = [k for k, v in found.items() if v != read.host["checksums"].get(k)]
            if wrong:
                raise ValueError(f"checksum of {wrong[0]} differs")
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            others = [s for s in steps if s != step]
            raise InputError(
                f"{self._directory / str(step)} cannot be read ({reason}); other checkpoints: "
                f"{others or 'none'}"
            ) from error
        return step, read.params

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()


def _split(state) -> tuple[dict, dict]:
    rest = state._asdict()
    return rest.pop("params"), rest


def checksums(tree) -> dict[str, jax.Array]:
    """{path: sum of the array's 32-bit words modulo 2^32}, the same however it is sharded."""

    def one(x):
        words = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): one(leaf) for path, leaf in leaves}
