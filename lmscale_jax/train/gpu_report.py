"""The compiled step on GPUs that are not here, as sections of the page of --explain."""

import collections
import re

from lmscale_jax.config.durations import tokens_per_step
from lmscale_jax.model import build, flops
from lmscale_jax.model.flops import Chip
from lmscale_jax.train import aot, hlo_text, roofline
from lmscale_jax.train.gpu_descriptions import gpu_target, target_number
from lmscale_jax.train.setup import Setup

# No kernel can be tried where there is no GPU. Given to one compilation, so that no other program
# of the process, or of a run, is compiled so.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
_PRODUCT_LIBRARIES = (("__cublas", "cuBLAS"), ("__triton", "Triton"))


def gpu_sections(setup: Setup, chip: Chip) -> list[tuple[str, list[tuple]]]:
    """Compiles the training step for described GPUs and reads memory and time off the program.

    Args:
        setup: over devices as `gpu_descriptions.described_gpus` makes them.
        chip: the kind of all of them.

    Returns:
        (title, rows of equally many texts) of each section.
    """
    compiled = setup.lower_step().compile(compiler_options=COMPILER_OPTIONS)
    program = hlo_text.parse_program(compiled.as_text())
    kernels = estimate_step(program, chip)
    times = time_rows(setup.config, setup.model, setup.mesh.size, kernels, chip)
    if loops := roofline.unknown_loops(program):
        times.append(("too little", f"{loops} loops", "of unknown length, counted as one turn"))
    return [
        ("memory per device (compiled)", aot.compiled_memory_rows(compiled)),
        ("kernels per step (compiled)", kernel_rows(kernels)),
        ("collectives per step and device (compiled)", collective_rows(kernels)),
        ("time per step (roofline of the compiled program, not measured)", times),
    ]


def estimate_step(program: hlo_text.Program, chip: Chip) -> list[roofline.TimedKernel]:
    """Returns the kernels of a program on one GPU of this kind, with their estimated times."""
    target = gpu_target(chip)
    cores = target_number(target, "core_count")
    # A lane multiplies and adds once a cycle.
    per_cycle = 2 * cores * target_number(target, "fpus_per_core")
    scalar_flops = per_cycle * target_number(target, "clock_rate_ghz") * 1e9
    gpu = roofline.Gpu(chip, int(cores), scalar_flops)
    return roofline.estimate_kernels(program, gpu)


def kernel_rows(kernels: list[roofline.TimedKernel]) -> list[tuple]:
    """(what, by what, how many) of attention, products, kernels of custom calls and all others."""
    counts: collections.Counter = collections.Counter()
    for kernel in kernels:
        counts[kernel_kind(kernel)] += kernel.times
    rows = [(*kind, f"{count:,}") for kind, count in sorted(counts.items())]
    return [*rows, ("all", "", f"{sum(counts.values()):,}")]


def kernel_kind(kernel: roofline.TimedKernel) -> tuple[str, str]:
    """Returns what a kernel computes and what made it, as ("product bf16", "Triton")."""
    text = kernel.instruction.text
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if kernel.category == "collectives":
        return "collective", ""
    if "__cudnn$fmha" in text:
        return "attention " + ("backward" if "Backward" in text else "forward"), "cuDNN"
    if roofline.is_tokamax(kernel.instruction):
        maker = "Triton" if "triton" in (target[1] if target else "") else "Mosaic"
        return "attention " + ("backward" if "Vjp" in text else "forward"), f"tokamax, {maker}"
    if kernel.flops:
        dtypes = " and ".join(sorted(kernel.flops))
        makers = (maker for mark, maker in _PRODUCT_LIBRARIES if mark in text)
        return f"product {dtypes}", next(makers, "XLA")
    if target:
        # Its operations are not in the program, so the estimate knows its bytes alone.
        return "kernel of unknown operations, by its bytes", target[1]
    return "fusion or copy", "XLA"


def collective_rows(kernels: list[roofline.TimedKernel]) -> list[tuple]:
    """Rows of each kind of collective: messages, bytes sent, seconds, and how many are hidden."""
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        if kernel.category == "collectives":
            # "all-gather-start.3", and "reduce-scatter.1" of one that is waited for.
            kind = re.match(r"[a-z\-]*[a-z]", kernel.instruction.name)[0].removesuffix("-start")
            total = totals.setdefault(kind, [0, 0.0, 0.0, 0.0])
            for i, x in enumerate((kernel.times, kernel.bytes, kernel.seconds, kernel.hidden)):
                total[i] += x
    if not totals:
        return [("none",)]
    rows = [("kind", "messages", "sent", "hidden", "waited for")]
    for kind, (count, sent, exposed, hidden) in sorted(totals.items()):
        size = f"{sent / 1e9:.3g} GB"
        rows.append((kind, f"{count:,}", size, f"{hidden * 1e3:.2f} ms", f"{exposed * 1e3:.2f} ms"))
    return rows


def time_rows(
    config, model: build.Model, devices: int, kernels: list[roofline.TimedKernel], chip: Chip
) -> list[tuple]:
    """Rows of the step's time by category, its MFU, and the time of the whole run."""
    seconds = sum(kernel.seconds for kernel in kernels)
    categories: collections.Counter = collections.Counter()
    for kernel in kernels:
        categories[kernel.category] += kernel.seconds
    rows = [
        (category, f"{part * 1e3:.2f} ms", f"{part / seconds:.0%}")
        for category, part in categories.most_common()
    ]
    tokens = tokens_per_step(config)
    per_token = flops.flops_per_token(config, model.specs)["model"]
    mfu = per_token * tokens / devices / (seconds * chip.peak)
    return [
        *rows,
        ("step", f"{seconds * 1e3:.2f} ms", f"{tokens / seconds:,.0f} tokens/s"),
        ("MFU", f"{mfu:.1%}", "FLOPs without recomputing / (step x dense bfloat16 peak)"),
        ("whole run", f"{seconds * config.train.steps / 3600:.3g} h", "the steps alone"),
    ]
