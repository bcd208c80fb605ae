"""The two ways a command ends badly.

A command turns either into one line on stderr and an exit status; everything else is a bug and
shows its traceback.
"""


class InputError(Exception):
    """Bad input (exit status 2). The message is one line: the field, its value, one that works."""


class RunFailed(Exception):
    """The work was started and failed: diverged, check not passed (exit status 1)."""
