"""How the processes of a run find each other, and how they notice that one is gone.

Process 0 listens on the coordinator's port. Each of the others connects, says who it is, and keeps
the connection: a line a second in both directions. So a process that dies is noticed at once, one
that hangs or whose machine is lost after a set time, and everybody learns which it was. JAX's own
service, on the next port, would end them too, but later and without a name.
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

BEAT = 1.0


class Address:
    """host:port of process 0."""

    def __init__(self, text: str):
        self.text = text
        self.host, _, port = text.rpartition(":")
        if not self.host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise InputError(
                f"--coordinator={text} must be HOST:PORT of process 0's machine; "
                f"node1:8476 would work"
            )
        self.port = int(port)

    @property
    def jax(self) -> str:
        """Where JAX's own service listens."""
        return f"{self.host}:{self.port + 1}"

    def resolved(self) -> list[str]:
        """The addresses that the name stands for here; [] where it has none (yet)."""
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), None, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return sorted({entry[4][0] for entry in found})

    def described(self) -> str:
        found = ", ".join(self.resolved()) or "no address"
        return f"{self.text} ({self.host} is {found} here)"


def check_loopback(address: Address, own: list[str]) -> None:
    """Raises InputError where a machine's name stands for an address that only it can reach.

    `own` are this machine's other addresses, to name one that would work.
    """
    found = address.resolved()
    literal = address.host == "localhost" or _is_loopback(address.host.strip("[]"))
    if found and all(map(_is_loopback, found)) and not literal:
        better = next((a for a in own if not _is_loopback(a)), "its address on the network")
        raise InputError(
            f"--coordinator={address.text}: {address.host} is {found[0]} here, a loopback address "
            f"that no other host can reach (see /etc/hosts); {better}:{address.port} would work"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def meet(address: Address, count: int, index: int, card: dict, timeout: float, grace: float):
    """Waits until all processes are there. Returns (the cards of all, the `Watch` over them).

    Args:
      address: of process 0.
      count, index: how many processes there are, and which this one is.
      card: what this process says of itself; "host" is shown to people, "same" must be equal on
        all of them.
      timeout: seconds to wait.
      grace: seconds of silence after which a process counts as gone.

    Raises:
      InputError: the port is in use, two processes have the same number, or they are not alike.
      RunFailed: not all came in time.
    """
    until = time.monotonic() + timeout
    if index:
        return _call(address, count, index, card, until, timeout, grace)
    return _host(address, count, card, until, timeout, grace)


def _host(address: Address, count: int, card: dict, until: float, timeout: float, grace: float):
    try:
        listening = _listen(address.port)
    except OSError as error:
        raise InputError(
            f"--coordinator={address.text}: port {address.port} cannot be used here "
            f"({error.strerror}), perhaps by another run; {address.host}:{address.port + 10} might"
        ) from None
    cards, lines = {0: card}, {}
    try:
        while len(cards) < count and (left := until - time.monotonic()) > 0:
            listening.settimeout(left)
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                break
            line = Line(connection)
            try:
                came = line.wait(min(5.0, timeout))
                number = came["index"]
            except (OSError, ValueError, KeyError, TypeError):
                line.close()  # somebody else, or one that gave up
                continue
            fault = _fault(cards, count, number, came)
            cards.setdefault(number, came["card"])
            lines.setdefault(number, line)
            if fault:
                line.say({"end": fault})
                _tell(lines, {"end": fault})
                raise InputError(fault)
        if len(cards) < count:
            fault = _absent(cards, count, timeout, address)
            _tell(lines, {"end": fault})
            raise RunFailed(fault)
    except BaseException:
        listening.close()
        raise
    everyone = [cards[i] for i in range(count)]
    _tell(lines, {"cards": everyone})
    # Still listening, so that another run finds the port taken.
    return everyone, Watch(0, everyone, lines, grace, listening)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _fault(cards: dict, count: int, number: int, came: dict) -> str | None:
    host = came["card"]["host"]
    if came["count"] != count:
        return f"process {number} on {host} has --num_processes={came['count']}, process 0 {count}"
    if number in cards or not 0 < number < count:
        taken = f", which is on {cards[number]['host']}" if number in cards else ""
        return (
            f"--process_id={number} on {host} is none of the {count - 1} that are awaited{taken}; "
            f"each process needs a number of its own from 0 to {count - 1}"
        )
    for name, value in cards[0]["same"].items():
        other = came["card"]["same"].get(name)
        if other != value:
            return (
                f"process {number} on {host} has another {name} than process 0 on "
                f"{cards[0]['host']}: {other} and {value}; all must start alike"
            )
    return None


def _absent(cards: dict, count: int, timeout: float, address: Address) -> str:
    absent = [i for i in range(count) if i not in cards]
    here = ", ".join(f"{i} on {cards[i]['host']}" for i in sorted(cards))
    shown = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
    return (
        f"{len(cards)} of {count} processes came to {address.described()} within {timeout:g} s: "
        f"{here}; missing: {shown}"
    )


def _call(address: Address, count: int, index: int, card: dict, until, timeout, grace: float):
    connection = None
    while connection is None and time.monotonic() < until:
        # Names are looked up again: those of pods appear some time after their machines.
        for host in address.resolved():
            try:
                connection = socket.create_connection((host, address.port), timeout=5)
                break
            except OSError:
                continue
        else:
            time.sleep(0.2)
    if connection is None:
        only = all(map(_is_loopback, address.resolved())) and address.resolved()
        why = "; a loopback address is this machine itself" if only else ""
        raise RunFailed(
            f"process {index} on {card['host']} found no process 0 at {address.described()} within "
            f"{timeout:g} s{why}; it has not started, or a firewall stands between"
        )
    line = Line(connection)
    try:
        line.say({"index": index, "count": count, "card": card})
        # Process 0 waits as long as we do, and knows better what is missing.
        answer = line.wait(max(1.0, until - time.monotonic()) + 10)
    except (OSError, ValueError):
        raise RunFailed(f"process 0 at {address.described()} left before all had come") from None
    if "end" in answer:
        raise RunFailed(answer["end"])
    return answer["cards"], Watch(index, answer["cards"], {0: line}, grace)


class Line:
    """JSON objects over a connection, one a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self._rest = connection, b""

    def say(self, message: dict) -> None:
        self.socket.settimeout(5)
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> list[dict] | None:
        """What has come; None where the other end is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in whole] if data else None

    def wait(self, seconds: float) -> dict:
        """The next message. Raises OSError where none comes in time."""
        until = time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            found = self.hear()
            if found is None:
                raise ConnectionError("the other end is closed")
            if found:
                return found[0]

    def close(self) -> None:
        self.socket.close()


def _tell(lines: dict[int, Line], message: dict) -> None:
    for line in lines.values():
        try:
            line.say(message)
        except OSError:
            continue


class Watch:
    """Ends this process, with one line on stderr and status 1, when another is gone."""

    def __init__(
        self, index: int, cards: list[dict], lines: dict[int, Line], grace: float, port=None
    ):
        self._index, self._cards, self._lines, self._grace = index, cards, lines, grace
        self._port = port
        self._last = dict.fromkeys(lines, time.monotonic())
        # Those that leave say so; they have `grace` seconds more to see the others leave as well.
        self._left: dict[int, str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        selector, said = selectors.DefaultSelector(), 0.0
        for index, line in self._lines.items():
            selector.register(line.socket, selectors.EVENT_READ, (index, line))
        while not self._done.is_set():
            for key, _ in selector.select(timeout=BEAT / 2):
                index, line = key.data
                found = line.hear()
                if found is None:
                    selector.unregister(line.socket)
                    del self._last[index]
                    self._gone(index, "has died")
                for message in found or ():
                    self._note(index, message)
            now = time.monotonic()
            if now - said >= BEAT:
                _tell({i: self._lines[i] for i in self._last}, {"beat": 1})
                said = now
            for index, last in list(self._last.items()):
                if now - last > self._grace and index not in self._left:
                    self._gone(index, f"has been silent for {self._grace:g} s")

    def _note(self, index: int, message: dict) -> None:
        self._last[index] = time.monotonic()
        if "end" in message:
            self._end(message["end"])
        if "leave" in message:
            self._left[index] = message["leave"]
            if message["leave"]:
                threading.Timer(self._grace, self._end, [message["leave"]]).start()

    def _gone(self, index: int, how: str) -> None:
        if index in self._left or self._done.is_set():
            return
        self._end(f"process {index} on {self._cards[index]['host']} {how}")

    def _end(self, why: str) -> None:
        if self._done.is_set():
            return
        self._done.set()
        if self._index == 0:
            _tell(self._lines, {"end": why})
        more = "its checkpoints are whole, and the same command goes on from the last one"
        print(f"error: {why}; the run ends here: {more}", file=sys.stderr, flush=True)
        os._exit(1)

    def explain(self, seconds: float = 5.0) -> None:
        """Called where something failed in this process: does not return if another one's end was
        the reason, which may become known a moment later."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if why := next((text for text in self._left.values() if text), None):
                self._end(why)
            time.sleep(0.05)

    def leave(self, why: str = "") -> None:
        """This process is about to end; `why` says what went wrong, if anything did."""
        self._done.set()
        _tell(self._lines, {"leave": why})
