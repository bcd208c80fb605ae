"""Several processes as one run: how each scheduler starts them, what they agree on, how they end.

One process is the rule; then nothing here does anything. Call `joined` before anything asks JAX for
a device.
"""

import atexit
import contextlib
import glob
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.run import peers

CLUSTERS = ("none", "slurm", "tpu", "hosts")


class Launch(NamedTuple):
    """What the command line says of the processes of this run.

    Attributes:
      cluster: who started them, of CLUSTERS.
      coordinator: HOST:PORT of process 0, for "hosts"; it takes the next port too.
      count, index: processes, and the number of this one, for "hosts".
    """

    cluster: str = "none"
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


@contextlib.contextmanager
def joined(launch: Launch, config, same: dict, say: Callable[[str], None] = print) -> Iterator:
    """Joins the other processes, for as long as the block lasts.

    `same` is what must be equal on all of them, by name. Process 0 prints who has come.

    Raises:
      InputError, RunFailed: they are not all there, or are not alike.
    """
    if launch.cluster == "none":
        yield
        return
    watch = _join(launch, config, same, say)
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        orderly = isinstance(error, (InputError, SystemExit))
        if watch and not orderly:
            watch.explain()
        if watch:
            watch.leave("" if orderly else f"a process ended: {' '.join(str(error).split())[:300]}")
        if not isinstance(error, SystemExit):
            # Without JAX's own farewell, which waits for processes that may be gone.
            atexit.register(_leave_now, 2 if isinstance(error, InputError) else status)
        raise
    if watch:
        watch.leave()


def _leave_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(launch: Launch, config, same: dict, say) -> peers.Watch | None:
    # JAX's would swallow SIGTERM, which `watchdog.Stop` handles.
    jax.config.update("jax_enable_preemption_service", False)
    start, grace = config.mesh.start_timeout, config.mesh.peer_timeout
    times = {
        "initialization_timeout": int(start),
        # JAX ends a process with a stack trace; `peers` does it earlier, with a line.
        "heartbeat_timeout_seconds": int(2 * grace) + 10,
        "shutdown_timeout_seconds": int(grace) + 240,
    }
    watch = None
    if launch.cluster == "tpu":
        try:
            jax.distributed.initialize(**times)
        except (ValueError, RuntimeError) as error:
            raise RunFailed(f"--cluster=tpu: {error}") from error
    else:
        how = from_slurm() if launch.cluster == "slurm" else _from_flags(launch)
        address, own = peers.Address(how.coordinator), _own_addresses()
        if how.count > 1:
            peers.check_loopback(address, own)
        card = {"host": platform.node(), "address": own[0], "pid": os.getpid(), "same": same}
        _, watch = peers.meet(address, how.count, how.index, card, start, grace)
        jax.distributed.initialize(
            address.jax,
            how.count,
            how.index,
            local_device_ids=local_devices() if launch.cluster == "slurm" else None,
            cluster_detection_method="deactivate",
            **times,
        )
    _check_devices()
    rows = gather(census_row())
    if is_first():
        for line in census(rows):
            say(line)
    for fault in missing(rows):
        raise InputError(fault)
    return watch


def _from_flags(launch: Launch) -> Launch:
    """Flags, or the variables of the same meaning, which launchers find easier to set."""
    given = {}
    for flag, field, variable in (
        ("coordinator", "coordinator", "LMSCALE_COORDINATOR"),
        ("num_processes", "count", "LMSCALE_NUM_PROCESSES"),
        ("process_id", "index", "LMSCALE_PROCESS_ID"),
    ):
        value = getattr(launch, field)
        value = os.environ.get(variable) if value is None else value
        if value in (None, ""):
            example = {"coordinator": "node1:8476", "num_processes": 2, "process_id": 0}[flag]
            raise InputError(
                f"--cluster=hosts needs --{flag} (or {variable}); --{flag}={example} would work"
            )
        if flag != "coordinator" and not str(value).isdecimal():
            raise InputError(f"{variable}={value} is no number; 2 would work")
        given[field] = value if flag == "coordinator" else int(value)
    if not 0 <= given["index"] < given["count"]:
        raise InputError(
            f"--process_id={given['index']} with --num_processes={given['count']}; "
            f"0 to {given['count'] - 1} would work"
        )
    return launch._replace(**given)


def from_slurm() -> Launch:
    """What srun tells each of its tasks. Raises InputError outside of one."""
    environment = os.environ
    needed = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
    absent = [name for name in needed if name not in environment]
    if absent:
        raise InputError(
            f"--cluster=slurm: {absent[0]} is not set, so this is no task of srun; "
            f"srun python -m lmscale_jax.main ... would work, as in launch/slurm.sh"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # Jobs that share a node get different ports.
    port = 20000 + 2 * (int(environment["SLURM_JOB_ID"]) % 5000)
    return Launch(
        "slurm",
        f"{first_node(nodes)}:{port}",
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
    )


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as gpu-[003-007,12] or a1,b2."""
    head = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return head[1] + (head[2] or "") + (head[3] or "") or platform.node()


def local_devices() -> list[int] | None:
    """Which GPUs a task of Slurm takes: its own where several share a node and see all of them;
    None: all that it sees."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    here = int(re.match(r"\d+", counts or "1")[0])
    seen = visible_gpus()
    number = int(os.environ.get("SLURM_LOCALID", 0))
    return [number] if here > 1 and seen >= here else None


def visible_gpus() -> int:
    """How many NVIDIA GPUs this process may use, as its environment says."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([part for part in named.split(",") if part])
    return len(glob.glob("/proc/driver/nvidia/gpus/*"))


def _own_addresses() -> list[str]:
    """This machine's address on the network, found without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [probe.getsockname()[0]]
        except OSError:
            return ["127.0.0.1"]


def census_row() -> dict:
    """What this process has, for `census` and `missing`."""
    devices = jax.local_devices()
    return {
        "host": platform.node(),
        "address": _own_addresses()[0],
        "devices": len(devices),
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "gpus": len(glob.glob("/proc/driver/nvidia/gpus/*")),
        "allocated": int(os.environ.get("SLURM_GPUS_ON_NODE", 0) or 0),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _check_devices() -> None:
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    odd = next((i for i, n in enumerate(counts) if n != counts[0]), None)
    if odd is not None:
        raise InputError(
            f"process {odd} has {counts[odd]} device(s) and process 0 {counts[0]}; all need the "
            f"same number, or one of them has lost some"
        )


def census(rows: list[dict]) -> list[str]:
    """Who has come, for people: a line for all and one for each host."""
    hosts: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        hosts.setdefault((row["host"], row["address"], row["kind"]), []).append(index)
    total = sum(row["devices"] for row in rows)
    lines = [f"{len(rows)} processes on {len(hosts)} host(s), {total} devices"]
    for (host, address, kind), members in hosts.items():
        numbers = f"{members[0]}" + (f" to {members[-1]}" if len(members) > 1 else "")
        count = sum(rows[i]["devices"] for i in members)
        gpus, seen = rows[members[0]]["gpus"], rows[members[0]]["visible"]
        more = f" of {gpus} GPUs (CUDA_VISIBLE_DEVICES={seen})" if gpus > count and seen else ""
        lines.append(f"  {host} ({address}): process {numbers}, {count} x {kind}{more}")
    return lines


def missing(rows: list[dict]) -> list[str]:
    """What is wrong with the devices of the hosts, in one line for each host where something is."""
    faults = []
    for host in dict.fromkeys(row["host"] for row in rows):
        own = [row for row in rows if row["host"] == host and row["platform"] in ("gpu", "cuda")]
        used = sum(row["devices"] for row in own)
        if own and used < own[0]["allocated"]:
            shown = own[0]["visible"]
            faults.append(
                f"{host} has {own[0]['allocated']} GPUs of this job and its {len(own)} process(es) "
                f"see {used} (CUDA_VISIBLE_DEVICES={shown or 'not set'}); "
                f"--ntasks-per-node={own[0]['allocated']} would work, or one task a node without "
                f"--gpus-per-task"
            )
    return faults


# --- What processes agree on ---------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is process 0, which prints and writes."""
    return jax.process_index() == 0


def gather(value) -> list:
    """The value of every process, in their order; anything that JSON can say."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def shared(value):
    """Process 0's value, everywhere."""
    return gather(value if is_first() else None)[0]


def on_first(function: Callable):
    """Calls it in process 0 alone. Returns its value there and None elsewhere; the InputError that
    it raises is raised everywhere."""
    value = fault = None
    if is_first():
        try:
            value = function()
        except InputError as error:
            fault = str(error)
    if fault := shared(fault):
        raise InputError(fault)
    return value


def agree(what: str, value, works: str) -> None:
    """Raises InputError, everywhere, where a process has another value than process 0."""
    found = gather([platform.node(), value])
    for index, (host, other) in enumerate(found):
        if other != found[0][1]:
            raise InputError(
                f"{what} is {other} in process {index} on {host} and {found[0][1]} in process 0; "
                f"{works} would work"
            )


class Votes:
    """Whether any process has been asked to stop, known to all of them after the same step.

    With each step every process casts a number, which lies on one of its devices; the largest is
    read with the metrics of that step, one step late, so nothing waits for it.
    """

    def __init__(self):
        devices = [
            next(d for d in jax.devices() if d.process_index == index)
            for index in range(jax.process_count())
        ]
        mesh = jax.sharding.Mesh(np.array(devices), "process")
        self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("process"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(lambda votes: votes.max(), out_shardings=whole)

    def cast(self, number: int) -> jax.Array | int:
        """The largest of all votes, to be read later with `int`."""
        if jax.process_count() == 1:
            return number
        own = np.array([number], np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._split, own))
