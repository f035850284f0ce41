"""What somebody with a database does for all: wakes what is due, ends what has expired, rescues, sweeps.

Any number of workers may do it, none leads; an API that lets in workers over HTTP does it, too, as they
have no database and may be all that there are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from pymongo.errors import PyMongoError

from core4.config import Settings
from core4.controls import ControlStore
from core4.database import Database
from core4.errors import Unavailable
from core4.events import EventStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry

log = logging.getLogger(__name__)

TROUBLE = (PyMongoError, Unavailable, TimeoutError)  # what a later try may not meet any more
SWEEP_EVERY = 10.0  # seconds between two looks for half-done moves


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


class Attendance:
    """The chores of one process.

    `name` is who declares others dead, `woken` is called when there is something to claim.
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
    ) -> None:
        self._database, self._settings, self._queue = database, settings, queue
        self._contact, self._name, self._woken = contact, name, woken
        self._controls = ControlStore(database)
        self._registry = WorkerRegistry(database)
        self._events = EventStore(database)

    async def run(self) -> None:
        """Do all of it now and then, until cancelled; survives outages of the database."""
        rescued_at = swept_at = time.monotonic()
        while True:
            await asyncio.sleep(jittered(self._settings.poll))
            now = time.monotonic()
            try:
                if await self._queue.promote() + await self._queue.claims.wake_rated():
                    self._woken()
                if now - rescued_at >= self._settings.rescue_every:
                    rescued_at = now
                    await self._queue.expire()  # windows are of hours: seconds later is soon enough
                    await self._rescue()
                    await self._queue.claims.wake_held()
                if now - swept_at >= SWEEP_EVERY:
                    swept_at = now
                    await self._queue.outbox.sweep()
                    await self._queue.claims.unpark(await self._controls.read())
            except TROUBLE as error:
                self._contact.lost()
                log.warning("upkeep.failed", extra={"error": str(error)[:200]})
                await asyncio.sleep(jittered(1.0))

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

    async def count(self) -> None:
        """Count the jobs by state now and then; one of all does it each time."""
        every = self._settings.count_every
        while True:
            await asyncio.sleep(jittered(every))
            try:
                now = await self._database.server_time()
                if not await self._events.counted(now, every):
                    await self._events.count(now, every, await self._queue.store.counts())
            except TROUBLE as error:
                log.warning("upkeep.count_failed", extra={"error": str(error)[:200]})

    async def _rescue(self) -> None:
        since = self._contact.since
        # Whoever was cut off itself cannot say who else is dead: an outage of the database kills nobody.
        if since is None or time.monotonic() - since < self._settings.dead_after:
            return
        for owner in await self._registry.bury(self._settings.dead_after):
            log.warning("worker.declared_dead", extra={"dead": owner})
            await self._events.tell("worker.dead", self._name(), key=f"{owner}.dead", owner=owner)
        rescued = await self._queue.rescue(self._registry.alive_ids)
        if rescued:
            log.warning("worker.rescued", extra={"jobs": rescued})
            self._woken()


def jittered(seconds: float) -> float:
    """About so many seconds: processes that were started together do not ask together."""
    return seconds * random.uniform(0.75, 1.25)
