"""Operations and time of attention kernels on a GPU, of which XLA's program says neither."""

import re
from typing import NamedTuple

from lmscale_jax.model.flops import Chip
from lmscale_jax.train.hlo_text import Instruction

# Fused attention: share of the peak for heads up to 64 and wider, of long rows; the length at which
# half of it is reached; the backward pass against the forward pass. Read off the curves of
# FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, figures 5 and 6), for H100.
ATTENTION_SHARE = {64: 0.485, 128: 0.657}
ATTENTION_HALF_LENGTH, ATTENTION_BACKWARD = 700, 0.75
# Products of a query with a key it sees: two forward; three more, two of which are done again,
# going back.
ATTENTION_FORWARD_FLOPS, ATTENTION_BACKWARD_FLOPS = 4, 10
# The same of tokamax's kernels by the number of gradients that one returns: of the queries, of keys
# and values, of all three.
TOKAMAX_BACKWARD_FLOPS = {1: 6, 2: 8, 3: 10}


class Gpu(NamedTuple):
    """Attributes:
    chip: its data sheet.
    cores: multiprocessors.
    scalar_flops: float32 operations a second outside the tensor cores.
    """

    chip: Chip
    cores: int
    scalar_flops: float


def cudnn_attention(
    instruction: Instruction, queries: Instruction, gpu: Gpu
) -> tuple[float, dict[str, float]]:
    """(seconds, operations) of cuDNN's attention; its operands are [B, T, H, d]."""
    batch, length, heads, width = queries.arrays[0].shape
    backward = "Backward" in instruction.text
    match = re.search(r'sliding_window_length": ?"?(\d+)', instruction.text)
    seen = min(length, int(match[1]) or length) if match else length
    pairs = length * seen - seen * seen / 2 if "CAUSAL" in instruction.text else length * length
    each = ATTENTION_BACKWARD_FLOPS if backward else ATTENTION_FORWARD_FLOPS
    flops = each * batch * heads * width * pairs
    seconds = flops / (gpu.chip.peak * attention_share(width, length, backward))
    return seconds, {queries.arrays[0].dtype: flops}


def attention_share(width: int, length: int, backward: bool) -> float:
    """Returns the share of the peak that attention over causal rows reaches."""
    share = ATTENTION_SHARE[64 if width <= 64 else 128] * length / (length + ATTENTION_HALF_LENGTH)
    return share * ATTENTION_BACKWARD if backward else share


def is_tokamax(instruction: Instruction) -> bool:
    """Whether it is one of tokamax's kernels, rather than arithmetic that surrounds them."""
    return instruction.opcode == "custom-call" and "tokamax:{" in instruction.text


def tokamax_attention(
    instruction: Instruction, operands: list[Instruction], gpu: Gpu
) -> tuple[float, dict[str, float]]:
    """(seconds, operations) of tokamax's attention; its operands are [B, T, H, d], [B, S, K, d].

    XLA knows no cost of it. Forward it does the pairs of a query and a key that causality and
    windows leave, which `fused_attention.tokamax` writes into its scope; documents, which leave
    fewer, are in the batch alone. Backward it does all keys, or half of them if causal, and the
    scores twice: in the kernel of the queries' gradient, and in that of keys and values.
    """
    batch, length, heads, width = operands[0].arrays[0].shape
    keys = operands[1].arrays[0].shape[1]
    seen = re.search(r"mean_keys_(\d+)", instruction.text)
    backward = "Vjp" in instruction.text
    if seen and not backward:
        keys = int(seen[1])
    elif re.search(r'is_causal\\*":true', instruction.text):
        keys /= 2
    results = sum(len(array.shape) == 4 for array in instruction.arrays)
    each = TOKAMAX_BACKWARD_FLOPS[results] if backward else ATTENTION_FORWARD_FLOPS
    flops = each * batch * heads * width * length * keys
    # A causal row of twice the length has as many keys to a query.
    seconds = flops / (gpu.chip.peak * attention_share(width, 2 * keys, backward))
    return seconds, {operands[0].arrays[0].dtype: flops}
