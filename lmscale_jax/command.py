"""How every command starts and ends: flags in, an exit status out, errors in one line."""

import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

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
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]!r} is no flag; flags are written --name=value")
        return rest
    except Exception as error:
        stop(_explain(error), status=2)


def _explain(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) or "No such file" in str(error):
        return f"--config: no such config file ({_config_argument()}); configs/quickstart.py is one"
    if isinstance(error, flags.Error):
        return str(error)
    # A mistake inside a config file, or an override of a key that is not there.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/configs/" in f.filename]
    where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}: " if frames else ""
    said = error.args[0] if error.args else type(error).__name__
    return f"{where}config: {said}".replace("\\'", "").replace('"', "")


def _config_argument() -> str:
    return next((a for a in sys.argv if a.startswith("--config")), "--config")
