"""The boundary of the model: `build(config)` gives pure functions of a nested dict of arrays.

Flax modules define parameters and the forward pass; beyond this file nothing sees a module. The
parameters of the L blocks are stacked under a leading axis, however the blocks are executed.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmscale_jax.model import attention, ops, param
from lmscale_jax.model.layers import Call
from lmscale_jax.model.loss import chunk_length, next_token_losses
from lmscale_jax.model.transformer import Block, Embed, Readout
from lmscale_jax.parametrization import rules


class Model(NamedTuple):
    """Attributes:
    specs: nested dict of `param.Spec`, the paths of the parameters.
    rows: {path: rules.Row}, what each parameter gets.
    init: key -> params, float32.
    logits: (params, tokens_BxT, key=None) -> logits_BxTxV; a key turns dropout on.
    losses: (params, tokens_BxT, targets_BxT, key=None) -> nll_BxT float32 in nats, 0 where the
      target is -1.
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


def build(config, *, platform: str, boundary: int | None = None, shards: int = 1) -> Model:
    """Builds the model of a resolved config.

    `boundary` is the token that begins a document (for model.mask="document"); `shards` is how many
    parts of the mesh split the batch, which decides the size of the loss chunks.
    """
    model = config.model
    kernel, why = attention.choose(model, platform)
    stack = model.stack
    if stack == "auto":
        stack = "unroll" if platform == "cpu" else "scan"
    parts, specs = _declare(model, kernel)
    rows = rules.table(specs, _declare(rules.base_model(config), kernel)[1], config)
    defs = {name: nnx.split(part)[0] for name, part in parts.items()}
    call = _shared_call(config, platform)
    body = functools.partial(
        _hidden, defs=defs, call=call, model=model, stack=stack, boundary=boundary
    )

    def read(params, x_NxD):
        readout = nnx.merge(defs["readout"], params["readout"])
        z_NxV = readout.logits(x_NxD, params["embed"]["tokens"], call)
        scale, cap = rules.scales(config).logits, model.logit_softcap
        z_NxV = z_NxV if scale == 1.0 else z_NxV * scale
        return cap * jnp.tanh(z_NxV / cap) if cap else z_NxV

    def logits(params, tokens_BxT, key=None):
        x_NxD, _ = body(params, tokens_BxT, key)
        return read(params, x_NxD).reshape(*tokens_BxT.shape, -1)

    def losses(params, tokens_BxT, targets_BxT, key=None):
        x_NxD, _ = body(params, tokens_BxT, key)
        length = chunk_length(model, tokens_BxT.shape, shards)
        return next_token_losses(
            functools.partial(read, params), x_NxD, targets_BxT, length, call.ops.cross_entropy
        )

    def taps(params, tokens_BxT, keep):
        x_NxD, kept = body(params, tokens_BxT, None, keep=keep)
        return kept | {"logits": keep("logits", read(params, x_NxD))}

    choices = {"attention": f"{kernel}: {why}", "blocks": stack, "remat": model.remat}
    init = functools.partial(_init, specs, rows)
    return Model(specs, rows, init, logits, losses, taps, choices)


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
            return (jnp.ones if spec.init == "ones" else jnp.zeros)(spec.shape, jnp.float32)
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


def _shared_call(config, platform: str) -> Call:
    scales = rules.scales(config)
    return Call(
        ops=ops.SETS["cpu" if platform == "cpu" else "plain"],
        dtype=jnp.dtype(config.model.dtype),
        batch=0,
        length=0,
        segments_BxT=None,
        rope=None,
        attention_scale=scales.attention,
        branch_scale=scales.branch,
        embed_scale=scales.embed,
        dropout=config.model.dropout,
        key=None,
    )


def _hidden(params, tokens_BxT, key, *, defs, call: Call, model, stack, boundary, keep=None):
    """The normalised residual stream after the last block, [B*T, D] in the compute type, and taps.

    Taps are what `keep` made of each activation (see `Model.taps`); None without it.
    """
    B, T = tokens_BxT.shape
    call = call._replace(batch=B, length=T, key=key)
    if model.positions == "rope":
        call = call._replace(rope=attention.rope_tables(T, model.head_dim, model.rope_theta))
    if model.mask == "document" and boundary is not None:
        call = call._replace(segments_BxT=jnp.cumsum(tokens_BxT == boundary, axis=1))
    embed = nnx.merge(defs["embed"], params["embed"])
    h_NxD = call.drop(embed(tokens_BxT, call.embed_scale), 0)

    def block(h_NxD, layer):
        params_layer, index = layer
        layer_key = None if key is None else jax.random.fold_in(key, index + 1)
        one = nnx.merge(defs["blocks"], params_layer)
        taps = {}
        return one(h_NxD, call._replace(key=layer_key, keep=keep, taps=taps)), taps

    taps = None if keep is None else {"embed": keep("embed", h_NxD)}
    remat = _REMAT[model.remat]
    h_NxD, of_blocks = run_stack(remat(block), h_NxD, params["blocks"], stack, model.n_layers)
    if keep is not None:
        taps |= {"blocks": of_blocks, "final": keep("final", h_NxD)}
    return nnx.merge(defs["readout"], params["readout"]).norm(h_NxD, call), taps


_REMAT = {
    "none": lambda block: block,
    "block": jax.checkpoint,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def run_stack(block, h_NxD, params_blocks, stack: str, n_layers: int):
    """Runs `block(h, (params of layer l, l)) -> (h, out)` for all layers, by a scan or one by one.

    Returns the last h and the stacked outs.
    """
    if stack == "scan":
        return jax.lax.scan(block, h_NxD, (params_blocks, jnp.arange(n_layers)))
    # lax.split is undone by one concatenation in the backward pass; slicing each layer would add L
    # zero-padded arrays of the full size.
    split = jax.tree.map(lambda a: jax.lax.split(a, [1] * n_layers), params_blocks)
    outs = []
    for index in range(n_layers):
        layer = jax.tree.map(
            lambda parts, i=index: parts[i][0],
            split,
            is_leaf=lambda x: isinstance(x, (list, tuple)),
        )
        h_NxD, out = block(h_NxD, (layer, index))
        outs.append(out)
    return h_NxD, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)
