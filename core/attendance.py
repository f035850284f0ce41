"""What somebody with a database does for all: wakes what is due, ends what has expired, rescues, sweeps.

Any number of workers may do it, none leads; an API that lets in workers over HTTP does it, too, as they
have no database and may be all that there are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from pymongo.errors import PyMongoError

from core4.changes import QUIET, Change, Lookout, jittered, turn
from core4.config import Settings
from core4.controls import ControlStore
from core4.database import Database, Document
from core4.errors import Unavailable
from core4.events import EventStore
from core4.jobs import utcnow
from core4.queues import JobQueue
from core4.registry import WorkerRegistry

log = logging.getLogger(__name__)

TROUBLE = (PyMongoError, Unavailable, TimeoutError)  # what a later try may not meet any more
SWEEP_EVERY = 10.0  # seconds between two looks for half-done moves, at least
CROWD = 40  # up to as many look at all that live, and sweep, each at its own pace; more as often as these
HELPERS = 8  # of a larger crowd do about so many what anybody may do once its time has come


class Contact:
    """Since when the contact to the database was uninterrupted; None while it is not."""

    def __init__(self) -> None:
        self.since: float | None = None

    def note(self, sent: float, *, gap: bool) -> None:
        """A renewal sent at this monotonic time has succeeded; with a `gap` since the one before."""
        if self.since is None or gap:
            self.since = sent

    def lost(self) -> None:
        """Something was not answered."""
        self.since = None


class _Waiting(NamedTuple):
    """A kind of what waits for its time: when to look, when the first is due (seconds), what wakes it."""

    lookout: Lookout
    due_in: Callable[[], Awaitable[float | None]]
    wake: Callable[[], Awaitable[int]]


class Attendance:
    """The chores of one process.

    `name` is who declares others dead, `woken` is called when there is something to claim, `live` tells
    whether changes of queue and controls are told to `hear` just now.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        queue: JobQueue,
        *,
        contact: Contact,
        name: Callable[[], str],
        woken: Callable[[], None],
        live: Callable[[], bool],
    ) -> None:
        self._database, self._settings, self._queue = database, settings, queue
        self._contact, self._name, self._woken = contact, name, woken
        self._controls = ControlStore(database)
        self._registry = WorkerRegistry(database)
        self._events = EventStore(database)
        self._due, self._rated = Lookout(live, settings.poll), Lookout(live, settings.poll)
        self._late = Lookout(live, settings.poll)
        # The last beat of each that lives, and since when it is.
        self._seen: dict[str, tuple[Any, float]] = {}
        self._serving: Counter[str] = Counter()  # how many of them serve a namespace
        self._noted_at = -math.inf  # when they were looked at
        self._id = uuid.uuid4().hex
        self._orphans = True  # somebody may have left jobs behind

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        """All of it, each to be run until cancelled; they survive outages of the database."""
        queue, ahead = self._queue, self._settings.poll * QUIET * 2
        return [
            self._wake(_Waiting(self._due, lambda: queue.due_in(ahead), queue.promote)),
            self._wake(_Waiting(self._rated, queue.claims.rated_in, queue.claims.wake_rated)),
            self._wake(_Waiting(self._late, lambda: queue.expires_in(ahead), queue.expire)),
            self._look_after(),
            self._count(),
        ]

    def crowd(self, namespace: str | None) -> int:
        """How many lived at the last look that serve a namespace, or in all if none is known to; 0 before."""
        return (namespace and self._serving[namespace]) or len(self._seen)

    def hear(self, change: Change) -> None:
        """A change that may say that something will be due, and when."""
        if change.kind == "resync":
            self._due.hint()
            self._rated.hint()
            self._late.hint()
        if "wake_at" in change.fields and self._helps(change.fields["wake_at"]):
            self._rated.hint()
        if (due := change.fields.get("query_at")) is not None:
            self._expect(self._due, (due - utcnow()).total_seconds())
        if (end := change.fields.get("expires")) is not None:
            self._expect(self._late, (end - utcnow()).total_seconds())

    def _expect(self, lookout: Lookout, seconds: float) -> None:
        # What nobody has done in time is anybody's. Those that help expect the same: apart enough that the
        # first does it, and the others find nothing left.
        if seconds <= 0 or self._helps(round(time.time() + seconds)):
            lookout.expect(seconds + random.uniform(0, self._settings.poll / 2))

    def _helps(self, key: Any) -> bool:
        """True if this is one of those of a crowd that do a thing; one look of any, or a sweep, makes up for
        the case that none of them is left.
        """
        return turn(key, self._id, len(self._seen), HELPERS) == 0

    def _slower(self, seconds: float) -> float:
        """How often one of a crowd has to do what as many as `CROWD` would do every so many seconds."""
        return seconds * max(1.0, len(self._seen) / CROWD)

    async def _wake(self, kind: _Waiting) -> None:
        """Wake what has waited long enough, of one kind."""
        while True:
            kind.lookout.looking()
            try:
                await self._wake_due(kind)
            except TROUBLE as error:
                self._trouble(error)
                kind.lookout.expect(jittered(1.0))
            await kind.lookout.wait()

    async def _wake_due(self, kind: _Waiting) -> None:
        """Wake what is due; what will be before the next look is expected."""
        woken, seconds = 0, await kind.due_in()
        if seconds is not None and seconds <= 0:
            woken, seconds = await kind.wake(), await kind.due_in()
            if seconds is not None and not woken:
                # Somebody else does it; or it is there by hand, and cannot be woken.
                seconds = max(seconds, self._settings.poll)
        if seconds is not None:
            self._expect(kind.lookout, seconds)
        if woken:
            self._woken()

    async def _look_after(self) -> None:
        """Rescue what the dead held, finish what they left half done."""
        # Only the dead leave something: it may take as long as to find them dead.
        swept_at, sweep_every = time.monotonic(), max(SWEEP_EVERY, self._settings.dead_after)
        while True:
            await asyncio.sleep(jittered(self._rescue_every))
            try:
                sweep = time.monotonic() - swept_at >= self._slower(sweep_every)
                self._orphans = self._orphans or sweep
                rescued = await self._rescue()
                if rescued or sweep:
                    await self._queue.claims.wake_held()
                if sweep:
                    swept_at = time.monotonic()
                    await self._queue.outbox.sweep()
                    await self._queue.claims.unpark(await self._controls.read())
            except TROUBLE as error:
                self._trouble(error)
                await asyncio.sleep(jittered(1.0))

    def _trouble(self, error: Exception) -> None:
        self._contact.lost()
        log.warning("upkeep.failed", extra={"error": str(error)[:200]})

    async def keep_contact(self) -> None:
        """Ask the database for a sign of life, until cancelled: for a process that renews nothing itself."""
        seen = time.monotonic()
        while True:
            sent = time.monotonic()
            try:
                await self._database.ping()
                # A process that was frozen has seen nothing in between, although nothing failed.
                self._contact.note(sent, gap=sent - seen > self._settings.dead_after / 2)
                seen = sent
            except TROUBLE:
                self._contact.lost()
            await asyncio.sleep(self._settings.heartbeat)

    async def _count(self) -> None:
        """Count the jobs by state now and then; one of all does it each time."""
        every = self._settings.count_every
        while True:
            await asyncio.sleep(jittered(every))
            if not self._helps(int(time.time() / every)):
                continue
            try:
                now = await self._database.server_time()
                if not await self._events.counted(now, every):
                    await self._events.count(now, every, await self._queue.store.counts())
            except TROUBLE as error:
                log.warning("upkeep.count_failed", extra={"error": str(error)[:200]})

    @property
    def _rescue_every(self) -> float:
        """Seconds between two looks for the dead.

        Seldom enough for a crowd, but often enough for each of it: it may be the last that is left.
        """
        pace = min(self._settings.rescue_every, max(SWEEP_EVERY, self._settings.dead_after))
        return max(pace, min(self._slower(pace), self._settings.dead_after / 3))

    async def _rescue(self) -> int:
        # Each of a crowd reads the others seldom, and asks the server in between who is silent: that are few.
        silent = len(self._seen) > CROWD and not self._is_stale()
        if not silent:
            silent = self._note_living(await self._registry.living())
        since = self._contact.since
        # Whoever was cut off itself cannot say who else is dead: an outage of the database kills nobody.
        if since is None or time.monotonic() - since < self._settings.dead_after:
            return 0
        if silent:
            await self._bury()
        if not self._orphans:
            return 0
        rescued = await self._queue.rescue(self._registry.alive_ids)
        self._orphans = False
        if rescued:
            log.warning("worker.rescued", extra={"jobs": rescued})
            self._woken()
        return rescued

    def _is_stale(self) -> bool:
        """True if one of a crowd has to look at all that live again."""
        return time.monotonic() - self._noted_at >= self._slower(self._settings.rescue_every)

    def _note_living(self, rows: Sequence[Document]) -> bool:
        """Note who lives, and whether somebody does no more; True if one of them seems to be silent.

        By this process's own clock, which only saves a look: who is dead is decided by the server's.
        """
        now, before, beats = time.monotonic(), self._seen, {row["_id"]: row.get("beat") for row in rows}
        self._noted_at = now
        self._serving = Counter(name for row in rows for name in row.get("namespaces") or ())
        self._orphans = self._orphans or bool(before.keys() - beats.keys())
        self._seen = {
            owner: before[owner] if owner in before and before[owner][0] == beat else (beat, now)
            for owner, beat in beats.items()
        }
        return any(now - since >= self._settings.dead_after / 2 for _, since in self._seen.values())

    async def _bury(self) -> None:
        for owner in await self._registry.bury(self._settings.dead_after):
            self._orphans, self._noted_at = True, -math.inf  # there may be far fewer now
            log.warning("worker.declared_dead", extra={"dead": owner})
            await self._events.tell("worker.dead", self._name(), key=f"{owner}.dead", owner=owner)
