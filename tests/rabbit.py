"""A RabbitMQ of the tests' own: a second node with own name, ports and data, that they may stop and start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
import pytest
from yarl import URL

from tests.helpers import clean_environ, eventually, free_port

# The packages' wrappers in /usr/sbin change the user; these run as whoever runs the tests.
FOLDER = "/usr/lib/rabbitmq/bin"
MISSING = "RabbitMQ is not installed: `apt-get install rabbitmq-server` (its service need not run)"


def rabbit_program(name: str) -> str:
    """A program of RabbitMQ's."""
    found = shutil.which(name, path=f"{FOLDER}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.fail(MISSING)
    return found


@dataclass
class Rabbit:
    """One node, made by `start`; `stop_app` and `start_app` are its restart."""

    home: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Returns when it takes connections."""
        self.home.mkdir(parents=True, exist_ok=True)
        self._name = f"test{uuid.uuid4().hex[:8]}@localhost"
        (self.home / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        self._environ = clean_environ(
            HOME=str(self.home),
            RABBITMQ_NODENAME=self._name,
            RABBITMQ_CONFIG_FILE=str(self.home / "rabbitmq.conf"),
            RABBITMQ_DIST_PORT=str(free_port()),
            RABBITMQ_MNESIA_BASE=str(self.home / "data"),
            RABBITMQ_LOG_BASE=str(self.home / "log"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self.home / "plugins"),
            RABBITMQ_PID_FILE=str(self.home / "pid"),
        )
        with (self.home / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [rabbit_program("rabbitmq-server")],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        eventually(self._answers, 180, what=f"RabbitMQ answers; see {self.home / 'output'}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "output").read_text()[-2000:]
        with socket.socket() as probe:
            probe.settimeout(2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """End it at once with all that it has started, if it was started: nobody reads its data again."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)

    def stop_app(self) -> None:
        """Every connection ends, and no new one is taken."""
        self._ctl("stop_app")

    def start_app(self) -> None:
        self._ctl("start_app")

    def unsettled(self, queue: str) -> int:
        """How many messages of a queue wait or are held by a consumer; no client is told of the latter."""
        listed = self._ctl("--quiet", "--no-table-headers", "list_queues", "name", "messages")
        return {name: int(count) for name, count in map(str.split, listed.splitlines())}[queue]

    def _ctl(self, *command: str) -> str:
        done = subprocess.run(
            [rabbit_program("rabbitmqctl"), "-n", self._name, *command],
            env=self._environ,
            check=True,
            capture_output=True,
            text=True,
            timeout=180,
        )
        return done.stdout


class Cutter:
    """A TCP proxy in a thread of its own, whose connections can be cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.refuse = False  # new connections, too
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> int:
        """Reset all connections, wherever they are; how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    async def _cut(self) -> int:
        writers, self._writers = self._writers, set()
        for writer in writers:
            reset = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
        return len(writers) // 2

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refuse:
                raise ConnectionRefusedError
            inner = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, inner[1]}
        await asyncio.gather(_pump(reader, inner[1]), _pump(inner[0], writer))
        self._writers -= {writer, inner[1]}

    def close(self) -> None:
        """Cut everything for good."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def channel_of(url: str, *, confirms: bool = True) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """A channel, as anybody can have one."""
    connection = aio_pika.Connection(URL(url))
    try:
        await connection.connect(timeout=10)
        yield await connection.channel(publisher_confirms=confirms)
    finally:
        await connection.close()


async def put(url: str, queue: str, *bodies: bytes, ids: Sequence[str] = ()) -> None:
    """Publish raw bytes into a queue that is there."""
    # With confirms the library gives an id to each message that has none.
    async with channel_of(url, confirms=bool(ids)) as channel:
        for index, body in enumerate(bodies):
            message = aio_pika.Message(body, message_id=ids[index] if ids else None, delivery_mode=2)
            await channel.default_exchange.publish(message, routing_key=queue, mandatory=bool(ids))


async def make_queue(url: str, queue: str) -> None:
    """A durable queue, as an operator makes it."""
    async with channel_of(url) as channel:
        await channel.declare_queue(queue, durable=True)


async def taken(url: str, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """All messages of a queue, out of it; none if there is no such queue."""
    found = []
    async with channel_of(url) as channel:
        try:
            declared = await channel.declare_queue(queue, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return []
        while message := await declared.get(fail=False):
            await message.ack()
            found.append(message)
    return found


async def numbers(url: str, queue: str) -> tuple[int, int]:
    """How many messages wait in a queue (those that a consumer holds do not count) and who consumes it."""
    async with channel_of(url) as channel:
        try:
            found = (await channel.declare_queue(queue, passive=True)).declaration_result
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return 0, 0
        return found.message_count or 0, found.consumer_count or 0


async def size(url: str, queue: str) -> int:
    """How many messages wait in a queue."""
    return (await numbers(url, queue))[0]
