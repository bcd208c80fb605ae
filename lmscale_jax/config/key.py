"""What the specification says of one key.

Tables of what a key's choices mean: one dict beside the code that it selects.
"""

import dataclasses
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
    """One key. `low` and `high` are inclusive; `above` is exclusive.

    `identity=False` marks a key that cannot change the numbers of a run (machine, logging): it may
    differ when a run is continued, and it is left out of the hash that names a run.
    """

    default: Any
    doc: str
    choices: tuple | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    duration: bool = False
    when: dict[str, tuple] = dataclasses.field(default_factory=dict)
    identity: bool = True


class Modes(dict):
    """The implementations of a string-valued key by choice: `NORMS = Modes("model.norm", {...})`.

    A choice that the key declares and the table lacks is an error at the first look-up, which names
    this table and its file.

    Attributes:
      key: dotted path of the key, such as "model.norm".
      module: name of the module that holds the table.
    """

    def __init__(self, key: str, table: dict):
        super().__init__(table)
        self.key, self.module = key, sys._getframe(1).f_globals["__name__"]
        TABLES.setdefault(key, []).append(self)

    def __missing__(self, choice):
        from lmscale_jax.errors import InputError

        holder = vars(sys.modules[self.module])
        name = next(n for n, value in holder.items() if value is self)
        raise InputError(
            f"config.{self.key}={choice!r} is declared but not implemented: {name} in "
            f"{self.module.replace('.', '/')}.py has {', '.join(map(str, self))}"
        )


# Every table by the key that it implements, as far as its module is imported.
TABLES: dict[str, list[Modes]] = {}
