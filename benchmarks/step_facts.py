"""What a compiled step says of itself: its memory, its estimated time, and its kernels, profiled.

For worker_jax.py. Everything is plain numbers and texts, to be written as JSON.
"""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

# Kernels that a table of a profile keeps; the rest is summed.
KEPT = 200


def chip_of(device_kind: str):
    """The data sheet of a device; None where there is none for it."""
    from lmscale_jax.model import flops

    chips = flops.CHIPS.values()
    return next((c for c in chips if re.search(c.pattern, device_kind, re.IGNORECASE)), None)


def estimate(compiled, device_kind: str) -> dict | None:
    """{"ms", "categories", "kernels"} by the roofline of the program, on the kind of GPU it is for.

    "kernels" is {name: [category, ms]}. None where the device is no GPU with a description.
    """
    from lmscale_jax.train import gpu_report, hlo_text

    chip = chip_of(device_kind)
    if chip is None or chip.platform != "gpu":
        return None
    kernels = gpu_report.estimate_step(hlo_text.parse_program(compiled.as_text()), chip)
    categories: collections.Counter = collections.Counter()
    for kernel in kernels:
        categories[kernel.category] += 1e3 * kernel.seconds
    return {
        "ms": sum(categories.values()),
        "categories": dict(categories.most_common()),
        "kernels": {k.instruction.name: [k.category, 1e3 * k.seconds] for k in kernels},
    }


def memory(compiled, device) -> dict:
    """GiB: "compiled", the compiler's peak, and "peak", the allocator's, where either is known."""
    from lmscale_jax.train import aot

    sizes, used = aot.compiled_memory(compiled), device.memory_stats() or {}
    peaks = {"compiled": (sizes or {}).get("peak"), "peak": used.get("peak_bytes_in_use")}
    return {name: n and n / 2**30 for name, n in peaks.items()}


def profile(run: Callable[[int], object], steps: int) -> dict:
    """{"steps", "kernels"} of some steps under JAX's profiler; "kernels" as of `traced_kernels`."""
    import jax

    run(1)
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            run(steps)
        finally:
            jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        return {"steps": steps, "kernels": traced_kernels(planes, steps)}


def traced_kernels(planes, steps: int) -> dict[str, list]:
    """{instruction: [times a step, ms a step]} of the device's planes, the slowest first.

    A device's streams have a line each; its other lines repeat them by module or by scope. Where
    there is no device's plane, as on a CPU, the operations of the host's threads are taken.
    """
    planes = list(planes)
    devices = [p for p in planes if p.name.startswith("/device:")]
    totals: dict[str, list] = {}
    for plane in devices or planes:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            for event in line.events:
                name = _instruction(event, bool(devices))
                if name:
                    total = totals.setdefault(name, [0.0, 0.0])
                    total[0] += 1 / steps
                    total[1] += event.duration_ns / 1e6 / steps
    slowest = sorted(totals.items(), key=lambda item: -item[1][1])
    rest = slowest[KEPT:]
    kept = dict(slowest[:KEPT])
    if rest:
        kept["(others)"] = [sum(t[i] for _, t in rest) for i in range(2)]
    return kept


def _instruction(event, on_device: bool) -> str:
    """The instruction of an event, else on a device its own name; "" for what is no kernel."""
    name = str(dict(event.stats).get("hlo_op", ""))
    if name.startswith(("while", "call", "conditional")):  # their bodies have events too
        return ""
    return name or (event.name if on_device else "")


def matched(kernels: dict[str, list], program: dict | None) -> list[dict]:
    """Profiled kernels beside their estimates: {"name", "times", "ms", "category", "estimate"}.

    A kernel that bears the name of its function in place of its instruction's has underscores for
    dots.
    """
    estimates = (program or {}).get("kernels", {})
    by_function = {name.replace(".", "_").replace("-", "_"): name for name in estimates}
    rows = []
    for name, (times, ms) in kernels.items():
        category, expected = estimates.get(name) or estimates.get(by_function.get(name), ("", None))
        row = {"name": name, "times": times, "ms": ms, "category": category}
        rows.append(row | {"estimate": expected})
    return rows
