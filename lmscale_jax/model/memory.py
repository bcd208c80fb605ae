"""Bytes on one chip at the worst moment of a training step, from config, annotations and mesh."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lmscale_jax.config.mlp_forms import MLP_FORMS
from lmscale_jax.model.context import DTYPES
from lmscale_jax.model.kernels import KERNELS
from lmscale_jax.model.loss import chunk_length
from lmscale_jax.model.param import named
from lmscale_jax.model.sharding import ROWS, partition
from lmscale_jax.model.stack import REMAT
from lmscale_jax.model.transformer import HEADS

# Bytes of all that is made of one logit, measured (docs/scale.md): of any type on accelerators, and
# on CPU for each byte of the type of products.
LOGITS, CPU_LOGITS = 10.5, 4.75
# Kernels that keep no probabilities for the backward pass.
FLASH = ("flash", *(name for name, k in KERNELS.items() if not k.keeps_probabilities))


def chip_memory(
    config,
    specs: dict,
    sizes: Mapping[str, int],
    *,
    platform: str,
    kernel: str,
    stack: str = "scan",
    moments: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """An estimate of what one chip holds; docs/scale.md has how near it is to the compiler's.

    Args:
        config: a resolved config.
        specs: the model's annotations.
        sizes: of the mesh axes by name; what is not named is 1.
        platform: of the chip, as JAX names it.
        kernel: of attention, as `model.kernels.choose_kernel` names it.
        stack: how the blocks run, "scan" or "unroll".
        moments: {path: arrays of its size that the optimizer keeps}; None: AdamW's two.

    Returns:
        {"parameters", "optimizer", "gradients", "activations", "logits", "gathered", "total"}. The
        first two are there always, float32; the others are those of the worse of two moments: the
        loss, with logits and no gradient of a block yet, or the last block, with all gradients.
    """
    held = {path: 4 * size for path, size in local_sizes(specs, sizes).items()}
    local = sum(held.values())
    ends = local - sum(size for path, size in held.items() if path.startswith("blocks/"))
    # With several micro-batches the sum of those before is held all along.
    summed = local if config.train.accum > 1 else 0
    if HEADS[config.model.head].table is None and platform != "cpu":
        # The gradients of both uses of the table, and the table turned round, beside their sum.
        ends += 3 * held["embed/tokens"]
    keeps, once = _activations(config, sizes, platform, kernel, stack)
    tables, blocks = _gathered(config, specs, sizes)
    worst = max(
        (
            {
                "gradients": summed + ends,
                "activations": keeps,
                "logits": _logits(config, sizes, platform, stack),
                "gathered": tables,
            },
            {
                "gradients": summed + local,
                "activations": keeps + once,
                "logits": 0,
                "gathered": blocks,
            },
        ),
        key=lambda moment: sum(moment.values()),
    )
    found = {
        "parameters": local,
        "optimizer": sum(size * kept_bytes(moments, path) for path, size in held.items()),
    }
    found = {name: int(size) for name, size in (found | worst).items()}
    return found | {"total": sum(found.values())}


def kept_bytes(moments: Mapping[str, int] | None, path: str) -> int:
    return 2 if moments is None else moments.get(path, 2)


def local_sizes(specs: dict, sizes: Mapping[str, int]) -> dict[str, float]:
    """Of each parameter by path, how many of its values one chip holds."""
    return {
        path: spec.size / math.prod(sizes[over] for over in partition(spec, sizes) if over)
        for path, spec in named(specs).items()
    }


def tokens_on_chip(config, sizes: Mapping[str, int]) -> float:
    """Of one micro-batch."""
    shards = math.prod(sizes.get(axis, 1) for axis in (*ROWS, "sequence"))
    rows = config.train.batch_size // config.train.accum
    return max(1.0, rows * config.data.seq_len / shards)


def loss_positions(config, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(positions in one chunk of the loss, positions of a window) on one chip."""
    shards = math.prod(sizes.get(axis, 1) for axis in ROWS)
    rows = max(1, config.train.batch_size // config.train.accum // shards)
    length = config.data.seq_len // sizes.get("sequence", 1)
    vocabulary = config.model.vocab_size // sizes.get("tensor", 1)
    return chunk_length(config.model, (rows, length), vocabulary), length


def type_bytes(model) -> int:
    return DTYPES[model.dtype].itemsize


class BlockBytes(NamedTuple):
    """What the backward pass may keep of one token in one block, bytes.

    Attributes:
      stream: the residual stream that enters.
      products: results of products.
      whole: everything.
      keeps_scores: the probabilities are among it.
    """

    stream: float
    products: float
    whole: float
    keeps_scores: bool


def block_bytes(
    model, seq_len: int, sizes: Mapping[str, int], kernel: str, platform: str = ""
) -> BlockBytes:
    """The stream before both branches (float32); two normed inputs; queries, keys, values and what
    attention makes of them; hidden values of the MLP before the activation and, some, after it; and
    the probabilities, float32, of kernels that keep them.

    On CPU everything is kept as float32, which its compiler widens bfloat16 to, and attention has
    copies of its operands with the heads in front.
    """
    on_cpu, tensor = platform == "cpu", sizes.get("tensor", 1)
    size = 4 if on_cpu else type_bytes(model)
    stream = 4 * model.d_model
    heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim / tensor
    hidden, form = model.d_ff / tensor, MLP_FORMS[model.mlp]
    products = size * (heads + form.input_matrices * hidden + 2 * model.d_model)
    again = form.recomputed_on_cpu if on_cpu else form.recomputed
    pointwise = size * (2 * model.d_model + (0 if again else hidden))
    if on_cpu:
        pointwise += size * 4 * model.n_heads * model.head_dim / tensor
    # Elsewhere than on CPU the probabilities in the type of products are kept too, and the mask.
    each = 4 if on_cpu else 4 + 1 + (2 if size == 2 else 0)
    scores = 0 if kernel in FLASH else each * model.n_heads * seq_len / tensor
    return BlockBytes(stream, products, 2 * stream + products + pointwise + scores, scores > 0)


def _activations(config, sizes, platform: str, kernel: str, stack: str) -> tuple[float, float]:
    """(what the backward pass keeps of all blocks, what it makes of one at a time)."""
    model, tokens = config.model, tokens_on_chip(config, sizes)
    block = block_bytes(model, config.data.seq_len, sizes, kernel, platform)
    remat = model.remat
    if platform == "cpu":
        # An unrolled stack's compiler joins what is computed again with what was computed first;
        # products with backward rules of their own are none that "dots" knows.
        remat = "none" if stack == "unroll" or remat == "none" else "block"
    # What one block makes again, with the gradients of its gate and its hidden values.
    again = block.whole + 2 * type_bytes(model) * model.d_ff / sizes.get("tensor", 1)
    once = 0 if remat == "none" else again
    # And the float32 gradients of one block's probabilities and scores.
    once += (
        2 * 4 * model.n_heads * config.data.seq_len / sizes.get("tensor", 1) * block.keeps_scores
    )
    return tokens * REMAT[remat].kept(block) * model.n_layers, tokens * once


def _logits(config, sizes, platform: str, stack: str) -> float:
    """Logits of one chunk of the loss, what is made of them, and their gradient."""
    chunk, length = loss_positions(config, sizes)
    tokens = tokens_on_chip(config, sizes) * chunk / length
    each = CPU_LOGITS * type_bytes(config.model) if platform == "cpu" else LOGITS
    if platform == "cpu" and stack == "scan":
        # One more copy was seen there, in float32.
        each += 4
    return each * tokens * config.model.vocab_size / sizes.get("tensor", 1)


def _gathered(config, specs: dict, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Weights that `fsdp` makes whole for a while, in the type of products: at the loss the
    readout, with its float32 gradient; in a block all of its weights, with that of the largest
    before it is scattered."""
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
