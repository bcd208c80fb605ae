"""The device mesh, and shardings from the named axes of each parameter."""

import hashlib
import math
import platform
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
    """Sets up JAX for a config; call it before anything asks for a device.

    Where devices are in use already, as in a notebook, they stay as they are; asking for another
    number of CPU devices is then an InputError.

    Of CPU devices there are `mesh.cpu_devices`, or `cpu_devices`, or as many as the mesh asks for.
    One on all cores is mostly as fast as one a core and holds the parameters once
    (docs/performance.md).
    """
    jax.config.update("jax_compilation_cache_dir", str(_compile_cache(config)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    wanted = config.mesh.cpu_devices
    try:
        asked = math.prod(n for n in (config.mesh[name] for name in AXES) if n > 0)
        devices = wanted or cpu_devices or asked
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        if wanted and jax.local_device_count("cpu") != wanted:
            raise InputError(
                f"config.mesh.cpu_devices={wanted}: this process uses "
                f"{jax.local_device_count('cpu')} already; 0 takes them"
            ) from None
    if wanted:
        jax.config.update("jax_platforms", "cpu")


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


def make_mesh(config, devices: list | None = None) -> Mesh:
    """The mesh of a config over these devices, all of them by default.

    Raises InputError where the sizes do not multiply to the number of devices or the batch cannot
    be split.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = mesh_shape(config, len(devices), devices[0].platform, count_hosts(devices))
    # Devices of one slice talk fast among themselves; only `replica` goes from slice to slice.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if sizes["replica"] % slices:
        raise InputError(
            f"config.mesh.replica={sizes['replica']} does not divide over the {slices} slices; "
            f"{slices} would"
        )
    from jax.experimental import mesh_utils

    within = [sizes["replica"] // slices, *list(sizes.values())[1:]]
    across = [slices, *[1] * (len(AXES) - 1)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(grid, AXES, axis_types=types)


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
        raise InputError(f"config.mesh.{zero}=0 is no number of devices; 1 would work")
    if len(free) > 1:
        raise InputError(f"config.mesh.{free[1]}=-1 and mesh.{free[0]}=-1: only one can take all "
                         f"that remain; mesh.{free[1]}=1 would work")  # fmt: skip
    for name in free:
        sizes[name] = max(1, count // fixed)
    if math.prod(sizes.values()) != count:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise InputError(
            f"config.mesh ({given or 'all 1'}) does not make {count} device(s); mesh.data=-1 with "
            f"the others 1 would"
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
            f"{-(-rows // shards) * shards * train.accum} would work"
        )
    if config.data.seq_len % pieces:
        raise InputError(
            f"config.data.seq_len={config.data.seq_len} cannot be split over mesh.sequence="
            f"{pieces}; {-(-config.data.seq_len // pieces) * pieces} would work"
        )
    measures = is_used(config, "mur.metric") or config.eval.redundancy_every
    if pieces > 1 and measures:
        raise InputError(
            f"config.mesh.sequence={pieces}: marginal utility and redundancy look at whole windows "
            f"(mur.mode={config.mur.mode!r}, eval.redundancy_every="
            f"{config.eval.redundancy_every!r}); mesh.sequence=1 would work"
        )


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts of the mesh the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROWS)


def param_splits(rows: dict, mesh: Mesh) -> dict[str, list[str | None]]:
    """{path: for each dimension of a parameter the mesh axis that splits it, or None}."""
    return {path: list(partition(row.spec, mesh.shape)) for path, row in rows.items()}


def param_shardings(specs: dict, mesh: Mesh) -> dict:
    """Nested dict of NamedSharding, one for each parameter."""
    return map_named(lambda _, spec: NamedSharding(mesh, partition(spec, mesh.shape)), specs)


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
        return NamedSharding(mesh, partition(spec, mesh.shape))

    return jax.tree_util.tree_map_with_path(one, state)


def put_batch(batch, mesh: Mesh):
    """The rows of a batch that this process read (see `host_rows`) as global arrays."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(x):
        whole = (len(x) * batch_shards(mesh) // _shards_here(mesh), *x.shape[1:])
        rows = host_rows(whole[0], mesh)

        def part(index):
            begin, end, _ = index[0].indices(whole[0])
            return x[np.searchsorted(rows, begin) :][: end - begin, index[1]]

        return jax.make_array_from_callback(whole, sharding, part)

    return jax.tree.map(place, batch)


def _shards_here(mesh: Mesh) -> int:
    """Over how many parts of this process's devices its rows are split."""
    return len(_start_positions(batch_shards(mesh), mesh))


def _start_positions(batch_size: int, mesh: Mesh) -> list[int]:
    index = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((batch_size,))
    return sorted({part[0].indices(batch_size)[0] for part in index.values()})


def host_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in order."""
    each = batch_size // batch_shards(mesh)
    return np.concatenate([begin + np.arange(each) for begin in _start_positions(batch_size, mesh)])
