"""Forecasts the cost of a training step on one chip: FLOPs, bytes, messages, seconds.

The forecast is arithmetic on the resolved config, the annotations, the sizes of the mesh axes and a
chip's data sheet; nothing is compiled. The messages are those of `model.sharding`:

- a product gathers its weight over `fsdp` in its own type, once forward, once backward and once
  more where remat="block" recomputes the block, and scatters the float32 sum of its gradient; a
  table over vocabulary or positions and the readout are gathered in float32 once, the readout once
  for all chunks of the loss;
- a gradient, or the part of it that a chip has, is summed over the other axes that split tokens
  (`replica`, `data`, `sequence`);
- activations are summed over `tensor` after products that contract a split axis, their gradients
  before products that produce one;
- keys and values are gathered over `sequence`, their gradients scattered.

Every micro-batch sends all of these. A ring over n chips sends (n-1)/n of the array from each chip
for a gather or a scatter, and twice that for a sum.

`best_layout` searches the fastest mesh, accumulation and rematerialization for a number of chips.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.model import flops, kernels, memory
from lmscale_jax.model.flops import Chip
from lmscale_jax.model.param import Spec, named
from lmscale_jax.model.remat import REMAT
from lmscale_jax.model.sharding import AXES, TOKENS, partition
from lmscale_jax.model.transformer import HEADS

# Assumed, not measured: the shares of the data sheet's figures that large products, sweeps over
# memory and long messages reach. --explain and docs/scale.md say so.
PRODUCT_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.75, 0.8, 0.8
# Assumed: seconds of launch and hops of each message, in addition to its bytes.
LATENCY = 10e-6
# Reads and writes of a stored activation outside products: written and read forward, read backward,
# its gradient written and read. Of the logits: written, read for their log-sum-exp, read again and
# overwritten by their gradient.
SWEEPS, LOGIT_SWEEPS = 5, 4
# Bytes a second that one host writes of a checkpoint to a parallel file system or object store.
WRITE_PER_HOST = 1e9


class Message(NamedTuple):
    """All messages of one kind in a step.

    Attributes:
      kind: "gather weights", "scatter gradients", "sum gradients", "sum activations",
        "gather keys and values".
      axes: the mesh axes that they run over.
      fast, network: bytes that one chip sends over its links, and out of its domain.
      count: number of messages.
      seconds: the longer time of the two, at LINK_SHARE, plus LATENCY for each message.
      hidden: whether they can overlap with products that do not wait for them.
    """

    kind: str
    axes: tuple[str, ...]
    fast: float
    network: float
    count: float
    seconds: float
    hidden: bool


class StepCost(NamedTuple):
    """The forecast of one step on one chip.

    Attributes:
      model_flops: the convention "model" of `flops.flops_per_token`.
      chip_flops: model_flops and recomputation.
      moved: bytes to and from memory.
      messages: list of `Message`.
      compute: seconds of products and of sweeps over memory between them.
      hidden, exposed: seconds of messages that can overlap with products, and of the others.
      seconds: the longer of compute and hidden, plus exposed.
      mfu: model_flops / (seconds * peak).
    """

    model_flops: float
    chip_flops: float
    moved: float
    messages: list[Message]
    compute: float
    hidden: float
    exposed: float
    seconds: float
    mfu: float


def step_cost(config, specs: dict, sizes: Mapping[str, int], chip: Chip, moments=None) -> StepCost:
    """Forecasts one step with products in bfloat16; `moments` as in `memory.chip_memory`."""
    chips = math.prod(sizes.values())
    tokens = config.train.batch_size * config.data.seq_len
    model_flops = flops.flops_per_token(config, specs)["model"] * tokens / chips
    chip_flops = model_flops + recomputed_flops(config, specs, sizes, chip) * tokens / chips
    moved = sum(memory_traffic(config, specs, sizes, moments).values())
    messages = step_messages(config, specs, sizes, chip)
    compute = chip_flops / (chip.peak * PRODUCT_SHARE) + moved / (chip.bandwidth * BANDWIDTH_SHARE)
    hidden, exposed = (
        sum(message.seconds for message in messages if message.hidden is side)
        for side in (True, False)
    )
    seconds = max(compute, hidden) + exposed
    mfu = model_flops / (seconds * chip.peak)
    return StepCost(
        model_flops, chip_flops, moved, messages, compute, hidden, exposed, seconds, mfu
    )


def recomputed_flops(config, specs: dict, sizes: Mapping[str, int], chip: Chip) -> float:
    """Returns the FLOPs of one token that the backward pass recomputes."""
    parts = flops.forward_flops(config, specs)
    blocks = REMAT[config.model.remat].recomputed(parts)
    return blocks + (parts["readout"] if loss_chunks(config, sizes, chip) > 1 else 0.0)


def memory_traffic(config, specs: dict, sizes: Mapping[str, int], moments=None) -> dict[str, float]:
    """Returns the bytes that one chip reads and writes in a step, by purpose."""
    local = memory.local_sizes(specs, sizes)
    accum, tokens = config.train.accum, memory.tokens_on_chip(config, sizes)
    compute = memory.type_bytes(config.model)
    matrix_size = sum(
        spec.size / _split_sizes(spec, sizes, "tensor")
        for spec in named(specs).values()
        if spec.n_in
    )
    stored = memory.mean_block_bytes(config, specs, sizes, "flash").total
    sweep_factor = 1 + REMAT[config.model.remat].more_sweeps / SWEEPS
    logits = compute * tokens * config.model.vocab_size / sizes.get("tensor", 1)
    param_bytes = {path: 4 * size for path, size in local.items()}
    return {
        # Read and written: the parameter, its moments; read: the gradient.
        "optimizer": sum(
            size * (3 + 2 * memory.moment_count(moments, path))
            for path, size in param_bytes.items()
        ),
        # Written once per micro-batch; with several, the sum reads and writes them too.
        "gradients": accum * sum(param_bytes.values()) * (1 if accum == 1 else 3),
        # Cast or gathered, and then read by each pass.
        "weights": accum * REMAT[config.model.remat].weight_uses * 2 * compute * matrix_size,
        "activations": accum * tokens * config.model.n_layers * stored * SWEEPS * sweep_factor,
        "logits": accum * logits * LOGIT_SWEEPS,
    }


def loss_chunks(config, sizes: Mapping[str, int], chip: Chip) -> int:
    """Returns the number of chunks of the loss."""
    chunk, length = memory.loss_positions(config, sizes, chip.platform, chip.kind)
    return -(-length // chunk)


def step_messages(config, specs: dict, sizes: Mapping[str, int], chip: Chip) -> list[Message]:
    """Lists all messages of one step, one entry per kind and axes; empty ones are omitted."""
    messages: dict[tuple, Message] = {}
    ring = Rings(sizes, chip)
    for message in (
        *_of_weights(config, specs, sizes, ring),
        *_of_activations(config, specs, sizes, ring),
    ):
        key = message[:2]
        earlier = messages.get(key)
        if earlier:
            summed = (a + b for a, b in zip(earlier[2:6], message[2:6], strict=True))
            message = Message(*key, *summed, message.hidden)
        if message.fast or message.network:
            messages[key] = message
    return list(messages.values())


class Rings(NamedTuple):
    """Rings over axes of a mesh. Its chips fill one domain after another, in the order of AXES."""

    sizes: Mapping[str, int]
    chip: Chip

    def send(self, kind: str, axes, size: float, count: float, turns: int, hidden: bool) -> Message:
        """Returns the cost of `count` messages whose arrays have `size` bytes together.

        `turns` is 1 for a gather or scatter, 2 for a sum.
        """
        axes = tuple(axis for axis in AXES if axis in axes and self.sizes.get(axis, 1) > 1)
        n = math.prod(self.sizes[axis] for axis in axes)
        inside = math.prod(self.inside(axis) for axis in axes)
        fast = turns * size * (n - 1) / n if inside > 1 else 0.0
        # The network ports of a domain share the bytes that enter it.
        network = turns * size * (n - inside) / n / inside
        seconds = max(fast / self.chip.link, network / self.chip.network) / LINK_SHARE
        seconds += count * LATENCY
        return Message(kind, axes, fast, network, count, seconds, hidden)

    def inside(self, axis: str) -> int:
        """Returns the number of chips along an axis in one domain."""
        after = AXES[AXES.index(axis) + 1 :]
        stride = math.prod(self.sizes.get(other, 1) for other in after)
        return max(1, math.gcd(self.sizes[axis], max(1, self.chip.domain // stride)))


def _of_weights(config, specs, sizes, ring: Rings):
    compute, accum = memory.type_bytes(config.model), config.train.accum
    for path, spec in named(specs).items():
        size = accum * 4 * spec.size / _split_sizes(spec, sizes, "tensor")
        each = accum * (spec.shape[0] if spec.axes[0] == "layers" else 1)
        parts = partition(spec, sizes)
        sum_axes = [axis for axis in TOKENS if axis not in parts]
        uses = list(_uses(path, spec, config.model, compute / 4))
        sums = sum(backward for *_, backward in uses)
        if "fsdp" in parts:
            gathers = sum(count for count, *_ in uses)
            gathered = sum(count * share for count, share, _ in uses)
            yield ring.send("gather weights", ["fsdp"], gathered * size, gathers * each, 1, True)
            yield ring.send("scatter gradients", ["fsdp"], sums * size, sums * each, 1, True)
            size /= sizes["fsdp"]
        yield ring.send("sum gradients", sum_axes, sums * size, sums * each, 2, True)


def _uses(path: str, spec: Spec, model, narrow: float):
    """Yields (gathers, their bytes over float32's, gradients) for each use of a parameter."""
    if path == "embed/tokens" and HEADS[model.head].table is None:
        yield 1, 1.0, 1
    if path.startswith("blocks/"):
        yield REMAT[model.remat].weight_uses, narrow, 1
    else:
        yield 1, 1.0, 1


def _of_activations(config, specs, sizes, ring: Rings):
    model, compute = config.model, memory.type_bytes(config.model)
    tokens = config.train.accum * memory.tokens_on_chip(config, sizes)
    stream = tokens * model.d_model
    forward, turns = REMAT[model.remat].weight_uses - 1, config.train.accum
    summed, count = 0.0, 0
    for spec in named(specs["blocks"]).values():
        parts = partition(spec, sizes)
        if "tensor" in parts and spec.n_in:
            into = parts.index("tensor") - 1 < spec.n_in
            times = spec.shape[0] * (forward if into else 1)
            summed, count = summed + times * compute * stream, count + times * turns
    if _split_sizes(named(specs)["embed/tokens"], sizes, "tensor") > 1:
        # The looked-up rows and their gradient, float32; and the gradient of the readout's input.
        summed, count = summed + (2 * 4 + compute) * stream, count + 3 * turns
    yield ring.send("sum activations", ["tensor"], summed, count, 2, False)
    t, pieces = sizes.get("tensor", 1), sizes.get("sequence", 1)
    # If tensor does not divide their heads, keys and values are first repeated for each query head.
    heads = next((n / t for n in (model.n_kv_heads, model.n_heads) if n % t == 0), model.n_kv_heads)
    messages = 2 * len(attention_blocks(model)) * (forward + 1)
    size = messages * compute * tokens * pieces * heads * model.head_dim
    yield ring.send("gather keys and values", ["sequence"], size, messages * turns, 1, False)


def _split_sizes(spec: Spec, sizes: Mapping[str, int], axis: str) -> int:
    return sizes.get(axis, 1) if axis in partition(spec, sizes) else 1


def checkpoint_cost(specs: dict, chips: int, chip: Chip, moments=None) -> tuple[float, float]:
    """Returns (bytes, seconds) of one checkpoint: parameters and optimizer, float32, written by all
    hosts at WRITE_PER_HOST."""
    size = sum(
        4 * spec.size * (1 + memory.moment_count(moments, path))
        for path, spec in named(specs).items()
    )
    return size, size / (max(1, -(-chips // chip.host)) * WRITE_PER_HOST)


# Share of a chip's memory that the estimate may fill: the runtime needs some, and the estimate is
# not exact.
FILL = 0.85
# From the fastest to the smallest.
REMAT_BY_COST = ("none", "dots", "block")


class Layout(NamedTuple):
    """A mesh with accumulation and rematerialization, and its cost.

    Attributes:
      sizes: chips along each mesh axis.
      accum, remat: train.accum and model.remat.
      bytes: result of `memory.chip_memory`.
      step: `StepCost`.
    """

    sizes: dict[str, int]
    accum: int
    remat: str
    bytes: dict[str, int]
    step: StepCost


def best_layout(config, specs: dict, chip: Chip, count: int) -> Layout | str:
    """Finds the layout with the shortest forecast step that fits; else returns the reason.

    Candidates are all meshes of `count` chips whose tensor axis divides the key and value heads and
    is within a host, whose fsdp axis divides the width, and whose batch axes divide the batch; for
    each of them and each rematerialization, the fewest micro-batches that fit, since more would
    only send and move more. The optimizer is AdamW.
    """
    rows, least = config.train.batch_size, None
    layouts = []
    for sizes in candidate_meshes(config, chip, count):
        for remat in REMAT_BY_COST:
            layout, smallest = _fit(config, specs, chip, sizes, remat)
            least = min(least or smallest, smallest)
            if layout:
                layouts.append(layout)
    if layouts:
        return min(layouts, key=lambda layout: layout.step.seconds)
    if least is None:
        tensor = max(_tensors(config, chip, count))
        return f"{rows} rows cannot be split over {count} chips, not with {tensor} sharing each"
    return f"does not fit: {least / 1e9:,.0f} GB of {chip.memory / 1e9:.4g} GB a chip at the least"


def candidate_meshes(config, chip: Chip, count: int) -> Iterator[dict[str, int]]:
    """Yields the sizes of the mesh axes that `best_layout` tries.

    `sequence` is 1; `replica` is the number of TPU pods, between which only gradients should go.
    """
    rows = config.train.batch_size
    pods = -(-count // chip.domain) if chip.platform == "tpu" else 1
    for tensor in _tensors(config, chip, count):
        shards = count // tensor
        if rows % shards or shards % pods:
            continue
        for fsdp in _divisors(shards // pods):
            if config.model.d_model % fsdp == 0:
                data = shards // pods // fsdp
                yield dict(replica=pods, data=data, fsdp=fsdp, sequence=1, tensor=tensor)


def _tensors(config, chip: Chip, count: int) -> list[int]:
    return [n for n in _divisors(min(chip.host, count)) if config.model.n_kv_heads % n == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _fit(config, specs, chip: Chip, sizes, remat: str) -> tuple[Layout | None, int]:
    """Returns the layout with the fewest micro-batches that fits, or None; and its bytes."""
    shards = sizes["replica"] * sizes["data"] * sizes["fsdp"]
    config.model.remat, kernel = remat, kernels.choose_kernel(config, chip.platform)[0]
    bytes_ = {}
    for accum in _divisors(config.train.batch_size // shards):
        config.train.accum = accum
        bytes_ = memory.chip_memory(
            config, specs, sizes, platform=chip.platform, device_kind=chip.kind, kernel=kernel
        )
        if bytes_["total"] <= FILL * chip.memory:
            step = step_cost(config, specs, sizes, chip)
            return Layout(sizes, accum, remat, bytes_, step), bytes_["total"]
    return None, bytes_["total"]
