"""Estimates the peak memory of one chip in a training step, from config, annotations and mesh."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.config.mlp_forms import MLP_FORMS
from lmscale_jax.model.context import DTYPES, RESIDUAL_DTYPES
from lmscale_jax.model.kernels import KERNELS
from lmscale_jax.model.loss import chunk_length, logit_bytes
from lmscale_jax.model.param import named
from lmscale_jax.model.remat import REMAT
from lmscale_jax.model.sharding import ROWS, partition
from lmscale_jax.model.transformer import HEADS

# Bytes of all arrays per logit, for each byte of the type of products (docs/scale.md). On
# accelerators the gradient takes the place of the logits.
LOGITS, CPU_LOGITS = 1.1, 4.75
# Kernels that keep no probabilities for the backward pass.
FLASH = ("flash", *(name for name, k in KERNELS.items() if not k.keeps_probabilities))


def chip_memory(
    config,
    specs: dict,
    sizes: Mapping[str, int],
    *,
    platform: str,
    device_kind: str = "",
    kernel: str,
    stack: str = "scan",
    moments: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Estimates the bytes on one chip; docs/scale.md compares it with the compiler's figures.

    Args:
        config: a resolved config.
        specs: the model's annotations.
        sizes: sizes of the mesh axes by name; a missing axis is 1.
        platform, device_kind: JAX's names of the chip's platform and kind.
        kernel: attention kernel, a name of `kernels.KERNELS`.
        stack: execution of the blocks, "scan" or "unroll".
        moments: {path: number of arrays of its size in the optimizer}; None: AdamW's two.

    Returns:
        {"parameters", "optimizer", "gradients", "activations", "logits", "gathered", "total"}. The
        first two are float32 and always present; the others are those of the larger of two moments:
        the loss, with logits but no gradients of blocks, or the last block, with all gradients.
    """
    param_bytes = {path: 4 * size for path, size in local_sizes(specs, sizes).items()}
    local = sum(param_bytes.values())
    ends = local - sum(size for path, size in param_bytes.items() if path.startswith("blocks/"))
    # With several micro-batches the sum of earlier gradients is always present.
    summed = local if config.train.accum > 1 else 0
    if HEADS[config.model.head].table is None and platform != "cpu":
        # The gradients of both uses of the table and the transposed table, besides their sum.
        ends += 3 * param_bytes["embed/tokens"]
    stored, transient = _activations(config, specs, sizes, platform, kernel, stack)
    tables, blocks = _gathered(config, specs, sizes)
    worst = max(
        (
            {
                "gradients": summed + ends,
                "activations": stored,
                "logits": _logits(config, sizes, (platform, device_kind), stack),
                "gathered": tables,
            },
            {
                "gradients": summed + local,
                "activations": stored + transient,
                "logits": 0,
                "gathered": blocks,
            },
        ),
        key=lambda moment: sum(moment.values()),
    )
    optimizer = sum(size * moment_count(moments, path) for path, size in param_bytes.items())
    estimate = {"parameters": local, "optimizer": optimizer} | worst
    estimate = {name: int(size) for name, size in estimate.items()}
    return estimate | {"total": sum(estimate.values())}


def moment_count(moments: Mapping[str, int] | None, path: str) -> int:
    """Returns the number of arrays that the optimizer keeps for a parameter."""
    return 2 if moments is None else moments.get(path, 2)


def local_sizes(specs: dict, sizes: Mapping[str, int]) -> dict[str, float]:
    """Returns the number of entries of each parameter on one chip, by path."""
    return {
        path: spec.size / math.prod(sizes[over] for over in partition(spec, sizes) if over)
        for path, spec in named(specs).items()
    }


def tokens_on_chip(config, sizes: Mapping[str, int]) -> float:
    """Returns the tokens of one micro-batch on one chip."""
    shards = math.prod(sizes.get(axis, 1) for axis in (*ROWS, "sequence"))
    rows = config.train.batch_size // config.train.accum
    return max(1.0, rows * config.data.seq_len / shards)


def loss_positions(
    config, sizes: Mapping[str, int], platform: str, device_kind: str
) -> tuple[int, int]:
    """Returns (positions in one chunk of the loss, positions of a window) on one chip."""
    shards = math.prod(sizes.get(axis, 1) for axis in ROWS)
    rows = max(1, config.train.batch_size // config.train.accum // shards)
    length = config.data.seq_len // sizes.get("sequence", 1)
    vocabulary = config.model.vocab_size // sizes.get("tensor", 1)
    most_bytes = logit_bytes(platform, device_kind)
    return chunk_length(config.model, (rows, length), vocabulary, most_bytes), length


def type_bytes(model) -> int:
    """Returns the bytes of one number of model.dtype."""
    return DTYPES[model.dtype].itemsize


class BlockBytes(NamedTuple):
    """Bytes that the backward pass may store per token and block.

    Attributes:
      stream: the block's input.
      products: results of products.
      total: everything, without rematerialization.
      keeps_scores: whether attention probabilities are included.
    """

    stream: float
    products: float
    total: float
    keeps_scores: bool


def mean_block_bytes(config, *where) -> BlockBytes:
    """Returns the mean of `block_bytes` over the blocks, some of which may lack attention."""
    share = len(attention_blocks(config.model)) / config.model.n_layers
    return block_bytes(config, *where, attending=share)


def block_bytes(
    config,
    specs: dict,
    sizes: Mapping[str, int],
    kernel: str,
    platform: str = "",
    attending: float = 1.0,
) -> BlockBytes:
    """Estimates the bytes that the backward pass may store of one token in one block.

    `attending` is the share of the blocks with attention, 1 for one that has it.

    They are: the stream before both branches; two normed inputs; queries, keys, values
    and the output of attention; hidden values of the MLP before the activation and, for some forms,
    after it; and the float32 probabilities of kernels that store them. On CPU everything is
    float32, as its compiler widens bfloat16, and attention copies its operands with heads first.
    """
    model, on_cpu, tensor = config.model, platform == "cpu", sizes.get("tensor", 1)
    size = 4 if on_cpu else type_bytes(model)
    stream = (
        4 if on_cpu else RESIDUAL_DTYPES[model.residual_dtype](model).itemsize
    ) * model.d_model
    branches, n_heads = 1 + attending, attending * model.n_heads / tensor
    heads = (2 * n_heads + 2 * attending * model.n_kv_heads / tensor) * model.head_dim
    hidden, form = model.d_ff / tensor, MLP_FORMS[model.mlp]
    # As many numbers as the matrices of the MLP's input, and a user's ones, have columns.
    inputs = sum(s.fan_out for s in named(specs["blocks"]).values() if "mlp" in s.axes_out)
    products = size * (heads + inputs / tensor + branches * model.d_model)
    recomputed = form.recomputed_on_cpu if on_cpu else form.recomputed
    pointwise = size * (branches * model.d_model + (0 if recomputed else hidden))
    if on_cpu:
        pointwise += size * 4 * n_heads * model.head_dim
    # Accelerators store the probabilities in the type of products and the mask too.
    each = 4 if on_cpu else 4 + 1 + (2 if size == 2 else 0)
    scores = 0 if kernel in FLASH else each * n_heads * config.data.seq_len
    total = branches * stream + products + pointwise + scores
    return BlockBytes(stream, products, total, scores > 0)


def _activations(
    config, specs: dict, sizes, platform: str, kernel: str, stack: str
) -> tuple[float, float]:
    """Returns bytes (stored for all blocks, transient in the backward pass of one block)."""
    model, tokens = config.model, tokens_on_chip(config, sizes)
    block = block_bytes(config, specs, sizes, kernel, platform)
    remat = model.remat
    if platform == "cpu" and stack == "unroll":
        # The compiler merges recomputed values with the first ones.
        remat = "none"
    # The recomputed values of one block, with the gradients of its gate and its hidden values.
    recomputed = block.total + 2 * type_bytes(model) * model.d_ff / sizes.get("tensor", 1)
    transient = 0 if remat == "none" else recomputed
    # The float32 gradients of one block's probabilities and scores.
    transient += (
        2 * 4 * model.n_heads * config.data.seq_len / sizes.get("tensor", 1) * block.keeps_scores
    )
    mean = mean_block_bytes(config, specs, sizes, kernel, platform)
    return tokens * REMAT[remat].stored(mean) * model.n_layers, tokens * transient


def _logits(config, sizes, chip: tuple[str, str], stack: str) -> float:
    """Returns the bytes of one chunk's logits, of arrays computed from them, and their gradient.

    `chip`: its platform and kind.
    """
    platform = chip[0]
    chunk, length = loss_positions(config, sizes, *chip)
    tokens = tokens_on_chip(config, sizes) * chunk / length
    each = type_bytes(config.model) * (CPU_LOGITS if platform == "cpu" else LOGITS)
    if platform == "cpu" and stack == "scan":
        # Measured: one more copy, in float32.
        each += 4
    return each * tokens * config.model.vocab_size / sizes.get("tensor", 1)


def _gathered(config, specs: dict, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Returns the bytes of gathered weights, in the type of products, (at the loss, in a block).

    At the loss that is the readout with its float32 gradient; in a block all of its weights, and
    the largest one's gradient before it is scattered.
    """
    compute, ends, blocks, largest = type_bytes(config.model), [0.0], 0.0, 0.0
    for path, spec in named(specs).items():
        parts = partition(spec, sizes)
        if "fsdp" not in parts:
            continue
        size = spec.size / (sizes["tensor"] if "tensor" in parts else 1)
        if path.startswith("blocks/"):
            each = size / spec.shape[0]
            blocks, largest = blocks + compute * each, max(largest, 4 * each)
        else:
            ends.append((compute + 4) * size)
    return max(ends), blocks + largest
