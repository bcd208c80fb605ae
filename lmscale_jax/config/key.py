"""What the specification says of one key."""

import dataclasses
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
