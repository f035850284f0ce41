"""What changes in the database, told to whoever waits for it in this process.

One change stream per process, however many listen. A change is only a hint to look: data is always
read by query, so a lost or doubled hint costs a moment, never a job or a line.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pymongo.errors import OperationFailure, PyMongoError

from core4.database import AWAIT, Database, history_lost
from core4.waits import heard

log = logging.getLogger(__name__)

SLACK = 1.0  # seconds that an answer on the stream may take longer than it has to
POLL = 0.5  # seconds between two resyncs where the server has no change streams
REOPEN = 60.0  # seconds until a refused change stream is tried again
QUIET = 20  # pauses that pass between two looks without a hint while the feed is live


@dataclass(frozen=True)
class Change:
    """One change. `fields`: the whole document of an insert, the changed fields of an update, None for those
    that it removed.

    A ``resync`` says that anything may have changed: look at all you hold.
    """

    kind: Literal["insert", "update", "delete", "resync"]
    collection: str = ""
    id: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Change], None]


class ChangeFeed:
    """Reads the changes of some collections and calls every listener, in the loop's thread.

    With a `gap` it asks for more at most once in so many seconds: a change after a silence is told at once,
    those that follow come together.
    """

    def __init__(self, database: Database, collections: Sequence[str], gap: float = 0.0) -> None:
        self._database, self._gap = database, gap
        self._collections = tuple(collections)
        self._listeners: set[Listener] = set()
        self._token: Mapping[str, Any] | None = None
        self._heard: float | None = None  # when the server answered last on the open stream

    @property
    def live(self) -> bool:
        """True while what changes is told at once; False as soon as the server is silent on the stream."""
        return self._heard is not None and time.monotonic() - self._heard < AWAIT + SLACK

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
                self._heard = None
                log.warning("changes.interrupted", extra={"error": str(error)[:200]})
                await asyncio.sleep(POLL)

    async def _stream(self) -> None:
        async with self._database.watch(self._collections, self._token) as stream:
            # Whatever happened before the stream was open has been told to nobody.
            self._tell(Change("resync"))
            while True:
                self._heard = asked = time.monotonic()
                documents = await stream.next()
                self._token = stream.resume_token
                for document in documents:
                    self._tell(_change(document))
                await asyncio.sleep(asked + self._gap - time.monotonic())

    async def _refused(self, error: OperationFailure) -> None:
        self._token = self._heard = None
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


class Lookout:
    """When to look again for something that changes are told of.

    At a hint, at a time that is expected, else after a pause. While the feed is live and the last pause
    passed without a hint the next one is longer: a look without a hint then only makes up for one that was
    missed.

    Args:
        live: whether all is told just now, see `ChangeFeed.live`.
        pause: seconds, about.
    """

    def __init__(self, live: Callable[[], bool], pause: float) -> None:
        self._live, self._pause = live, pause
        self._hinted = True
        self.quiet = False  # the last look came without a hint, or has seen that no other is needed soon
        self._expected: float | None = None
        self._stirred = asyncio.Event()

    def hint(self) -> None:
        """There may be something now."""
        self._hinted = True
        self._stirred.set()

    def expect(self, seconds: float) -> None:
        """There will be something in so many seconds."""
        at = time.monotonic() + seconds
        if self._expected is None or at < self._expected:
            self._expected = at
            self._stirred.set()

    def looking(self) -> None:
        """A look begins: it sees whatever was hinted at before."""
        self.quiet = not self._hinted
        self._hinted, self._expected = False, None

    async def wait(self) -> None:
        """Until it is time for the next look."""
        began, pause = time.monotonic(), jittered(self._pause)
        while not self._hinted:
            now = time.monotonic()
            pauses = QUIET if self.quiet and self._live() else 1
            if now >= began + pauses * pause or (self._expected is not None and now >= self._expected):
                return
            # No longer than a pause: the feed may break off.
            until = min(now + pause, began + pauses * pause, self._expected or math.inf)
            self._stirred.clear()
            await heard(self._stirred, until - now)


def never() -> bool:
    """`live` of who hears of no changes."""
    return False


def jittered(seconds: float) -> float:
    """About so many seconds: processes that were started together do not ask together."""
    return seconds * random.uniform(0.75, 1.25)


def _change(document: Mapping[str, Any]) -> Change:
    kind = document["operationType"]
    collection = document.get("ns", {}).get("coll", "")
    key = document.get("documentKey", {}).get("_id")
    match kind:
        case "insert" | "replace":
            return Change("insert", collection, key, document.get("fullDocument") or {})
        case "update":
            told = document["updateDescription"]
            gone = dict.fromkeys(told.get("removedFields") or ())
            return Change("update", collection, key, {**gone, **told["updatedFields"]})
        case "delete":
            return Change("delete", collection, key)
    return Change("resync")  # drop, rename, invalidate
