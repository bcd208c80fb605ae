"""Makes the device mesh, and shardings from the named axes of each parameter."""

import hashlib
import math
import os
import platform
from collections.abc import Container
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale_jax.config.keys import SPEC, is_used
from lmscale_jax.data.prepare import cache_root
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import map_named, named
from lmscale_jax.model.sharding import AXES, BATCH, ROWS, partition

# Packages that bring another backend than CPU.
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def start_jax(config, cpu_devices: int = 0) -> None:
    """Sets up JAX for a config; call it before any use of a device.

    The number of CPU devices is `mesh.cpu_devices`, else `cpu_devices`, else the product of the
    mesh axes. One device on all cores is mostly as fast as one device per core, and holds the
    parameters once (docs/performance.md).

    Compiled programs are kept with the prepared data, or where JAX_COMPILATION_CACHE_DIR says.

    Raises InputError if devices are in use already, as in a notebook, and mesh.cpu_devices is not
    their number; with mesh.cpu_devices=0 they remain.
    """
    compile_cache = {
        "jax_compilation_cache_dir": str(_compile_cache(config)),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in compile_cache.items():
        # Whoever sets JAX's own variable has chosen already.
        if not os.environ.get(name.upper()):
            jax.config.update(name, value)
    explicit = config.mesh.cpu_devices
    try:
        axes = (config.mesh[name] for name in AXES)
        devices = explicit or cpu_devices or math.prod(n for n in axes if n > 0)
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        if explicit and jax.local_device_count("cpu") != explicit:
            raise InputError(
                f"config.mesh.cpu_devices={explicit}: this process already uses "
                f"{jax.local_device_count('cpu')}; use 0"
            ) from None
    if explicit:
        jax.config.update("jax_platforms", "cpu")


def _compile_cache(config) -> Path:
    """Returns the directory of compiled programs, one for each JAX version and kind of processor.

    JAX's key covers the program and the compiler, but machines that share a home directory may
    have processors with different instructions.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = f"{platform.machine()} {platform.processor()} {platform.node()}"
    kind = hashlib.sha256(processor.encode()).hexdigest()[:8]
    return cache_root(config.data) / "compiled" / f"jax-{jax.__version__}-{kind}"


def make_mesh(config, devices: list | None = None) -> Mesh:
    """Makes the mesh of a config over these devices, by default all.

    Raises InputError if the product of the axes is not the number of devices, or the axes do not
    divide the batch.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = mesh_shape(config, len(devices), devices[0].platform, count_hosts(devices))
    # Only `replica` crosses the slow network between slices.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if sizes["replica"] % slices:
        raise InputError(
            f"config.mesh.replica={sizes['replica']} is not a multiple of the {slices} slices; "
            f"use {slices}"
        )
    from jax.experimental import mesh_utils

    within = [sizes["replica"] // slices, *list(sizes.values())[1:]]
    across = [slices, *[1] * (len(AXES) - 1)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(grid, AXES, axis_types=types)


def one_device_mesh() -> Mesh:
    """Makes the mesh of the first device alone, of whatever size the config's mesh is."""
    axes = (1,) * len(AXES)
    return jax.make_mesh(axes, AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])


def count_hosts(devices: list) -> int:
    """Returns how many processes hold these devices: one for each host, or for less of it."""
    return len({device.process_index for device in devices})


def mesh_shape(config, count: int, platform: str, hosts: int) -> dict[str, int]:
    """Returns the size of each mesh axis over `count` devices of a platform on that many hosts.

    Raises InputError as `make_mesh` does.
    """
    sizes = {name: config.mesh[name] for name in AXES}
    if _is_default(config) and platform != "cpu" and hosts == 1:
        # Scattered sums of gradients hide behind products where whole ones would be waited for.
        sizes |= {"data": 1, "fsdp": -1}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [name for name, size in sizes.items() if size == -1]
    if 0 in sizes.values():
        zero = next(name for name, size in sizes.items() if size == 0)
        raise InputError(f"config.mesh.{zero}=0 is not a number of devices; use 1")
    if len(free) > 1:
        raise InputError(f"config.mesh.{free[1]}=-1 and mesh.{free[0]}=-1: only one axis can "
                         f"take all remaining devices; use mesh.{free[1]}=1")  # fmt: skip
    for name in free:
        sizes[name] = max(1, count // fixed)
    if math.prod(sizes.values()) != count:
        large = next((name for name in AXES if config.mesh[name] > 1), None)
        remedy = f"use mesh.{large}=1" if large else "use mesh.data=-1"
        raise InputError(
            f"config.mesh.{large or 'data'}={config.mesh[large or 'data']}: the mesh axes "
            f"({', '.join(f'{name}={size}' for name, size in sizes.items() if size != 1) or '1'}) "
            f"do not multiply to {count} device(s); {remedy}"
        )
    _check_batch(config, sizes)
    return sizes


def _is_default(config) -> bool:
    """Whether a config leaves every axis of the mesh as it is."""
    spec = SPEC["mesh"]
    return all(config.mesh[name] == spec[name].default for name in AXES)


def describe_mesh(config, mesh: Mesh) -> dict[str, str]:
    """Returns the line of --explain and run.json where the devices were not asked for axis by
    axis and did not go to `data`."""
    if not _is_default(config) or mesh.shape["fsdp"] == 1:
        return {}
    return {
        "mesh": f"fsdp: default on one node of accelerators; mesh.data={mesh.size} splits the "
        f"batch alone"
    }


def _check_batch(config, sizes: dict[str, int]) -> None:
    train, pieces = config.train, sizes["sequence"]
    shards, rows = math.prod(sizes[name] for name in ROWS), train.batch_size // train.accum
    if rows % shards:
        raise InputError(
            f"config.train.batch_size={train.batch_size} in {train.accum} "
            f"micro-batch(es) cannot be split over {shards} devices; "
            f"use {-(-rows // shards) * shards * train.accum}"
        )
    if config.data.seq_len % pieces:
        raise InputError(
            f"config.data.seq_len={config.data.seq_len} cannot be split over mesh.sequence="
            f"{pieces}; use {-(-config.data.seq_len // pieces) * pieces}"
        )
    measured = is_used(config, "mur.metric") or config.eval.redundancy_every
    if pieces > 1 and measured:
        raise InputError(
            f"config.mesh.sequence={pieces} does not support marginal utility and redundancy "
            f"(mur.mode={config.mur.mode!r}, eval.redundancy_every="
            f"{config.eval.redundancy_every!r}); use mesh.sequence=1"
        )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[name] for name in ROWS)


def param_splits(rules: dict, mesh: Mesh) -> dict[str, list[str | None]]:
    """Returns {path: the mesh axis, or None, that splits each dimension of the parameter}."""
    return {path: list(partition(rule.spec, mesh.shape)) for path, rule in rules.items()}


def param_shardings(specs: dict, mesh: Mesh) -> dict:
    """Returns a nested dict with the NamedSharding of each parameter."""
    return map_named(lambda _, spec: NamedSharding(mesh, partition(spec, mesh.shape)), specs)


def path_of_parameter(path: tuple, names: Container[str]) -> str | None:
    """Returns the parameter whose path ends the path of an array of a state; None without one."""
    keys = [str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey)]
    # Names of the optimizer's groups may precede it.
    ends = ("/".join(keys[i:]) for i in range(len(keys)))
    return next((end for end in ends if end in names), None)


def state_shardings(state, specs: dict, mesh: Mesh):
    """Returns shardings for any tree of arrays: an array with a parameter's path and shape is split
    like the parameter, any other is replicated.

    Optimizer moments are trees like the parameters, so the end of a path names the parameter.
    """
    by_path = named(specs)

    def leaf_sharding(path, leaf):
        spec = by_path.get(path_of_parameter(path, by_path))
        if spec is None or spec.shape != leaf.shape:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, partition(spec, mesh.shape))

    return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def put_batch(batch, mesh: Mesh):
    """Makes global arrays of the rows of a batch that this process read (see `host_rows`)."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(x):
        shape = (len(x) * batch_shards(mesh) // _host_shards(mesh), *x.shape[1:])
        rows = host_rows(shape[0], mesh)

        def part(index):
            begin, end, _ = index[0].indices(shape[0])
            return x[np.searchsorted(rows, begin) :][: end - begin, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def _host_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which this process's devices split its rows."""
    return len(_start_positions(batch_shards(mesh), mesh))


def _start_positions(batch_size: int, mesh: Mesh) -> list[int]:
    index = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((batch_size,))
    return sorted({part[0].indices(batch_size)[0] for part in index.values()})


def host_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the row numbers of a global batch on this process's devices, in order."""
    each = batch_size // batch_shards(mesh)
    return np.concatenate([begin + np.arange(each) for begin in _start_positions(batch_size, mesh)])
