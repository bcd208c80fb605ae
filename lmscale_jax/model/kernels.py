"""Attention kernels behind one signature, and which of them serves."""

import jax
import jax.numpy as jnp

from lmscale_jax.errors import InputError
from lmscale_jax.model import ops
from lmscale_jax.model.layers import Call


def _head_major(kernel):
    """Adapts a kernel on [B*H, T, d] with as many key and value heads as query heads."""

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
        B, T, H, d = q_BxTxHxd.shape

        def flat(x):
            x = jnp.repeat(x, H // x.shape[2], axis=2) if x.shape[2] != H else x
            return x.transpose(0, 2, 1, 3).reshape(B * H, T, d)

        o = kernel(call, flat(q_BxTxHxd), flat(k_BxTxKxd), flat(v_BxTxKxd))
        return o.reshape(B, H, T, d).transpose(0, 2, 1, 3)

    return run


def _plain(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    rate = call.dropout if call.key is not None else 0.0
    key = jax.random.fold_in(call.key, 3) if rate else None
    return ops.plain.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale,
        segments_BxT=call.segments_BxT, window=call.window,
        window_block=call.window_block, dropout=rate, key=key,
    )  # fmt: skip


def _saved(call: Call, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    return ops.cpu.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=call.attention_scale, segments_BxT=call.segments_BxT,
        window=call.window, window_block=call.window_block,
    )  # fmt: skip


def _xla(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, call: Call):
    mask = None if call.segments_BxT is None else ops.same_document(call.segments_BxT)
    if call.window is not None:
        near_1x1xTxT = ops.near(call.length, call.window, call.window_block)[None, None]
        mask = near_1x1xTxT if mask is None else mask & near_1x1xTxT
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, mask=mask, scale=call.attention_scale, is_causal=True
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


KERNELS = {
    "plain": _head_major(_plain), "saved": _head_major(_saved), "xla": _xla, "cudnn": _cudnn,
    "splash": splash,
}  # fmt: skip


def choose(config, platform: str, shards: int = 1) -> tuple[str, str]:
    """The kernel that model.attention names, or for "auto" the best that can serve, and why.

    Raises InputError where the one that is named cannot serve, with the reason.
    """
    name = config.model.attention
    if name != "auto":
        reason = unable(name, config, platform, shards)
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
    reason = unable(fast, config, platform, shards) if fast else f"nothing else on {platform}"
    if reason is None:
        return fast, f"made for {platform}"
    return "xla", reason if fast is None else f"{fast} cannot serve: {reason}"


def unable(name: str, config, platform: str, shards: int) -> str | None:
    """Why a kernel cannot serve this model on this platform; None where it can."""
    model = config.model
    if name not in ("cudnn", "splash"):
        return None
    plain_window = model.window_layers == "all" and model.window_block == 1
    if model.window_layers != "none" and not (plain_window and model.window_growth == "0"):
        return "its window is one number of tokens for all blocks and steps"
    if name == "cudnn":
        return _unable_cudnn(model, platform)
    if platform != "tpu":
        return f"it runs on TPU, and this is {platform}"
    if shards > 1:
        return f"it is one device's, and the batch is split over {shards}"
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
