"""Starts and ends every command: parses flags, reports errors in one line, sets the exit status."""

import contextlib
import errno
import os
import platform
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lmscale_jax.config import own_code
from lmscale_jax.config.resolve import hint, reset_unused
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.files import user_path


def run_command(main: Callable[[], None]) -> None:
    """Parses flags and calls `main()`.

    Exit status 0: done; 1: RunFailed; 2: bad input; 130: Ctrl-C.
    """
    _take_huge_pages()

    def body(_argv) -> None:
        logging.set_verbosity(logging.WARNING)
        # So that a line reaches a file or a pipe when it is printed, not an hour later. Not every
        # terminal has all characters.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
        with exit_on_error():
            if "trust_code" in flags.FLAGS:
                own_code.trust(flags.FLAGS.trust_code)
            main()

    app.run(body, flags_parser=_parse)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process with the line that `line_of` has of an error, if any."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # As after `| head`: who read the output has enough. Python would flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if (line := line_of(error)) is None:
            raise
        exit_with_error(*line)


def line_of(error: Exception) -> tuple[str, int] | None:
    """Returns the line and exit status with which a command ends; None for a bug."""
    if isinstance(error, InputError | RunFailed):
        return str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, OSError) and error.errno in _REMEDIES and error.filename is not None:
        status, remedy = _REMEDIES[error.errno]
        return f"{error.filename}: {error.strerror}; {remedy}", status
    message = own_code.fault_of_code(error)
    return message and (message, 2)


def _take_huge_pages() -> None:
    """Restarts this process with a glibc that asks for huge pages, unless the setting is made.

    XLA's CPU programs allocate their temporaries at each call, and glibc maps large ones again each
    time. With small pages the kernel's work on them is a quarter of a step's time, with huge ones a
    twentieth (docs/performance.md). glibc reads the setting when a process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # A program read from stdin cannot be read a second time.
    if _HUGE_PAGES in tunables or platform.libc_ver()[0] != "glibc" or sys.argv[0] in ("", "-"):
        return
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return
    if "[never]" in modes:
        return
    tunables = f"{tunables}:{_HUGE_PAGES}=1".removeprefix(":")
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        os.environ | {"GLIBC_TUNABLES": tunables},
    )


_HUGE_PAGES = "glibc.malloc.hugetlb"

# Errors of the environment, by number: the exit status, and what to do. Others are bugs.
_REMEDIES = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS),
    (2, "use a path that this user may read and write"),
) | {
    errno.ENAMETOOLONG: (2, "use a shorter name"),
    errno.ELOOP: (2, "use a path without circular links"),
    errno.ENOSPC: (1, "make room there, or use another disk"),
    errno.EDQUOT: (1, "make room in the quota, or use another disk"),
    errno.EFBIG: (1, "raise the limit on the size of files (ulimit -f)"),
    errno.EMFILE: (1, "raise the limit on open files (ulimit -n)"),
    errno.EIO: (1, "the disk may be failing; use another"),
}


def exit_with_error(message: str, status: int) -> None:
    """Prints one line on stderr and exits with `status`."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)


def config_flag(required: bool = True, default: str | None = None):
    """Defines the flag --config=FILE.py, with --config.a.b=value overrides.

    `default` is the name of a shipped config; a user's file of that name replaces it.
    """
    default = default and find_config(default)
    flag = config_flags.DEFINE_config_file("config", default, "config file", lock_config=False)
    if required and default is None:
        flags.mark_flag_as_required("config")
    return flag


class _PathParser(flags.ArgumentParser):
    """Parses a path: a leading ~ is replaced, and what names nothing is refused."""

    def parse(self, argument):
        if argument in ("", "None"):
            raise ValueError("names no path; leave the flag out, or use ./None for that name")
        try:
            return user_path(argument)
        except InputError as error:
            raise ValueError(str(error)) from None


def path_flag(name: str, help: str, required: bool = False):
    """Defines a flag whose value is a `Path`; None where it is not set."""
    return flags.DEFINE(_PathParser(), name, None, help, required=required)


def trust_flag() -> None:
    """Defines the flag --trust_code=HASH,..., which lets code of a run's directory be executed."""
    flags.DEFINE_list(
        "trust_code",
        [],
        "hashes of code of its own that this command may take from a run's source/",
    )


def overrides() -> dict:
    """Returns the --config.a.b=value overrides of the command line, {dotted path: value}."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def find_config(argument: str) -> str:
    """Resolves the path in a --config value FILE.py[:ARG].

    A file of this name in the working directory comes first; else configs/NAME.py is the one in
    the package.
    """
    path, colon, name = argument.partition(":")
    shipped = PACKAGE / path
    if path.startswith("configs/") and not os.path.isfile(path) and shipped.is_file():
        return f"{shipped}{colon}{name}"
    return argument


PACKAGE = Path(__file__).parent


def config_file() -> str:
    """Returns the path of the config file; lmscale_jax/configs/NAME.py if it is shipped."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return path.replace(f"{PACKAGE}/configs/", f"{PACKAGE.name}/configs/", 1)


def _with_flag_of_first(argv: list[str]) -> list[str]:
    """Replaces a file or directory that comes first, without a flag, by the flags that it means.

    FILE.py is --config=FILE.py, and unless it is set --workdir=runs/FILE. Commands without a config
    take their --workdir, or --input, so.
    """
    first = argv[1] if len(argv) > 1 else "-"
    path, _, name = first.partition(":")
    if first.startswith("-") or "=" in first:
        return argv
    if "config" in flags.FLAGS:
        if not path.endswith(".py"):
            return argv
        meant = [f"--config={first}"]
        if "workdir" in flags.FLAGS and not any(re.match("--?workdir", a) for a in argv[2:]):
            stem = "_".join([Path(path).stem, *re.findall(r"\w+", name)])
            meant.append(f"--workdir=runs/{stem}")
    else:
        meant = [f"--{flag}={first}" for flag in ("workdir", "input") if flag in flags.FLAGS][:1]
    return [argv[0], *(meant or [first]), *argv[2:]]


def _with_config_path(argv: list[str]) -> list[str]:
    """Replaces the value of --config by `find_config` of it, in either spelling of the flag."""
    changed = list(argv)
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and equals:
            changed[i] = f"{name}={find_config(value)}"
        elif name in ("--config", "-config") and i + 1 < len(argv):
            changed[i + 1] = find_config(argv[i + 1])
    return changed


def _parse(argv: list[str]) -> list[str]:
    # The config library warns of errors that are reported here in one line.
    logging.set_verbosity(logging.ERROR)
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        argv = _with_config_path(_with_flag_of_first(argv))
        positional = flags.FLAGS(argv)
        if len(positional) > 1:
            raise flags.Error(f"{positional[1]!r} is not a flag; use --name=value")
        if message := _missing_value():
            raise flags.Error(message)
        # A config file that cannot be read shows only when its config is used.
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.to_dict()
            settle_unused(flags.FLAGS.config, overrides())
        return positional
    except Exception as error:
        exit_with_error(_explain(error, argv), status=2)


def _explain(error: Exception, argv: list[str]) -> str:
    """Explains in one line why the flags could not be parsed.

    The config library may hide the cause in a traceback or an error about another error; then the
    config file is loaded once more.
    """
    if "before a value for --config" in str(error):
        return "--config.KEY=value is before --config=FILE; put it after"
    if message := _missing_value():
        return message
    argument = _config_argument(argv)
    if argument is None:
        missing = "--config must" in str(error) or "flag 'config." in str(error)
        message = "--config is missing; use --config=configs/quickstart.py"
        return message if missing else str(error)
    config, fault = load_config(argument)
    return fault or _override_fault(config, argv, str(error)) or str(error)


def _missing_value() -> str | None:
    """Returns a message where a flag without a value has taken the next flag as its value."""
    for name in flags.FLAGS:
        if str(value := flags.FLAGS[name].value).startswith("--"):
            return f"--{name} has no value but the next flag, {value}; use --{name}=value"
    return None


def _config_argument(argv: list[str]) -> str | None:
    """Returns the value of --config, in either spelling."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else "".join(argv[i + 1 : i + 2])
    return None


def load_config(argument: str) -> tuple[ConfigDict | None, str | None]:
    """Loads the file of a --config value. Returns (config, None), or (None, message with line)."""
    path, colon, name = argument.partition(":")
    if not os.path.isfile(path):
        return None, f"--config={argument}: no such file; use --config=configs/quickstart.py"
    try:
        config = runpy.run_path(path)["get_config"](*([name] if colon else []))
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() returns {type(config).__name__}, not a ConfigDict")
        return config, None
    except SyntaxError as error:
        line, message = error.lineno, error.msg
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        # The text of a ConfigDict's own errors is quoted once or twice.
        message = str(error).replace("\\n", " ").strip("\"'")
        line, message = lines[-1] if lines else 1, f"{message or type(error).__name__}"
        if isinstance(error, KeyError):
            message = f"no {message} there"
    return None, f"--config={path}:{line}: {message}"


def settle_unused(config: ConfigDict, changes) -> None:
    """Resets what `changes` (dotted paths) leave unused, in a run's config or a ladder's."""
    reset_unused(config, changes)
    runs = config.get("run")
    if isinstance(runs, ConfigDict):  # the config of a ladder's runs
        reset_unused(runs, {path.removeprefix("run.") for path in changes})


def _override_fault(config: ConfigDict, argv: list[str], message: str) -> str | None:
    """Returns what is wrong with an override --config.a.b=value: its key or its value's type.

    `message` is the config library's.
    """
    for match in (re.match(r"--?(?:no)?config\.([^=]+)=?(.*)", a) for a in argv):
        if match is None:
            continue
        path, value = match.groups()
        if path.startswith("own."):
            return f"config.{path}={value}: the config file must set this key of code first, too"
        default = _default_of(config, path)
        if default is None:
            return f"config.{path} is not a key; {hint(path, list(config_paths(config)))}"
        if isinstance(default, ConfigDict):
            return f"config.{path}={value} is a group of keys; set one, config.{path}.KEY=value"
        if f"config.{path}={value}" in message:
            kind, meant = type(default).__name__, _meant(value, default)
            return f"config.{path}={value} must be of type {kind}; use {meant!r}"
    return None


def _meant(text: str, default):
    """Returns the value of the default's type that a text means, else the default."""
    if isinstance(default, bool):
        return {"yes": True, "on": True, "no": False, "off": False}.get(text.lower(), default)
    if isinstance(default, int):
        with contextlib.suppress(ValueError, OverflowError):
            return int(float(text))
    return default


def _default_of(config: ConfigDict, path: str):
    for name in path.split("."):
        config = config.get(name) if isinstance(config, ConfigDict) else None
    return config


def config_paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted path of every key of a config."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from config_paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name
