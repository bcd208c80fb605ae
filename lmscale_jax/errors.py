"""The two exceptions with which a command may end.

A command turns either into one line on stderr and an exit status; any other exception is a bug and
shows its traceback.
"""


class InputError(Exception):
    """Bad input (exit status 2). The message is one line: field, value, a value that works."""


class RunFailed(Exception):
    """The work started and failed (exit status 1): diverged, or a check did not pass."""
