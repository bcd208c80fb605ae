"""One config key (`Key`), and the tables that implement a key's choices (`Modes`)."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from lmscale_jax.config import own_code
from lmscale_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Key:
    """Specifies one key. `low` and `high` are inclusive; `above` is exclusive.

    `when` maps other keys to the values with which this key is used; {}: it always is.

    `late=True` marks a key that the hash omits at its default: runs and ladders from before it
    keep their names, and their records, which lack it, have the default.

    `identity=False` marks a key that cannot change a run's numbers (machine, logging): it may
    differ when a run is resumed, and the hash that names a run omits it.

    `code` says what a user's FILE.py:NAME at this key must be; "": the key takes no code.
    """

    default: Any
    doc: str
    choices: tuple | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    duration: bool = False
    when: dict[str, tuple] = dataclasses.field(default_factory=dict)
    late: bool = False
    identity: bool = True
    code: str = ""


class _AnyCode(str):
    """Equals every FILE.py:NAME: stands for them in the `when` of a key."""

    def __eq__(self, other):
        return own_code.is_code(other)

    __hash__ = str.__hash__


CODE = _AnyCode("FILE.py:NAME")


class Modes(dict):
    """Maps each choice of a string-valued key to code: `NORMS = Modes("model.norm", {...})`.

    A choice that the key declares and the table lacks raises InputError at the first look-up; the
    message names this table and its file. A look-up of a user's code (`own_code`) returns what
    `adapt` makes of it, so that whoever looks up need not know which of both it is.

    Attributes:
      key: dotted path of the key, such as "model.norm".
      adapt: `own_code.OwnCode` -> entry of the table; None where the key takes no code.
      module: name of the module that holds the table.
    """

    def __init__(self, key: str, table: dict, adapt: Callable | None = None):
        super().__init__(table)
        self.adapt = adapt
        self.key, self.module = key, sys._getframe(1).f_globals["__name__"]
        TABLES.setdefault(key, []).append(self)

    def __missing__(self, choice):
        if self.adapt and own_code.is_code(choice):
            return self.adapt(own_code.load(choice))
        holder = vars(sys.modules[self.module])
        name = next(n for n, value in holder.items() if value is self)
        raise InputError(
            f"config.{self.key}={choice!r} is declared but not implemented: {name} in "
            f"{self.module.replace('.', '/')}.py has {', '.join(map(str, self))}"
        )


# Every table of the modules imported so far, by key.
TABLES: dict[str, list[Modes]] = {}
