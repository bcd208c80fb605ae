"""Builds a model as pure functions of a nested dict of arrays: `build_model(config)`.

Flax modules define parameters and the forward pass; no other file sees a module. The parameters of
the L blocks are stacked under a leading axis, however the blocks run.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lmscale_jax.config.blocks import attention_blocks
from lmscale_jax.config.key import TABLES, Modes
from lmscale_jax.errors import InputError
from lmscale_jax.model import (
    attention,
    fp8,
    kernels,
    param,
    parametrization,
    primitives,
    skip_connections,
)
from lmscale_jax.model.context import DTYPES, RESIDUAL_DTYPES, ForwardContext
from lmscale_jax.model.loss import chunk_length, logit_bytes, token_losses
from lmscale_jax.model.mesh import describe_mesh
from lmscale_jax.model.sharding import ShardingContext
from lmscale_jax.model.stack import STACKS, Blocks, run_blocks
from lmscale_jax.model.transformer import HEADS, Embed, Readout, declare_block, declare_mlp_block


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      specs: nested dict of `param.Spec`, with the paths of the parameters.
      param_rules: {path: `ParamRule`}, initial scale and multipliers of each parameter.
      init: key -> params, float32.
      logits: (params, tokens_BxT, key=None) -> logits_BxTxV; a key turns dropout on.
      losses: (params, tokens_BxT, targets_BxT, key=None, wrapper=None, step=None, needs=None) ->
        nll_BxT float32 in nats, 0 where the target is -1; with a `BlockWrapper` the result of its
        `close`. `step` sets the size of growing windows; None: full. With a tuple `needs` it is
        (that, {name: array}), of "logz" [B, T] and "streams" [L, N, D], the blocks' outputs.
      taps: (params, tokens_BxT, keep, step=None) -> the results of `keep(name, activation)`, as
        {"embed", "blocks": {name: [L, ...]}, "final" (the input of the last norm), "logits"}. What
        only blocks with attention have is an array over these (`param.row_layers`).
      choices: {name: implementation and reason}, for people to read.
    """

    specs: dict
    param_rules: dict[str, parametrization.ParamRule]
    init: Callable
    logits: Callable
    losses: Callable
    taps: Callable
    choices: dict[str, str]


def build_model(config, *, platform: str, bos_id: int | None = None, mesh=None) -> Model:
    """Builds the model of a resolved config.

    Args:
      config: resolved.
      platform: of the model, JAX's name.
      bos_id: the token that begins a document, for model.mask="document".
      mesh: of `losses` and `taps`; it must divide their batches. `logits` takes any batch.

    Raises:
      InputError: a choice cannot be honoured, on this platform or without a `bos_id`.
    """
    model = config.model
    _check_choices(config, bos_id)
    sharding = ShardingContext(mesh if mesh is not None and mesh.size > 1 else None)
    kernel, why = kernels.choose_kernel(config, platform, sharding)
    stack = STACKS[model.stack](model, platform)
    defs, specs = _declare(config, kernel)
    param_rules = _param_rules(config, specs, kernel)
    fixed, head = model_context(config, platform, sharding, mesh), HEADS[model.head]
    begin = functools.partial(_begin, defs=defs, config=config, bos_id=bos_id)
    blocks = Blocks(defs["blocks"], defs["mlp_block"], specs["blocks"])
    run = functools.partial(run_blocks, blocks=blocks, model=model, stack=stack)
    final_norm = functools.partial(_final_norm, defs["readout"])
    read, read_tokens = _readout(config, fixed, head)
    cut = functools.partial(chunk_length, model, most_bytes=_logit_bytes(platform, mesh))

    def logits(params, tokens_BxT, key=None):
        params = parametrization.multiplied_params(param_rules, params)
        context = fixed.replace(key=key, sharding=ShardingContext())
        h_NxD, context = begin(params, tokens_BxT, context)
        x_NxD = final_norm(params, run(params["blocks"], h_NxD, context)[0], context)
        return read_tokens(head.of(params), x_NxD).reshape(*tokens_BxT.shape, -1)

    def losses(params, tokens_BxT, targets_BxT, key=None, wrapper=None, step=None, needs=None):
        params = parametrization.multiplied_params(param_rules, params)
        context = fixed.replace(key=key, keep=_stream_keeper(needs))
        h_NxD, context = begin(params, tokens_BxT, context, step=step)
        h_NxD, stored, wrapper_output = run(params["blocks"], h_NxD, context, wrapper=wrapper)
        weight, x_NxD = (head.of(params), head.of(specs)), final_norm(params, h_NxD, context)
        how = (cut, fixed.ops.cross_entropy, "logz" in (needs or ()))
        nll_BxT, logz_BxT = token_losses(sharding, read_tokens, *weight, x_NxD, targets_BxT, *how)
        loss_BxT = nll_BxT if wrapper is None else wrapper.close(nll_BxT, wrapper_output)
        handed_out = {"logz": logz_BxT, "streams": stored.get("residual")}
        return loss_BxT if needs is None else (loss_BxT, {name: handed_out[name] for name in needs})

    def taps(params, tokens_BxT, keep, step=None):
        params = parametrization.multiplied_params(param_rules, params)
        h_NxD, context = begin(params, tokens_BxT, fixed.replace(keep=keep), step=step)
        stored = {"embed": keep("embed", h_NxD)}
        h_NxD, stored["blocks"], _ = run(params["blocks"], h_NxD, context)
        stored["final"] = keep("final", h_NxD)
        z_NxV = read(head.of(params), final_norm(params, h_NxD, context))
        return stored | {"logits": keep("logits", z_NxV)}

    choices = {"attention": f"{kernel}: {why}", "blocks": stack, "remat": model.remat}
    choices |= _descriptions(config, specs, platform, mesh)
    init = functools.partial(_init, specs, param_rules)
    return Model(specs, param_rules, init, logits, losses, taps, choices)


def _param_rules(config, specs: dict, kernel: str) -> dict[str, parametrization.ParamRule]:
    base_specs = _declare(parametrization.base_config(config), kernel)[1]
    return parametrization.param_rules(specs, base_specs, config)


def _logit_bytes(platform: str, mesh) -> float:
    return logit_bytes(platform, getattr(_first_device(mesh), "device_kind", ""))


def _stream_keeper(needs: tuple[str, ...] | None) -> Callable | None:
    """Returns the `keep` that stores the streams between blocks and nothing else, if needed."""
    wanted = "streams" in (needs or ())
    return (lambda name, x: x if name == "residual" else jnp.zeros(())) if wanted else None


def _final_norm(definition, params, h_NxD, context: ForwardContext):
    """Normalises the residual stream after the last block, [N, D] in the compute type."""
    return nnx.merge(definition, params["readout"]).norm(h_NxD, context)


def _check_choices(config, bos_id: int | None) -> None:
    """Raises InputError if a choice is not implemented, even if other keys make it irrelevant.

    Also where a mask needs to know where documents begin, and nothing says so.
    """
    model, data = config.model, config.data
    for path, tables in TABLES.items():
        group, _, name = path.partition(".")
        for table in tables if group == "model" else ():
            table[model[name]]
    if bos_id is None and skip_connections.MASKS[model.mask] is not None:
        raise InputError(
            f"config.model.mask={model.mask!r} needs document marks, which data.source="
            f"{data.source} with data.tokenizer={data.tokenizer} and data.document_mark="
            f"{data.document_mark} does not have; use 'causal', or for bare shards of GPT-2's "
            f"tokens data.document_mark=50256"
        )


def declare_specs(config, platform: str) -> dict:
    """Returns `Model.specs` of a resolved config, without anything that needs data or devices."""
    kernel, _ = kernels.choose_kernel(config, platform, ShardingContext())
    return _declare(config, kernel)[1]


def _begin(params, tokens_BxT, context: ForwardContext, *, defs, config, bos_id, step=None):
    """Returns (h_NxD, context): the embedding, and the context of a pass over these tokens."""
    (B, T), mask = tokens_BxT.shape, skip_connections.MASKS[config.model.mask]
    starts_BxT = mask and mask(tokens_BxT, bos_id)
    context = context.replace(batch=B, length=T, document_starts_BxT=starts_BxT)
    embed = nnx.merge(defs["embed"], params["embed"])
    h_NxD = context.dropout(embed(tokens_BxT, context), 0)
    h_NxD = h_NxD.astype(RESIDUAL_DTYPES[config.model.residual_dtype](config.model))
    return h_NxD, skip_connections.begin_pass(config, embed, h_NxD, tokens_BxT, context, step)


def _descriptions(config, specs: dict, platform: str, mesh) -> dict[str, str]:
    matmul = fp8.choose_fp8(config.model, platform, _first_device(mesh)).description
    return (
        ({"matmul": matmul} if matmul else {})
        | ({} if mesh is None else describe_mesh(config, mesh))
        | attention.describe_gate(config.model, specs)
        | skip_connections.describe_skips(config)
    )


# (logits, cap) -> logits within +-cap.
SOFTCAPS = Modes(
    "model.softcap_form",
    {
        "tanh": lambda z_NxV, cap: cap * jnp.tanh(z_NxV / cap),
        "algebraic": lambda z_NxV, cap: z_NxV * jax.lax.rsqrt(1 + jnp.square(z_NxV / cap)),
    },
)


def _readout(config, fixed: ForwardContext, head) -> tuple[Callable, Callable]:
    """Returns two functions (matrix, x_NxD) -> logits_NxV.

    The second also takes the id of the matrix's first token, and sets the logits of padding rows
    to -inf.
    """
    model, scale, cap = config.model, fixed.scales.logits, config.model.logit_softcap
    softcap = SOFTCAPS[model.softcap_form]

    def read(w, x_NxD):
        z_NxV = fixed.ops.dense(x_NxD, w if head.vocab_axis == -1 else w.T)
        z_NxV = z_NxV if scale == 1.0 else z_NxV * scale
        return softcap(z_NxV, cap) if cap else z_NxV

    def read_tokens(w, x_NxD, first=0):
        z_NxV = read(w, x_NxD)
        if model.ids >= model.vocab_size:
            return z_NxV
        padding_V = first + jnp.arange(w.shape[head.vocab_axis]) >= model.ids
        return jnp.where(padding_V, -jnp.inf, z_NxV)

    return read, read_tokens


def _declare(config, kernel: str) -> tuple[dict, dict]:
    """Returns the definitions of a model's modules by name, and their parameters' annotations."""
    model = config.model
    block, mlp_block = (declare(config, kernel) for declare in (declare_block, declare_mlp_block))
    blocks = {"blocks": block, "mlp_block": mlp_block}
    parts = {"embed": Embed(model), **blocks, "readout": Readout(config)}
    specs = {name: param.specs(part) for name, part in parts.items()}
    in_all, layers = param.named(specs.pop("mlp_block")), tuple(range(model.n_layers))

    def of_blocks(path: str, spec: param.Spec) -> param.Spec:
        return spec.stacked(layers if path in in_all else attention_blocks(model))

    specs["blocks"] = param.map_named(of_blocks, specs["blocks"])
    return {name: nnx.split(part)[0] for name, part in parts.items()}, specs


def _init(specs: dict, param_rules: dict[str, parametrization.ParamRule], key: jax.Array) -> dict:
    """Draws every parameter from a random stream of its path and layer.

    So a parameter's values depend neither on the order of declaration nor on the number of layers.
    """

    def draw(path: str, spec: param.Spec):
        if spec.init != "normal":
            value = {"ones": 1.0, "zeros": 0.0}.get(spec.init, spec.init)
            return jnp.full(spec.shape, value, jnp.float32)
        stream = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        if spec.axes[0] == "layers":
            streams = jax.vmap(functools.partial(jax.random.fold_in, stream))(
                jnp.asarray(spec.layers)
            )
            values = jax.vmap(lambda k: jax.random.normal(k, spec.matrix))(streams)
        else:
            values = jax.random.normal(stream, spec.shape)
        return values * param_rules[path].init_std

    return param.map_named(draw, specs)


def model_context(
    config, platform: str, sharding: ShardingContext, mesh: Mesh | None = None
) -> ForwardContext:
    """Returns the context that all forward passes of a model share.

    Args:
      config: resolved.
      platform: JAX's name of the platform that runs the model.
      sharding: how arrays are split over the mesh.
      mesh: of the devices that run the model, which may only be described; None: those here.
    """
    ops = primitives.platform_primitives(platform)
    return ForwardContext(
        ops=ops,
        product=fp8.choose_fp8(config.model, platform, _first_device(mesh)).product or ops.dense,
        sharding=sharding,
        dtype=DTYPES[config.model.dtype],
        scales=parametrization.forward_scales(config),
        window_block=config.model.window_block,
        dropout_rate=config.model.dropout,
    )


def _first_device(mesh: Mesh | None):
    return None if mesh is None else mesh.devices.flat[0]
