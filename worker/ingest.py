"""Makes jobs of messages: from the inbox in the database, and from a message broker if one is configured.

Any number of workers may do so. A message is settled after its job is stored, and the job's id is derived
from the message's: what is delivered again makes no second job.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4 import messages
from core4.brokers import Broker, Delivery, connector
from core4.catalogue import Catalogue
from core4.changes import Change, never
from core4.config import Settings
from core4.database import Database
from core4.errors import (
    BadMessage,
    BrokerLost,
    Core4Error,
    Forbidden,
    KeyReused,
    Unavailable,
    UnknownJob,
)
from core4.inbox import Inbox
from core4.jobs import JobOrder, canonical, derived_id
from core4.messages import Message
from core4.orders import make_order
from core4.queues import JobQueue
from core4.service import masked
from core4.transitions import clean
from core4.users import UserStore

log = logging.getLogger(__name__)

HOLD = 60.0  # seconds that a message is held at most while the database does not take its job
LOOK = 1.0  # seconds between two looks for a worker that publishes an unknown job
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0  # seconds until a broker that was lost is tried again
USERNAME = "broker"  # who enqueues where no user is set
_NAMES = 10_000  # unknown names that are remembered

_TROUBLE = (PyMongoError, Unavailable, BrokerLost, TimeoutError, OSError)


class Ingest:
    """Takes messages for the namespaces of a worker until it is stopped."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        queue: JobQueue,
        live: Callable[[], bool] = never,
    ) -> None:
        self._database, self._settings, self._queue = database, settings, queue
        self._catalogue, self._users = Catalogue(database), UserStore(database, settings)
        self._inbox = Inbox(database, poll=settings.poll, prefetch=settings.broker_prefetch, live=live)
        # Since when a name has been looked for in vain. Beyond that time it is refused at once: messages of
        # an unknown name must not keep the others of their queue waiting one by one.
        self._unknown: dict[str, float] = {}
        self._settled = 0  # messages, so far
        url = settings.broker_url
        self._connect = partial(connector(url), url, settings.broker_prefetch) if url else None

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._inbox.prepare()

    def hear(self, change: Change) -> None:
        """A hint that something may be in the inbox; an update or a delete only tells that it is settled."""
        if change.kind in ("insert", "resync"):
            self._inbox.hint()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; outlives outages of the database and of the broker."""
        sources = [self._serve("inbox", self._open_inbox)]
        if self._connect is not None:
            sources.append(self._serve("broker", self._connect))
        tasks = [asyncio.create_task(source) for source in sources]
        try:
            await stop.wait()
        finally:
            # What is cut in the middle has not been settled: it is delivered again, to somebody.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._users.close()

    async def _open_inbox(self) -> Broker:
        return self._inbox

    async def _serve(self, name: str, connect: Callable[[], Awaitable[Broker]]) -> None:
        """Take messages from one broker; after a trouble of either side again, with growing pauses."""
        pause = 0.0
        while True:
            settled = self._settled
            try:
                await self._database.ping()  # before anything is taken that could not be stored
                await self._consume(name, connect)
            except* _TROUBLE as group:
                error = masked(str(group.exceptions[0]))[:300]
                log.warning("ingest.interrupted", extra={"source": name, "error": error})
            except* Exception as group:  # another's broker may raise anything; the worker goes on
                log.error("ingest.failed", extra={"source": name}, exc_info=group)
            # As long as messages get through, the trouble is a short one.
            pause = FIRST_PAUSE if self._settled > settled else min(max(pause * 2, FIRST_PAUSE), LAST_PAUSE)
            await asyncio.sleep(pause)

    async def _consume(self, name: str, connect: Callable[[], Awaitable[Broker]]) -> None:
        """Until something fails. Closing gives back to the broker whatever is not settled."""
        async with AsyncExitStack() as stack:
            broker = await connect()
            stack.push_async_callback(broker.close)
            log.info("ingest.connected", extra={"source": name, "namespaces": self._settings.namespaces})
            deliveries = broker.deliveries(self._settings.namespaces)
            async with asyncio.TaskGroup() as waiting, aclosing(deliveries):  # type: ignore[type-var]
                async for delivery in deliveries:
                    message = await self._read(delivery)
                    if message and not await self._take(broker.scope, delivery, message):
                        waiting.create_task(self._wait(broker.scope, delivery, message))

    async def _read(self, delivery: Delivery) -> Message | None:
        """What the message says; None if that could not be read: it is a dead letter then."""
        try:
            message = messages.read(delivery.body, delivery.queue, cap=self._settings.max_body)
            if message.namespace != delivery.queue and not self._settings.broker_any_namespace:
                raise BadMessage(
                    f"[namespace] is {message.namespace}, but queue {delivery.queue} takes only its own; "
                    "see CORE4_BROKER_ANY_NAMESPACE"
                )
            if self._settings.broker_require_id and _key(delivery, message) is None:
                raise BadMessage("the message has no id; see CORE4_BROKER_REQUIRE_ID")
        except Exception as error:
            await _bury(delivery, error)
            return None
        return message

    async def _take(self, scope: str, delivery: Delivery, message: Message, *, last: bool = False) -> bool:
        """Make the job and settle the message; False if no worker has published such a job yet.

        Raises: what a database says that does not answer; the message is as it was.
        """
        try:
            async with asyncio.timeout(HOLD):
                job_id = await self._enqueue(scope, delivery, message)
        except UnknownJob as error:
            if not last and self._is_patient(message.qual_names[0]):
                return False
            await _bury(delivery, error)
        except _TROUBLE:
            raise
        except Exception as error:  # the same the next time: it must not keep all others waiting
            await _bury(delivery, error)
        else:
            await delivery.accept()
            self._settled += 1
            extra = {"job_id": str(job_id), "queue": delivery.queue, "message_id": delivery.message_id}
            log.info("message.enqueued", extra=extra)
        return True

    async def _wait(self, scope: str, delivery: Delivery, message: Message) -> None:
        """Try a message of an unknown name again until its worker is there or patience ends."""
        until = time.monotonic() + self._settings.broker_patience
        done = False
        while not done:
            await asyncio.sleep(min(LOOK, self._settings.broker_patience))
            done = await self._take(scope, delivery, message, last=time.monotonic() >= until)

    def _is_patient(self, name: str) -> bool:
        since = self._unknown.setdefault(name, time.monotonic())
        if len(self._unknown) > _NAMES:
            self._unknown.pop(next(iter(self._unknown)))
        return time.monotonic() - since < self._settings.broker_patience

    async def _enqueue(self, scope: str, delivery: Delivery, message: Message) -> ObjectId:
        order = await self._order(delivery, message)
        key = _key(delivery, message)
        if key is None:
            return (await self._queue.enqueue(order)).id
        job_id = derived_id("message", canonical([scope, delivery.queue, key]))
        job = await self._queue.enqueue(order, job_id=job_id, once=True)
        if job.document.get("request_hash") != order.request_hash:
            raise KeyReused(f"the id belongs to another message: it made job [{job.id}]")
        return job.id

    async def _order(self, delivery: Delivery, message: Message) -> JobOrder:
        for name in message.qual_names:
            entry = await self._catalogue.get(name)
            if entry is not None:
                break
        else:
            raise UnknownJob(message.name)
        self._unknown.pop(message.qual_names[0], None)
        username = await self._allowed(name)
        return make_order(
            entry,
            messages.bind(entry, message),
            args_cap=self._settings.args_cap,
            options=message.options,
            namespace=message.namespace,
            username=username,
            hostname=socket.gethostname(),
            request_id=message.request_id or delivery.message_id,
            request_hash=message.digest,
        )

    async def _allowed(self, name: str) -> str:
        """Who enqueues: our settings say so, never the message.

        Raises: Forbidden.
        """
        username = self._settings.broker_user
        if username is None:
            return USERNAME
        user = await self._users.get(username)
        if user is None or not user.is_active or not user.may.may_execute(name):
            raise Forbidden(f"user [{username}] of the broker has no right to execute job [{name}]")
        return username


def _key(delivery: Delivery, message: Message) -> str | None:
    """What tells a redelivery from a new message."""
    return delivery.message_id or message.request_id


async def _bury(delivery: Delivery, error: Exception) -> None:
    reason, detail = "internal", type(error).__name__
    if isinstance(error, Core4Error):
        reason, detail = error.code, clean(error.detail)
    else:
        log.error("message.failed", extra={"message_id": delivery.message_id}, exc_info=error)
    where = {"queue": delivery.queue, "message_id": delivery.message_id}
    log.warning("message.dead", extra={**where, "reason": reason, "detail": detail[:300]})
    await delivery.bury(reason, detail)
