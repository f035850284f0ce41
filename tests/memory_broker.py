"""A broker of others: messages in this process's memory, found by the entry point `core4.brokers`."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENTRY_POINTS = "[core4.brokers]\nmemory = tests.memory_broker:connect\n"
METADATA = "Metadata-Version: 2.1\nName: memory-broker\nVersion: 1.0\n"


def install(folder: Path) -> None:
    """What an installer leaves on the path for a package with this entry point."""
    place = folder / "memory_broker-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(METADATA)
    (place / "entry_points.txt").write_text(ENTRY_POINTS)


@dataclass
class Letter:
    """One message; its state is what has become of it."""

    queue: str
    body: bytes
    message_id: str | None = None
    state: str = "waiting"
    reason: str = ""

    async def accept(self) -> None:
        self.state = "accepted"

    async def bury(self, reason: str, detail: str) -> None:
        self.state, self.reason = "dead", reason


@dataclass
class MemoryBroker:
    """All queues of one URL."""

    scope: str
    letters: defaultdict[str, list[Letter]] = field(default_factory=lambda: defaultdict(list))

    async def deliveries(self, queues: Sequence[str]) -> AsyncIterator[Letter]:
        while True:
            for queue in queues:
                for letter in self.letters[queue]:
                    if letter.state == "waiting":
                        letter.state = "delivered"
                        yield letter
            await asyncio.sleep(0.01)

    async def send(self, queue: str, body: bytes, *, message_id: str) -> None:
        self.letters[queue].append(Letter(queue, body, message_id))

    async def close(self) -> None:
        for letters in self.letters.values():
            for letter in letters:
                if letter.state == "delivered":
                    letter.state = "waiting"


BROKERS: dict[str, MemoryBroker] = {}


async def connect(url: str, prefetch: int) -> MemoryBroker:
    """The broker of this URL; any number may be connected to it."""
    return BROKERS.setdefault(url, MemoryBroker(url))
