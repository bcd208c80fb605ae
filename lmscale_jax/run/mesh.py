"""The device mesh, and shardings from the named axes of each parameter."""

import ctypes
import hashlib
import importlib.util
import math
import os
import platform
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale_jax.data.prepared import cache_root
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import Spec, map_named, named

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Which mesh axis splits which named axis of a parameter. The rest is replicated.
RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
}

# Floating-point operations of a micro-batch up to which one CPU device is faster than one a core:
# between the two shapes that were measured, 3.6e9 and 5.8e10.
SMALL_STEP = 1e10

# Packages that bring another backend than CPU.
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def start(config) -> None:
    """Sets up JAX for a config; call it before anything asks for a device.

    Where devices are in use already, as in a notebook, they stay as they are; asking for another
    number of CPU devices is then an InputError.

    On CPU each core is a device by default and the batch is split over them, but for the smallest
    steps, which one device takes faster (benchmarks/README.md).
    """
    jax.config.update("jax_compilation_cache_dir", str(_compile_cache(config)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if not any(importlib.util.find_spec(name) for name in ACCELERATORS):
        _keep_memory()
    wanted = config.mesh.cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", wanted or _cpu_devices(config))
    except RuntimeError:
        if wanted and jax.local_device_count("cpu") != wanted:
            raise InputError(
                f"config.mesh.cpu_devices={wanted}: this process uses "
                f"{jax.local_device_count('cpu')} already; 0 takes them"
            ) from None
    if wanted:
        jax.config.update("jax_platforms", "cpu")


def _keep_memory() -> None:
    """Tells glibc to keep what is freed, in one heap that every thread shares.

    XLA's CPU programs allocate their temporaries anew at each call. By default glibc maps large
    ones afresh, so that every step faults in and zeroes every page: a quarter of the time of a step
    whose temporaries are hundreds of MiB (docs/performance.md). It must come before XLA's threads
    have heaps of their own. The price is memory that stays with the process, up to twice as much.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in _MALLOPT.items():
        libc.mallopt(option, value)


# Numbers of malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def _compile_cache(config) -> Path:
    """Where compiled programs are kept: apart for each version of JAX and each kind of processor.

    JAX's own key knows the program and the compiler, but a home directory may be shared by machines
    whose processors do not have the same instructions.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = f"{platform.machine()} {platform.processor()} {platform.node()}"
    kind = hashlib.sha256(processor.encode()).hexdigest()[:8]
    return cache_root(config.data) / "compiled" / f"jax-{jax.__version__}-{kind}"


def _cpu_devices(config) -> int:
    """What a mesh of fixed size needs; else as many as the cores and the micro-batch allow, or one
    where a step is small."""
    sizes = config.mesh
    split, data = sizes.fsdp * sizes.tensor, sizes.data
    model, rows = config.model, config.train.batch_size // config.train.accum
    # A block has about 12 d_model^2 parameters, each 6 operations a token.
    small = 72 * model.n_layers * model.d_model**2 * rows * config.data.seq_len < SMALL_STEP
    if data == -1 and small and split == 1:
        return 1
    if data == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        fit = [d for d in range(1, cores // split + 1) if rows % (d * sizes.fsdp) == 0]
        data = max(fit, default=1)
    return split * data


def make(config, devices: list | None = None) -> Mesh:
    """The mesh of a config over these devices, all of them by default.

    Raises InputError where the sizes do not multiply to the number of devices or the batch cannot
    be split.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: config.mesh[name] for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if sizes["data"] == -1 and len(devices) % fixed == 0:
        sizes["data"] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"config.mesh={sizes} does not make {len(devices)} device(s); "
            f"mesh.data=-1 with fsdp=1 and tensor=1 would"
        )
    shards, rows = sizes["data"] * sizes["fsdp"], config.train.batch_size // config.train.accum
    if rows % shards:
        raise InputError(
            f"config.train.batch_size={config.train.batch_size} in {config.train.accum} "
            f"micro-batch(es) cannot be split over {shards} devices; "
            f"{-(-rows // shards) * shards * config.train.accum} would work"
        )
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=np.array(devices))


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition(spec: Spec, mesh: Mesh) -> P:
    """The partition of one parameter. A mesh axis is used once, and only where it divides."""
    free = {name for name, size in mesh.shape.items() if size > 1}
    parts: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        name = RULES.get(axis)
        fits = name in free and size % mesh.shape[name] == 0
        parts.append(name if fits else None)
        free -= {name} if fits else set()
    return P(*parts)


def split(rows: dict, mesh: Mesh) -> dict[str, list[str | None]]:
    """{path: for each dimension of a parameter the mesh axis that splits it, or None}."""
    return {path: list(partition(row.spec, mesh)) for path, row in rows.items()}


def param_shardings(specs: dict, mesh: Mesh) -> dict:
    """Nested dict of NamedSharding, one for each parameter."""
    return map_named(lambda _, spec: NamedSharding(mesh, partition(spec, mesh)), specs)


def state_shardings(state, specs: dict, mesh: Mesh):
    """Shardings for any tree of arrays: what has a parameter's path and shape is split like it.

    Optimizer moments hold copies of the parameter tree, so the end of their path names the
    parameter; scalars and counters are replicated.
    """
    by_path = named(specs)

    def one(path, leaf):
        names = [str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey)]
        # The names of an optimizer's own groups may come first.
        ends = ("/".join(names[i:]) for i in range(len(names)))
        spec = next((by_path[end] for end in ends if end in by_path), None)
        if spec is None or spec.shape != leaf.shape:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, partition(spec, mesh))

    return jax.tree_util.tree_map_with_path(one, state)


def put_batch(batch, mesh: Mesh):
    """This process's rows of a batch as global arrays, split along their first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def sum_over_hosts(value: int) -> int:
    """The sum of one integer over all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int64(value)).sum())


def host_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a global batch that this process's devices hold, which must be contiguous."""
    index = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    starts = [(s[0].start or 0) for s in index.values()]
    stops = [batch_size if s[0].stop is None else s[0].stop for s in index.values()]
    return slice(min(starts), max(stops))
