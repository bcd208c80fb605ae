"""A worker taking turns, and timing. Only the standard library: any interpreter reads it."""

import json
import statistics
import sys
import time
from collections.abc import Callable


def serve(run: Callable[[int], float], facts: Callable[[], dict] = dict) -> None:
    """Warms up, says "ready" with some facts as JSON, then for each number of steps read prints ms
    a step and the loss.

    `run(n)` makes n steps, waits for them and returns the last loss; `facts()` is asked for after
    the warm-up.
    """
    begin = time.perf_counter()
    run(3)
    first_steps_s = round(time.perf_counter() - begin, 3)
    print("ready", json.dumps(facts() | {"first_steps_s": first_steps_s}), flush=True)
    for line in sys.stdin:
        run(1)  # wakes the threads and fills the caches; not measured
        begin = time.perf_counter()
        loss = run(int(line))
        print((time.perf_counter() - begin) / int(line) * 1e3, loss, flush=True)


def timed(run: Callable[[], object], seconds: float = 0.25) -> float:
    """Median milliseconds of one call."""
    for _ in range(3):
        run()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)
