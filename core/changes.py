"""What changes in the database, told to whoever waits for it in this process.

One change stream per process, however many listen. A change is only a hint to look: data is always
read by query, so a lost or doubled hint costs a moment, never a job or a line.
"""

from __future__ import annotations

import asyncio
import hashlib
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
GAP = 0.02  # seconds after a change in which more may gather: an answer costs a server as much as a write
LONGEST_GAP = 0.1  # the same while many come each time
MANY = 32  # changes of an answer: more than a few jobs make that follow one another
POLL = 0.5  # seconds between two resyncs where the server has no change streams
REOPEN = 60.0  # seconds until a refused change stream is tried again
QUIET = 20  # pauses that pass between two looks without a hint while the feed is live
FEW = 4  # as many look at once at all that they are told of
FIRST = 3  # of a larger crowd, about as many do
WAVE = 0.25  # seconds until twice as many look, at least: as long as a look and word of it may take
SLOWEST = 5.0  # the same, at most
HEARD = 1000  # that a lookout waits with, at most: then it looks


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
    """Reads the changes of some collections and calls every listener, in the loop's thread."""

    def __init__(self, database: Database, collections: Sequence[str]) -> None:
        self._database = database
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
            began = time.monotonic()
            try:
                await self._stream()
            except PyMongoError as error:
                was_open, self._heard = self._heard is not None, None
                if isinstance(error, OperationFailure) and (history_lost(error) or not was_open):
                    await self._refused(error)
                    continue
                log.warning("changes.interrupted", extra={"error": str(error)[:200]})
                await asyncio.sleep(max(0.0, began + POLL - time.monotonic()))

    async def _stream(self) -> None:
        async with self._database.watch(self._collections, self._token) as stream:
            # Whatever happened before the stream was open has been told to nobody.
            self._tell(Change("resync"))
            gap = 0.0
            while True:
                self._heard = time.monotonic()
                changes = await stream.next()
                self._token = stream.resume_token
                for change in changes:
                    self._tell(_change(change))
                gap = pause_after(len(changes), gap)
                await asyncio.sleep(gap)

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


def pause_after(changes: int, last: float) -> float:
    """Seconds in which more may gather after an answer with so many changes; `last` is the pause before it.

    A longer one only where many are under way: nobody waits for a single change there. In a chain of
    calls each answer comes at once, too, as it has gathered in the pause, and each step waits for it.
    """
    if changes < MANY:
        return GAP if changes else 0.0
    return min(max(last * 2, GAP), LONGEST_GAP)


class Lookout:
    """When to look again for something that changes are told of.

    At a hint, at a time that is expected, else after a pause. While the feed is live and the last pause
    passed without a hint the next one is longer: a look without a hint then only makes up for one that was
    missed.

    Args:
        live: whether all is told just now, see `ChangeFeed.live`.
        pause: seconds, about.

    Whoever is one of many waits with a hint until it is his turn, and forgets it if others were faster.
    """

    def __init__(self, live: Callable[[], bool], pause: float) -> None:
        self._live, self._pause = live, pause
        self._hinted = True
        self.quiet = False  # the last look came without a hint, or has seen that no other is needed soon
        self._expected: float | None = None
        self._heard: dict[Any, float] = {}  # what there may be, and when it is this one's turn
        self._began, self._wave = time.monotonic(), WAVE  # of the last look; see `hint_of`
        self._until = -math.inf  # what `wait` waits for now
        self._stirred = asyncio.Event()

    def hint(self) -> None:
        """There may be something now."""
        self._hinted = True
        self._stirred.set()

    def hint_of(self, key: Any, waves: float) -> None:
        """There may be this now: look when so many waves have, see `turn`, unless it is `gone` by then."""
        if waves <= 0 or len(self._heard) >= HEARD:
            self.hint()
        elif not self._hinted:
            at = self._heard[key] = time.monotonic() + waves * self._wave
            if at < self._until:
                self._stirred.set()

    def gone(self, key: Any) -> None:
        """Somebody else has it: no reason to look any more."""
        self._heard.pop(key, None)

    def expect(self, seconds: float) -> None:
        """There will be something in so many seconds."""
        at = time.monotonic() + seconds
        if self._expected is None or at < self._expected:
            self._expected = at
            self._stirred.set()

    def looking(self) -> None:
        """A look begins: it sees whatever was hinted at before."""
        self.quiet = not (self._hinted or self._heard)
        self._hinted, self._expected = False, None
        self._heard.clear()
        self._began = time.monotonic()

    async def wait(self) -> None:
        """Until it is time for the next look."""
        began, pause = time.monotonic(), jittered(self._pause)
        # On a slow server the next wave waits for longer: to look while the first still do makes it slower.
        self._wave = min(max(WAVE, 2 * (began - self._began)), SLOWEST)
        while not self._hinted:
            now = time.monotonic()
            pauses = QUIET if self.quiet and self._live() else 1
            told = min(self._heard.values(), default=math.inf)
            due = min(began + pauses * pause, told, math.inf if self._expected is None else self._expected)
            if now >= due:
                return
            # No longer than a pause: the feed may break off.
            self._until = min(now + pause, due)
            self._stirred.clear()
            await heard(self._stirred, self._until - now)


def turn(key: Any, who: str, crowd: int, first: int = FIRST) -> float:
    """How often those that look for `key` have doubled when it is the turn of `who`; 0 if he looks at once.

    About `first` of a crowd of so many do, others for each key, without asking one another; all of a few.
    Nobody is left out: the last comes after log2(crowd / first).
    """
    if crowd <= max(FEW, first):
        return 0.0
    # Not `hash`: that of a text is another in each process, and a sum of two says little of either.
    digest = hashlib.blake2b(f"{key} {who}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * crowd  # about how many come before
    return math.log2(place / first) if place > first else 0.0


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
