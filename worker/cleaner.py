"""Deletes what is older than the settings keep it: bounded portions, each by an index.

Every worker may do it at any time: what is deleted is named by its id and age, so twice is the same as once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4.actions import ActionStore
from core4.config import Settings
from core4.controls import ControlStore
from core4.database import Database
from core4.errors import Unavailable
from core4.events import EventStore
from core4.jobs import utcnow
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retention import Retention
from core4.returns import Returns
from core4.users import UserStore

log = logging.getLogger(__name__)

PORTION = 200  # documents looked at and deleted at once
PORTIONS = 50  # of one kind in one sweep: what is left then waits for the next
PAUSE = 0.05  # seconds between two portions, for everybody else
WORKERS_DAYS = 7.0  # that a worker which has ended is listed


class Cleaner:
    """One sweeper; `run` it, or `step` for one sweep."""

    def __init__(self, database: Database, settings: Settings, queue: JobQueue) -> None:
        self._settings, self._queue = settings, queue
        self._retention = Retention(queue.store, queue.outbox)
        self._actions = ActionStore(database)
        self._logs, self._events = LogStore(database), EventStore(database)
        self._controls = ControlStore(database)
        self._registry, self._users = WorkerRegistry(database), UserStore(database, settings)
        self._returns = Returns(database)
        self._expired_to: datetime | None = None  # results of jobs journaled before that are gone

    async def run(self) -> None:
        """Sweep until cancelled; outlives outages of the database."""
        while True:
            # Workers that were started together do not sweep together.
            await asyncio.sleep(self._settings.clean_every * random.uniform(0.5, 1.5))
            try:
                done = await self.step()
            except (PyMongoError, Unavailable) as error:
                log.warning("cleaner.interrupted", extra={"error": str(error)[:200]})
                continue
            if any(done.values()):
                log.info("cleaner.deleted", extra={kind: count for kind, count in done.items() if count})

    async def step(self) -> dict[str, int]:
        """One sweep; how much of each kind has gone.

        Raises: PyMongoError, Unavailable: what is left is found again by the next one.
        """
        keep = self._settings
        return {
            "stopped": await self._sweep(keep.keep_stopped_days, self._retire),
            "journal": await self._sweep(keep.keep_journal_days, self._forget_jobs),
            "log": await self._sweep(keep.keep_log_days, self._forget_lines),
            "action": await self._sweep(keep.keep_journal_days, self._forget_actions),
            "event": await self._sweep(keep.keep_event_days, self._events.forget),
            "result": await self._sweep(keep.keep_result_days, self._expire_results),
            "return": await self._sweep(keep.keep_return_days, self._forget_returned),
            "counts": await self._events.forget_counts(utcnow(), PORTION),
            "worker": await self._registry.forget(utcnow() - timedelta(days=WORKERS_DAYS)),
            "stop": await self._controls.forget_stops(utcnow() - timedelta(days=WORKERS_DAYS)),
            "token": await self._users.forget_tokens(),
        }

    async def _sweep(self, days: float, portion: Callable[[datetime, int], Awaitable[int]]) -> int:
        """Portions until one comes back empty; 0 days keep for ever."""
        if not days:
            return 0
        before, total = utcnow() - timedelta(days=days), 0
        for _ in range(PORTIONS):
            done = await portion(before, PORTION)
            total += done
            if not done:
                break
            await asyncio.sleep(PAUSE)
        return total

    async def _retire(self, before: datetime, limit: int) -> int:
        return await self._retention.retire(before, limit)

    async def _forget_jobs(self, before: datetime, limit: int) -> int:
        ids = await self._retention.forgettable(before, limit)
        # The log first: it can be read with its job only, and would be left behind.
        await self._logs.forget(ids)
        return await self._retention.forget(ids, before)

    async def _expire_results(self, before: datetime, limit: int) -> int:
        done, self._expired_to = await self._retention.expire_results(self._expired_to, before, limit)
        return done

    async def _forget_returned(self, before: datetime, limit: int) -> int:
        rows = await self._returns.older(before, limit)
        # Put there once more it would be a second one: not before its job has nothing left to put.
        busy = await self._queue.store.unsettled({row["job_id"] for row in rows})
        return await self._returns.forget([row["_id"] for row in rows if row["job_id"] not in busy])

    async def _forget_lines(self, before: datetime, limit: int) -> int:
        ids: set[ObjectId] = await self._logs.older(before, limit)
        return await self._logs.forget(ids - await self._queue.store.opened(ids), before)

    async def _forget_actions(self, before: datetime, limit: int) -> int:
        keys = await self._actions.forgettable(before, limit)
        if not keys:
            return 0
        # A job may have waited all that time.
        needed = await self._queue.store.queue.distinct("function.key", {"function.key": {"$in": keys}})
        return await self._actions.forget(set(keys) - set(needed), before)
