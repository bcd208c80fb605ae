"""Training time, apart from everything else and kept across restarts."""

import contextlib
import time
from collections.abc import Iterable, Iterator


class Clock:
    """Counts the seconds and tokens of steps; compilation, evaluation and saving are left out.

    `state()` goes into each checkpoint, so a run that was stopped and continued reports the sum.
    """

    def __init__(self, state: dict | None = None):
        state = state or {}
        self.step_seconds = state.get("step_seconds", 0.0)
        self.step_tokens = state.get("step_tokens", 0)
        self.wait_seconds = state.get("wait_seconds", 0.0)
        self._earlier_seconds = state.get("wall_seconds", 0.0)
        self._start = self._lap_start = time.perf_counter()
        self._skip_lap = True

    def lap(self, tokens: int) -> float | None:
        """Ends one step. Returns its tokens per second, or None if it was left out."""
        now = time.perf_counter()
        seconds, self._lap_start = now - self._lap_start, now
        if self._skip_lap:
            self._skip_lap = False
            return None
        self.step_seconds += seconds
        self.step_tokens += tokens
        return tokens / seconds

    def leave_out(self) -> None:
        """Leaves the current lap out, as one in which something was compiled."""
        self._skip_lap = True

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time of the block out of the training time."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start

    def waiting_for(self, stream: Iterable) -> Iterator:
        """Yields the same items, and counts the time of each `next` as waiting for data."""
        iterator = iter(stream)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.wait_seconds += time.perf_counter() - start
            yield item

    @property
    def data_wait(self) -> float | None:
        """Share of the training time in which a step waited for its batch."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else None

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run started, without those between a stop and a restart."""
        return self._earlier_seconds + time.perf_counter() - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over all steps that were counted."""
        return self.step_tokens / self.step_seconds if self.step_seconds else None

    def state(self) -> dict:
        """Returns the counts as a checkpoint keeps them."""
        return {
            "step_seconds": self.step_seconds,
            "step_tokens": self.step_tokens,
            "wait_seconds": self.wait_seconds,
            "wall_seconds": self.wall_seconds,
        }
