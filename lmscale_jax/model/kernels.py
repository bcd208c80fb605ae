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
from lmscale_jax.model.banded import banded_attention
from lmscale_jax.model.context import ARRAYS, ForwardContext
from lmscale_jax.model.fused_attention import LANES, cudnn, splash, tokamax, tokamax_installed
from lmscale_jax.model.sharding import BATCH, ROWS, ShardingContext

# What the kernels read of a mask.
MASK_ARRAYS = ("document_starts_BxT", "first_key_BxT", "last_key_1xT")
# Queries and keys of tokamax's tiles, by which it does not divide a row with a rest.
TOKAMAX_ROWS = 128
# Up to so many tokens the scores of whole rows cost less than bands that are computed twice.
SHORT_ROW = 512


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
        first_key_BxT=context.first_key_BxT, last_key_1xT=context.last_key_1xT, dropout=rate,
        key=key,
    )  # fmt: skip


def _keeping_probabilities(context: ForwardContext, q_BHxTxd, k_BHxTxd, v_BHxTxd):
    return primitives.cpu.attention(
        q_BHxTxd, k_BHxTxd, v_BHxTxd, scale=context.scales.attention,
        first_key_BxT=context.first_key_BxT, last_key_1xT=context.last_key_1xT,
    )  # fmt: skip


def _xla(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
    bounds, mask = (context.first_key_BxT, context.last_key_1xT), None
    if bounds != (None, None):
        mask = primitives.visible(q_BxTxHxd.shape[1], k_BxTxKxd.shape[1], *bounds)
        mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    return jax.nn.dot_product_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd,
        mask=mask, scale=context.scales.attention, is_causal=context.last_key_1xT is None,
    )  # fmt: skip


def _banded(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context: ForwardContext):
    return banded_attention(
        q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, scale=context.scales.attention,
        first_key_BxT=context.first_key_BxT, last_key_1xT=context.last_key_1xT,
        reach=context.reach, unit=context.window_block,
    )  # fmt: skip


class Kernel(NamedTuple):
    """An attention kernel.

    Attributes:
      attend: (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, context) -> o_BxTxHxd.
      unsupported: (config, platform, sharding) -> the setting that it does not support, or None;
        None for a kernel that supports everything.
      keeps_probabilities: stores them for the backward pass; others recompute them.
      partitions_itself: its lowering asks how each operand is split over the mesh, which JAX cannot
        answer where some axes are local (manual) and others are not.
      rotates: applies RoPE itself, from the tables of the context.
    """

    attend: Callable
    unsupported: Callable | None = None
    keeps_probabilities: bool = True
    partitions_itself: bool = False
    rotates: bool = False


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
            context, **dict.fromkeys(ARRAYS) | {"rope": context.rope}, sharding=ShardingContext(),
            keep=None, taps=None,
        )  # fmt: skip
        bounds = {name: getattr(context, name) for name in MASK_ARRAYS}
        if sharding.size("sequence") > 1:
            bounds["last_key_1xT"] = jnp.arange(context.length, dtype=jnp.int32)[None]

        def local(q, k, v, bounds):
            if sharding.size("sequence") > 1:
                k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
            B, T = k.shape[:2]
            return kernel.attend(q, k, v, on_device.replace(batch=B, length=T, **bounds))

        axes = sharding.mesh.axis_names if kernel.partitions_itself else None
        layouts = {
            name: P(None if x is None or len(x) == 1 else ROWS, "sequence")
            for name, x in bounds.items()
        }
        run_local = sharding.shard(local, (layout, layout, layout, layouts), layout, axes)
        return run_local(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, bounds)

    return run


def _unsupported_by_cudnn(config, platform: str, sharding: ShardingContext) -> str | None:
    return (
        _unsupported_on_gpu(config, platform)
        or _unsupported_mask(config, sharding)
        or (f"model.mask={config.model.mask!r}" if config.model.mask != "causal" else None)
    )


def _unsupported_by_tokamax(config, platform: str, sharding: ShardingContext) -> str | None:
    if setting := _unsupported_on_gpu(config, platform):
        return setting
    if config.data.seq_len // sharding.size("sequence") % TOKAMAX_ROWS:
        return (
            f"data.seq_len={config.data.seq_len} with mesh.sequence={sharding.size('sequence')}; "
            f"it needs a multiple of {TOKAMAX_ROWS} on each device"
        )
    if not tokamax_installed():
        return "this Python, where it is not installed (pip install 'lmscale_jax[tokamax]')"
    return None


def _unsupported_by_splash(config, platform: str, sharding: ShardingContext) -> str | None:
    if platform != "tpu":
        return f"platform {platform}; it runs on TPUs"
    if config.data.seq_len % LANES:
        return f"data.seq_len={config.data.seq_len}; it needs a multiple of {LANES}"
    return _unsupported_mask(config, sharding)


def _unsupported_on_gpu(config, platform: str) -> str | None:
    model = config.model
    if platform not in ("gpu", "cuda"):
        return f"platform {platform}; it runs on NVIDIA GPUs"
    if model.dtype != "bfloat16":
        return f"model.dtype={model.dtype!r}; it needs bfloat16"
    if model.head_dim % 8 or model.head_dim > 128:
        return f"model.head_dim={model.head_dim}; it needs a multiple of 8 up to 128"
    return None


def _unsupported_mask(config, sharding: ShardingContext) -> str | None:
    """For kernels whose masks are fixed in the program and whose rows are whole."""
    model = config.model
    if (pieces := sharding.size("sequence")) > 1:
        return f"sequence parallelism (mesh.sequence={pieces})"
    plain_window = model.window_layers == "all" and model.window_block == 1
    if model.window_layers != "none" and not (plain_window and not model.window_growth):
        return (
            f"model.window_layers={model.window_layers!r}, model.window_block={model.window_block} "
            f"and model.window_growth={model.window_growth}; it needs one window for all blocks "
            f"and steps"
        )
    return None


KERNELS = {
    "plain": Kernel(_head_major(_plain_attention)),
    "saved": Kernel(_head_major(_keeping_probabilities)),
    "xla": Kernel(_xla),
    "banded": Kernel(_banded, keeps_probabilities=False),
    "cudnn": Kernel(
        cudnn, _unsupported_by_cudnn, keeps_probabilities=False, partitions_itself=True
    ),
    "tokamax": Kernel(
        tokamax, _unsupported_by_tokamax, keeps_probabilities=False, partitions_itself=True
    ),
    "splash": Kernel(splash, _unsupported_by_splash, keeps_probabilities=False, rotates=True),
}


def unsupported_setting(
    name: str, config, platform: str, sharding: ShardingContext | None = None
) -> str | None:
    """Returns the setting or platform that a kernel does not support, in words, or None."""
    unsupported = KERNELS[name].unsupported
    return unsupported and unsupported(config, platform, sharding or ShardingContext())


def _named_kernel(name: str, config, platform: str, sharding) -> tuple[str, str]:
    setting = unsupported_setting(name, config, platform, sharding)
    if setting:
        raise InputError(f"config.model.attention={name!r} does not support {setting}; use 'auto'")
    return name, "set in the config"


# Kernels made for a platform, the fastest first.
_MADE_FOR = {"gpu": ("cudnn", "tokamax"), "cuda": ("cudnn", "tokamax"), "tpu": ("splash",)}


def _fastest(config, platform: str, sharding) -> tuple[str, str]:
    if config.model.dropout:
        return "plain", "the only one with attention dropout"
    if platform == "cpu":
        return "saved", "its custom backward rule is faster on CPU (docs/performance.md)"
    settings = []
    for name in _MADE_FOR.get(platform, ()):
        setting = unsupported_setting(name, config, platform, sharding)
        if setting is None:
            return name, "; ".join([f"made for {platform}", *settings])
        settings.append(f"{name} does not support {setting}")
    if config.data.seq_len <= SHORT_ROW:
        return "xla", "; ".join([f"rows of at most {SHORT_ROW}", *settings])
    return "banded", "; ".join(["no scores outside the mask's band", *settings])


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
