"""How every command starts and ends: flags in, an exit status out, errors in one line."""

import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lmscale_jax.config import hint
from lmscale_jax.errors import InputError, RunFailed


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main()`. Exit status 0: done; 1: RunFailed; 2: bad input."""

    def body(_argv) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except InputError as error:
            stop(str(error), status=2)
        except RunFailed as error:
            stop(str(error), status=1)

    app.run(body, flags_parser=_parse)


def stop(message: str, status: int) -> None:
    """Prints one line on stderr and leaves."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)


def config_flag(required: bool = True, default: str | None = None):
    """Defines --config=FILE.py with --config.a.b=value overrides."""
    flag = config_flags.DEFINE_config_file("config", default, "config file", lock_config=False)
    if required and default is None:
        flags.mark_flag_as_required("config")
    return flag


def overrides() -> dict:
    """The --config.a.b=value overrides given on the command line, {dotted path: value}."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def _parse(argv: list[str]) -> list[str]:
    # The config library warns of what is one error, said in one line, here.
    logging.set_verbosity(logging.ERROR)
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]!r} is no flag; flags are written --name=value")
        # A config file that cannot be read shows only when its config is used.
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.to_dict()
        return rest
    except Exception as error:
        stop(_explain(error, argv), status=2)


def _explain(error: Exception, argv: list[str]) -> str:
    """One line on why the flags could not be parsed.

    Where the config library hides the cause, in a traceback or an error about another error, the
    config file is loaded once more.
    """
    given = next((a.partition("=")[2] for a in argv if re.match("--?config=", a)), None)
    if given is not None:
        config, fault = _load(given)
        fault = fault or _unknown_override(config, argv)
        if fault:
            return fault
    elif "--config must have a value" in str(error):
        return "--config is missing; --config=configs/quickstart.py would work"
    wrong = re.search(r"--?config\.([\w.]+)=(\S*?):? ", str(error))
    if given is not None and wrong:
        value = _at(config, wrong[1])
        return (
            f"config.{wrong[1]}={wrong[2]} must be of type {type(value).__name__}; "
            f"{value!r} would work"
        )
    return str(error)


def _load(given: str) -> tuple[ConfigDict | None, str | None]:
    """The config of a --config value, or what is wrong with the file, by its line."""
    path, colon, argument = given.partition(":")
    if not os.path.isfile(path):
        return None, f"--config={given}: no such file; configs/quickstart.py is one"
    try:
        config = runpy.run_path(path)["get_config"](*([argument] if colon else []))
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() returns {type(config).__name__}, not a ConfigDict")
        return config, None
    except SyntaxError as error:
        line, said = error.lineno, error.msg
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        # The text of a ConfigDict's own errors is quoted once or twice.
        said = str(error).replace("\\n", " ").strip("\"'")
        line, said = lines[-1] if lines else 1, f"{said or type(error).__name__}"
        if isinstance(error, KeyError):
            said = f"no {said} there"
    return None, f"--config={path}:{line}: {said}"


def _unknown_override(config: ConfigDict, argv: list[str]) -> str | None:
    """What is wrong with the first --config.a.b=value that names no key of the config."""
    for path in (m[1] for a in argv if (m := re.match(r"--?(?:no)?config\.([^=]+)", a))):
        if _at(config, path) is None:
            return f"config.{path} is not a key; {hint(path, list(_paths(config)))}"
    return None


def _at(config: ConfigDict, path: str):
    for name in path.split("."):
        config = config.get(name) if isinstance(config, ConfigDict) else None
    return config


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name
