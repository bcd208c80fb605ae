"""Runs the blocks: one loop over segments, some of which the caller may wrap."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.config.key import Modes
from lmscale_jax.model import skip_connections
from lmscale_jax.model.context import ForwardContext
from lmscale_jax.model.param import named, nested
from lmscale_jax.model.remat import REMAT
from lmscale_jax.model.transformer import MLPBlock


def _both_branches(block: MLPBlock, context: ForwardContext, h_NxD: jax.Array) -> jax.Array:
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


class Blocks(NamedTuple):
    """The definitions of blocks, for `nnx.merge`: with attention and without it.

    `specs` are the annotations of their stacked parameters.
    """

    full: Any
    mlp: Any
    specs: dict


class Segment(NamedTuple):
    """Consecutive blocks that run alike.

    Attributes:
      layers: their numbers.
      attends: whether they have attention.
      wrapped: whether the caller's wrapper wraps them.
      hands_out, takes_in: whether skip connections leave or enter these blocks.
    """

    layers: range
    attends: bool
    wrapped: bool
    hands_out: bool
    takes_in: bool


def segments(model, wrapper: BlockWrapper | None) -> list[Segment]:
    """Divides the blocks into segments, in their order.

    Raises ValueError for a wrapper around blocks with skip connections, or without attention.
    """
    n, half = model.n_layers, skip_connections.SKIPS[model.skips].half(model.n_layers)
    attending = attention_blocks(model)
    if wrapper is not None and (half or len(attending) < n):
        raise ValueError(
            f"model.skips={model.skips!r} with attention_skip={model.attention_skip!r} does not "
            f"support a wrapper; use 'none' and ''"
        )

    def kind(layer: int) -> tuple[bool, ...]:
        wrapped = wrapper is not None and wrapper.first <= layer < wrapper.stop
        return layer in attending, wrapped, layer < half, layer >= n - half

    groups = ((key, list(layers)) for key, layers in itertools.groupby(range(n), kind))
    return [Segment(range(layers[0], layers[-1] + 1), *key) for key, layers in groups]


def run_blocks(
    params_blocks, h_NxD, context: ForwardContext, *, blocks, model, stack: str, wrapper=None
):
    """Runs all blocks in their order.

    Args:
      params_blocks: parameters, stacked over layers.
      h_NxD: the residual stream.
      context: context of the pass; with `keep`, blocks that are not wrapped store taps.
      blocks: their definitions.
      model: the `model` group of a resolved config.
      stack: a key of RUNNERS.
      wrapper: a `BlockWrapper`, or None.

    Returns:
      (h_NxD, taps, output): the stream after the blocks; {name: a row for each block that has the
      tap}; the argument of the wrapper's `close`, or None.
    """

    def at_layer(definition, context, layer):
        params, index = layer
        return nnx.merge(definition, params), skip_connections.layer_inputs(model, context, index)

    def part(branch, context, h_NxD, layer):
        return branch(*at_layer(blocks.full, context, layer), h_NxD)

    plan = segments(model, wrapper)
    runs = cut_layers(params_blocks, blocks.specs, stack, [segment.layers for segment in plan])
    wrapper_output, streams, taps = None, [], []
    for segment, run in zip(plan, runs, strict=True):
        if segment.wrapped:
            carry, body = wrapper.begin(h_NxD), _wrapped_body(wrapper, part, context, model.remat)
        else:
            block = functools.partial(at_layer, blocks.full if segment.attends else blocks.mlp)
            skips = _joined(streams) if segment.takes_in else None
            segment_context = context.replace(skips_SxNxD=skips)
            carry, body = h_NxD, _block_body(segment, block, segment_context, model.remat)
        outs = []
        for apply, layers in run(body):
            carry, out = apply(carry, layers)
            outs.append(out)
        if segment.wrapped:
            h_NxD, wrapper_output = wrapper.end(carry)
        else:
            h_NxD, (taps_of_segment, handed_out) = carry, RUNNERS[stack].joined(outs)
            streams += [handed_out] if segment.hands_out else []
            taps.append(taps_of_segment)
    names = dict.fromkeys(name for of_segment in taps for name in of_segment)
    joined = {name: _joined([t[name] for t in taps if name in t]) for name in names}
    return h_NxD, joined, wrapper_output


def _joined(of_segments: list[jax.Array]) -> jax.Array:
    return of_segments[0] if len(of_segments) == 1 else jnp.concatenate(of_segments)


def _block_body(segment: Segment, at_layer, context: ForwardContext, remat: str) -> Callable:
    """Makes the body (h_NxD, layer) -> (h_NxD, (taps, handed_out)) of blocks without wrapper."""

    def body(h_NxD, layer):
        params, index = layer

        # The index is no argument: where it is a number it stays one, for the block's window.
        def run_block(h_NxD, params):
            block, block_context = at_layer(context.replace(taps={}), (params, index))
            h_NxD = block.feed(block.attend(h_NxD, block_context), block_context)
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
      pieces: layers of the segments -> those of the pieces into which parameters are split.
      applications: (body, layers of a segment, the parameters of its pieces) -> applications.
      joined: outs of a segment's applications -> outs along a leading axis of layers.
    """

    pieces: Callable[[list[range]], list[range]]
    applications: Callable[..., Iterator[tuple]]
    joined: Callable[[list], Any]


def _scan(body, layers: range, pieces: list[dict]) -> Iterator[tuple]:
    index_L = layers.start + jnp.arange(len(layers))
    yield functools.partial(jax.lax.scan, body), (pieces[0], index_L)


def _unroll(body, layers: range, pieces: list[dict]) -> Iterator[tuple]:
    for index, piece in zip(layers, pieces, strict=True):
        yield body, (jax.tree.map(lambda x: x[0], piece), index)


RUNNERS = {
    "scan": Runner(lambda segments: segments, _scan, lambda outs: outs[0]),
    "unroll": Runner(
        lambda segments: [range(layer, layer + 1) for layers in segments for layer in layers],
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


def cut_layers(params_blocks, specs, stack: str, segments: list[range]) -> list[Callable]:
    """Splits the parameters into those of the layers of each segment.

    Returns for each segment: body -> applications of its runner, where `body(carry, (params of
    layer l, l)) -> (carry, out)` runs one layer.
    """
    runner, specs = RUNNERS[stack], named(specs)
    pieces = {layers: {} for layers in runner.pieces(segments)}
    for path, leaf in named(params_blocks).items():
        owners = [layers for layers in pieces if layers[0] in specs[path].layers]
        # The gradient of lax.split is one concatenation; that of slicing each layer would be a sum
        # of L zero-padded arrays of the full size.
        sizes = [len(layers) for layers in owners]
        parts = jax.lax.split(leaf, sizes) if len(sizes) > 1 else [leaf]
        for layers, part in zip(owners, parts, strict=True):
            pieces[layers][path] = part
    return [
        functools.partial(
            runner.applications,
            layers=layers,
            pieces=[nested(piece) for inside, piece in pieces.items() if inside[0] in layers],
        )
        for layers in segments
    ]
