"""How processes find each other and notice who is gone, over real sockets; what schedulers say."""

import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_processes import free_port

from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.train import distributed, peers


def facts(host: str, **same) -> dict:
    return {"host": host, "same": {"config": "abc"} | same}


def meet_in_threads(
    count: int, facts_by_name: dict, timeout: float = 2.0, counts: dict | None = None
) -> dict:
    """Returns by name what each process gets from `meet` or raises; they run as threads.

    A name begins with the index of the process. `counts` are those that processes start with, where
    they differ.
    """
    address, results = peers.Address(f"127.0.0.1:{free_port()}"), {}

    def join(name, index, process_facts):
        try:
            n = (counts or {}).get(name, count)
            results[name] = peers.meet_peers(address, n, index, process_facts, timeout, grace=5.0)
        except (InputError, RunFailed) as error:
            results[name] = error

    threads = [
        threading.Thread(target=join, args=(name, int(str(name)[0]), process_facts))
        for name, process_facts in facts_by_name.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in results.values():
        if isinstance(value, tuple):
            value[1].leave()
    return results


def test_all_learn_of_all():
    results = meet_in_threads(3, {i: facts(f"node{i}") for i in range(3)})
    for all_facts, _ in results.values():
        assert [f["host"] for f in all_facts] == ["node0", "node1", "node2"]


def test_who_is_missing_is_named_everywhere():
    results = meet_in_threads(4, {0: facts("a"), 2: facts("c")}, timeout=0.7)
    for error in results.values():
        assert isinstance(error, RunFailed)
        assert "2 of 4 processes connected" in str(error)
        assert "0 on a, 2 on c; missing: 1, 3" in str(error)


@pytest.mark.parametrize(
    ("count", "facts_by_name", "counts", "message"),
    [
        (
            2,
            {0: facts("a"), 1: facts("b", config="xyz")},
            {},
            "process 1 on b has another config than",
        ),
        (3, {0: facts("a"), "1": facts("b"), "1'": facts("c")}, {}, "is in use on "),
        (2, {0: facts("a"), "3": facts("b")}, {}, "--process_id=3 on b is out of range; "),
        (
            3,
            {0: facts("a"), 1: facts("b")},
            {1: 5},
            "process 1 on b has --num_processes=5, process 0 3",
        ),
    ],
)
def test_processes_that_differ_are_refused(count, facts_by_name, counts, message):
    results = meet_in_threads(count, facts_by_name, counts=counts)
    assert isinstance(results[0], InputError) and message in str(results[0]), results
    assert any(message in str(error) for name, error in results.items() if name != 0)


def test_strangers_do_not_disturb():
    address, results = peers.Address(f"127.0.0.1:{free_port()}"), []
    thread = threading.Thread(
        target=lambda: results.append(peers.meet_peers(address, 2, 0, facts("a"), 10.0, 5.0))
    )
    thread.start()
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", address.port))
            break
        except OSError:
            continue
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    _, watch = peers.meet_peers(address, 2, 1, facts("b"), 10.0, 5.0)
    thread.join()
    watch.leave()
    results[0][1].leave()
    stranger.close()


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as other:
        address = peers.Address(f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(InputError, match=r"cannot be used here .*, perhaps by another run"):
            peers.meet_peers(address, 2, 0, facts("a"), 1.0, 5.0)


@pytest.mark.parametrize("text", ["node1", ":8476", "node1:", "node1:0", "node1:99999", "node1:x"])
def test_a_coordinator_is_host_and_port(text):
    with pytest.raises(InputError, match=r"must be HOST:PORT.*use --coordinator=node1:8476"):
        peers.Address(text)


def test_names_that_mean_loopback_are_explained(monkeypatch):
    def lookup(host, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], 0))]

    addresses = {"node1": "127.0.1.1", "localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1",
             "node2": "10.0.0.7"}  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(
        InputError, match=r"node1 is 127\.0\.1\.1 here.*use --coordinator=10\.0\.0\.5:8476"
    ):
        peers.check_loopback(peers.Address("node1:8476"), ["10.0.0.5"])
    for fine in ("localhost:8476", "127.0.0.1:8476", "node2:8476"):
        peers.check_loopback(peers.Address(fine), ["10.0.0.5"])


GONE = """
import sys, time
from lmscale_jax.train import peers
address, index, last = peers.Address(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
_, watch = peers.meet_peers(address, 3, index, {"host": f"node{index}", "same": {}}, 20.0, 2.0)
print("met", flush=True)
if index == 2:
    if last == "dies":
        time.sleep(1)
        raise SystemExit(9)
    if last == "leaves":
        watch.leave()
        raise SystemExit(0)
    watch.leave("the disk is full")
    raise SystemExit(1)
time.sleep(4 if last == "leaves" else 60)
watch.leave()
"""


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("dies", "process 2 on node2 has died; the run ends here"),
        ("fails", "the disk is full; the run ends here"),
        ("leaves", ""),
    ],
)
def test_the_others_learn_of_an_end(last, message):
    """Three real processes; an orderly end is none of the others' business."""
    address, pipes = (
        f"127.0.0.1:{free_port()}",
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GONE, address, str(i), last], cwd=ROOT, text=True, **pipes
        )
        for i in range(3)
    ]
    ended = [process.communicate(timeout=60) for process in processes]
    for process, (_, err) in list(zip(processes, ended, strict=True))[:2]:
        assert process.returncode == (1 if message else 0), err
        assert message in err and err.count("\n") == (1 if message else 0)


def test_what_slurm_says(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"SLURM_JOB_ID is not set.*srun python"):
        distributed.from_slurm()
    monkeypatch.setenv("SLURM_JOB_ID", "123457")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu-[003-004,9]")
    launch = distributed.from_slurm()
    assert launch == ("slurm", "gpu-003:26914", 16, 3)
    assert 20000 <= 26914 < 30000
    for nodes, first in (
        ("a1,b2", "a1"),
        ("n[7]", "n7"),
        ("x-[01-02]-y,z", "x-01-y"),
        ("one", "one"),
        ("node[01-03,07]", "node01"),
        ("node[07,01-03],gpu1", "node07"),
        ("rack[0-1]n[01-03],z", "rack0n01"),
        ("tux[2-3][0-7]", "tux20"),
        ("n[1,3]-ib[0],z", "n1-ib0"),
    ):
        assert distributed.first_node(nodes) == first


@pytest.mark.parametrize(
    ("tasks", "visible", "local", "expected"),
    [
        ("8(x2)", "0,1,2,3,4,5,6,7", "3", [3]),  # a task a GPU, all of them visible to each
        ("8(x2)", "0", "3", None),  # a task a GPU, which is all that it sees
        ("1(x2)", "0,1,2,3,4,5,6,7", "0", None),  # a task a node, which takes all of them
    ],
)
def test_a_task_takes_its_own_gpus(monkeypatch, tasks, visible, local, expected):
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("SLURM_LOCALID", local)
    assert distributed.local_devices() == expected


def test_a_node_that_shows_one_gpu_of_eight_is_explained():
    row = {"host": "n1", "address": "10.0.0.1", "devices": 1, "platform": "gpu", "gpus": 8,
           "kind": "NVIDIA H100", "allocated": 8, "visible": "0"}  # fmt: skip
    (message,) = distributed.device_faults([row])
    assert "n1 has 8 GPUs of this job and its 1 process(es) see 1" in message
    assert "use --ntasks-per-node=8, or" in message
    assert distributed.device_faults([row | {"visible": str(i)} for i in range(8)]) == []
    lines = distributed.census_lines([row, row | {"host": "n2", "address": "10.0.0.2"}])
    assert lines[0] == "2 processes on 2 host(s), 2 devices"
    assert (
        "n2 (10.0.0.2): process 1, 1 x NVIDIA H100 of 8 GPUs (CUDA_VISIBLE_DEVICES=0)" in lines[2]
    )
