"""What a worker with a database does for all: attends to the queue, fires, takes messages, cleans, counts.

Any number of workers may do it, none leads. One that has no database (`core4.worker.remote`) leaves it to
the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from core4.attendance import Attendance, Contact
from core4.changes import Change, ChangeFeed
from core4.config import Settings
from core4.controls import Controls
from core4.database import Database
from core4.inbox import INBOX
from core4.queues import JobQueue
from core4.returns import RETURN
from core4.schedules import SCHEDULE
from core4.worker.cleaner import Cleaner
from core4.worker.forward import Forward
from core4.worker.ingest import Ingest
from core4.worker.scheduler import Scheduler


class Upkeep:
    """The chores of one worker; see `core4.worker.backend.Backend.chores` for the arguments."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        queue: JobQueue,
        feed: ChangeFeed,
        *,
        contact: Contact,
        controls: Callable[[], Controls],
        worker: Callable[[], str],
        woken: Callable[[], None],
        closing: asyncio.Event,
    ) -> None:
        self._database, self._settings, self._queue, self._feed = database, settings, queue, feed
        self._controls, self._closing = controls, closing
        self._attendance = Attendance(
            database, settings, queue, contact=contact, name=worker, woken=woken, live=self._is_live
        )
        self._scheduler = Scheduler.of_worker(database, settings, queue, controls, self._is_live)
        self._ingest = Ingest(database, settings, queue, self._is_live)
        self._cleaner = Cleaner(database, settings, queue)
        url = settings.broker_url if settings.ingest else None
        self._forward = Forward(database, settings, url, self._is_live) if url else None

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        self._feed.listen(self._hear)
        parts = [*self._attendance.parts(), self._cleaner.run()]
        if self._settings.scheduler:
            parts.append(self._scheduler.run(self._closing))
        if self._settings.ingest:
            parts.append(self._ingest.run(self._closing))
        if self._forward is not None:
            parts.append(self._forward.run())
        return parts

    def crowd(self, namespace: str | None) -> int:
        return self._attendance.crowd(namespace)

    async def obey(self, *, resumed: bool) -> None:
        self._scheduler.wake()
        if resumed:
            # Whoever parked a job of a name that was resumed meanwhile puts it back, too.
            await self._queue.claims.unpark(self._controls())

    def _is_live(self) -> bool:
        return self._feed.live

    def _hear(self, change: Change) -> None:
        self._attendance.hear(change)
        if change.collection in (SCHEDULE, ""):
            self._scheduler.hear(change)
        if change.collection in (INBOX, ""):
            self._ingest.hear(change)
        if self._forward is not None and change.collection in (RETURN, ""):
            self._forward.hear(change)
