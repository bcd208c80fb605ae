"""Attention kernels of one signature, and the choice among them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError
from lmscale_jax.model import primitives
from lmscale_jax.model.context import ARRAYS, ForwardContext
from lmscale_jax.model.sharding import BATCH, ROWS, ShardingContext


def _head_major(kernel):
    """Adapts a kernel on [B*H, T, d] with as many key and value heads as query heads."""

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
        B, T, H, d = q_BxTxHxd.shape

        def flat(x):
            x = jnp.repeat(x, H // x.shape[2], axis=2) if x.shape[2] != H else x
            return x.transpose(0, 2, 1, 3).reshape(B * H, -1, d)

        o = kernel(context, flat(q_BxTxHxd), flat(k_BxTxKxd), flat(v_BxTxKxd))
        return o.reshape(B, H, T, d).transpose(0, 2, 1, 3)

    return run


def _plain_attention(context: ForwardContext, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    rate = context.dropout_rate if context.key is not None else 0.0
    key = jax.random.fold_in(context.key, 3) if rate else None
    return primitives.plain.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=context.scales.attention,
        segments_BxT=context.segments_BxT, window=context.window,
        window_block=context.window_block, first=context.first, dropout=rate, key=key,
    )  # fmt: skip


def _keeping_probabilities(context: ForwardContext, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    return primitives.cpu.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=context.scales.attention,
        segments_BxT=context.segments_BxT,
        window=context.window, window_block=context.window_block, first=context.first,
    )  # fmt: skip


def _xla(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
    mask_inputs = (context.segments_BxT, context.window, context.window_block, context.first)
    all_queries = context.first is None
    mask = None
    if not all_queries or context.segments_BxT is not None or context.window is not None:
        mask = primitives.visible(q_BxTxHxd.shape[1], k_BxTxKxd.shape[1], *mask_inputs)
        mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd,
        mask=mask, scale=context.scales.attention, is_causal=all_queries,
    )  # fmt: skip


def _cudnn(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
    window = None if context.window is None else (context.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, scale=context.scales.attention, is_causal=True,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip


def splash(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext, interpret: bool = False):
    """Runs JAX's Pallas kernel for TPU; `interpret` runs it on any platform, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q_BxTxHxd.shape[1:3]
    if context.window is None:
        mask = masks.CausalMask((T, T))
    else:
        mask = masks.LocalMask((T, T), (context.window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * H), interpret=interpret
    )
    q_BxTxHxd = (q_BxTxHxd * context.scales.attention).astype(q_BxTxHxd.dtype)
    q, k, v = (
        jnp.repeat(x, H // x.shape[2], axis=2).transpose(0, 2, 1, 3)
        for x in (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
    )
    segments = context.segments_BxT
    if segments is None:
        o_BxHxTxd = jax.vmap(kernel)(q, k, v)
    else:
        ids = kernels.SegmentIds(segments, segments)
        o_BxHxTxd = jax.vmap(kernel)(q, k, v, segment_ids=ids)
    return o_BxHxTxd.transpose(0, 2, 1, 3).astype(q_BxTxHxd.dtype)


class Kernel(NamedTuple):
    """An attention kernel.

    Attributes:
      attend: (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context) -> o_BxTxHxd.
      unsupported: (config, platform) -> the setting that it does not support, or None; None for a
        kernel that supports everything.
      keeps_probabilities: stores them for the backward pass; others recompute them.
      partitions_itself: its lowering asks how each operand is split over the mesh, which JAX cannot
        answer where some axes are local (manual) and others are not.
    """

    attend: Callable
    unsupported: Callable | None = None
    keeps_probabilities: bool = True
    partitions_itself: bool = False


def shard_kernel(kernel: Kernel) -> Callable:
    """Wraps a kernel's `attend` so that each device runs it on its rows and heads.

    If `sequence` splits rows, a device has a part of the queries; keys and values are gathered.
    """

    def run(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
        sharding = context.sharding
        # Dropout masks must not depend on the mesh, so the partitioner handles their draws.
        if sharding.mesh is None or (context.dropout_rate and context.key is not None):
            return kernel.attend(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context)
        (H, K), t = (q_BxTxHxd.shape[2], k_BxTxKxd.shape[2]), sharding.size("tensor")
        if H % t == 0 and K % t:
            k_BxTxKxd, v_BxTxKxd = (jnp.repeat(x, H // K, axis=2) for x in (k_BxTxKxd, v_BxTxKxd))
        layout = P(*BATCH, "tensor" if H % t == 0 else None, None)
        on_device = dataclasses.replace(
            context, **dict.fromkeys(ARRAYS), sharding=ShardingContext(), keep=None, taps=None
        )

        def local(q, k, v, segments_BxT, window):
            first = None
            if sharding.size("sequence") > 1:
                first = jax.lax.axis_index("sequence") * q.shape[1]
                k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
            B, T = k.shape[:2]
            local_context = on_device.replace(
                batch=B, length=T, first=first, segments_BxT=segments_BxT, window=window
            )
            return kernel.attend(q, k, v, local_context)

        # A fixed window remains a Python int, which some kernels need.
        window, segments = context.window, P(ROWS, None)
        if not isinstance(window, jax.Array):
            local, window = functools.partial(_with_window, local, window), None
        axes = sharding.mesh.axis_names if kernel.partitions_itself else None
        layouts = (layout, layout, layout, segments, P())
        run_local = sharding.shard(local, layouts, layout, axes)
        return run_local(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context.segments_BxT, window)

    return run


def _with_window(local, window, q, k, v, segments_BxT, _):
    return local(q, k, v, segments_BxT, window)


def _unsupported_by_cudnn(config, platform: str) -> str | None:
    model = config.model
    if platform not in ("gpu", "cuda"):
        return f"platform {platform}; it runs on NVIDIA GPUs"
    if model.dtype != "bfloat16":
        return f"model.dtype={model.dtype!r}; it needs bfloat16"
    if model.head_dim % 8 or model.head_dim > 128:
        return f"model.head_dim={model.head_dim}; it needs a multiple of 8 up to 128"
    if model.mask != "causal":
        return f"model.mask={model.mask!r}"
    return None


def _unsupported_by_splash(config, platform: str) -> str | None:
    if platform != "tpu":
        return f"platform {platform}; it runs on TPUs"
    if config.model.head_dim % 128 or config.data.seq_len % 128:
        return (
            f"model.head_dim={config.model.head_dim} with data.seq_len={config.data.seq_len}; both "
            f"must be multiples of 128"
        )
    return None


KERNELS = {
    "plain": Kernel(_head_major(_plain_attention)),
    "saved": Kernel(_head_major(_keeping_probabilities)),
    "xla": Kernel(_xla),
    "cudnn": Kernel(
        _cudnn, _unsupported_by_cudnn, keeps_probabilities=False, partitions_itself=True
    ),
    "splash": Kernel(splash, _unsupported_by_splash, keeps_probabilities=False),
}


def unsupported_setting(
    name: str, config, platform: str, sharding: ShardingContext | None = None
) -> str | None:
    """Returns the setting or platform that a kernel does not support, in words, or None."""
    model, unsupported = config.model, KERNELS[name].unsupported
    if unsupported is None:
        return None
    if sharding and (pieces := sharding.size("sequence")) > 1:
        return f"sequence parallelism (mesh.sequence={pieces})"
    plain_window = model.window_layers == "all" and model.window_block == 1
    if model.window_layers != "none" and not (plain_window and not model.window_growth):
        return (
            f"model.window_layers={model.window_layers!r}, model.window_block={model.window_block} "
            f"and model.window_growth={model.window_growth}; it needs one window for all blocks "
            f"and steps"
        )
    return unsupported(config, platform)


def _named_kernel(name: str, config, platform: str, sharding) -> tuple[str, str]:
    setting = unsupported_setting(name, config, platform, sharding)
    if setting:
        raise InputError(f"config.model.attention={name!r} does not support {setting}; use 'auto'")
    return name, "set in the config"


def _fastest(config, platform: str, sharding) -> tuple[str, str]:
    if config.model.dropout:
        return "plain", "the only one with attention dropout"
    if platform == "cpu":
        return "saved", "its custom backward rule is faster on CPU (docs/performance.md)"
    fast = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
    if fast is None:
        return "xla", f"the only one on {platform}"
    setting = unsupported_setting(fast, config, platform, sharding)
    if setting is None:
        return fast, f"made for {platform}"
    return "xla", f"{fast} does not support {setting}"


# (config, platform, sharding) -> (a key of KERNELS, the reason).
CHOICES = Modes(
    "model.attention",
    {"auto": _fastest} | {name: functools.partial(_named_kernel, name) for name in KERNELS},
)


def choose_kernel(
    config, platform: str, sharding: ShardingContext | None = None
) -> tuple[str, str]:
    """Returns the kernel of model.attention, for "auto" the fastest supported one, and the reason.

    Raises:
      InputError: the kernel does not support a setting or the platform.
    """
    return CHOICES[config.model.attention](config, platform, sharding)
