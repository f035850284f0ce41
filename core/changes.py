"""What changes in the database, told to whoever waits for it in this process.

One change stream per process, however many listen. A change is only a hint to look: data is always
read by query, so a lost or doubled hint costs a moment, never a job or a line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pymongo.errors import OperationFailure, PyMongoError

from core4.database import Database, history_lost

log = logging.getLogger(__name__)

POLL = 0.5  # seconds between two resyncs where the server has no change streams
REOPEN = 60.0  # seconds until a refused change stream is tried again


@dataclass(frozen=True)
class Change:
    """One change. `fields`: the whole document of an insert, the changed fields of an update.

    A ``resync`` says that anything may have changed: look at all you hold.
    """

    kind: Literal["insert", "update", "delete", "resync"]
    collection: str = ""
    id: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Change], None]


class ChangeFeed:
    """Reads the changes of some collections and calls every listener, in the loop's thread."""

    def __init__(self, database: Database, collections: Sequence[str]) -> None:
        self._database = database
        self._collections = tuple(collections)
        self._listeners: set[Listener] = set()
        self._token: Mapping[str, Any] | None = None

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Call `callback` for every change from now on; returns what ends that."""
        self._listeners.add(callback)
        return lambda: self._listeners.discard(callback)

    async def run(self) -> None:
        """Read until cancelled; survives outages of the database and lost history."""
        while True:
            try:
                await self._stream()
            except OperationFailure as error:
                await self._refused(error)
            except PyMongoError as error:
                log.warning("changes.interrupted", extra={"error": str(error)[:200]})
                await asyncio.sleep(POLL)

    async def _stream(self) -> None:
        async with self._database.watch(self._collections, self._token) as stream:
            # Whatever happened before the stream was open has been told to nobody.
            self._tell(Change("resync"))
            while True:
                document = await stream.next()
                self._token = stream.resume_token
                if document is not None:
                    self._tell(_change(document))

    async def _refused(self, error: OperationFailure) -> None:
        self._token = None
        if history_lost(error):
            return
        log.warning("changes.polling", extra={"error": str(error)[:200], "retry_in": REOPEN})
        for _ in range(int(REOPEN / POLL)):
            self._tell(Change("resync"))
            await asyncio.sleep(POLL)

    def _tell(self, change: Change) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(change)
            except Exception:
                log.exception("changes.listener_failed")


def _change(document: Mapping[str, Any]) -> Change:
    kind = document["operationType"]
    collection = document.get("ns", {}).get("coll", "")
    key = document.get("documentKey", {}).get("_id")
    match kind:
        case "insert" | "replace":
            return Change("insert", collection, key, document.get("fullDocument") or {})
        case "update":
            return Change("update", collection, key, document["updateDescription"]["updatedFields"])
        case "delete":
            return Change("delete", collection, key)
    return Change("resync")  # drop, rename, invalidate
