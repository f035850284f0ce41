"""Clients that cost little, so that it is the server that is measured: bare sockets under one epoll."""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
LIMIT = 120.0  # seconds after which a measurement that does not end is given up


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    head = {"Host": "127.0.0.1", **headers, **({"Content-Length": str(len(body))} if body else {})}
    if body:
        head["Content-Type"] = "application/json"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class _Peer:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.buffer = b""
        self.sent = 0.0

    def answered(self) -> bytes | None:
        """The next whole answer, if it is there."""
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        match = _LENGTH.search(head)
        if not found or match is None or len(rest) < (size := int(match[1])):
            return None
        self.buffer = rest[size:]
        return head


def ask(port: int, connections: int, total: int, make: Callable[[int], bytes]) -> tuple[float, list[float]]:
    """Send `total` requests over keep-alive `connections`; the seconds of all and of each one.

    `make` is given the number of each. Anything but 200 is an error.
    """
    peers = {peer.socket.fileno(): peer for peer in (_Peer(port) for _ in range(connections))}
    poll = select.epoll()
    sent, done, took = 0, 0, []
    start = time.perf_counter()
    for number, peer in peers.items():
        poll.register(number, select.EPOLLIN)
        peer.sent = time.perf_counter()
        peer.socket.sendall(make(sent))
        sent += 1
    while done < total:
        for number, _ in poll.poll(LIMIT):
            peer = peers[number]
            peer.buffer += peer.socket.recv(1 << 20)
            head = peer.answered()
            if head is None:
                continue
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(head.decode() + peer.buffer.decode())
            took.append(time.perf_counter() - peer.sent)
            done += 1
            if sent < total:
                peer.sent = time.perf_counter()
                peer.socket.sendall(make(sent))
                sent += 1
    seconds = time.perf_counter() - start
    for peer in peers.values():
        peer.socket.close()
    return seconds, took


class Listeners:
    """Many open streams, of which only the number of events is read."""

    def __init__(self, port: int, wire: bytes, count: int) -> None:
        self._poll = select.epoll()
        self._peers: dict[int, socket.socket] = {}
        self._early: dict[int, bytes] = {}  # what came together with the head of an answer
        self.count = count
        start = time.perf_counter()
        for _ in range(count):
            peer = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
            peer.sendall(wire)
            self._peers[peer.fileno()] = peer
        for number, peer in self._peers.items():
            head = b""
            while b"\r\n\r\n" not in head:
                head += peer.recv(65536)
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(head.decode())
            self._early[number] = head.partition(b"\r\n\r\n")[2]
        self.connect_seconds = time.perf_counter() - start
        for number, peer in self._peers.items():
            peer.setblocking(False)
            self._poll.register(number, select.EPOLLIN)

    def drain(self, seconds: float) -> None:
        """Read and forget what comes until there is nothing for so long."""
        self._early.clear()
        while ready := self._poll.poll(seconds):
            for number, _ in ready:
                self._peers[number].recv(1 << 20)

    def wait_for(self, mark: bytes, events: int) -> None:
        """Until each has been sent `events` times what contains `mark`. A mark that is cut counts not."""
        left = events * self.count
        tails: dict[int, bytes] = {}

        def take(number: int, data: bytes) -> int:
            data = tails.get(number, b"") + data
            cut = data.rfind(mark)
            rest = data if cut < 0 else data[cut + len(mark) :]
            tails[number] = rest[-(len(mark) - 1) :]
            return data.count(mark)

        early, self._early = self._early, {}
        left -= sum(take(number, data) for number, data in early.items())
        end = time.perf_counter() + LIMIT
        while left > 0:
            if time.perf_counter() > end:
                raise RuntimeError(f"{left} events have not come")
            for number, _ in self._poll.poll(1):
                left -= take(number, self._peers[number].recv(1 << 20))

    def close(self) -> None:
        """End all connections."""
        self._poll.close()
        for peer in self._peers.values():
            peer.close()


@contextmanager
def listening(port: int, wire: bytes, count: int) -> Iterator[Listeners]:
    """So many open streams within the block."""
    listeners = Listeners(port, wire, count)
    try:
        yield listeners
    finally:
        listeners.close()
