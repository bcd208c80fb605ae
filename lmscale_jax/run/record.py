"""The run directory: who may write in it, whether it may be continued, and run.json."""

import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path

from lmscale_jax.config.keys import get, has
from lmscale_jax.config.resolve import differences
from lmscale_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check(workdir: Path, config) -> dict | None:
    """The record of the run that `workdir` already holds, or None. Writes nothing.

    Raises InputError where the directory cannot be written or holds another run.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--workdir={workdir} cannot be written; one under {Path.home()} could")
    path = workdir / "run.json"
    if not path.exists():
        if workdir.exists() and any(p.name != ".lock" for p in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} holds files but no run.json; name an empty or new directory"
            )
        return None
    try:
        record = json.loads(path.read_text())
        before = record["config"]
    except (ValueError, KeyError) as error:
        raise InputError(f"--workdir={workdir}: run.json is no run record ({error})") from None
    changed = differences(before, config.to_dict(), identity_only=True)
    if changed:
        first = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        was = get(before, first) if has(before, first) else "absent"
        raise InputError(
            f"--workdir={workdir} holds a run of another config: {first} is {was!r} there and "
            f"{get(config, first)!r} here{more}; name a new --workdir"
        )
    return record


def read_record(workdir: Path) -> dict:
    """run.json of a directory. Raises InputError where there is none that can be read."""
    path = workdir / "run.json"
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run.json; name the directory of a run")
    try:
        record = json.loads(path.read_text())
        assert {"config", "status", "data"} <= record.keys()
    except (ValueError, AssertionError, AttributeError):
        raise InputError(f"--workdir={workdir}: run.json is no run record") from None
    return record


class Lock:
    """Holds a run directory for one process; the system releases it when the process ends."""

    def __init__(self, workdir: Path):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(workdir / ".lock", "a+")
        except OSError as error:
            raise InputError(f"--workdir={workdir}: {error.strerror}; name another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = holder(workdir) or "another process"
            raise InputError(
                f"--workdir={workdir} is in use by {other}; wait for it or name another"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def holder(workdir: Path) -> str:
    """Which process locked the directory last, as this one sees it; "" where it sees none."""
    try:
        return (workdir / ".lock").read_text().strip()
    except OSError:
        return ""


def in_use(workdir: Path) -> bool:
    """Whether a process holds the directory now."""
    try:
        with open(workdir / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


class Record:
    """run.json: read by every plot, fit and table. Each `update` rewrites it atomically.

    Without a `workdir` it is kept in memory, where another process writes it.
    """

    def __init__(self, workdir: Path | None, fields: dict):
        self._path = workdir and workdir / "run.json"
        self._fields = fields

    def __getitem__(self, name: str):
        return self._fields[name]

    @property
    def id(self) -> str:
        """Names the run elsewhere, as in Weights & Biases."""
        return f"{self['config_hash']}-{self['name']}"

    def update(self, **fields) -> None:
        self._fields |= fields
        if self._path:
            write_json(self._path, self._fields)


def write_json(path: Path, value) -> None:
    """Writes JSON atomically; numbers that are not finite become null."""
    text = json.dumps(finite(value), indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(value):
    """The value with every non-finite float replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def provenance() -> dict:
    """Versions, code revision and start time: what a reader needs to repeat the run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "code": _revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _revision() -> dict | None:
    """The commit of the source tree and whether it had changes, where it is a git checkout."""
    here = Path(__file__).parent

    def git(*arguments) -> str:
        result = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
