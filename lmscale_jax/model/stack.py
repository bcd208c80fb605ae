"""How the blocks run: one loop over segments, some of them wrapped by the caller."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.config.key import Modes
from lmscale_jax.model import skip_connections
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.transformer import Block


def _whole(block: Block, context: ForwardContext, h_NxD: jax.Array) -> jax.Array:
    return block.feed(context, block.attend(context, h_NxD))


# The parts of a block that a wrapper may wrap, by name.
PARTS = {"block": _whole, "attention": Block.attend, "mlp": Block.feed}


class BlockWrapper(Protocol):
    """Wraps some of the blocks: their inputs and outputs, and how gradients pass.

    `part(context, h_NxD, (params, index)) -> h_NxD` is a block, or first its attention and then its
    MLP. It closes over no traced value, so that it can be put inside a `jax.custom_vjp`; `index`
    counts layers.

    Attributes:
      first, stop: the blocks first..stop-1 are wrapped.
      part_names: the parts of each block that are wrapped in turn, keys of PARTS.
    """

    first: int
    stop: int
    part_names: tuple[str, ...]

    def begin(self, h_NxD: jax.Array):
        """Returns what is carried through the blocks in place of h."""

    def wrap(self, part: Callable, number: int, remat: str) -> Callable:
        """Returns the same part from carry to carry; `number` counts the parts of one block. What
        the backward pass recomputes, a key of REMAT, is the wrapper's business."""

    def end(self, carry) -> tuple:
        """Returns (h_NxD, rest): the stream after the blocks, and what `close` needs."""

    def close(self, nll_BxT: jax.Array, rest):
        """Returns what `Model.losses` returns."""


class Remat(NamedTuple):
    """One choice of model.remat.

    Attributes:
      wrap: function -> the same function, whose backward pass recomputes what is not kept.
      kept: `memory.BlockBytes` -> bytes kept of a token in one block.
      recomputed: FLOPs of a token by part (`flops.forward_flops`) -> those done a second time.
      weight_uses: how often a step uses a block's weight: forward, for the input's gradient, and
        again where the whole block is recomputed.
      sweeps_again: how often a kept activation crosses the memory's edge once more.
    """

    wrap: Callable[[Callable], Callable]
    kept: Callable
    recomputed: Callable[[dict], float]
    weight_uses: int
    sweeps_again: int


REMAT = Modes(
    "model.remat",
    {
        "none": Remat(lambda block: block, lambda b: b.whole, lambda parts: 0.0, 2, 0),
        "block": Remat(
            jax.checkpoint,
            lambda b: b.stream,
            lambda parts: parts["dense"] + parts["attention"],
            3,
            2,
        ),
        "dots": Remat(
            functools.partial(
                jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
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
      size: how many.
      wrapped: by the caller's wrapper.
      hands_out, takes_in: streams, by skip connections.
    """

    size: int
    wrapped: bool = False
    hands_out: bool = False
    takes_in: bool = False


def segments(model, wrapper: BlockWrapper | None) -> list[Segment]:
    """Returns the segments of all blocks, in turn.

    Raises ValueError for a wrapper around blocks with skip connections.
    """
    n, half = model.n_layers, skip_connections.SKIPS[model.skips].half(model.n_layers)
    if wrapper is None:
        parts = [
            Segment(half, hands_out=True), Segment(n - 2 * half), Segment(half, takes_in=True)
        ]  # fmt: skip
    elif half:
        raise ValueError(f"model.skips={model.skips!r}: only a plain stack can be wrapped")
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
    """Runs all blocks in turn.

    Args:
      params_blocks: stacked.
      h_NxD: the residual stream.
      context: of the pass; with `keep`, taps are taken of the blocks that are not wrapped.
      definition: of one block, for `nnx.merge`.
      model: the group of a resolved config.
      stack: of RUNNERS.
      wrapper: of some of the blocks, or None.

    Returns:
      (h_NxD, taps, rest): the stream after the blocks; {name: [L, ...]}; what the wrapper's `close`
      needs.
    """

    def at_layer(context, layer):
        params, index = layer
        return nnx.merge(definition, params), skip_connections.layer_inputs(model, context, index)

    def part(branch, context, h_NxD, layer):
        return branch(*at_layer(context, layer), h_NxD)

    def body_of(segment: Segment, context: ForwardContext) -> Callable:
        def body(h_NxD, layer):
            block, here = at_layer(context.replace(taps={}), layer)
            for branch in (Block.attend, Block.feed):
                h_NxD = branch(block, here, h_NxD)
            return h_NxD, (here.taps, h_NxD if segment.hands_out else None)

        return REMAT[model.remat].wrap(body)

    plan = segments(model, wrapper)
    runs = cut_layers(params_blocks, stack, [segment.size for segment in plan])
    rest, streams, taps = None, None, []
    for segment, run in zip(plan, runs, strict=True):
        if segment.wrapped:
            carry, body = wrapper.begin(h_NxD), _wrapped_body(wrapper, part, context, model.remat)
        else:
            here = context.replace(skips_SxNxD=streams if segment.takes_in else None)
            carry, body = h_NxD, body_of(segment, here)
        outs = []
        for apply, layers in run(body):
            carry, out = apply(carry, layers)
            outs.append(out)
        if segment.wrapped:
            h_NxD, rest = wrapper.end(carry)
        else:
            h_NxD, (taps_of_segment, handed_out) = carry, RUNNERS[stack].joined(outs)
            streams = handed_out if segment.hands_out else streams
            taps.append(taps_of_segment)
    if len(taps) > 1:
        taps = [jax.tree.map(lambda *of_segments: jnp.concatenate(of_segments), *taps)]
    return h_NxD, taps[0] if taps else {}, rest


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
    """How consecutive blocks run, by applications (function, layers) in turn.

    `function(carry, layers) -> (carry, out)`; `layers` are parameters and number of one layer, or
    of several along a leading axis.

    Attributes:
      pieces: sizes of the segments -> those of the pieces that the parameters are cut in; [] for
        one that is all of them.
      applications: (body, segment's number, first layer, size, number of a piece -> its parameters)
        -> applications.
      joined: outs of the applications of a segment -> outs along a leading axis of layers.
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


def _cheapest(model, platform: str) -> str:
    # Unrolled blocks are compiled as one: what remat should compute again is kept on CPU.
    return "unroll" if platform == "cpu" and model.remat == "none" else "scan"


# (model, platform) -> of RUNNERS.
STACKS = Modes(
    "model.stack",
    {
        "auto": _cheapest,
        "scan": lambda model, platform: "scan",
        "unroll": lambda model, platform: "unroll",
    },
)


def cut_layers(params_blocks, stack: str, sizes: list[int]) -> list[Callable]:
    """Returns for each segment of `sizes` layers: body -> the applications of its runner.

    `body(carry, (params of layer l, l)) -> (carry, out)` is for one layer.
    """
    runner, (leaves, tree) = RUNNERS[stack], jax.tree.flatten(params_blocks)
    # lax.split is undone by one concatenation in the backward pass; slicing each layer would add L
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
