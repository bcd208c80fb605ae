"""The run directory: its lock, whether its run may be continued, and run.json."""

import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from lmscale_jax.config.keys import get, has
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import InputError
from lmscale_jax.files import check_writable, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_workdir(workdir: Path, config) -> dict | None:
    """Reads the record of the run that `workdir` already holds; None if there is none.

    Writes nothing. Raises InputError where the directory cannot be written or holds another run.
    """
    check_writable(workdir, "--workdir")
    path = workdir / "run.json"
    if not path.exists():
        if workdir.exists() and any(p.name != ".lock" for p in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} holds files but no run.json; use an empty or new directory"
            )
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved = record["config"]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"--workdir={workdir}: run.json is not a run record ({error}); use another directory"
        ) from None
    changed = differences(saved, config.to_dict(), identity_only=True)
    if changed:
        first = changed[0]
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        saved_value = get(saved, first) if has(saved, first) else "absent"
        raise InputError(
            f"--workdir={workdir} holds a run of another config: {first} is {saved_value!r} there "
            f"and {get(config, first)!r} here{others}; use a new --workdir"
        )
    return record


def read_record(workdir: Path) -> dict:
    """Reads run.json of a directory. Raises InputError where there is none that can be read."""
    path = workdir / "run.json"
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run.json; use the directory of a run")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"config", "status", "data"} <= record.keys()
    except (ValueError, AssertionError, AttributeError):
        raise InputError(
            f"--workdir={workdir}: run.json is not a run record; use the directory of a run"
        ) from None
    return record


class RunLock:
    """A run directory's lock, held by one process; the system releases it when the process ends.

    Raises InputError where another process holds it or the directory cannot be made.
    """

    def __init__(self, workdir: Path):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(workdir / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--workdir={workdir}: {error.strerror}; use another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = lock_holder(workdir) or "another process"
            raise InputError(
                f"--workdir={workdir} is in use by {other}; wait for it or use another"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def lock_holder(workdir: Path) -> str:
    """Returns which process locked the directory last, as this one sees it; "" if it sees none."""
    try:
        return (workdir / ".lock").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def is_locked(workdir: Path) -> bool:
    """Returns whether a process holds the directory's lock now."""
    try:
        with open(workdir / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


class RunRecord:
    """The record run.json, which every plot, fit and table reads.

    Each `update` rewrites it atomically. Without a `workdir` it stays in memory: another process
    writes it.
    """

    def __init__(self, workdir: Path | None, fields: dict):
        self._path = workdir and workdir / "run.json"
        self._fields = fields

    def __getitem__(self, name: str):
        return self._fields[name]

    @property
    def id(self) -> str:
        """The run's name elsewhere, as in Weights & Biases."""
        return f"{self['config_hash']}-{self['name']}"

    def update(self, **fields) -> None:
        self._fields |= fields
        if self._path:
            write_json(self._path, self._fields)


def provenance() -> dict:
    """Returns versions, code revision and start time, which a reader needs to repeat the run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "code": {"sha256": package_hash()} | (_revision() or {}),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Folders of the package whose code changes no number of a run.
_READERS = {"configs", "examples", "guards", "reports", "scaling"}


@functools.cache
def package_hash() -> str:
    """Hashes the package's own source files that train and evaluate; returns twelve hex digits."""
    folder, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] not in _READERS:
            total.update(f"\0{name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _revision() -> dict | None:
    """Returns the source tree's commit and whether it had changes; None outside of git."""
    folder = Path(__file__).parent

    def git(*arguments) -> str:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
