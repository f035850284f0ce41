"""A worker's backend that is the database itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from bson import ObjectId

from core4 import __version__
from core4.actions import ActionStore
from core4.attendance import Contact
from core4.catalogue import Catalogue
from core4.changes import ChangeFeed, Listener
from core4.children import call_child, ended_children, enqueue_child, kill_child
from core4.claims import Begins, Claimed
from core4.config import Settings
from core4.controls import CONTROL, Controls, ControlStore
from core4.database import Database, Document
from core4.events import EventStore
from core4.functions import RESULTS
from core4.inbox import INBOX, Inbox
from core4.jobs import Job, Owner
from core4.logs import Line, LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.returns import RETURN
from core4.schedules import SCHEDULE, ScheduleStore, publish_declared
from core4.states import Flag
from core4.store import QUEUE
from core4.worker.protocol import Message
from core4.worker.together import Together
from core4.worker.upkeep import Upkeep

TOGETHER = 64  # jobs that are started, finished or logged in one call, at most
FEW_LINES = 10  # of a log that are stored together with those of other jobs


class Direct:
    """The stores, as a `core4.worker.backend.Backend`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._queue = JobQueue(database, settings)
        self._logs = LogStore(database)
        self._catalogue = Catalogue(database)
        self._schedules = ScheduleStore(database)
        self._registry = WorkerRegistry(database)
        self._controls = ControlStore(database)
        self._events = EventStore(database)
        self._inbox = Inbox(database)
        self._actions = ActionStore(database)
        self._feed = ChangeFeed(database, [QUEUE, SCHEDULE, CONTROL, INBOX, RETURN])
        self._start = Together(self._queue.start_many, TOGETHER)
        self._finish = Together(self._queue.finish_many, TOGETHER)
        self._append = Together(self._append_many, TOGETHER)

    async def prepare(self) -> None:
        for store in (self._queue.store, self._logs, self._registry, self._controls, self._inbox):
            await store.prepare()

    def chores(
        self,
        *,
        contact: Contact,
        controls: Callable[[], Controls],
        worker: Callable[[], str],
        woken: Callable[[], None],
        closing: asyncio.Event,
    ) -> Upkeep:
        return Upkeep(
            self._database,
            self._settings,
            self._queue,
            self._feed,
            contact=contact,
            controls=controls,
            worker=worker,
            woken=woken,
            closing=closing,
        )

    def listen(self, callback: Listener) -> Callable[[], None]:
        return self._feed.listen(callback)

    def is_live(self) -> bool:
        return self._feed.live

    async def follow(self) -> None:
        await self._feed.run()

    async def server_time(self, owner: Owner) -> datetime:
        return await self._database.server_time()

    async def controls(self, owner: Owner) -> Controls:
        return await self._controls.read()

    async def enlist(self, owner: Owner) -> None:
        await self._registry.enlist(owner)

    async def register(
        self, owner: Owner, *, slots: int, namespaces: Sequence[str], jobs: Sequence[str]
    ) -> None:
        await self._registry.register(
            owner, slots=slots, namespaces=namespaces, jobs=jobs, version=__version__
        )
        await self._events.tell_of(owner, "start", version=__version__, namespaces=list(namespaces))

    async def publish(self, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> None:
        await self._catalogue.publish(entries)
        await publish_declared(self._schedules, self._catalogue, entries)

    async def serve(
        self, owner: Owner, jobs: Sequence[str], namespaces: Sequence[str], broken: Sequence[str]
    ) -> None:
        await self._registry.serve(owner, jobs, namespaces, broken)

    async def beat(
        self, owner: Owner, *, running: int, draining: bool, gate: str | None, paused: bool
    ) -> bool:
        return await self._registry.beat(owner, running=running, draining=draining, gate=gate, paused=paused)

    async def leave(self, owner: Owner) -> None:
        await self._registry.leave(owner)
        await self._events.tell_of(owner, "stop")

    async def claim(
        self,
        owner: Owner,
        *,
        namespaces: Sequence[str],
        limit: int,
        rooms: Mapping[str, int],
        forced: bool,
        awaited: bool,
        pinned: bool,
        arrived: Sequence[Document] | None,
        controls: Controls,
        begins: Begins,
    ) -> Claimed:
        return await self._queue.claims.claim(
            owner,
            namespaces=namespaces,
            limit=limit,
            rooms=rooms,
            forced=forced,
            awaited=awaited,
            pinned=pinned,
            arrived=arrived,
            controls=controls,
            begins=begins,
        )

    async def running(self, owner: Owner) -> list[Job]:
        return await self._queue.store.running(owner.id)

    async def release(self, job: Job, *, reason: str, delay: float = 0.0, evicted: int = 0) -> Job:
        return await self._queue.release(job, reason=reason, delay=delay, evicted=evicted)

    async def start(self, job: Job, *, pid: int) -> Job:
        return await self._start((job, pid))

    async def progress(self, job: Job, value: float, message: str) -> None:
        await self._queue.progress(job, value, message)

    async def flag(self, job: Job, what: Flag, *, reason: str) -> Job:
        return await self._queue.flag(job, what, reason=reason)

    async def finish(self, job: Job, outcome: Outcome, *, log_seq: int) -> Job:
        return await self._finish((job, outcome, log_seq))

    async def append(self, job: Job, hostname: str, lines: Sequence[Line]) -> None:
        if len(lines) > FEW_LINES:
            await self._logs.append(job, hostname, lines)  # it fills a round trip alone
        else:
            await self._append((job, hostname, lines))

    async def _append_many(self, batches: Sequence[tuple[Job, str, Sequence[Line]]]) -> Sequence[None]:
        if len(batches) == 1:
            await self._logs.append(*batches[0])
        else:
            await self._logs.append_many(batches)
        return [None] * len(batches)

    async def action(self, job: Job) -> Mapping[str, Any] | None:
        return await self._actions.granted(job.document["function"])

    async def dependencies(self, job: Job) -> Mapping[str, Any]:
        return await self._queue.store.results_before(job, most=RESULTS)

    async def enqueue(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        cap = self._settings.args_cap
        return await enqueue_child(
            self._queue, self._catalogue, job, name, args, number, args_cap=cap, hostname=hostname
        )

    async def call(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        cap = self._settings.args_cap
        return await call_child(
            self._queue, self._catalogue, job, name, args, number, args_cap=cap, hostname=hostname
        )

    async def ended(self, ids: Sequence[ObjectId]) -> Mapping[ObjectId, Message]:
        return await ended_children(self._queue, ids)

    async def kill_called(self, job: Job, called: ObjectId) -> None:
        await kill_child(self._queue, job, called)
