"""A TCP proxy in front of the database that delays, drops, half-closes and resets connections.

It reads the wire protocol's frames, so that it can cut inside one and knows a write when it sees one.
Seeded; while it is calm it passes everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field

HEADER = struct.Struct("<iiii")
RESET = struct.pack("ii", 1, 0)
WRITES = (b"insert", b"update", b"delete", b"findAndModify")
# What may happen to a request while the proxy is not calm, and how often in ten thousand.
RATES = {
    "delay": 300,
    "lost request": 20,
    "half request": 20,
    "lost reply": 60,
    "half reply": 20,
    "half close": 15,
    "black hole": 10,
}
BLACK_HOLE = 2.0  # seconds before a black hole ends in a reset


@dataclass
class Proxy:
    """Listens on a port of its own in a thread of its own; `target` may change its process, not its port."""

    target: int
    seed: int
    port: int = 0
    calm: bool = True
    counts: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Returns when it listens."""
        self._random = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        listening.wait()

    def stop(self) -> None:
        """Cut everything."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, listening: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(listening))
        self._loop.close()

    async def _serve(self, listening: threading.Event) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        await self._stopped.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(writer)
            return
        # Cancelled when the proxy stops; streams would print that.
        with contextlib.suppress(asyncio.CancelledError):
            await _Connection(self, (reader, writer), upstream).run()

    def fate(self) -> str | None:
        """What happens to the next request; mostly nothing."""
        if self.calm:
            return None
        drawn = self._random.randrange(10_000)
        for name, rate in RATES.items():
            drawn -= rate
            if drawn < 0:
                return name
        return None

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One client's connection: a request, its reply, and so on, as the drivers do it."""

    def __init__(self, proxy: Proxy, client: Stream, server: Stream) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._cut_reply, self._answered = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        replies = asyncio.create_task(self._replies())
        try:
            await self._requests()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            replies.cancel()
            await asyncio.gather(replies, return_exceptions=True)
            for writer in (self._to_client, self._to_server):
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _requests(self) -> None:
        while True:
            frame = await _frame(self._from_client)
            fate = self._proxy.fate()
            if fate is None:
                await _send(self._to_server, frame)
                continue
            self._proxy.counts[fate] += 1
            if fate == "delay":
                await asyncio.sleep(self._proxy.uniform(0.005, 0.3))
                await _send(self._to_server, frame)
                continue
            if fate == "half close":
                # The client reads the end, what it has sent is done all the same.
                self._to_client.write_eof()
                await _send(self._to_server, frame)
                continue
            await self._break(fate, frame)
            return

    async def _break(self, fate: str, frame: bytes) -> None:
        is_write = _command(frame) in WRITES
        self._proxy.counts["reset inside a write"] += is_write
        if fate == "half request":
            await _send(self._to_server, frame[: len(frame) // 2])
        elif fate == "lost reply":
            await _send(self._to_server, frame)
        elif fate == "half reply":
            self._cut_reply.set()
            await _send(self._to_server, frame)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._answered.wait()
        elif fate == "black hole":
            await asyncio.sleep(BLACK_HOLE)
        _reset(self._to_client)
        if fate != "lost reply":
            _reset(self._to_server)

    async def _replies(self) -> None:
        try:
            while True:
                frame = await _frame(self._from_server)
                if self._cut_reply.is_set():
                    await _send(self._to_client, frame[: len(frame) // 2])
                    self._answered.set()
                    return
                await _send(self._to_client, frame)
        except (OSError, asyncio.IncompleteReadError):
            self._to_client.close()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(HEADER.size)
    length, *_ = HEADER.unpack(header)
    return header + await reader.readexactly(length - HEADER.size)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _command(frame: bytes) -> bytes:
    """The name of the command in a frame: the first key of its document."""
    return frame[26 : frame.find(b"\0", 26)] if len(frame) > 26 else b""


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of an orderly end."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
