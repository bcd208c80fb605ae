"""Bytes that a fused kernel moves: outputs written, and of each input the elements they ask for."""

import collections

from lmscale_jax.train.hlo_text import Computation, Instruction

# Kernels of these alone compute nothing.
MOVEMENT = {
    "parameter", "constant", "bitcast", "copy", "transpose", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "broadcast", "concatenate", "pad", "tuple", "iota", "get-tuple-element",
}  # fmt: skip
# Read whole, whatever is asked of their result.
_WHOLE = {"reduce", "reduce-window", "dot", "sort", "concatenate", "pad", "fusion", "custom-call"}
# The operand that says what is written, of operations that write into their first operand.
_UPDATE = {"dynamic-update-slice": 1, "scatter": -1}


def fusion_bytes(computation: Computation) -> float:
    """Returns the bytes that one turn of a fusion reads from and writes to memory.

    Slices and gathers read what they take; an update of a slice, or a scatter, that is an output
    works in place, so that the array it changes is not moved.
    """
    needed: collections.Counter = collections.Counter()
    written, in_place = 0.0, set()
    for output in outputs(computation):
        needed[output.name] += output.size
        if output.opcode in _UPDATE:
            update = computation[output.operands[_UPDATE[output.opcode]]]
            # A scatter adds to what is there.
            written += update.bytes * (2 if output.opcode == "scatter" else 1)
            in_place.add(output.name)
        else:
            written += output.bytes
    for instruction in reversed(computation.values()):
        asked = needed[instruction.name]
        if not asked or instruction.opcode == "parameter":
            continue
        for position, name in enumerate(instruction.operands):
            if name not in computation:
                continue
            size = computation[name].size
            count = size if instruction.opcode in _WHOLE else asked
            if instruction.opcode in _UPDATE:
                first = 0 if instruction.name in in_place else asked
                count = first if position == 0 else size
            needed[name] = min(size, needed[name] + count)
    parameters = [i for i in computation.values() if i.opcode == "parameter"]
    read = sum(needed[p.name] * p.bytes / max(1, p.size) for p in parameters)
    return written + read


def outputs(computation: Computation) -> list[Instruction]:
    """Returns what a computation returns, behind bitcasts, which move nothing."""
    root = next(instruction for instruction in computation.values() if instruction.is_root)
    names = root.operands if root.opcode == "tuple" else [root.name]
    results = []
    for name in names:
        output = computation[name]
        while output.opcode == "bitcast":
            output = computation[output.operands[0]]
        results.append(output)
    return results


def moves_only(instruction: Instruction, called: Computation) -> bool:
    """Whether a kernel only moves data, or puts what it computed into a larger array."""
    if not called:
        return instruction.opcode in MOVEMENT
    if all(output.opcode == "dynamic-update-slice" for output in outputs(called)):
        return True
    # Scalars are indices.
    arrays = [i for i in called.values() if i.arrays and i.arrays[0].shape]
    return all(i.opcode in MOVEMENT for i in arrays)
