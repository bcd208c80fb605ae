"""Describes config keys to people, for `lmscale help optim.lr`."""

import difflib
from collections.abc import Iterable

from lmscale_jax.config.key import Key
from lmscale_jax.config.keys import SPEC, keys
from lmscale_jax.config.ladder_keys import FREE, LADDER
from lmscale_jax.errors import InputError

# Keys of one name that are described one below the other; of more, a line each.
MOST_DESCRIBED = 3


def key_help(text: str) -> list[str]:
    """Describes the key, the keys of the group, or the keys of the last name, that `text` is.

    Raises InputError with the nearest names where it is none of these.
    """
    specs = dict(keys(SPEC)) | dict(keys(LADDER))
    path = text.removeprefix("--").removeprefix("config.").partition("=")[0]
    path = path.removeprefix("run.") if path.startswith("run.") else path
    if path in FREE:
        return [f"{path}   of a ladder: {FREE[path]}"]
    matches = [p for p in specs if p == path or p.startswith(f"{path}.")]
    matches = matches or [p for p in specs if p.rpartition(".")[2] == path]
    if not matches:
        raise InputError(f"help {text}: no key or group of that name; {_nearest(path, specs)}")
    if len(matches) > MOST_DESCRIBED:
        return _aligned([(p, repr(specs[p].default), _first_clause(specs[p])) for p in matches])
    return [line for p in matches for line in _describe(p, specs[p])]


def group_help() -> list[str]:
    """Lists the groups of keys with the number of keys in each."""
    rows = []
    for owner, spec in (("a run", SPEC), ("a ladder", LADDER)):
        for name, group in spec.items():
            count = "key" if isinstance(group, Key) else f"{len(dict(keys(group)))} keys"
            what = group.doc if isinstance(group, Key) else ", ".join(group)
            what = what or "what code of your own declares: own.FILE.KEY (docs/own_change.md)"
            rows.append((name, f"{count} of {owner}", what))
    return _aligned([*rows, *((name, "group of a ladder", what) for name, what in FREE.items())])


def _describe(path: str, key: Key) -> list[str]:
    bounds = [("at least", key.low), ("above", key.above), ("at most", key.high)]
    limits = " and ".join(f"{word} {value:g}" for word, value in bounds if value is not None)
    shown = key.default if isinstance(key.default, str) else repr(key.default)
    of_run = path in dict(keys(SPEC))
    rows = [
        ("default", repr(key.default)),
        ("choices", ", ".join(map(repr, key.choices or ()))),
        ("or code", f"FILE.py:NAME of a {key.code}" if key.code else ""),
        ("range", limits),
        ("written as", '"200" (steps), "5%" of the run, "50M tokens"' if key.duration else ""),
        *(("used with", f"{other} = {_either(allowed)}") for other, allowed in key.when.items()),
        ("identity", "" if key.identity else "no: a run that is continued may change it"),
        ("set by", f"--config.{path}={shown}" + (f"; --config.run.{path} of a ladder" * of_run)),
    ]
    return [f"{path}   {key.doc}", *(f"  {name:<11}{value}" for name, value in rows if value)]


def _either(values: Iterable) -> str:
    return " or ".join(map(repr, values))


def _first_clause(key: Key) -> str:
    return key.doc.partition(";")[0]


def _nearest(path: str, specs: dict) -> str:
    """Names up to three keys that resemble a path, in whole or in their last name."""
    near = difflib.get_close_matches(path, specs, n=3, cutoff=0.7)
    name = path.rpartition(".")[2]
    by_name = {p.rpartition(".")[2]: p for p in reversed(specs)}
    near += [by_name[n] for n in difflib.get_close_matches(name, by_name, n=3)]
    near = list(dict.fromkeys(near))[:3]
    return f"did you mean {' or '.join(near)}?" if near else "lmscale help lists the groups"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Formats rows of text, all columns but the last one padded to equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(f"{x:<{w}}" for x, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
