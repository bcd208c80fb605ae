"""Another benchmark as a process of its own, which ends with what it started."""

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    fault: str
    written: tuple[str, ...]


def carry_out(name: str, program: list[str], limit_s: float, results: Path) -> Outcome:
    """Runs one benchmark; its output goes where ours goes."""
    print(f"\n## {name}\n\n{' '.join(program[1:])}\n", flush=True)
    begin, wall = time.perf_counter(), time.time()
    # A group of its own, so that its processes end with it.
    process = subprocess.Popen(program, cwd=ROOT, start_new_session=True)
    fault = ""
    try:
        status = process.wait(limit_s)
        fault = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        fault = f"stopped after {limit_s:.0f} s"
    finally:
        _end(process)
    # Clocks of file systems are coarse.
    new = [p.name for p in sorted(results.glob("*.json")) if p.stat().st_mtime > wall - 0.1]
    return Outcome(name, time.perf_counter() - begin, fault, tuple(new))


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
