"""A network of a process's own, from which one port of this machine is reachable and nothing else.

The kernel's: a network namespace, in which there is a loopback and no other device. The process makes the
port that it may talk to itself, and passes the listening socket out to the test, which forwards what comes.

Run as a program it goes into that network and becomes the command: ``island.py SOCKET PORT COMMAND...``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SIOCSIFFLAGS = 0x8914
UP = 0x1


@cache
def means() -> tuple[str, ...] | None:
    """The command that starts another one in a network of its own; None if this machine lets nobody.

    In a container without rights there is no way, neither as root nor as anybody else.
    """
    if not shutil.which("unshare"):
        return None
    for way in (("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net")):
        if subprocess.run([*way, "true"], capture_output=True, check=False).returncode == 0:
            return way
    return None


class Ferry:
    """Forwards the islands' port `port` to that of this machine; for as long as the block lasts."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._folder = tempfile.TemporaryDirectory(prefix="ferry")  # a socket's path must be short
        self._path = Path(self._folder.name) / "socket"
        self._servers: list[asyncio.Server] = []
        self._waiting: set[asyncio.Task[None]] = set()

    def aboard(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The command that runs `command` on an island; itself where the machine has none."""
        way = means()
        if way is None:
            return list(command)
        return [*way, sys.executable, __file__, str(self._path), str(self.port), *command]

    async def __aenter__(self) -> Ferry:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._waiting.add(asyncio.create_task(self._islands()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        for server in self._servers:
            server.close()
        self._listener.close()
        self._folder.cleanup()

    async def _islands(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            with connection:
                connection.setblocking(True)
                _, (port, *_), *_ = socket.recv_fds(connection, 1, 1)
            server = await asyncio.start_server(self._forward, sock=socket.socket(fileno=port))
            self._servers.append(server)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            await asyncio.gather(_copy(reader, back), _copy(there, writer))
        writer.close()
        self._waiting.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one of both ends; then the other side is told."""
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()


def main(path: str, port: str, *command: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP))
    with socket.create_server(("127.0.0.1", int(port))) as listener, socket.socket(socket.AF_UNIX) as ferry:
        ferry.connect(path)
        socket.send_fds(ferry, [b"x"], [listener.fileno()])
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
