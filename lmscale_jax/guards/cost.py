"""Guard: what a step of an arm costs in time and memory, beside the baseline's."""

import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import Finding, SmallArm
from lmscale_jax.model.flops import flops_per_token
from lmscale_jax.model.mesh import one_device_mesh
from lmscale_jax.train import aot
from lmscale_jax.train.setup import TrainStep, build_setup

REPEATS = 4
# Ratio of time, or of memory, to the ratio of FLOPs above which a comparison by FLOPs misleads.
UNEQUAL = 1.3


class TimedStep(NamedTuple):
    """A compiled step, with what it is called with and the bytes of its memory."""

    step: object
    state: object
    batch: object
    hparams: dict
    bytes: int | None
    flops: float


def check_cost(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Times steps of both in turn, on this CPU, at the largest anchor that it trains in moments."""
    if baseline is None or arm is baseline:
        return Finding(skipped="it is the baseline" if baseline else "there is no baseline")
    if arm.anchor is None:
        return Finding(skipped="only the anchors of a ladder are timed")
    pair = [_program(each) for each in (arm, baseline)]
    seconds = [[], []]
    for _ in range(REPEATS + 1):
        for i, program in enumerate(pair):
            begin = time.perf_counter()
            after, _ = program.step(program.state, program.batch, program.hparams)
            jax.block_until_ready(after)
            seconds[i].append(time.perf_counter() - begin)
            pair[i] = program._replace(state=after)
    # The first call also pages memory in. Noise only adds time.
    ours, theirs = (statistics.median(sorted(s[1:])[:3]) for s in seconds)
    memory = pair[0].bytes / pair[1].bytes if pair[0].bytes and pair[1].bytes else None
    finding = judge_cost(ours / theirs, pair[0].flops / pair[1].flops, memory)
    times = f" ({ours * 1e3:.0f} and {theirs * 1e3:.0f} ms on this CPU)"
    return finding._replace(note=finding.note + times)


def judge_cost(elapsed: float, flops: float, memory: float | None) -> Finding:
    """Judges ratios to the baseline: of step time, FLOPs and memory (None: not known)."""
    measured = f"{elapsed:.2f} x step time, {flops:.2f} x FLOPs"
    measured += f", {memory:.2f} x memory" if memory else ""
    fault = ""
    if elapsed > UNEQUAL * flops:
        fault = f"{measured}: k(C) counts FLOPs, not time; compare k in seconds too"
    elif memory and memory > UNEQUAL * max(1.0, flops):
        fault = f"{measured}: it may need smaller micro-batches, by train.accum"
    return Finding(fault, measured)


def _program(arm: SmallArm) -> TimedStep:
    if "step" in arm.memory:
        return arm.memory["step"]
    changes = {
        "model.stack": "scan", "model.dtype": "float32", "train.accum": 1, "train.parent": "",
        "train.parent_step": 0, **shrink.ONE_DEVICE,
    }  # fmt: skip
    config = apply_overrides(arm.anchor, changes)
    setup = build_setup(resolve(config, arm.vocab_size), shrink.MARK, one_device_mesh())
    rng = np.random.default_rng(0)

    def filled(x):
        fits = np.issubdtype(x.dtype, np.floating)
        return (0.02 * rng.standard_normal(x.shape) if fits else np.zeros(x.shape)).astype(x.dtype)

    shapes = jax.eval_shape(setup.initial, 0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = jax.device_put(state._replace(params=jax.tree.map(filled, shapes.params)))
    size = setup.config.train.batch_size, setup.config.data.seq_len
    tokens = rng.integers(1, setup.config.model.ids, size).astype(np.int32)
    batch, take = type(setup.abstract_batch())(tokens, tokens), TrainStep(setup)
    lowered, quick = take.lower(state, batch), jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        compiled = lowered.compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)
    sizes = aot.compiled_memory(compiled)
    flops = flops_per_token(setup.config, setup.model.specs)["model"]
    program = TimedStep(compiled, state, batch, take.hparams, sizes and sizes["peak"], flops)
    arm.memory["step"] = program
    return program
