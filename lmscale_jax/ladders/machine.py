"""What this machine trains on: its cores, and whether it has an accelerator. Does not start JAX."""

import importlib.util
import os
import sys

from lmscale_jax.model.mesh import ACCELERATORS

# Which a machine with a GPU has: NVIDIA's, the same under WSL, AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def runs_on_cpu() -> bool:
    """Returns whether this machine has no accelerator that JAX could use.

    The plugins for GPUs also compile where there is none, so they alone do not mean a GPU.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    has_gpu = any(os.path.exists(path) for path in _GPU_FILES)
    installed = [name for name in ACCELERATORS if importlib.util.find_spec(name)]
    return not any(name == "libtpu" or has_gpu for name in installed)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def holds_accelerator() -> bool:
    """Returns whether this process uses an accelerator already."""
    if "jax" not in sys.modules:
        return False
    import jax

    before = jax.config.jax_num_cpu_devices
    try:
        # JAX refuses to change it once a device is in use.
        jax.config.update("jax_num_cpu_devices", max(before, 0) + 1)
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        return jax.default_backend() != "cpu"
    return False
