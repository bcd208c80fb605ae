"""Several processes as one run: how each scheduler starts them, what they agree on, how they end.

With one process, which is usual, nothing here does anything. Call `join_processes` before anything
asks JAX for a device.
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
from lmscale_jax.train import peers


class Launch(NamedTuple):
    """What the command line says about the processes of this run.

    Attributes:
      cluster: who started them: "none" (there is one), "slurm", "tpu" or "hosts".
      coordinator: HOST:PORT of process 0, for "hosts"; the next port is used too.
      count, index: number of processes, and which of them this is, for "hosts".
    """

    cluster: str = "none"
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


@contextlib.contextmanager
def join_processes(
    launch: Launch, config, same: dict, say: Callable[[str], None] = print
) -> Iterator:
    """Joins the other processes for the duration of the block.

    `same` holds, by name, what must be equal on all of them. Process 0 prints hosts and devices.

    Raises:
      InputError, RunFailed: a process is missing or differs.
    """
    if launch.cluster == "none":
        yield
        return
    watch = _initialize(launch, config, same, say)
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        orderly = isinstance(error, (InputError, SystemExit))
        if watch and not orderly:
            watch.end_if_peer_failed()
        if watch:
            watch.leave("" if orderly else f"a process ended: {' '.join(str(error).split())[:300]}")
        if not isinstance(error, SystemExit):
            # Skips JAX's own shutdown, which waits for processes that may be gone.
            atexit.register(_leave_now, 2 if isinstance(error, InputError) else status)
        raise
    if watch:
        watch.leave()


def _leave_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _initialize(launch: Launch, config, same: dict, say) -> peers.PeerWatch | None:
    # JAX's service would swallow SIGTERM, which `watchdog.SignalHandler` handles.
    jax.config.update("jax_enable_preemption_service", False)
    start, grace = config.mesh.start_timeout, config.mesh.peer_timeout
    times = {
        "initialization_timeout": int(start),
        # JAX ends a process with a stack trace; `peers` does it earlier, with one line.
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
        complete = from_slurm() if launch.cluster == "slurm" else _from_flags(launch)
        address, local_addresses = peers.Address(complete.coordinator), _local_addresses()
        if complete.count > 1:
            peers.check_loopback(address, local_addresses)
        facts = {"host": platform.node(), "address": local_addresses[0]}
        facts |= {"pid": os.getpid(), "same": same}
        _, watch = peers.meet_peers(address, complete.count, complete.index, facts, start, grace)
        jax.distributed.initialize(
            address.jax,
            complete.count,
            complete.index,
            local_device_ids=local_devices() if launch.cluster == "slurm" else None,
            cluster_detection_method="deactivate",
            **times,
        )
    _check_devices()
    rows = gather(host_facts())
    if is_first():
        for line in census_lines(rows):
            say(line)
    for fault in device_faults(rows):
        raise InputError(fault)
    return watch


def _from_flags(launch: Launch) -> Launch:
    """Takes each field from its flag, or else from the environment variable of the same meaning.

    Launchers find variables easier to set. Raises InputError where both are missing or wrong.
    """
    fields = {}
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
                f"--cluster=hosts needs --{flag} (or {variable}); use --{flag}={example}"
            )
        if flag != "coordinator" and not str(value).isdecimal():
            raise InputError(f"{variable}={value} is not a number; use {variable}=2")
        fields[field] = value if flag == "coordinator" else int(value)
    if not 0 <= fields["index"] < fields["count"]:
        raise InputError(
            f"--process_id={fields['index']} is out of range with "
            f"--num_processes={fields['count']}; use 0 to {fields['count'] - 1}"
        )
    return launch._replace(**fields)


def from_slurm() -> Launch:
    """Reads what srun tells each of its tasks. Raises InputError outside of a task."""
    environment = os.environ
    needed = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
    absent = [name for name in needed if name not in environment]
    if absent:
        raise InputError(
            f"--cluster=slurm: {absent[0]} is not set, so this is not a task of srun; "
            f"use srun python -m lmscale_jax.main ..., as in launch/slurm.sh"
        )
    for name in needed:
        if not environment[name].isdecimal():
            raise InputError(
                f"--cluster=slurm: {name}={environment[name]} is not a number; "
                f"use srun python -m lmscale_jax.main ..., as in launch/slurm.sh"
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
    """Returns the first host of Slurm's list, such as gpu-[003-007,12], a1,b2 or r[1-2]n[01,04]."""
    # Each bracket becomes its first number; only then is a comma one between hosts.
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0].strip() or platform.node()


def local_devices() -> list[int] | None:
    """Returns the indices of the GPUs that a task of Slurm takes; None: all that it sees.

    Where several tasks share a node and each sees all GPUs, a task takes the one of its own number.
    """
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    tasks_on_node, local_index = _number(counts, 1), _number(os.environ.get("SLURM_LOCALID"), 0)
    return [local_index] if 1 < tasks_on_node <= visible_gpus() else None


def _number(text: str | None, default: int) -> int:
    """Returns the first whole number of a text such as "2(x3)" or "gpu:8"; else the default."""
    digits = re.match(r"[^\d(]*(\d+)", text or "")
    return int(digits[1]) if digits else default


def visible_gpus() -> int:
    """Counts the NVIDIA GPUs that this process may use, according to its environment."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([part for part in listed.split(",") if part])
    return len(glob.glob("/proc/driver/nvidia/gpus/*"))


def _local_addresses() -> list[str]:
    """Returns this machine's address on the network, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [probe.getsockname()[0]]
        except OSError:
            return ["127.0.0.1"]


def host_facts() -> dict:
    """Returns the host and devices of this process, for `census` and `missing_devices`."""
    devices = jax.local_devices()
    return {
        "host": platform.node(),
        "address": _local_addresses()[0],
        "devices": len(devices),
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "gpus": len(glob.glob("/proc/driver/nvidia/gpus/*")),
        "allocated": _number(os.environ.get("SLURM_GPUS_ON_NODE"), 0),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _check_devices() -> None:
    """Raises InputError where the processes have different numbers of devices."""
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    odd = next((i for i, n in enumerate(counts) if n != counts[0]), None)
    if odd is not None:
        raise InputError(
            f"process {odd} has {counts[odd]} device(s) and process 0 {counts[0]}; start all with "
            f"the same number"
        )


def census_lines(rows: list[dict]) -> list[str]:
    """Returns the lines that process 0 prints: one for all processes and one for each host."""
    hosts: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        hosts.setdefault((row["host"], row["address"], row["kind"]), []).append(index)
    total = sum(row["devices"] for row in rows)
    lines = [f"{len(rows)} processes on {len(hosts)} host(s), {total} devices"]
    for (host, address, kind), members in hosts.items():
        numbers = f"{members[0]}" + (f" to {members[-1]}" if len(members) > 1 else "")
        count = sum(rows[i]["devices"] for i in members)
        gpus, visible = rows[members[0]]["gpus"], rows[members[0]]["visible"]
        note = (
            f" of {gpus} GPUs (CUDA_VISIBLE_DEVICES={visible})" if gpus > count and visible else ""
        )
        lines.append(f"  {host} ({address}): process {numbers}, {count} x {kind}{note}")
    return lines


def device_faults(rows: list[dict]) -> list[str]:
    """Returns one message for each host whose processes see fewer GPUs than the job has there."""
    messages = []
    for host in dict.fromkeys(row["host"] for row in rows):
        gpu_rows = [r for r in rows if r["host"] == host and r["platform"] in ("gpu", "cuda")]
        n_used = sum(row["devices"] for row in gpu_rows)
        if gpu_rows and n_used < (n_allocated := gpu_rows[0]["allocated"]):
            visible = gpu_rows[0]["visible"] or "not set"
            messages.append(
                f"{host} has {n_allocated} GPUs of this job and its {len(gpu_rows)} process(es) "
                f"see {n_used} (CUDA_VISIBLE_DEVICES={visible}); use "
                f"--ntasks-per-node={n_allocated}, or one task a node without --gpus-per-task"
            )
    return messages


# --- What processes agree on ---------------------------------------------------------------------


def is_first() -> bool:
    """Returns whether this is process 0, which prints and writes."""
    return jax.process_index() == 0


def gather(value) -> list:
    """Returns the values of all processes, in their order; a value is anything JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def broadcast(value):
    """Returns process 0's value, in every process."""
    return gather(value if is_first() else None)[0]


def on_first(function: Callable):
    """Calls a function in process 0 alone. Returns its value there and None elsewhere.

    An InputError that it raises is raised in every process.
    """
    value = fault = None
    if is_first():
        try:
            value = function()
        except InputError as error:
            fault = str(error)
    if fault := broadcast(fault):
        raise InputError(fault)
    return value


def check_agreement(name: str, value, remedy: str) -> None:
    """Raises InputError, in every process, where a process has another value than process 0."""
    answers = gather([platform.node(), value])
    first = answers[0][1]
    for index, (host, other) in enumerate(answers):
        if other != first:
            raise InputError(
                f"{name} is {other} in process {index} on {host} and {first} in process 0; "
                f"use {remedy}"
            )


class Votes:
    """Tells all processes, after the same step, whether any of them has been asked to stop.

    With each step every process casts a number, which lies on one of its devices. The largest is
    read with the metrics of that step, one step late, so nothing waits for it.
    """

    def __init__(self):
        devices = [
            next(d for d in jax.devices() if d.process_index == index)
            for index in range(jax.process_count())
        ]
        mesh = jax.sharding.Mesh(np.array(devices), "process")
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("process"))
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(lambda votes: votes.max(), out_shardings=replicated)

    def cast(self, number: int) -> jax.Array | int:
        """Casts this process's number. Returns the largest of all, to be read later with `int`."""
        if jax.process_count() == 1:
            return number
        vote = np.array([number], np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._sharding, vote))
