"""Send jobs through a message queue: RabbitMQ, the built-in inbox, or another broker that is installed.

from core4.producers import get_producer_channel

with get_producer_channel("amqp://guest:guest@localhost/", "ETL") as channel:
    channel.send_job({"name": "my_jobs.Extract", "kwargs": {"month": "2026-01"}})

For asyncio there is `Producer`, with the same methods.
"""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from core4 import messages
from core4.brokers import Broker, connector
from core4.config import MIB, mask_url
from core4.errors import BadMessage, BrokerLost, ConfigError
from core4.jobs import NAMESPACE

T = TypeVar("T")

LARGEST = MIB  # bytes of a message: what the default CORE4_MAX_BODY accepts
TRIES, PAUSE = 3, 0.5  # of one message; seconds between them
TOGETHER = 100  # messages sent before the first is confirmed
PATIENCE = 120.0  # seconds for one call of a channel, as the last resort


class Producer:
    """Puts jobs into one queue. A message that was sent is safe at the broker.

    Args:
        url: of the broker; ``mongodb://...`` is the built-in inbox in that database.
        queue: the namespace whose workers take the messages.
        database: name of the database, for the inbox.

    A connection is made when it is needed, and again when it was lost: a message is then sent once more,
    under the same id, so that it makes one job.

    Raises: ConfigError for a URL or a queue that cannot be.
    """

    def __init__(self, url: str, queue: str, *, database: str = "core4") -> None:
        if not NAMESPACE.fullmatch(queue):
            raise ConfigError(f"queue {queue!r:.110} is no namespace: 1 to 100 of A-Z a-z 0-9 _ -")
        self.queue = queue
        self._shown = mask_url(url)
        self._connect = _connect_to(url, database)
        self._broker: Broker | None = None
        self._connecting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown!r}, {self.queue!r})"

    async def send_job(self, job: Mapping[str, Any]) -> str:
        """Send one job: ``name``, ``args``, ``kwargs``, options, all of it under ``"job"`` or not.

        Returns its request id: the message's ``request_id``, else a new one. Under the same id a job is
        made once, however often it is sent.

        Raises: BadMessage or TooLarge, before anything is sent; BrokerLost if it may not have arrived.
        """
        return (await self.send_jobs([job]))[0]

    async def send_jobs(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Send many; none if one is malformed. After BrokerLost some may have arrived."""
        if isinstance(jobs, Mapping | str):
            raise BadMessage("send_jobs takes a list of jobs; for one there is send_job")
        bodies = [messages.write(job, self.queue, cap=LARGEST) for job in jobs]
        ids = [messages.check(job, self.queue).request_id or uuid.uuid4().hex for job in jobs]
        sent = list(zip(bodies, ids, strict=True))
        for start in range(0, len(sent), TOGETHER):
            await asyncio.gather(*(self._send(*each) for each in sent[start : start + TOGETHER]))
        return ids

    async def _send(self, body: bytes, message_id: str) -> None:
        for left in reversed(range(TRIES)):
            broker = None
            try:
                broker = await self._connected()
                return await broker.send(self.queue, body, message_id=message_id)
            except BrokerLost:
                await self._drop(broker)
                if not left:
                    raise
            await asyncio.sleep(PAUSE)
        raise AssertionError("unreachable")

    async def _connected(self) -> Broker:
        async with self._connecting:
            if self._broker is None:
                self._broker = await self._connect()
            return self._broker

    async def _drop(self, broker: Broker | None) -> None:
        if broker is not None and broker is self._broker:
            self._broker = None
            await broker.close()

    async def close(self) -> None:
        """Give the connection back."""
        await self._drop(self._broker)

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Channel:
    """A `Producer` for programs without asyncio; made by `get_producer_channel`, good for any thread."""

    def __init__(self, url: str, queue: str, *, database: str = "core4") -> None:
        self._producer = Producer(url, queue, database=database)
        self._loop = asyncio.new_event_loop()
        # A thread of its own, so that the broker's heartbeats are answered whatever the program does.
        self._thread = threading.Thread(target=self._loop.run_forever, name="core4-producer", daemon=True)
        self._thread.start()

    def send_job(self, job: Mapping[str, Any]) -> str:
        """See `Producer.send_job`."""
        return self._run(self._producer.send_job(job))

    def send_jobs(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """See `Producer.send_jobs`."""
        return self._run(self._producer.send_jobs(jobs))

    def close(self) -> None:
        """Give the connection back; harmless if that is done."""
        if not self._loop.is_closed():
            self._run(self._producer.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise ConfigError("this channel is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def get_producer_channel(url: str, queue: str, *, database: str = "core4") -> Channel:
    """A channel into a queue; arguments as for `Producer`. Close it, or use it in a ``with`` block."""
    return Channel(url, queue, database=database)


def _connect_to(url: str, database: str) -> Callable[[], Awaitable[Broker]]:
    if re.match(r"mongodb(\+srv)?://", url):
        return lambda: _open_inbox(url, database)
    connect = connector(url)
    return lambda: connect(url, 1)


async def _open_inbox(url: str, database: str) -> Broker:
    from pymongo.errors import PyMongoError

    from core4.database import Database
    from core4.inbox import Inbox

    class OwnInbox(Inbox):
        """An inbox that closes its database, and speaks of troubles as brokers do."""

        def __init__(self, database: Database) -> None:
            super().__init__(database)
            self._own = database

        async def send(self, queue: str, body: bytes, *, message_id: str) -> None:
            try:
                await super().send(queue, body, message_id=message_id)
            except PyMongoError as error:
                raise BrokerLost(f"the database did not answer: {type(error).__name__}") from error

        async def close(self) -> None:
            await self._own.close()

    try:
        return OwnInbox(await Database.connect(url, database))
    except PyMongoError as error:
        raise BrokerLost(f"the database did not answer: {type(error).__name__}") from error
