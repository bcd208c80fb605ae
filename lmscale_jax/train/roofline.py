"""Estimates the time of an optimised program on a GPU, kernel by kernel, from its text.

A kernel takes the longest of its launch, its bytes at the memory's bandwidth and its products at
the tensor cores' rate; the body of a loop counts as often as the loop turns. Collectives run one
after another beside the kernels that the compiler scheduled between their start and their end.

Nothing here is measured. Not modelled: hits in the L2 cache (arrays that fit are counted as read
from memory), clocks that sink under load, what autotuning would choose, the host.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lmscale_jax.model.costs import BANDWIDTH_SHARE, LINK_SHARE
from lmscale_jax.model.flops import Chip
from lmscale_jax.train.hlo_text import Computation, Instruction, Program
from lmscale_jax.train.roofline_attention import (
    Gpu,
    cudnn_attention,
    is_tokamax,
    tokamax_attention,
)
from lmscale_jax.train.roofline_bytes import fusion_bytes, moves_only

# Seconds. A kernel's launch within a CUDA graph, and NCCL's latency of a small message in a node:
# assumed, both near what NVIDIA's developer blog and nccl-tests show.
LAUNCH, COLLECTIVE_LATENCY = 2e-6, 8e-6
# Share of the data sheet's dense peak that a large product reaches (power, not the tensor cores,
# limits it), and the depth at which filling and draining the pipeline costs half. Assumed.
PRODUCT_SHARE, HALF_DEPTH = 0.8, 128
# (rows, columns) of the result that a multiprocessor computes at a time: rate against the largest.
# The tiles are those of CUTLASS; the rates are assumed.
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9,
         (64, 256): 0.85, (64, 128): 0.75, (64, 64): 0.55}  # fmt: skip
# A product at least so deep may be split over its depth into so many parts. Assumed.
SPLIT_DEPTH, SPLITS = 4096, (1, 2, 4, 8, 16)
# Rates of a product against bfloat16: data sheets. float32 is TF32, which XLA uses by default.
RATES = {"bf16": 1.0, "f16": 1.0, "f32": 0.5, "f8e4m3fn": 2.0, "f8e5m2": 2.0, "s8": 2.0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\s*\{"n":"?(\d+)')
# No kernel of their own. Copies to and from the host's memory run beside the kernels.
FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "copy-start", "copy-done", "add-dependency",
}  # fmt: skip
# (category, a pattern of "file:function"): the innermost frame of an instruction that matches.
CATEGORIES = (
    ("rope", re.compile(r":rotate\b")),
    ("loss", re.compile(r"lmscale_jax/model/loss\.py:")),
    ("attention", re.compile(r"lmscale_jax/model/(kernels|banded|fused_attention)\.py:")),
    ("optimizer", re.compile(r"lmscale_jax/optim/|/optax/")),
    ("other", re.compile(r":(Embed\.|ShardingContext\.lookup)")),
)


class TimedKernel(NamedTuple):
    """Everything that one instruction runs, all its turns together.

    Attributes:
      instruction: of the program.
      category: "dense", "attention", "loss", "elementwise", "copies", "optimizer", "rope",
        "collectives" or "other".
      times: how often it runs.
      seconds: that the step waits for it.
      hidden: seconds that it runs beside other kernels.
      bytes: that it moves; of a collective, that the device sends.
      flops: {type of the operands: operations of products}.
    """

    instruction: Instruction
    category: str
    times: int
    seconds: float
    hidden: float
    bytes: float
    flops: dict[str, float]


class Work(NamedTuple):
    """One turn of an instruction: bytes, seconds of tensor cores, {type: operations}."""

    bytes: float
    product_seconds: float
    flops: dict[str, float]


def estimate_kernels(program: Program, gpu: Gpu) -> list[TimedKernel]:
    """Returns the kernels of one run of the program, in order."""
    return _run(program, program.entry, 1, gpu)[1]


def _run(program: Program, name: str, times: int, gpu: Gpu) -> tuple[float, list[TimedKernel]]:
    """Returns the seconds of one turn of a computation, and its kernels over `times` turns."""
    clock, wire_free = 0.0, 0.0
    kernels: list[TimedKernel] = []
    in_flight: dict[str, _Flight] = {}
    computation = program.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if kind := collective_kind(instruction, program):
            sent, seconds = collective_cost(instruction, kind, computation, gpu.chip)
            wire_free = max(clock, wire_free) + seconds
            in_flight[instruction.name] = _Flight(instruction, wire_free, seconds, sent)
            if not opcode.endswith("-start"):
                clock = _land(in_flight.pop(instruction.name), clock, times, kernels)
        elif opcode.endswith("-done"):
            if flight := in_flight.pop(instruction.operands[0], None):
                clock = _land(flight, clock, times, kernels)
        elif opcode in ("while", "call", "conditional", "async-start"):
            turns = trip_count(instruction) if opcode == "while" else 1
            branches = [_run(program, c, times * turns, gpu) for c in _called(instruction)]
            # Which branch runs is not known; the step is never faster than with the slowest.
            seconds, inner = max(branches, key=lambda branch: branch[0], default=(0.0, []))
            clock += turns * seconds
            kernels += inner
        elif opcode not in FREE:
            seconds, kernel = _kernel(instruction, computation, times, program, gpu)
            clock += seconds
            kernels.append(kernel)
    for flight in in_flight.values():
        clock = _land(flight, clock, times, kernels)
    return clock, kernels


class _Flight(NamedTuple):
    """A collective under way: where it started, when it ends, how long it takes, bytes it sends."""

    instruction: Instruction
    end: float
    seconds: float
    sent: float


def _land(flight: _Flight, clock: float, times: int, kernels: list[TimedKernel]) -> float:
    """Waits for a collective and records it; returns the time at which the step goes on."""
    exposed = max(0.0, flight.end - clock)
    hidden = max(0.0, flight.seconds - exposed)
    kernels.append(
        TimedKernel(
            flight.instruction, "collectives", times, times * exposed, times * hidden,
            times * flight.sent, {},
        )
    )  # fmt: skip
    return clock + exposed


def _kernel(
    instruction: Instruction, computation: Computation, times: int, program: Program, gpu: Gpu
) -> tuple[float, TimedKernel]:
    """Returns the seconds of one turn of a kernel, and all its turns."""
    work = kernel_work(instruction, computation, program, gpu)
    seconds = max(LAUNCH, work.bytes / (gpu.chip.bandwidth * BANDWIDTH_SHARE), work.product_seconds)
    category = category_of(instruction, program, bool(work.flops))
    flops = {dtype: times * count for dtype, count in work.flops.items()}
    return seconds, TimedKernel(
        instruction, category, times, times * seconds, 0.0, times * work.bytes, flops
    )


def trip_count(loop: Instruction) -> int:
    """Returns how often a while loop turns; 1 where the compiler does not know."""
    match = _TRIP_COUNT.search(loop.text)
    return int(match[1]) if match else 1


def unknown_loops(program: Program) -> int:
    """Returns the number of while loops whose turns the compiler does not know."""
    return sum(
        instruction.opcode == "while" and not _TRIP_COUNT.search(instruction.text)
        for computation in program.computations.values()
        for instruction in computation.values()
    )


def _called(instruction: Instruction) -> list[str]:
    """The computations that a loop, a call or a branch may run; not a loop's condition."""
    match = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    if match:
        return re.findall(r"%?([\w.\-]+)", match[1])
    names = ("body", "to_apply", "calls", "true_computation", "false_computation")
    return [called for name in names if (called := instruction.attribute(name))]


def collective_kind(instruction: Instruction, program: Program) -> str | None:
    """Returns the member of COLLECTIVES that an instruction runs or starts, or None."""
    opcode = instruction.opcode
    if opcode == "async-start":
        inner = program.computations.get(instruction.attribute("calls") or "", {})
        opcode = next((i.opcode for i in inner.values() if i.opcode in COLLECTIVES), opcode)
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def collective_cost(
    instruction: Instruction, kind: str, computation: Computation, chip: Chip
) -> tuple[float, float]:
    """Returns (bytes that one device sends, seconds) of a collective on a ring.

    Within a domain it takes the chip's links; between domains what enters one is shared out over
    its members' network ports, as in `costs.Rings`.
    """
    operands = sum(computation[name].bytes for name in instruction.operands)
    group = replica_group(instruction.text)
    n = len(group)
    if n == 1:
        return 0.0, LAUNCH
    inside = max(collections.Counter(device // chip.domain for device in group).values())
    turns = 2 if kind == "all-reduce" else 1
    whole = operands * (n if kind == "all-gather" else 1)
    if kind == "collective-permute":
        whole = operands * n / (n - 1)
    sent = turns * whole * (n - 1) / n
    fast = sent if inside > 1 else 0.0
    network = turns * whole * (n - inside) / n / inside
    seconds = max(fast / chip.link, network / chip.network) / LINK_SHARE
    return sent, COLLECTIVE_LATENCY + seconds


def replica_group(text: str) -> list[int]:
    """Returns the devices of the first group of a collective: of {{0,1},{2,3}}, of
    [2,2]<=[4] with T(1,0) or without, or of mesh['x'=2,'y'=2] {'x'}; [0] where none is named."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return [int(device) for device in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sides = [int(side) for side in match[3].split(",")]
        devices = np.arange(math.prod(sides)).reshape(sides)
        if match[4]:
            devices = devices.transpose([int(axis) for axis in match[4].split(",")])
        return devices.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        names = re.findall(r"'(\w+)'", match[2])
        return devices[tuple(slice(None) if a in names else 0 for a in sizes)].flatten().tolist()
    return [0]


def kernel_work(
    instruction: Instruction, computation: Computation, program: Program, gpu: Gpu
) -> Work:
    """Returns what one turn of a kernel moves and multiplies."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    moved = instruction.bytes + sum(operand.bytes for operand in operands)
    if instruction.opcode == "fusion":
        called = program.computations[instruction.attribute("calls")]
        products = list(_products(called, program))
        flops = collections.Counter()
        for product, around in products:
            flops.update(_product_flops(product, around))
        seconds = sum(product_seconds(product, around, gpu) for product, around in products)
        return Work(fusion_bytes(called), seconds, dict(flops))
    if instruction.opcode == "dot" or '"__cublas' in instruction.text:
        flops = _product_flops(instruction, computation)
        return Work(moved, product_seconds(instruction, computation, gpu), flops)
    if "__cudnn$fmha" in instruction.text:
        return Work(moved, *cudnn_attention(instruction, operands[0], gpu))
    if is_tokamax(instruction):
        return Work(moved, *tokamax_attention(instruction, operands, gpu))
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return Work(2 * instruction.bytes, 0.0, {})
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
        return Work(2 * update.bytes, 0.0, {})
    return Work(moved, 0.0, {})


def _products(
    computation: Computation, program: Program
) -> Iterator[tuple[Instruction, Computation]]:
    for instruction in computation.values():
        if instruction.opcode == "dot":
            yield instruction, computation
        elif called := instruction.attribute("calls"):
            yield from _products(program.computations[called], program)


def product_dims(product: Instruction, around: Computation) -> tuple[int, int, int, int]:
    """Returns (batch, rows, columns, depth) of a dot, or of a call of cuBLAS."""
    left, right = (around[name].arrays[0] for name in product.operands[:2])
    contracted = product.numbers("lhs_contracting_dims") or product.numbers(
        "lhs_contracting_dimensions"
    )
    batched = product.numbers("lhs_batch_dims") or product.numbers("lhs_batch_dimensions")
    depth = math.prod(left.shape[axis] for axis in contracted)
    batch = math.prod(left.shape[axis] for axis in batched)
    return batch, left.size // (batch * depth), right.size // (batch * depth), depth


def _product_flops(product: Instruction, around: Computation) -> dict[str, float]:
    dtype = around[product.operands[0]].arrays[0].dtype
    return {dtype: 2.0 * math.prod(product_dims(product, around))}


def product_seconds(product: Instruction, around: Computation, gpu: Gpu) -> float:
    """Returns the time of a product on the tensor cores, by the best of TILES."""
    batch, rows, columns, depth = product_dims(product, around)
    ((dtype, flops),) = _product_flops(product, around).items()
    exact = re.search(r"highest|dot_f32_f32_f32|HIGHEST", product.text)
    if dtype not in RATES or (dtype == "f32" and exact):
        return flops / (gpu.scalar_flops * PRODUCT_SHARE)
    filled = max(
        rate * batch * parts * rows * columns / (waves * gpu.cores * tile[0] * tile[1])
        for tile, rate in TILES.items()
        for parts in (SPLITS if depth >= SPLIT_DEPTH else (1,))
        for waves in [_waves(batch * parts, rows, columns, tile, gpu.cores)]
    )
    share = PRODUCT_SHARE * depth / (depth + HALF_DEPTH) * filled
    return flops / (gpu.chip.peak * RATES[dtype] * share)


def _waves(batch: int, rows: int, columns: int, tile: tuple[int, int], cores: int) -> int:
    """How often all multiprocessors take a tile each."""
    return -(-batch * -(-rows // tile[0]) * -(-columns // tile[1]) // cores)


def category_of(instruction: Instruction, program: Program, multiplies: bool) -> str:
    """Returns what a kernel is for: by its opcode, its products, then its source frames.

    Without a frame that says so, what JAX's differentiation made is "elementwise" and the rest of
    the step "optimizer".
    """
    if "__cudnn$fmha" in instruction.text or is_tokamax(instruction):
        return "attention"
    called = program.computations.get(instruction.attribute("calls") or "", {})
    if moves_only(instruction, called):
        return "copies"
    traced = [i for i in (instruction, *reversed(called.values())) if i.op_name]
    category = "other"
    if traced:
        category = "elementwise" if "jvp(" in traced[0].op_name else "optimizer"
        frames = program.frames_of(traced[0])
        category = next((c for f in frames for c, p in CATEGORIES if p.search(f)), category)
    return "dense" if multiplies and category not in ("attention", "optimizer") else category
