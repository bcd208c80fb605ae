"""Everything that one accelerator should be asked, in order of worth, within --minutes:

    python -m benchmarks.accelerator --minutes=8 --results=DIR

Losses beside those of the CPU; the training steps of four models beside compiled PyTorch, with the
roofline's estimate beside each; the kernels of the slowest, profiled; attention kernels; changes
of the step; packs; larger batches. After every part DIR/accelerator.json and DIR/accelerator.md
are written anew, so that an end in the middle loses nothing. A part that fails is recorded and the
next goes on; a part for which the time does not suffice is skipped.

--tiny takes models of a few thousand parameters, which shows on any machine that it runs.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from benchmarks import accelerator_tables, interleave, machine, step_facts
from benchmarks.accelerator_models import (
    ALLOWED,
    CHANGED,
    CHANGES,
    FOLLOWED_KEYS,
    LARGER,
    MODELS,
    TINY,
    Model,
    peer_command,
    peer_shape,
    worker_command,
)
from benchmarks.children import carry_out
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.files import atomic_write

MINUTES = flags.DEFINE_float("minutes", 8.0, "after which no part goes on", lower_bound=0.1)
PARTS_WANTED = flags.DEFINE_list("parts", [], "some of the parts by name; all by default")

OURS, THEIRS = "ours", "torch, compiled"
# Seconds of turns, and of one turn in milliseconds.
TURNS_S, TURN_MS, ROUNDS = 12.0, 400.0, 8
# Of the time of a part, that compiling may take; who has not finished is left out of the turns.
READY_SHARE = 0.75
# Times as long may a part take with --tiny, on machines whose cores compile slowly.
TINY_PATIENCE = 4
# Several processes share the accelerator.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@contextlib.contextmanager
def workers(limit_s: float) -> Iterator[Callable[..., interleave.Worker]]:
    """Starts processes that end with the block, or are killed after `limit_s` seconds."""
    started: list[interleave.Worker] = []

    def start(label: str, command: list[str], environment: dict | None = None):
        started.append(interleave.Worker(label, command, SHARED | (environment or {})))
        return started[-1]

    timer = threading.Timer(limit_s, lambda: [worker.kill() for worker in started])
    timer.start()
    try:
        yield start
    except BaseException:
        for worker in started:
            worker.kill()
        raise
    finally:
        for worker in started:
            worker.close()
        timer.cancel()


# --- Parts --------------------------------------------------------------------------------------


def follow_losses(limit_s: float, results: dict) -> dict:
    """Losses of the same 50 steps on the accelerator and on the CPU, in both types."""
    model, rows, steps = Model("configs/llama_50m.py:embedded", 8), {}, 8 if TINY.value else 50
    folder, running = Path(tempfile.mkdtemp()), []
    places = {"here": {}, "there": {"JAX_PLATFORMS": "cpu"}}
    with workers(limit_s) as start:
        for dtype in ALLOWED:
            for place, environment in places.items():
                sizes = {"train.steps": steps, "schedule.warmup": "10%", "model.dtype": dtype}
                keys = sizes if TINY.value else FOLLOWED_KEYS | sizes
                report = folder / f"{dtype}.{place}"
                command = worker_command(model, 8, keys, report, f"--losses={steps}")
                exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if dtype == "float32" else {}
                running.append(start(report.name, command, environment | exact))
    if lost := [worker for worker in running if not (folder / worker.label).is_file()]:
        raise RunFailed("; ".join(f"{worker.label}: {worker.last_words()}" for worker in lost))
    for dtype, allowed in ALLOWED.items():
        here, there = (read_report(folder / f"{dtype}.{place}") for place in places)
        pairs = zip(here["losses"], there["losses"], strict=True)
        largest = max(abs(a - b) for a, b in pairs)
        rows[dtype] = {
            "steps": steps, "first": here["losses"][0], "last": here["losses"][-1],
            "largest": largest, "allowed": allowed, "equal": largest <= allowed,
            "losses": [here["losses"], there["losses"]],
        }  # fmt: skip
    results["device"] = here["device"]["kind"]
    return {"here": here["device"]["kind"], "there": there["device"]["kind"], "rows": rows}


def read_report(path: Path) -> dict:
    """Raises RunFailed where the process left none."""
    if not path.is_file():
        raise RunFailed(f"the process of {path.name} left no report")
    return json.loads(path.read_text())


def time_model(name: str, limit_s: float, results: dict, factor: int = 1) -> dict:
    """Steps of one model, ours and the peer's in turns, or after each other."""
    model = MODELS[name]
    rows = (2 if TINY.value else model.rows) * factor
    report = Path(tempfile.mkdtemp()) / name
    ours = worker_command(model, rows, {}, report, "--profiled=3")
    shape = peer_shape(model, rows)
    programs = {OURS: ours} | ({THEIRS: peer_command(shape)} if results["torch"] else {})
    apart = model.apart or factor > 1
    groups = [{k: v} for k, v in programs.items()] if apart else [programs]
    chunks, failed, facts = {}, {}, {}
    for group in groups:
        _time_group(group, limit_s / len(groups), chunks, failed, facts)
    reported = read_report(report) if OURS not in failed else None
    if reported:
        results["device"] = reported["device"]["kind"]
    sides = {side: {"error": text} for side, text in failed.items()}
    for side in chunks:
        sides[side] = _side(side, chunks, facts[side], reported, rows * shape["T"])
    entry = {"rows": rows, "length": shape["T"], "sides": sides, "report": reported}
    return {"batches": [entry], "remark": model.remark}


def _time_group(programs: dict, limit_s: float, chunks: dict, failed: dict, facts: dict) -> None:
    """Has the programs take turns; adds what came out to the last three."""
    with workers(limit_s) as start:
        running = {label: start(label, command) for label, command in programs.items()}
        ready_by = time.perf_counter() + READY_SHARE * limit_s
        for label, worker in list(running.items()):
            try:
                _wait(worker, ready_by - time.perf_counter())
                facts[label] = worker.facts
            except RunFailed as error:
                failed[label] = str(error)
                del running[label]
        rounds, turn_ms = (1, 1.0) if TINY.value else (ROUNDS, TURN_MS)
        chunks |= interleave.measure(list(running.values()), rounds, turn_ms, TURNS_S, failed)[0]


def _wait(worker: interleave.Worker, seconds: float) -> None:
    """Until it is warmed up. Raises RunFailed where it is not in time, and ends it."""
    timer = threading.Timer(max(1.0, seconds), worker.kill)
    timer.start()
    try:
        worker.wait()
    except RunFailed as error:
        late = "" if timer.is_alive() else f"not ready after {seconds:.0f} s; "
        raise RunFailed(f"{late}{error}") from None
    finally:
        timer.cancel()


def _side(side: str, chunks: dict, facts: dict, report: dict | None, tokens: int) -> dict:
    """One line of the table of steps: times and rates; of ours, what it reported."""
    from lmscale_jax.model.flops import peak_flops

    ms = interleave.ms(chunks[side])
    peak, median = peak_flops(facts["device"]["kind"], "bfloat16"), ms["median"]
    work = report and report["flops"]
    together = side == OURS and THEIRS in chunks and len(chunks[OURS]) == len(chunks[THEIRS])
    mine = report if side == OURS else None
    estimate = mine and mine["estimate"]
    memory = mine["memory"] if mine else facts.get("memory", {})
    return {
        "ms": ms,
        "tokens_s": median and 1e3 * tokens / median,
        "mfu": work / (median / 1e3 * peak) if work and median and peak else None,
        "estimate_ms": estimate and estimate["ms"],
        "peak_gib": memory.get("peak"),
        "compiled_gib": memory.get("compiled"),
        "compile_s": mine["compile_s"] if mine else facts["first_steps_s"],
        "over_torch": interleave.ratio(chunks[OURS], chunks[THEIRS]) if together else None,
        "ms_by_round": [round(c.ms, 3) for c in chunks[side]],
    }


def profile_slowest(limit_s: float, results: dict) -> dict:
    """The profile of the step of ours that took longest; all were profiled when they were timed."""
    slowest = None
    for name in MODELS:
        for entry in results["parts"].get(name, {}).get("result", {}).get("batches", []):
            row, report = entry["sides"].get(OURS, {}), entry["report"] or {}
            ms = row.get("ms", {}).get("median")
            if ms and "profile" in report and (slowest is None or ms > slowest["ms"]):
                kernels = step_facts.matched(report["profile"]["kernels"], report["estimate"])
                slowest = {"model": name, "rows": entry["rows"], "ms": ms, "kernels": kernels}
    if slowest is None:
        raise RunFailed("no step was timed and profiled")
    return slowest


def compare_changes(limit_s: float, results: dict) -> dict:
    """The step of one model with each of CHANGES, in turns, over the plain one."""
    folder, model = Path(tempfile.mkdtemp()), MODELS[CHANGED]
    rows = 2 if TINY.value else model.rows
    paths = {name: folder / str(i) for i, name in enumerate(CHANGES)}
    programs = {
        name: worker_command(model, rows, CHANGES[name], path) for name, path in paths.items()
    }
    chunks, failed, facts = {}, {}, {}
    _time_group(programs, limit_s, chunks, failed, facts)
    if "plain" not in chunks:
        raise RunFailed(f"the plain step: {failed.get('plain', 'no turn')}")
    reports = {name: read_report(paths[name]) for name in chunks}
    plain = reports["plain"]["estimate"]
    lines = {name: {"error": text} for name, text in failed.items()}
    for name, report in reports.items():
        estimate = report["estimate"]
        lines[name] = {
            "ms": interleave.ms(chunks[name]),
            "over_plain": interleave.ratio(chunks[name], chunks["plain"]),
            "estimated_over_plain": estimate["ms"] / plain["ms"] if estimate and plain else None,
            "peak_gib": report["memory"]["peak"],
        }
    return {"model": f"{CHANGED}, {rows} sequences", "rows": lines}


def run_module(module: str, arguments: list[str], limit_s: float) -> dict:
    """The rows of another benchmark, in a process of its own."""
    folder = Path(tempfile.mkdtemp())
    program = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--results={folder}"]
    outcome = carry_out(module, program, limit_s, folder)
    if not outcome.written:
        raise RunFailed(outcome.fault or "it wrote nothing")
    result = json.loads((folder / outcome.written[-1]).read_text())
    return result | {"fault": outcome.fault}


def time_attention(limit_s: float, results: dict) -> dict:
    sizes = ["--lengths=16", "--tokens=128", "--heads=1", "--head_dim=8", "--rounds=1", "--turn=0"]
    if not TINY.value:
        sizes = ["--lengths=512,1024,4096,8192", "--tokens=16384", "--heads=12", "--rounds=3"]
    return run_module("attention", [*sizes, "--dtype=bfloat16"], limit_s)


def time_packs(limit_s: float, results: dict) -> dict:
    sizes = ["--widths=16", "--counts=2", "--rounds=1", "--turn_ms=1"]
    if not TINY.value:
        sizes = ["--widths=64,128", "--counts=8,32", "--rounds=3"]
    return run_module("population", [*sizes, "--dtype=bfloat16"], limit_s)


@dataclasses.dataclass(frozen=True)
class Part:
    """Attributes:
    run: (seconds it may take, all results so far) -> its result.
    show: name of its table in accelerator_tables.SHOW.
    least: seconds without which it does not begin; 0: it needs none.
    most: seconds after which its processes are killed.
    """

    run: Callable[[float, dict], dict]
    show: str
    least: float
    most: float


PARTS = {
    "losses": Part(follow_losses, "losses", 30, 120),
    **{
        name: Part(functools.partial(time_model, name), "steps", 60, 200 if m.apart else 150)
        for name, m in MODELS.items()
    },
    "profile": Part(profile_slowest, "profile", 0, 10),
    "attention": Part(time_attention, "attention", 30, 90),
    "changes": Part(compare_changes, "ratios", 60, 150),
    "packs": Part(time_packs, "packs", 30, 90),
    **{
        f"{name}, {n} times": Part(
            functools.partial(time_model, name, factor=n), "steps", 60, 150
        )
        for name, n in LARGER
    },
}  # fmt: skip


def run_parts(names: list[str], results: dict, end: float, save: Callable[[], None]) -> None:
    """Runs parts until the time `end` of perf_counter; whatever fails is recorded."""
    begin = time.perf_counter()
    for name in names:
        part, left = PARTS[name], end - time.perf_counter()
        entry = results["parts"][name] = {"show": part.show}
        if part.least and left < part.least:
            entry["skipped"] = f"{left:.0f} s are left, and it takes {part.least:.0f} at the least"
        else:
            started = time.perf_counter()
            try:
                most = part.most * (TINY_PATIENCE if TINY.value else 1)
                entry["result"] = part.run(min(most, left), results)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            entry["seconds"] = time.perf_counter() - started
        results["seconds"] = time.perf_counter() - begin
        save()


def main() -> None:
    # Other processes on the cores disturb an accelerator little, and its turns are few.
    if not flags.FLAGS["others"].present:
        flags.FLAGS.others = float(machine.cores())
    end = time.perf_counter() + 60 * MINUTES.value
    names = PARTS_WANTED.value or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(f"--parts={unknown[0]}: one of {','.join(PARTS)} would work")
    torch = machine.torch_version(machine.TORCH_PYTHON.value)
    facts = machine.facts(torch, machine.asked("minutes", "parts", "tiny"))
    results = {"machine": facts, "minutes": MINUTES.value, "device": "", "torch": torch,
               "seconds": 0.0, "parts": {}}  # fmt: skip
    folder = Path(machine.OUT.value)

    def save() -> None:
        machine.save("accelerator", results)
        atomic_write(folder / "accelerator.md", accelerator_tables.page(results))
        name = list(results["parts"])[-1]
        print(f"{results['seconds']:.0f} s: {name}", flush=True)

    run_parts(names, results, end, save)
    print(accelerator_tables.page(results))
    if failed := [name for name, part in results["parts"].items() if "error" in part]:
        raise RunFailed(f"{len(failed)} part(s) failed: {', '.join(failed)}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cli.run_command(main)
