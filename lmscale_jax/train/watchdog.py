"""Signal handling (`SignalHandler`), and a watchdog for steps that hang."""

import ctypes
import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax

from lmscale_jax.train import distributed

_PR_SET_PDEATHSIG = 1
STOPPING = (signal.SIGTERM, signal.SIGINT)


def end_at_next_signal() -> None:
    """Lets the next SIGTERM or SIGINT end this process, even while it waits for a save.

    A handler in Python would run only after that.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


class SignalHandler:
    """Handles SIGTERM and SIGINT in any process; a second signal ends that process at once.

    Call `vote()` with every step.

    Args:
      notice: called with the name of the first signal, in the signal handler.

    Attributes:
      received: the name of the signal that this process has received, or None.
      agreed: the name of the signal after which all processes stop, set after the same step in all
        of them, or None.
    """

    def __init__(self, notice: Callable[[str], None] = lambda name: None):
        self._notice = notice
        self.received: str | None = None
        self.agreed: str | None = None
        self._votes, self._last_vote = distributed.Votes(), None
        self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}

    def _handle(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        end_at_next_signal()
        # Not `print`, which the signal may have interrupted.
        text = "stops after this step and saves; once more ends it at once"
        os.write(2, f"{self.received}: {text}\n".encode())
        self._notice(self.received)

    def vote(self) -> None:
        """Tells the other processes about a signal, and reads what they voted one step ago."""
        if jax.process_count() == 1:
            self.agreed = self.received
            return
        if self._last_vote is not None and (number := int(self._last_vote)):
            self.agreed = signal.Signals(number).name
        number = int(signal.Signals[self.received]) if self.received else 0
        self._last_vote = self._votes.cast(number)

    def restore(self) -> None:
        """Puts the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Watchdog:
    """Prints the stack of every thread when no step has finished for a while, and repeats that.

    It ends nothing: a step may be slow, or compiling.

    Args:
      seconds: how long a step may take before stacks are printed; 0: does nothing.
    """

    def __init__(self, seconds: float):
        self._seconds, self._step, self._last_beat = seconds, None, time.monotonic()
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Notes that the metrics of `step` have been read."""
        self._step, self._last_beat = step, time.monotonic()

    def stop(self) -> None:
        """Ends the watching thread."""
        self._done.set()

    def _run(self) -> None:
        last_printed = self._last_beat
        while not self._done.wait(min(1.0, self._seconds / 4)):
            since = max(self._last_beat, last_printed)
            if time.monotonic() - since < self._seconds:
                continue
            last_printed = time.monotonic()
            where = f"since step {self._step}" if self._step else "yet"
            print(
                f"no step has finished {where}, for {last_printed - self._last_beat:.0f} s "
                f"(log.watchdog={self._seconds:g}); the stacks of process {jax.process_index()}:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def leave_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent dies, so that no orphaned run continues unnoticed."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
