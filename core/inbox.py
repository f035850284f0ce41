"""The built-in broker: messages in the database itself, for whoever can reach that.

A producer inserts; a worker makes a job of the message, whose id is derived from the message's, and deletes
it then. Several may read the same message: they make the same job. Dead letters stay, marked as such.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from bson import ObjectId
from pymongo import IndexModel

from core4.changes import Lookout, never
from core4.database import Database, Document
from core4.jobs import utcnow

INBOX = "sys.inbox"
WINDOW = 500  # messages looked at once; their bodies are read one by one
KEEP_DEAD = timedelta(days=30)
SWEEP_EVERY = 600.0  # seconds between two looks for older ones

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    INBOX: (
        # Only what waits is in it: looking into an empty inbox costs nothing, whatever lies dead beside.
        IndexModel([("due", 1), ("_id", 1)], name="due", partialFilterExpression={"due": True}),
        IndexModel([("dead.at", 1)], name="dead", sparse=True),
    ),
}


class Inbox:
    """The only writer of `sys.inbox`; a `Broker` (see core4.brokers). All methods raise PyMongoError.

    Args:
        poll: seconds between two looks into an inbox that was empty.
        prefetch: most messages that are delivered and not settled.
        live: whether `hint` is called for whatever comes in just now; then it looks less often.
    """

    scope = "inbox"

    def __init__(
        self,
        database: Database,
        *,
        poll: float = 1.0,
        prefetch: int = 50,
        live: Callable[[], bool] = never,
    ) -> None:
        self._database, self._prefetch = database, prefetch
        self._lookout = Lookout(live, poll)
        self.hint = self._lookout.hint
        self._messages = database.collection(INBOX)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def send(self, queue: str, body: bytes, *, message_id: str) -> None:
        """Put a message into a queue; sent twice under one `message_id` it makes one job."""
        document = {"_id": ObjectId(), "queue": queue, "message_id": message_id, "at": utcnow(), "due": True}
        await self._messages.insert_one({**document, "body": body})

    async def deliveries(self, queues: Sequence[str]) -> AsyncIterator[InboxDelivery]:
        """What waits in these queues, oldest first, as it comes."""
        pending: set[ObjectId] = set()  # delivered and not settled yet
        swept: float | None = None
        while True:
            if swept is None or time.monotonic() - swept > SWEEP_EVERY:
                swept = time.monotonic()
                await self._forget_old()
            self._lookout.looking()
            found = False
            for row in await self._window(queues):
                if row["_id"] in pending or len(pending) >= self._prefetch:
                    continue
                message = await self._messages.find_one({"_id": row["_id"], "due": True})
                if message is not None:  # nobody else was faster
                    found = True
                    pending.add(row["_id"])
                    yield InboxDelivery(self, message, pending)
            if not found:
                await self._lookout.wait()

    async def _window(self, queues: Sequence[str]) -> list[Document]:
        where = {"due": True, "queue": {"$in": list(queues)}}
        return await self._messages.find(where, {"_id": 1}).sort("_id", 1).limit(WINDOW).to_list(None)

    async def _forget_old(self) -> None:
        """Delete some dead letters that nobody has looked after for long."""
        where = {"dead.at": {"$lt": utcnow() - KEEP_DEAD}}
        for row in await self._messages.find(where, {"_id": 1}).limit(WINDOW).to_list(None):
            await self.forget(row["_id"])

    async def forget(self, message: ObjectId) -> None:
        """Delete a message, whoever else does the same."""
        await self._messages.delete_one({"_id": message})

    async def bury(self, message: ObjectId, reason: str, detail: str) -> None:
        """Make a dead letter of a message that waits."""
        dead = {"reason": reason, "detail": detail, "at": utcnow()}
        await self._messages.update_one(
            {"_id": message, "due": True}, {"$set": {"dead": dead}, "$unset": {"due": 1}}
        )

    async def waiting(self, queue: str) -> int:
        """How many messages nobody has settled; beyond the window it stays that number."""
        return len(await self._window([queue]))

    async def dead(self, queue: str, limit: int = 100) -> list[Document]:
        """The oldest dead letters of a queue."""
        where = {"dead.at": {"$gt": utcnow() - 2 * KEEP_DEAD}, "queue": queue}
        return await self._messages.find(where).sort("dead.at", 1).limit(limit).to_list(None)

    async def close(self) -> None:
        """The database stays open: it belongs to whoever gave it."""


class InboxDelivery:
    """One message of the inbox."""

    def __init__(self, inbox: Inbox, message: Mapping[str, Any], pending: set[ObjectId]) -> None:
        self.queue: str = message["queue"]
        self.message_id = _text(message.get("message_id")) or str(message["_id"])
        self.body = _bytes(message.get("body"))
        self._inbox, self._id, self._pending = inbox, message["_id"], pending

    async def accept(self) -> None:
        """Delete it."""
        await self._inbox.forget(self._id)
        self._pending.discard(self._id)

    async def bury(self, reason: str, detail: str) -> None:
        """Mark it as dead."""
        await self._inbox.bury(self._id, reason, detail)
        self._pending.discard(self._id)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _bytes(value: Any) -> bytes:
    """The body, which producers in other languages may have stored as text."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return value if isinstance(value, bytes) else b""
