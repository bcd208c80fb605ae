"""Attention kernels behind one signature, and which of them serves."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmscale_jax.errors import InputError
from lmscale_jax.model import ops
from lmscale_jax.model.layers import Call
from lmscale_jax.model.placement import BATCH, ROWS, Place


def _head_major(kernel):
    """Adapts a kernel on [B*H, T, d] with as many key and value heads as query heads."""

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
        B, T, H, d = q_BxTxHxd.shape

        def flat(x):
            x = jnp.repeat(x, H // x.shape[2], axis=2) if x.shape[2] != H else x
            return x.transpose(0, 2, 1, 3).reshape(B * H, -1, d)

        o = kernel(call, flat(q_BxTxHxd), flat(k_BxTxKxd), flat(v_BxTxKxd))
        return o.reshape(B, H, T, d).transpose(0, 2, 1, 3)

    return run


def _plain(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    rate = call.dropout if call.key is not None else 0.0
    key = jax.random.fold_in(call.key, 3) if rate else None
    return ops.plain.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale,
        segments_BxT=call.segments_BxT, window=call.window,
        window_block=call.window_block, first=call.first, dropout=rate, key=key,
    )  # fmt: skip


def _saved(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    return ops.cpu.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale, segments_BxT=call.segments_BxT,
        window=call.window, window_block=call.window_block, first=call.first,
    )  # fmt: skip


def _xla(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
    hidden = (call.segments_BxT, call.window, call.window_block, call.first)
    whole = call.first is None
    mask = None
    if not whole or call.segments_BxT is not None or call.window is not None:
        mask = ops.visible(q_BxTxHxd.shape[1], k_BxTxKxd.shape[1], *hidden)
        mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, mask=mask, scale=call.attention_scale, is_causal=whole
    )


def _cudnn(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
    window = None if call.window is None else (call.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, scale=call.attention_scale, is_causal=True,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip


def splash(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call, interpret: bool = False):
    """JAX's Pallas kernel for TPU; `interpret` runs it anywhere, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q_BxTxHxd.shape[1:3]
    if call.window is None:
        mask = masks.CausalMask((T, T))
    else:
        mask = masks.LocalMask((T, T), (call.window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * H), interpret=interpret
    )
    q_BxTxHxd = (q_BxTxHxd * call.attention_scale).astype(q_BxTxHxd.dtype)
    q, k, v = (
        jnp.repeat(x, H // x.shape[2], axis=2).transpose(0, 2, 1, 3)
        for x in (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
    )
    segments = call.segments_BxT
    if segments is None:
        o_BxHxTxd = jax.vmap(kernel)(q, k, v)
    else:
        ids = kernels.SegmentIds(segments, segments)
        o_BxHxTxd = jax.vmap(kernel)(q, k, v, segment_ids=ids)
    return o_BxHxTxd.transpose(0, 2, 1, 3).astype(q_BxTxHxd.dtype)


def placed(kernel):
    """A kernel on what each device holds: its rows, its heads, and of a row split over `sequence`
    its queries, while keys and values are gathered."""

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
        place = call.place
        # What is dropped must not depend on the mesh, so those draws are left to the partitioner.
        if place.mesh is None or (call.dropout and call.key is not None):
            return kernel(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call)
        (H, K), t = (q_BxTxHxd.shape[2], k_BxTxKxd.shape[2]), place.size("tensor")
        if H % t == 0 and K % t:
            k_BxTxKxd, v_BxTxKxd = (jnp.repeat(x, H // K, axis=2) for x in (k_BxTxKxd, v_BxTxKxd))
        layout = P(*BATCH, "tensor" if H % t == 0 else None, None)
        own = call._replace(place=Place(), rope=None, origin_NxD=None, skip_NxD=None,
                            values_BxTxKxd=None, key=None)  # fmt: skip

        def local(q, k, v, segments_BxT, window):
            first = None
            if place.size("sequence") > 1:
                first = jax.lax.axis_index("sequence") * q.shape[1]
                k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
            (B, T), given = k.shape[:2], {"segments_BxT": segments_BxT, "window": window}
            return kernel(q, k, v, own._replace(batch=B, length=T, first=first, **given))

        # A fixed window stays a number, which some kernels want.
        window, rest = call.window, P(ROWS, None)
        if not isinstance(window, jax.Array):
            local, window = functools.partial(_with_window, local, window), None
        run_local = place.shard(local, (layout, layout, layout, rest, P()), layout)
        return run_local(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call.segments_BxT, window)

    return run


def _with_window(local, window, q, k, v, segments_BxT, _):
    return local(q, k, v, segments_BxT, window)


KERNELS = {
    "plain": _head_major(_plain), "saved": _head_major(_saved), "xla": _xla, "cudnn": _cudnn,
    "splash": splash,
}  # fmt: skip


def choose(config, platform: str, place: Place | None = None) -> tuple[str, str]:
    """The kernel that model.attention names, or for "auto" the best that can serve, and why.

    Raises InputError where the one that is named cannot serve, with the reason.
    """
    name = config.model.attention
    if name != "auto":
        reason = unable(name, config, platform, place)
        if reason:
            raise InputError(
                f"config.model.attention={name!r} cannot serve: {reason}; 'auto' would work"
            )
        return name, "asked for"
    if config.model.dropout:
        return "plain", "only it drops attention probabilities"
    if platform == "cpu":
        return "saved", "its own backward rule is faster on CPU (docs/performance.md)"
    fast = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
    reason = unable(fast, config, platform, place) if fast else f"nothing else on {platform}"
    if reason is None:
        return fast, f"made for {platform}"
    return "xla", reason if fast is None else f"{fast} cannot serve: {reason}"


def unable(name: str, config, platform: str, place: Place | None = None) -> str | None:
    """Why a kernel cannot serve this model on this platform; None where it can."""
    model = config.model
    if name not in ("cudnn", "splash"):
        return None
    if place and place.size("sequence") > 1:
        return "a query's row is split over mesh.sequence, and it takes whole rows"
    plain_window = model.window_layers == "all" and model.window_block == 1
    if model.window_layers != "none" and not (plain_window and model.window_growth == "0"):
        return "its window is one number of tokens for all blocks and steps"
    if name == "cudnn":
        return _unable_cudnn(model, platform)
    if platform != "tpu":
        return f"it runs on TPU, and this is {platform}"
    if model.head_dim % 128 or config.data.seq_len % 128:
        return (
            f"model.head_dim={model.head_dim} and data.seq_len={config.data.seq_len} must be "
            f"multiples of 128"
        )
    return None


def _unable_cudnn(model, platform: str) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this is {platform}"
    if model.dtype != "bfloat16":
        return f"it takes bfloat16, and model.dtype is {model.dtype}"
    if model.head_dim % 8 or model.head_dim > 128:
        return f"model.head_dim={model.head_dim} is not a multiple of 8 up to 128"
    if model.mask == "document":
        return "it has no masks between documents (model.mask='document')"
    return None
