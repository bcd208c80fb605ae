"""Training time apart from everything else, kept across restarts."""

import contextlib
import time
from collections.abc import Iterable, Iterator


class Clock:
    """Counts seconds and tokens of steps; compilation, evaluation and saving are left out.

    `state()` goes into each checkpoint, so a run that was stopped reports the sum.
    """

    def __init__(self, state: dict | None = None):
        state = state or {}
        self.step_seconds = state.get("step_seconds", 0.0)
        self.step_tokens = state.get("step_tokens", 0)
        self.wait_seconds = state.get("wait_seconds", 0.0)
        self._wall_before = state.get("wall_seconds", 0.0)
        self._begin = self._mark = time.perf_counter()
        self._skip = True

    def lap(self, tokens: int) -> float | None:
        """Ends one step; tokens per second of it, or None if it was left out."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        if self._skip:
            self._skip = False
            return None
        self.step_seconds += seconds
        self.step_tokens += tokens
        return tokens / seconds

    def leave_out(self) -> None:
        """The lap under way is not representative: something was compiled in it."""
        self._skip = True

    @contextlib.contextmanager
    def pause(self):
        """What happens inside is not training time."""
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    def waiting_for(self, stream: Iterable) -> Iterator:
        """The same items, with the time that each `next` took counted as waiting for data."""
        iterator = iter(stream)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.wait_seconds += time.perf_counter() - begin
            yield item

    @property
    def data_wait(self) -> float | None:
        """Share of the training time in which a step waited for its batch."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else None

    @property
    def wall_seconds(self) -> float:
        return self._wall_before + time.perf_counter() - self._begin

    @property
    def tokens_per_second(self) -> float | None:
        return self.step_tokens / self.step_seconds if self.step_seconds else None

    def state(self) -> dict:
        return {
            "step_seconds": self.step_seconds,
            "step_tokens": self.step_tokens,
            "wait_seconds": self.wait_seconds,
            "wall_seconds": self.wall_seconds,
        }
