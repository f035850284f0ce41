"""RabbitMQ as a `Broker`: one durable queue per namespace, and beside it ``<queue>.dead`` for dead letters.

A queue that exists is taken as it is, so an operator may make it a quorum queue. Acknowledgements are by
hand; a dead letter is confirmed in its place before the message leaves the queue.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity
from pamqp import decode
from yarl import URL

from core4.errors import BrokerLost

T = TypeVar("T")

ANSWER = 20.0  # seconds for one answer of the broker
DEAD = ".dead"
DETAIL = 2000  # characters of a detail in a header
_TROUBLE = (AMQPError, OSError, TimeoutError, asyncio.InvalidStateError, RuntimeError)

logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # it logs what it raises, URLs included
logging.getLogger("aio_pika").setLevel(logging.CRITICAL)


def _short_text(value: bytes) -> tuple[int, str]:
    length = value[0] if value else 0
    # Not replaced by one character for all: two ids that differ must still differ.
    return length + 1, value[1 : length + 1].decode("utf-8", "backslashreplace")


def _or_nothing(read: Callable[[bytes], Any], size: Callable[[bytes], int]) -> Callable[[bytes], Any]:
    """A reader that passes over a value it cannot read; `size` says how many bytes that is."""

    def tolerant(value: bytes) -> tuple[int, Any]:
        try:
            found: tuple[int, Any] = read(value)
        except (ValueError, OverflowError, OSError, struct.error, RecursionError):
            return size(value), None
        return found

    return tolerant


# The library ends the connection when a property of a message is not as it should be. It would be delivered
# again, for ever: whoever may publish could block a queue by one message. We read nothing but its id.
decode.METHODS["shortstr"] = _short_text
decode.METHODS["timestamp"] = _or_nothing(decode.timestamp, lambda value: 8)
decode.METHODS["table"] = _or_nothing(decode.field_table, lambda value: 4 + int.from_bytes(value[:4], "big"))


async def connect(url: str, prefetch: int) -> RabbitBroker:
    """A broker that has answered.

    Raises: BrokerLost.
    """
    connection = aio_pika.Connection(URL(url), client_properties={"connection_name": "core4"})
    try:
        await _answered(connection.connect())
        channel = await _answered(connection.channel(publisher_confirms=True, on_return_raises=True))
        await _answered(channel.set_qos(prefetch_count=prefetch))
    except BaseException:
        await connection.close()
        raise
    # As aiormq reads it: no path is the default virtual host, as is a bare slash.
    vhost = unquote(urlsplit(url).path.removeprefix("/")) or "/"
    return RabbitBroker(connection, channel, vhost)


async def _answered(question: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(ANSWER):
            return await question
    except _TROUBLE as error:
        raise BrokerLost(f"RabbitMQ: {type(error).__name__} {error}"[:500]) from error


class RabbitBroker:
    """One connection with one channel."""

    def __init__(self, connection: AbstractConnection, channel: AbstractChannel, vhost: str) -> None:
        self.scope = f"amqp {vhost}"
        self._connection, self._channel = connection, channel
        self._known: set[str] = set()
        self._arrived: asyncio.Queue[RabbitDelivery | None] = asyncio.Queue()
        channel.close_callbacks.add(self._on_closed)

    async def _on_message(self, queue: str, message: AbstractIncomingMessage) -> None:
        self._arrived.put_nowait(RabbitDelivery(self, message, queue))

    def _on_closed(self, *_: object) -> None:
        self._arrived.put_nowait(None)

    async def deliveries(self, queues: Sequence[str]) -> AsyncIterator[RabbitDelivery]:
        inner = await _answered(self._channel.get_underlay_channel())
        inner.on_consumer_cancel_callbacks.add(self._on_closed)  # as when somebody deletes the queue
        for name in queues:
            await self.declare(name)
            queue = await _answered(self._channel.get_queue(name, ensure=False))
            await _answered(queue.consume(partial(self._on_message, name)))
        while (delivery := await self._arrived.get()) is not None:
            yield delivery
        raise BrokerLost("RabbitMQ ended the connection")

    async def declare(self, name: str) -> None:
        """See to it that a queue is there."""
        if name in self._known:
            return
        # Asked for on a channel of its own: a refusal closes the channel, and with it all consumers.
        probe = await _answered(self._connection.channel(publisher_confirms=False))
        try:
            await probe.declare_queue(name, passive=True, timeout=ANSWER)
        except ChannelNotFoundEntity:
            # Never auto-delete: the messages would go with the last consumer.
            await _answered(self._channel.declare_queue(name, durable=True, timeout=ANSWER))
        except _TROUBLE as error:
            raise BrokerLost(f"RabbitMQ: queue {name}: {error}"[:500]) from error
        finally:
            with suppress(*_TROUBLE):
                await probe.close()
        self._known.add(name)

    async def send(
        self, queue: str, body: bytes, *, message_id: str | None, headers: dict[str, str] | None = None
    ) -> None:
        message = aio_pika.Message(
            body,
            message_id=message_id,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers=dict(headers or {}),
        )
        await self.declare(queue)
        exchange = self._channel.default_exchange
        try:
            await _answered(exchange.publish(message, routing_key=queue, mandatory=True, timeout=ANSWER))
        except BrokerLost:
            self._known.discard(queue)  # it may have been deleted
            raise

    async def close(self) -> None:
        with suppress(BrokerLost):
            await _answered(self._connection.close())


class RabbitDelivery:
    """One message of a queue."""

    def __init__(self, broker: RabbitBroker, message: AbstractIncomingMessage, queue: str) -> None:
        self.queue, self.body = queue, message.body
        self.message_id = message.message_id or None
        self._broker, self._message = broker, message

    async def accept(self) -> None:
        await _answered(self._message.ack())

    async def bury(self, reason: str, detail: str) -> None:
        headers = {"x-core4-reason": reason, "x-core4-detail": detail[:DETAIL], "x-core4-queue": self.queue}
        await self._broker.send(self.queue + DEAD, self.body, message_id=self.message_id, headers=headers)
        await self.accept()
