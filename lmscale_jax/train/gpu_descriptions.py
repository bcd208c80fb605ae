"""GPUs that are not here, described so that XLA compiles for them (gpu_targets/README.md)."""

import importlib.util
import re
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.model.flops import Chip

TARGETS = Path(__file__).parent / "gpu_targets"
EXTRA = "lmscale_jax[cuda13]"


def gpu_compiler_installed() -> bool:
    """Whether JAX's CUDA 13 plugin, which compiles for GPUs without one, is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def gpu_target(chip: Chip) -> str:
    """Returns XLA's description of a GPU, the text of a GpuTargetConfigProto."""
    return (TARGETS / f"{chip.name.lower()}.txtpb").read_text(encoding="utf-8")


def target_number(target: str, name: str) -> float:
    """Returns a number of a description, such as core_count. Raises KeyError without it."""
    match = re.search(rf"\b{name}: ([\d.]+)", target)
    if not match:
        raise KeyError(name)
    return float(match[1])


def described_gpus(chip: Chip, count: int, name: str) -> list:
    """Returns `count` devices that JAX can compile for and nothing can run on.

    Whole domains become hosts of their own. Where there is no GPU, JAX's option jax_platforms must
    be "cpu" before anything asks JAX for a device: without it the plugin looks for one and leaves.

    Raises InputError, which names the --topology `name`, where XLA does not take the description.
    """
    from jax.experimental import topologies

    hosts = count // chip.domain if count % chip.domain == 0 else 1
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_target(chip), topology=f"1x{hosts}x{count // hosts}"
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology={name}: the CUDA plugin does not describe it ({reason}); "
            f"use --topology={chip.name}:8"
        ) from None
    return list(description.devices)
