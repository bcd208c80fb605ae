"""Estimates the time of an optimised program on a TPU from the cycles its compiler expects.

libtpu writes an estimate on most instructions. Kernels of Pallas have none: those of splash
attention are counted by their products, others are left out and named. Nothing here is measured.
"""

import collections
import re

from lmscale_jax.model.flops import Chip
from lmscale_jax.train import aot, gpu_report
from lmscale_jax.train.hlo_text import Instruction, Program, parse_program
from lmscale_jax.train.roofline import FREE, TimedKernel, category_of, collective_kind, trip_count
from lmscale_jax.train.setup import Setup

# Cycles a second: the data sheet's peak over the products of all matrix units in a cycle.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
# Share of the peak that splash attention reaches on the tiles that it computes. Assumed.
SPLASH_SHARE = 0.6
# Products of a query with a key: q k and p v forward; the queries' gradient recomputes the scores
# and their gradient, that of keys and values too.
SPLASH_FLOPS = {"fwd": 4, "dq": 6, "dkv": 8}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Started, they run beside the kernels up to their end.
_ASYNC = re.compile(r"(copy|slice|async|all-\w+|collective-\w+)-(start|done|update)")
_PRODUCT = re.compile(r"\b(convolution|dot)\b")


def tpu_sections(setup: Setup, chip: Chip) -> list[tuple[str, list[tuple]]]:
    """Compiles the training step for described TPUs and reads memory and time off the program.

    Args and result are those of `gpu_report.gpu_sections`.
    """
    compiled = setup.lower_step().compile()
    kernels, missing = estimate_cycles(parse_program(compiled.as_text()), chip)
    times = gpu_report.time_rows(setup.config, setup.model, setup.mesh.size, kernels, chip)
    times += [
        ("not counted", f"{count:,} x {name}", "the compiler gives no cycles")
        for name, count in missing.most_common(4)
    ]
    return [
        ("memory per device (compiled)", aot.compiled_memory_rows(compiled)),
        ("time per step (cycles that the compiler expects, not measured)", times),
    ]


def estimate_cycles(
    program: Program, chip: Chip
) -> tuple[list[TimedKernel], collections.Counter[str]]:
    """Returns the timed kernels of one run, and {opcode or target: how many have no estimate}."""
    kernels: list[TimedKernel] = []
    missing: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for instruction in program.computations[name].values():
            if instruction.opcode == "while":
                turns = loop_turns(instruction, program)
                walk(instruction.attribute("body"), times * turns)
            elif instruction.opcode in ("call", "conditional"):
                if called := instruction.attribute("to_apply"):
                    walk(called, times)
            elif seconds := kernel_seconds(instruction, chip):
                kernels.append(_timed(instruction, program, times, seconds))
            elif instruction.opcode not in FREE and not _ASYNC.match(instruction.opcode):
                target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
                missing[target[1] if target else instruction.opcode] += times

    walk(program.entry, 1)
    return kernels, missing


def loop_turns(loop: Instruction, program: Program) -> int:
    """Returns how often a while loop turns: as the compiler says, or the limit in its condition."""
    if (turns := trip_count(loop)) > 1:
        return turns
    condition = program.computations[loop.attribute("condition")]
    limits = (re.match(r"(\d+)\)", i.text) for i in condition.values() if i.opcode == "constant")
    return max((int(match[1]) for match in limits if match), default=1)


def kernel_seconds(instruction: Instruction, chip: Chip) -> float:
    """Returns the estimated seconds of one turn of an instruction; 0 where there is no estimate."""
    if cycles := _CYCLES.search(instruction.text):
        return int(cycles[1]) / CLOCKS[chip.name]
    return splash_flops(instruction) / (SPLASH_SHARE * chip.peak)


def splash_flops(instruction: Instruction) -> float:
    """Counts the products of a kernel of splash attention; 0 for all others.

    Its scope says how many keys the tiles of a query have on average (`fused_attention.splash`).
    """
    kind = re.search(r"splash_mha_(fwd|dq|dkv)", instruction.text)
    keys = re.search(r"mean_keys_(\d+)", instruction.text)
    if not kind or not keys or instruction.opcode != "custom-call":
        return 0.0
    # [B, H, T, d] of the output, or of a gradient.
    size = max(array.size for array in instruction.arrays)
    return float(SPLASH_FLOPS[kind[1]] * size * int(keys[1]))


def _timed(instruction: Instruction, program: Program, times: int, seconds: float) -> TimedKernel:
    called = program.computations.get(instruction.attribute("calls") or "", {})
    multiplies = any(_PRODUCT.search(i.opcode) for i in (instruction, *called.values()))
    category = category_of(instruction, program, multiplies)
    if splash_flops(instruction):
        category = "attention"
    elif collective_kind(instruction, program):
        category = "collectives"
    return TimedKernel(instruction, category, times, times * seconds, 0.0, 0.0, {})
