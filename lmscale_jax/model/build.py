"""The boundary of the model: `build(config)` gives pure functions of a nested dict of arrays.

Flax modules define parameters and the forward pass; beyond this file nothing sees a module. The
parameters of the L blocks are stacked under a leading axis, however the blocks are executed.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lmscale_jax.model import fp8, gates, kernels, ops, param, wiring
from lmscale_jax.model.layers import Call
from lmscale_jax.model.loss import token_losses
from lmscale_jax.model.placement import Place
from lmscale_jax.model.transformer import Block, Embed, Readout
from lmscale_jax.parametrization import rules


class Around(Protocol):
    """Something done around some of the blocks: their inputs and outputs, and how gradients pass.

    `part(shared, h_NxD, (params, index)) -> h_NxD` is a block, or with granularity "branch" first
    its attention and then its MLP. It closes over no traced value, so that it can be put inside a
    `jax.custom_vjp`; `index` counts layers.

    Attributes:
      first, stop: the blocks first..stop-1 are meant.
      granularity: "block" or "branch".
    """

    first: int
    stop: int
    granularity: str

    def begin(self, h_NxD: jax.Array):
        """What is carried through the blocks in place of h."""

    def wrap(self, part: Callable, number: int, remat: str) -> Callable:
        """The same part from carry to carry; `number` counts the parts of one block. What the
        backward pass recomputes, a key of REMAT, is its business."""

    def end(self, carry) -> tuple:
        """(h_NxD, rest): the stream after the blocks, and what `close` needs of the carry."""

    def close(self, nll_BxT: jax.Array, rest):
        """What `losses` returns."""


class Model(NamedTuple):
    """Attributes:
    specs: nested dict of `param.Spec`, the paths of the parameters.
    rows: {path: rules.Row}, what each parameter gets.
    init: key -> params, float32.
    logits: (params, tokens_BxT, key=None) -> logits_BxTxV; a key turns dropout on.
    losses: (params, tokens_BxT, targets_BxT, key=None, around=None, step=None) -> nll_BxT float32
      in nats, 0 where the target is -1; with an `Around` what its `close` makes of them. Windows
      that grow are those of that optimizer step; None: whole.
    taps: (params, tokens_BxT, keep) -> what `keep(name, activation)` makes of each activation, as
      {"embed", "blocks": {name: [L, ...]}, "final" (what the last norm reads), "logits"}.
    choices: what was chosen here, and why, by name.
    """

    specs: dict
    rows: dict[str, rules.Row]
    init: Callable
    logits: Callable
    losses: Callable
    taps: Callable
    choices: dict[str, str]


def build(config, *, platform: str, boundary: int | None = None, mesh: Mesh | None = None) -> Model:
    """Builds the model of a resolved config.

    `boundary` is the token that begins a document (for model.mask="document"); `mesh` is that of
    `losses` and `taps`, whose batches it must be able to split. `logits` takes any batch and leaves
    its layout to the partitioner.
    """
    model = config.model
    place = Place(mesh if mesh is not None and mesh.size > 1 else None)
    kernel, why = kernels.choose(config, platform, place)
    stack = _stack(model, platform)
    parts, specs = _declare(model, kernel)
    rows = rules.table(specs, _declare(rules.base_model(config), kernel)[1], config)
    defs = {name: nnx.split(part)[0] for name, part in parts.items()}
    call = shared_call(config, platform, place)
    body = functools.partial(_hidden, defs=defs, config=config, stack=stack, boundary=boundary)
    where, last = (
        (("readout", "weight"), -1) if model.head == "untied" else (("embed", "tokens"), 0)
    )
    last_spec = specs[where[0]][where[1]]

    def readout(params):
        return params[where[0]][where[1]]

    def read(w, x_NxD):
        z_NxV = call.ops.dense(x_NxD, w if last else w.T)
        scale = rules.scales(config).logits
        return _bounded(z_NxV if scale == 1.0 else z_NxV * scale, model)

    def of_tokens(w, x_NxD, first=0):
        """The logits, those of rows that only fill up the vocabulary being -inf."""
        z_NxV = read(w, x_NxD)
        if model.ids >= model.vocab_size:
            return z_NxV
        filling_V = first + jnp.arange(w.shape[last]) >= model.ids
        return jnp.where(filling_V, -jnp.inf, z_NxV)

    def logits(params, tokens_BxT, key=None):
        params = rules.multiplied(rows, params)
        x_NxD, *_ = body(params, tokens_BxT, key, call=call._replace(place=Place()))
        return of_tokens(readout(params), x_NxD).reshape(*tokens_BxT.shape, -1)

    def losses(params, tokens_BxT, targets_BxT, key=None, around=None, step=None):
        params = rules.multiplied(rows, params)
        x_NxD, _, rest = body(params, tokens_BxT, key, call=call, around=around, step=step)
        entropy = call.ops.cross_entropy
        nll_BxT = token_losses(
            place, model, of_tokens, readout(params), last_spec, x_NxD, targets_BxT, entropy
        )
        return nll_BxT if around is None else around.close(nll_BxT, rest)

    def taps(params, tokens_BxT, keep):
        params = rules.multiplied(rows, params)
        x_NxD, kept, _ = body(params, tokens_BxT, None, call=call, keep=keep)
        return kept | {"logits": keep("logits", read(readout(params), x_NxD))}

    choices = {"attention": f"{kernel}: {why}", "blocks": stack, "remat": model.remat}
    choices |= _described(config, specs, platform)
    return Model(specs, rows, functools.partial(_init, specs, rows), logits, losses, taps, choices)


def _stack(model, platform: str) -> str:
    if model.stack != "auto":
        return model.stack
    # Unrolled blocks are compiled as one: what remat should compute again is kept on CPU.
    return "unroll" if platform == "cpu" and model.remat == "none" else "scan"


def _described(config, specs: dict, platform: str) -> dict[str, str]:
    matmul = {"matmul": fp8.choose(config.model, platform)} if config.model.matmul == "fp8" else {}
    return matmul | gates.described(config.model, specs) | wiring.described(config)


def _bounded(z_NxV: jax.Array, model) -> jax.Array:
    """Logits within +-model.logit_softcap, where there is one."""
    cap = model.logit_softcap
    if not cap:
        return z_NxV
    if model.softcap_form == "algebraic":
        return z_NxV * jax.lax.rsqrt(1 + jnp.square(z_NxV / cap))
    return cap * jnp.tanh(z_NxV / cap)


def _declare(model, kernel: str) -> tuple[dict, dict]:
    """The modules of a model group by name, and the annotations of their parameters."""
    parts = {"embed": Embed(model), "blocks": Block(model, kernel), "readout": Readout(model)}
    specs = {name: param.specs(part) for name, part in parts.items()}
    specs["blocks"] = param.map_named(lambda _, s: s.stacked(model.n_layers), specs["blocks"])
    return parts, specs


def _init(specs: dict, rows: dict[str, rules.Row], key: jax.Array) -> dict:
    """Draws every parameter from its own stream, named by its path and its layer.

    So neither the order of declaration nor the number of layers changes what a parameter gets.
    """

    def draw(path: str, spec: param.Spec):
        if spec.init != "normal":
            value = {"ones": 1.0, "zeros": 0.0}.get(spec.init, spec.init)
            return jnp.full(spec.shape, value, jnp.float32)
        stream = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        if spec.axes[0] == "layers":
            streams = jax.vmap(functools.partial(jax.random.fold_in, stream))(
                jnp.arange(spec.shape[0])
            )
            values = jax.vmap(lambda k: jax.random.normal(k, spec.matrix))(streams)
        else:
            values = jax.random.normal(stream, spec.shape)
        return values * rows[path].init_std

    return param.map_named(draw, specs)


def shared_call(config, platform: str, place: Place) -> Call:
    """What all forward passes of a model have in common; without tokens, key and positions."""
    scales, own = rules.scales(config), ops.SETS["cpu" if platform == "cpu" else "plain"]
    in_fp8 = fp8.choose(config.model, platform).startswith("fp8")
    return Call(
        ops=own,
        product=fp8.dense if in_fp8 else own.dense,
        place=place,
        dtype=jnp.dtype(config.model.dtype),
        batch=0,
        length=0,
        segments_BxT=None,
        rope=None,
        attention_scale=scales.attention,
        branch_scale=scales.branch,
        embed_scale=scales.embed,
        gate_scale=scales.gate,
        window=None,
        window_block=config.model.window_block,
        origin_NxD=None,
        skip_NxD=None,
        values_BxTxKxd=None,
        first=None,
        dropout=config.model.dropout,
        key=None,
    )


def _hidden(
    params, tokens_BxT, key, *, defs, call: Call, config, stack, boundary, keep=None, around=None,
    step=None,
):  # fmt: skip
    """(x, taps, rest): the normalised residual stream after the last block, [B*T, D] in the compute
    type; what `keep` made of each activation (see `Model.taps`); what `around` has left over.

    Taps are of a forward pass without `around`; each of the two is None without its cause.
    """
    model, (B, T) = config.model, tokens_BxT.shape
    call = call._replace(batch=B, length=T, key=key)
    segments_BxT = None
    if model.mask == "document" and boundary is not None:
        segments_BxT = jnp.cumsum(tokens_BxT == boundary, axis=1)
    embed = nnx.merge(defs["embed"], params["embed"])
    h_NxD = call.drop(embed(tokens_BxT, call), 0)
    shared = wiring.begin(config, embed, h_NxD, tokens_BxT, call, segments_BxT, step)

    def part(run, shared, h_NxD, layer, keep=None, taps=None):
        params_layer, index = layer
        given = wiring.of_layer(model, shared, index) | {"keep": keep, "taps": taps}
        return run(nnx.merge(defs["blocks"], params_layer), h_NxD, call._replace(**given))

    taps = None if keep is None else {"embed": keep("embed", h_NxD)}
    if around is None:
        h_NxD, of_blocks = _blocks(part, shared, h_NxD, params["blocks"], model, stack, keep)
        rest = None
    else:
        h_NxD, rest = _around(around, part, shared, h_NxD, params["blocks"], model, stack)
    if keep is not None:
        taps |= {"blocks": of_blocks, "final": keep("final", h_NxD)}
    return nnx.merge(defs["readout"], params["readout"]).norm(h_NxD, call), taps, rest


def _blocks(part, shared: wiring.Shared, h_NxD, params_blocks, model, stack: str, keep):
    """(h_NxD, taps of the blocks by name): all of them in turn, with skips from half to half."""

    def block_of(shared, saving: bool):
        def block(h_NxD, layer):
            taps = {}
            h_NxD = part(Block.__call__, shared, h_NxD, layer, keep, taps)
            return h_NxD, (taps, h_NxD if saving else None)

        return REMAT[model.remat](block)

    n = model.n_layers
    if model.skips == "none":
        run = stacked(params_blocks, stack, [n])[0]
        h_NxD, (taps, _) = run(block_of(shared, saving=False), h_NxD)
        return h_NxD, taps
    half = n // 2
    down, middle, up = stacked(params_blocks, stack, [half, n - 2 * half, half])
    h_NxD, (below, saved_SxNxD) = down(block_of(shared, saving=True), h_NxD)
    h_NxD, between = middle(block_of(shared, saving=False), h_NxD)
    entering = shared._replace(skips_SxNxD=saved_SxNxD)
    h_NxD, (above, _) = up(block_of(entering, saving=False), h_NxD)
    parts = [below, *([between[0]] if between else []), above]
    return h_NxD, jax.tree.map(lambda *layers: jnp.concatenate(layers), *parts)


def _around(around: Around, part, shared: wiring.Shared, h_NxD, params_blocks, model, stack: str):
    """(h_NxD, rest): the blocks, those from first to stop - 1 with something around them."""

    def block(h_NxD, layer):
        return part(Block.__call__, shared, h_NxD, layer), None

    block = REMAT[model.remat](block)
    sizes = [around.first, around.stop - around.first, model.n_layers - around.stop]
    below, chosen, above = stacked(params_blocks, stack, sizes)
    wrapped = [
        around.wrap(functools.partial(part, run), number, model.remat)
        for number, run in enumerate(PARTS[around.granularity])
    ]
    h_NxD, _ = below(block, h_NxD)
    carry, _ = chosen(functools.partial(_in_turn, wrapped, shared), around.begin(h_NxD))
    h_NxD, rest = around.end(carry)
    return above(block, h_NxD)[0], rest


PARTS = {"block": (Block.__call__,), "branch": (Block.attend, Block.feed)}


def _in_turn(parts, shared, carry, layer):
    for part in parts:
        carry = part(shared, carry, layer)
    return carry, None


REMAT = {
    "none": lambda block: block,
    "block": jax.checkpoint,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def stacked(params_blocks, stack: str, sizes: list[int]) -> list[Callable]:
    """For each run of `sizes` layers: (block, carry) -> (carry, the outs of its layers stacked).

    A run calls `block(carry, (params of layer l, l)) -> (carry, out)` for its layers, by a scan or
    one by one.
    """
    n_layers = sum(sizes)
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    # lax.split is undone by one concatenation in the backward pass; slicing each layer would add L
    # zero-padded arrays of the full size.
    pieces = [1] * n_layers if stack == "unroll" else [size for size in sizes if size]
    leaves, tree = jax.tree.flatten(params_blocks)
    if len(pieces) == 1 and stack == "scan":
        split = [[leaf] for leaf in leaves]
    else:
        split = [jax.lax.split(leaf, pieces) for leaf in leaves]

    def unrolled(begin: int, size: int, block, carry):
        outs = []
        for index in range(begin, begin + size):
            layer = tree.unflatten([parts[index][0] for parts in split])
            carry, out = block(carry, (layer, index))
            outs.append(out)
        return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outs) if outs else None

    def scanned(begin: int, size: int, block, carry):
        if not size:
            return carry, None
        at = sum(1 for b, s in zip(begins, sizes, strict=True) if s and b < begin)
        layers = tree.unflatten([parts[at] for parts in split])
        return jax.lax.scan(block, carry, (layers, begin + jnp.arange(size)))

    run = {"scan": scanned, "unroll": unrolled}[stack]
    return [functools.partial(run, b, s) for b, s in zip(begins, sizes, strict=True)]
