"""The mesh, accumulation and recomputation that a model should take on so many chips: a search."""

from collections.abc import Iterator
from typing import NamedTuple

from lmscale_jax.model import costs, kernels, memory
from lmscale_jax.model.chips import Chip

# Share of a chip's memory that the estimate may fill: the runtime takes some, and the estimate is
# not exact.
FILL = 0.85
# From the fastest to the smallest.
REMAT_BY_COST = ("none", "dots", "block")


class Layout(NamedTuple):
    """Attributes:
    sizes: chips along each mesh axis.
    accum, remat: of the config.
    bytes: `memory.on_chip`.
    step: `costs.Step`.
    """

    sizes: dict[str, int]
    accum: int
    remat: str
    bytes: dict[str, int]
    step: costs.Step


def best(config, specs: dict, chip: Chip, count: int) -> Layout | str:
    """The layout with the shortest forecast step that fits, or why there is none.

    All meshes of `count` chips are tried whose tensor axis divides the key and value heads and
    stays within a host, whose fsdp axis divides the width, and whose batch axes divide the rows of
    the batch; of each and each way to recompute, the fewest micro-batches that fit. Fewer send less
    and move less, so more need not be tried. The optimizer is AdamW.
    """
    rows, least = config.train.batch_size, None
    found = []
    for sizes in meshes(config, chip, count):
        for remat in REMAT_BY_COST:
            fitting, smallest = _fit(config, specs, chip, sizes, remat)
            least = min(least or smallest, smallest)
            if fitting:
                found.append(fitting)
    if found:
        return min(found, key=lambda layout: layout.step.seconds)
    if least is None:
        tensor = max(_tensors(config, chip, count))
        return f"{rows} rows cannot be split over {count} chips, not with {tensor} sharing each"
    return f"does not fit: {least / 1e9:,.0f} GB of {chip.memory / 1e9:.4g} GB a chip at the least"


def meshes(config, chip: Chip, count: int) -> Iterator[dict[str, int]]:
    """The sizes of the mesh axes that `best` tries. `sequence` stays 1; `replica` counts the
    domains of a cluster of several TPU pods, across which nothing but gradients should go."""
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
    """The layout with the fewest micro-batches that fits, if any; and the fewest bytes seen."""
    shards = sizes["replica"] * sizes["data"] * sizes["fsdp"]
    config.model.remat, kernel = remat, kernels.choose(config, chip.platform)[0]
    bytes_ = {}
    for accum in _divisors(config.train.batch_size // shards):
        config.train.accum = accum
        bytes_ = memory.on_chip(config, specs, sizes, platform=chip.platform, kernel=kernel)
        if bytes_["total"] <= FILL * chip.memory:
            step = costs.step(config, specs, sizes, chip)
            return Layout(sizes, accum, remat, bytes_, step), bytes_["total"]
    return None, bytes_["total"]
