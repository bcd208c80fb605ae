"""Runs a command by its verb: lmscale VERB [FLAGS], which is python -m lmscale_jax.MODULE [FLAGS].

lmscale help [VERB or KEY]   describes a command, a config key (optim.lr) or a group of keys
lmscale configs              lists the configs that come with the package
lmscale new KIND [NAME]      writes an example of a change of your own and its ladder: {kinds}
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from lmscale_jax import cli
from lmscale_jax.errors import InputError
from lmscale_jax.new import KINDS, write_example

__doc__ = __doc__.format(kinds=", ".join(KINDS))

# Verb -> module of the command.
VERBS = {
    "train": "main",
    "check": "check",
    "ladder": "ladder",
    "fit": "fit",
    "report": "report",
    "evaluate": "evaluate",
    "generate": "generate",
    "prepare": "prepare",
    "convert": "convert",
    "coord_check": "coord_check",
    "lr_transfer": "lr_transfer",
}


def show_help(arguments: list[str]) -> None:
    """Describes all verbs and groups of keys, or the verb or key that is asked for."""
    from lmscale_jax.config.key_help import group_help, key_help

    if not arguments:
        print(f"{__doc__}\n{_verb_lines()}\n\nKeys of a config, for lmscale help KEY:\n")
        print("\n".join(group_help()))
        return
    if arguments[0] in VERBS:
        verb = arguments[0]
        print(f"{_docstring(cli.PACKAGE / f'{VERBS[verb]}.py')}\nflags: lmscale {verb} --help")
        return
    print("\n".join(key_help(arguments[0])))


def list_configs(arguments: list[str]) -> None:
    """Prints the path of each shipped config, and the first line that it says of itself."""
    if arguments:
        raise InputError(f"configs {arguments[0]}: configs takes no argument; use lmscale configs")
    paths = [path.relative_to(cli.PACKAGE) for path in (cli.PACKAGE / "configs").rglob("*.py")]
    configs = [path for path in sorted(paths) if path.stem not in ("__init__", "laddering")]
    width = max(len(str(path)) for path in configs)
    for path in configs:
        print(f"{path!s:<{width}}  {_docstring(cli.PACKAGE / path).partition(chr(10))[0]}")


# Verb -> function of the arguments behind it.
WORDS = {"help": show_help, "configs": list_configs, "new": write_example}


def main() -> None:
    verb, *arguments = sys.argv[1:] or ["help"]
    if verb in ("-h", "--help"):
        verb, arguments = "help", []
    if verb in VERBS:
        sys.argv = [f"lmscale {verb}", *arguments]
        # As python -m does it, so that flags, errors and pages are the same.
        runpy.run_module(f"lmscale_jax.{VERBS[verb]}", run_name="__main__", alter_sys=True)
        return
    with cli.exit_on_error():
        _say(verb, arguments)


def _say(verb: str, arguments: list[str]) -> None:
    if verb not in WORDS:
        near = difflib.get_close_matches(verb, [*VERBS, *WORDS], n=1) or ["help"]
        raise InputError(f"{verb} is not a verb of lmscale; use lmscale {near[0]}")
    WORDS[verb](arguments)
    sys.stdout.flush()


def _verb_lines() -> str:
    lines = []
    for verb, module in VERBS.items():
        doc = _docstring(cli.PACKAGE / f"{module}.py").partition("\n")[0]
        lines.append(f"{verb:<12}{doc.partition(': python -m')[0].removesuffix(':')}")
    return "\n".join(lines)


def _docstring(path: Path) -> str:
    """Reads the docstring of a module without importing it."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    main()
