"""Being stopped, and being stuck."""

import faulthandler
import signal
import sys
import threading
import time

import jax

from lmscale_jax.run import cluster


class Stop:
    """SIGTERM and SIGINT, wherever they arrive; a second one ends that process at once.

    `vote()` with every step; `agreed` names the signal from the same step on in all processes.
    """

    def __init__(self):
        self.asked = self.agreed = None
        self._votes, self._cast = cluster.Votes(), None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, _frame) -> None:
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def vote(self) -> None:
        if jax.process_count() == 1:
            self.agreed = self.asked
            return
        if self._cast is not None and (number := int(self._cast)):
            self.agreed = signal.Signals(number).name
        self._cast = self._votes.cast(int(signal.Signals[self.asked]) if self.asked else 0)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """Prints what every thread does when no step has finished for a while, and again after as long.

    It ends nothing: a step may be slow, or compiling. `seconds` 0: it does nothing at all.
    """

    def __init__(self, seconds: float):
        self._seconds, self._step, self._last = seconds, None, time.monotonic()
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """The metrics of `step` have been read."""
        self._step, self._last = step, time.monotonic()

    def stop(self) -> None:
        self._done.set()

    def _run(self) -> None:
        said = self._last
        while not self._done.wait(min(1.0, self._seconds / 4)):
            since = max(self._last, said)
            if time.monotonic() - since < self._seconds:
                continue
            said = time.monotonic()
            where = f"since step {self._step}" if self._step else "yet"
            print(
                f"no step has finished {where}, for {said - self._last:.0f} s (log.watchdog="
                f"{self._seconds:g}); what every thread of process {jax.process_index()} does:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
