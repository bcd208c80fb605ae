"""Runs the blocks: one loop over segments, some of which the caller may wrap."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.config.key import Modes
from lmscale_jax.model import skip_connections
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.layers import PRODUCT
from lmscale_jax.model.transformer import Block


def _both_branches(block: Block, context: ForwardContext, h_NxD: jax.Array) -> jax.Array:
    return block.feed(block.attend(h_NxD, context), context)


# The parts of a block that a wrapper can wrap, by name.
PARTS = {
    "block": _both_branches,
    "attention": lambda block, context, h_NxD: block.attend(h_NxD, context),
    "mlp": lambda block, context, h_NxD: block.feed(h_NxD, context),
}


class BlockWrapper(Protocol):
    """Wraps consecutive blocks: their inputs and outputs, and their gradients.

    `part(context, h_NxD, (params, index)) -> h_NxD` is a block, its attention or its MLP. It closes
    over no traced value, so that a `jax.custom_vjp` can contain it; `index` is the layer.

    Attributes:
      first, stop: the blocks first..stop-1 are wrapped.
      part_names: the parts of each block that are wrapped in turn, keys of PARTS.
    """

    first: int
    stop: int
    part_names: tuple[str, ...]

    def begin(self, h_NxD: jax.Array):
        """Returns the carry that goes through the blocks in place of h."""

    def wrap(self, part: Callable, number: int, remat: str) -> Callable:
        """Returns the part as a function of the carry; `number` counts the parts of one block.

        The wrapper itself applies the rematerialization `remat`, a key of REMAT.
        """

    def end(self, carry) -> tuple:
        """Returns (h_NxD, output): the stream after the blocks, and the argument of `close`."""

    def close(self, nll_BxT: jax.Array, output):
        """Returns the result of `Model.losses`."""


class Remat(NamedTuple):
    """One choice of model.remat.

    Attributes:
      wrap: function -> the same function, whose backward pass recomputes what is not stored.
      stored: `memory.BlockBytes` -> bytes stored per token and block.
      recomputed: FLOPs of a token by part (`flops.forward_flops`) -> FLOPs done a second time.
      weight_uses: how often a step reads a block's weight: forward, for the input's gradient, and
        where the block is recomputed.
      more_sweeps: additional reads and writes of a stored activation.
    """

    wrap: Callable[[Callable], Callable]
    stored: Callable
    recomputed: Callable[[dict], float]
    weight_uses: int
    more_sweeps: int


REMAT = Modes(
    "model.remat",
    {
        "none": Remat(lambda block: block, lambda b: b.total, lambda parts: 0.0, 2, 0),
        "block": Remat(
            jax.checkpoint,
            lambda b: b.stream,
            lambda parts: parts["dense"] + parts["attention"],
            3,
            2,
        ),
        "dots": Remat(
            functools.partial(
                jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)
            ),
            lambda b: b.stream + b.products,
            lambda parts: parts["attention"],
            2,
            2,
        ),
    },
)


class Segment(NamedTuple):
    """Consecutive blocks that run alike.

    Attributes:
      size: number of blocks.
      wrapped: whether the caller's wrapper wraps them.
      hands_out, takes_in: whether skip connections leave or enter these blocks.
    """

    size: int
    wrapped: bool = False
    hands_out: bool = False
    takes_in: bool = False


def segments(model, wrapper: BlockWrapper | None) -> list[Segment]:
    """Divides the blocks into segments, in their order.

    Raises ValueError for a wrapper around blocks with skip connections.
    """
    n, half = model.n_layers, skip_connections.SKIPS[model.skips].half(model.n_layers)
    if wrapper is None:
        parts = [
            Segment(half, hands_out=True), Segment(n - 2 * half), Segment(half, takes_in=True)
        ]  # fmt: skip
    elif half:
        raise ValueError(f"model.skips={model.skips!r}: does not support a wrapper; use 'none'")
    else:
        parts = [
            Segment(wrapper.first),
            Segment(wrapper.stop - wrapper.first, wrapped=True),
            Segment(n - wrapper.stop),
        ]
    return [segment for segment in parts if segment.size]


def run_blocks(
    params_blocks, h_NxD, context: ForwardContext, *, definition, model, stack: str, wrapper=None
):
    """Runs all blocks in their order.

    Args:
      params_blocks: parameters, stacked over layers.
      h_NxD: the residual stream.
      context: context of the pass; with `keep`, blocks that are not wrapped store taps.
      definition: graph definition of one block, for `nnx.merge`.
      model: the `model` group of a resolved config.
      stack: a key of RUNNERS.
      wrapper: a `BlockWrapper`, or None.

    Returns:
      (h_NxD, taps, output): the stream after the blocks; {name: [L, ...]}; the argument of the
      wrapper's `close`, or None.
    """

    def at_layer(context, layer):
        params, index = layer
        return nnx.merge(definition, params), skip_connections.layer_inputs(model, context, index)

    def part(branch, context, h_NxD, layer):
        return branch(*at_layer(context, layer), h_NxD)

    plan = segments(model, wrapper)
    runs = cut_layers(params_blocks, stack, [segment.size for segment in plan])
    wrapper_output, streams, taps = None, None, []
    for segment, run in zip(plan, runs, strict=True):
        if segment.wrapped:
            carry, body = wrapper.begin(h_NxD), _wrapped_body(wrapper, part, context, model.remat)
        else:
            segment_context = context.replace(skips_SxNxD=streams if segment.takes_in else None)
            carry, body = h_NxD, _block_body(segment, at_layer, segment_context, model.remat)
        outs = []
        for apply, layers in run(body):
            carry, out = apply(carry, layers)
            outs.append(out)
        if segment.wrapped:
            h_NxD, wrapper_output = wrapper.end(carry)
        else:
            h_NxD, (taps_of_segment, handed_out) = carry, RUNNERS[stack].joined(outs)
            streams = handed_out if segment.hands_out else streams
            taps.append(taps_of_segment)
    if len(taps) > 1:
        taps = [jax.tree.map(lambda *of_segments: jnp.concatenate(of_segments), *taps)]
    return h_NxD, taps[0] if taps else {}, wrapper_output


def _block_body(segment: Segment, at_layer, context: ForwardContext, remat: str) -> Callable:
    """Makes the body (h_NxD, layer) -> (h_NxD, (taps, handed_out)) of blocks without wrapper."""

    def body(h_NxD, layer):
        params, index = layer

        # The index is no argument: where it is a number it stays one, for the block's window.
        def run_block(h_NxD, params):
            block, block_context = at_layer(context.replace(taps={}), (params, index))
            h_NxD = _both_branches(block, block_context, h_NxD)
            return h_NxD, (block_context.taps, h_NxD if segment.hands_out else None)

        return REMAT[remat].wrap(run_block)(h_NxD, params)

    return body


def _wrapped_body(wrapper: BlockWrapper, part, context: ForwardContext, remat: str) -> Callable:
    wrapped_parts = [
        wrapper.wrap(functools.partial(part, PARTS[name]), number, remat)
        for number, name in enumerate(wrapper.part_names)
    ]

    def body(carry, layer):
        for wrapped in wrapped_parts:
            carry = wrapped(context, carry, layer)
        return carry, None

    return body


class Runner(NamedTuple):
    """Runs consecutive blocks as a sequence of applications (function, layers).

    `function(carry, layers) -> (carry, out)`; `layers` are parameters and index of one layer, or of
    several along a leading axis.

    Attributes:
      pieces: sizes of the segments -> sizes of the pieces into which parameters are split; []: one
        piece with all layers.
      applications: (body, number of the segment, first layer, size, number of a piece -> its
        parameters) -> applications.
      joined: outs of a segment's applications -> outs along a leading axis of layers.
    """

    pieces: Callable[[list[int]], list[int]]
    applications: Callable[..., Iterator[tuple]]
    joined: Callable[[list], Any]


def _scan(body, number: int, first: int, size: int, piece: Callable) -> Iterator[tuple]:
    yield functools.partial(jax.lax.scan, body), (piece(number), first + jnp.arange(size))


def _unroll(body, number: int, first: int, size: int, piece: Callable) -> Iterator[tuple]:
    for index in range(first, first + size):
        yield body, (jax.tree.map(lambda x: x[0], piece(index)), index)


RUNNERS = {
    "scan": Runner(lambda sizes: sizes if len(sizes) > 1 else [], _scan, lambda outs: outs[0]),
    "unroll": Runner(
        lambda sizes: [1] * sum(sizes),
        _unroll,
        lambda outs: jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *outs),
    ),
}


# Accelerators unroll up to so many blocks. Each adds about 2 s to compiling, once, since programs
# are kept; a scan copies what each block stores into and out of arrays of all blocks.
MOST_UNROLLED = 32


def _cheapest(model, platform: str) -> str:
    # The compiler merges unrolled blocks: on CPU remat would save nothing there.
    unrolled = model.remat == "none" if platform == "cpu" else model.n_layers <= MOST_UNROLLED
    return "unroll" if unrolled else "scan"


# (model, platform) -> key of RUNNERS.
STACKS = Modes(
    "model.stack",
    {
        "auto": _cheapest,
        "scan": lambda model, platform: "scan",
        "unroll": lambda model, platform: "unroll",
    },
)


def cut_layers(params_blocks, stack: str, sizes: list[int]) -> list[Callable]:
    """Splits the parameters into segments of `sizes` layers.

    Returns for each segment: body -> applications of its runner, where `body(carry, (params of
    layer l, l)) -> (carry, out)` runs one layer.
    """
    runner, (leaves, tree) = RUNNERS[stack], jax.tree.flatten(params_blocks)
    # The gradient of lax.split is one concatenation; that of slicing each layer would be a sum of L
    # zero-padded arrays of the full size.
    pieces = runner.pieces(sizes)
    split = [jax.lax.split(leaf, pieces) if pieces else [leaf] for leaf in leaves]

    def piece(number: int):
        return tree.unflatten([parts[number] for parts in split])

    return [
        functools.partial(
            runner.applications, number=n, first=sum(sizes[:n]), size=size, piece=piece
        )
        for n, size in enumerate(sizes)
    ]
