"""How the processes of a run find each other, and how they notice that one is lost.

Process 0 listens on the coordinator's port. Each of the others connects, says who it is, and keeps
the connection open: a line a second in both directions. So a process that dies is noticed at once,
and one that hangs, or whose machine is lost, after a set time; everybody learns which one it was.
JAX's own service, on the next port, would end the processes too, but later and without a name.
"""

import ipaddress
import json
import os
import selectors
import socket
import sys
import threading
import time

from lmscale_jax.errors import InputError, RunFailed

HEARTBEAT_SECONDS = 1.0


class Address:
    """host:port of process 0."""

    def __init__(self, text: str):
        self.text = text
        self.host, _, port = text.rpartition(":")
        if not self.host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise InputError(
                f"--coordinator={text} must be HOST:PORT of process 0's machine; "
                f"use --coordinator=node1:8476"
            )
        self.port = int(port)

    @property
    def jax(self) -> str:
        """Where JAX's own service listens."""
        return f"{self.host}:{self.port + 1}"

    def resolved(self) -> list[str]:
        """Looks up the addresses of the host name; [] where it has none (yet)."""
        try:
            entries = socket.getaddrinfo(self.host.strip("[]"), None, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return sorted({entry[4][0] for entry in entries})

    def described(self) -> str:
        """Returns the text and the addresses it resolves to, for messages."""
        addresses = ", ".join(self.resolved()) or "no address"
        return f"{self.text} ({self.host} is {addresses} here)"


def check_loopback(address: Address, local_addresses: list[str]) -> None:
    """Raises InputError where a machine's name resolves to an address that only it can reach.

    `local_addresses` are this machine's other addresses, from which the message takes a better one.
    """
    resolved = address.resolved()
    literal = address.host == "localhost" or _is_loopback(address.host.strip("[]"))
    if resolved and all(map(_is_loopback, resolved)) and not literal:
        better = next((a for a in local_addresses if not _is_loopback(a)), "ADDRESS_ON_THE_NETWORK")
        raise InputError(
            f"--coordinator={address.text}: {address.host} is {resolved[0]} here, a loopback "
            f"address that no other host can reach (see /etc/hosts); "
            f"use --coordinator={better}:{address.port}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def meet_peers(address: Address, count: int, index: int, facts: dict, timeout: float, grace: float):
    """Waits until all processes are connected.

    Returns (facts of all processes in their order, the `PeerWatch` that looks after them).

    Args:
      address: of process 0.
      count, index: number of processes, and which of them this is.
      facts: what this process reports of itself. "host" is shown in messages; "same" is a dict
        that must be equal on all processes.
      timeout: seconds to wait.
      grace: seconds of silence after which a process counts as lost.

    Raises:
      InputError: the port is in use, two processes have the same index, or "same" differs.
      RunFailed: not all processes connected in time.
    """
    deadline = time.monotonic() + timeout
    if index:
        return _connect(address, count, index, facts, deadline, timeout, grace)
    return _listen_for_all(address, count, facts, deadline, timeout, grace)


def _listen_for_all(
    address: Address, count: int, facts: dict, deadline: float, timeout: float, grace: float
):
    """Process 0's side of `meet_peers`."""
    try:
        listener = _listen(address.port)
    except OSError as error:
        raise InputError(
            f"--coordinator={address.text}: port {address.port} cannot be used here "
            f"({error.strerror}), perhaps by another run; try {address.host}:{address.port + 10}"
        ) from None
    facts_by_index, connections = {0: facts}, {}
    try:
        while len(facts_by_index) < count and (seconds := deadline - time.monotonic()) > 0:
            listener.settimeout(seconds)
            try:
                peer_socket, _ = listener.accept()
            except TimeoutError:
                break
            connection = Connection(peer_socket)
            try:
                hello = connection.next_message(min(5.0, timeout))
                index = hello["index"]
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # not a process of a run, or one that gave up
                continue
            fault = _hello_fault(facts_by_index, count, index, hello)
            facts_by_index.setdefault(index, hello["facts"])
            connections.setdefault(index, connection)
            if fault:
                connection.send({"end": fault})
                _send_all(connections, {"end": fault})
                raise InputError(fault)
        if len(facts_by_index) < count:
            fault = _missing_message(facts_by_index, count, timeout, address)
            _send_all(connections, {"end": fault})
            raise RunFailed(fault)
    except BaseException:
        listener.close()
        raise
    all_facts = [facts_by_index[i] for i in range(count)]
    _send_all(connections, {"all_facts": all_facts})
    # The listener stays open, so that another run finds the port taken.
    return all_facts, PeerWatch(0, all_facts, connections, grace, listener)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _hello_fault(facts_by_index: dict, count: int, index: int, hello: dict) -> str | None:
    """Says what is wrong with the first message of a process, if anything is."""
    host = hello["facts"]["host"]
    if hello["count"] != count:
        return f"process {index} on {host} has --num_processes={hello['count']}, process 0 {count}"
    if index in facts_by_index or not 0 < index < count:
        user = facts_by_index.get(index)
        in_use = f"is in use on {user['host']}" if user else "is out of range"
        return (
            f"--process_id={index} on {host} {in_use}; "
            f"each process needs a number of its own from 0 to {count - 1}"
        )
    for name, value in facts_by_index[0]["same"].items():
        other = hello["facts"]["same"].get(name)
        if other != value:
            return (
                f"process {index} on {host} has another {name} than process 0 on "
                f"{facts_by_index[0]['host']}: {other} and {value}; start all with the same"
            )
    return None


def _missing_message(facts_by_index: dict, count: int, timeout: float, address: Address) -> str:
    absent = [i for i in range(count) if i not in facts_by_index]
    connected = ", ".join(f"{i} on {facts_by_index[i]['host']}" for i in sorted(facts_by_index))
    shown = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
    return (
        f"{len(facts_by_index)} of {count} processes connected to {address.described()} within "
        f"{timeout:g} s: {connected}; missing: {shown}"
    )


def _connect(
    address: Address, count: int, index: int, facts: dict, deadline: float, timeout, grace: float
):
    """The side of `meet_peers` of all processes but 0."""
    peer_socket = None
    while peer_socket is None and time.monotonic() < deadline:
        # Names are looked up again: those of pods appear some time after their machines.
        for host in address.resolved():
            try:
                peer_socket = socket.create_connection((host, address.port), timeout=5)
                break
            except OSError:
                continue
        else:
            time.sleep(0.2)
    if peer_socket is None:
        loopback = all(map(_is_loopback, address.resolved())) and address.resolved()
        hint = "; a loopback address is this machine itself" if loopback else ""
        raise RunFailed(
            f"process {index} on {facts['host']} could not connect to process 0 at "
            f"{address.described()} within {timeout:g} s{hint}; process 0 has not started, or a "
            f"firewall blocks the port"
        )
    connection = Connection(peer_socket)
    try:
        connection.send({"index": index, "count": count, "facts": facts})
        # Process 0 waits as long as this one does, and knows better what is missing.
        answer = connection.next_message(max(1.0, deadline - time.monotonic()) + 10)
    except (OSError, ValueError):
        raise RunFailed(
            f"process 0 at {address.described()} left before all had connected"
        ) from None
    if "end" in answer:
        raise RunFailed(answer["end"])
    return answer["all_facts"], PeerWatch(index, answer["all_facts"], {0: connection}, grace)


class Connection:
    """Exchanges JSON objects over a socket, one a line."""

    def __init__(self, peer_socket: socket.socket):
        self.socket, self._incomplete = peer_socket, b""

    def send(self, message: dict) -> None:
        self.socket.settimeout(5)
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """Returns the messages that have arrived; None where the other end is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        *complete, self._incomplete = (self._incomplete + data).split(b"\n")
        return [json.loads(line) for line in complete] if data else None

    def next_message(self, seconds: float) -> dict:
        """Waits for the next message. Raises OSError where none arrives in time."""
        deadline = time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            messages = self.receive()
            if messages is None:
                raise ConnectionError("the other end is closed")
            if messages:
                return messages[0]

    def close(self) -> None:
        self.socket.close()


def _send_all(connections: dict[int, Connection], message: dict) -> None:
    for connection in connections.values():
        try:
            connection.send(message)
        except OSError:
            continue


class PeerWatch:
    """Ends this process, with one line on stderr and status 1, when another process is lost."""

    def __init__(
        self,
        index: int,
        all_facts: list[dict],
        connections: dict[int, Connection],
        grace: float,
        listener: socket.socket | None = None,
    ):
        self._index, self._all_facts, self._connections = index, all_facts, connections
        self._grace, self._listener = grace, listener
        self._last_heard = dict.fromkeys(connections, time.monotonic())
        # {index: reason} of the processes that say they leave. They have `grace` seconds more to
        # see the others leave as well.
        self._leaving: dict[int, str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        selector, last_sent = selectors.DefaultSelector(), 0.0
        for index, connection in self._connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, (index, connection))
        while not self._done.is_set():
            for key, _ in selector.select(timeout=HEARTBEAT_SECONDS / 2):
                index, connection = key.data
                messages = connection.receive()
                if messages is None:
                    selector.unregister(connection.socket)
                    del self._last_heard[index]
                    self._lost(index, "has died")
                for message in messages or ():
                    self._handle(index, message)
            now = time.monotonic()
            if now - last_sent >= HEARTBEAT_SECONDS:
                _send_all({i: self._connections[i] for i in self._last_heard}, {"beat": 1})
                last_sent = now
            for index, last in list(self._last_heard.items()):
                if now - last > self._grace and index not in self._leaving:
                    self._lost(index, f"has been silent for {self._grace:g} s")

    def _handle(self, index: int, message: dict) -> None:
        self._last_heard[index] = time.monotonic()
        if "end" in message:
            self._end(message["end"])
        if "leave" in message:
            self._leaving[index] = message["leave"]
            if message["leave"]:
                threading.Timer(self._grace, self._end, [message["leave"]]).start()

    def _lost(self, index: int, how: str) -> None:
        if index in self._leaving or self._done.is_set():
            return
        self._end(f"process {index} on {self._all_facts[index]['host']} {how}")

    def _end(self, reason: str) -> None:
        if self._done.is_set():
            return
        self._done.set()
        if self._index == 0:
            _send_all(self._connections, {"end": reason})
        advice = "its checkpoints are complete, and the same command continues from the last one"
        print(f"error: {reason}; the run ends here: {advice}", file=sys.stderr, flush=True)
        os._exit(1)

    def end_if_peer_failed(self, seconds: float = 5.0) -> None:
        """Ends this process if another one's failure is the cause of the failure here.

        Waits for `seconds`, as the other's reason may arrive a moment later.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if reason := next((text for text in self._leaving.values() if text), None):
                self._end(reason)
            time.sleep(0.05)

    def leave(self, reason: str = "") -> None:
        """Tells the others that this process is about to end, and what went wrong, if anything."""
        self._done.set()
        _send_all(self._connections, {"leave": reason})
