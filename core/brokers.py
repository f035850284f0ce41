"""What a message broker is to us: a few methods. Others add theirs by the entry point `core4.brokers`.

The name of an entry point is the scheme of the URLs it answers to, its value a coroutine function like
`core4.rabbit.connect`: URL and prefetch in, a connected `Broker` out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, cast

from core4.errors import ConfigError

GROUP = "core4.brokers"
BUILT_IN = {"amqp": "core4.rabbit:connect", "amqps": "core4.rabbit:connect"}


class Delivery(Protocol):
    """A message that was taken from a queue and is ours until it is settled, once, by one of the two."""

    @property
    def queue(self) -> str:
        """Where it came from."""

    @property
    def body(self) -> bytes:
        """What it says."""

    @property
    def message_id(self) -> str | None:
        """The same whenever it is delivered again; None if it has none."""

    async def accept(self) -> None:
        """It is done: forget it."""

    async def bury(self, reason: str, detail: str) -> None:
        """It is a dead letter: keep it aside with `reason`, a stable word, and `detail`, for people."""


class Broker(Protocol):
    """A connection to a message broker. Each method raises `BrokerLost` when it has ended.

    What was delivered and not settled when a connection ends has to be delivered again, to somebody.
    """

    @property
    def scope(self) -> str:
        """Where the ids of a queue's messages are unique; for RabbitMQ the virtual host."""

    def deliveries(self, queues: Sequence[str]) -> AsyncIterator[Delivery]:
        """The messages of these queues as they come, without end; makes queues that are missing."""

    async def send(self, queue: str, body: bytes, *, message_id: str) -> None:
        """Put a message into a queue; it is safe there when this returns. Makes a queue that is missing."""

    async def close(self) -> None:
        """End the connection; harmless if it has ended."""


Connect = Callable[[str, int], Awaitable[Broker]]


def require(url: str) -> None:
    """Check, and load nothing yet, that there is a broker for URLs like this.

    Raises: ConfigError.
    """
    scheme = url.partition("://")[0]
    known = sorted({*BUILT_IN, *entry_points(group=GROUP).names})
    if scheme not in known:
        raise ConfigError(
            f"CORE4_BROKER_URL has the scheme {scheme!r}: no broker of this name is installed, only "
            f"{', '.join(known)}"
        )


def connector(url: str) -> Connect:
    """What connects to a URL of this scheme.

    Raises: ConfigError if no broker of this scheme is installed.
    """
    require(url)
    scheme = url.partition("://")[0]
    if scheme in BUILT_IN:
        module, _, function = BUILT_IN[scheme].partition(":")
        return cast(Connect, getattr(import_module(module), function))
    return cast(Connect, entry_points(group=GROUP)[scheme].load())
