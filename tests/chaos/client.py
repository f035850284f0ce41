"""A client and worker in one, that notes outside of the product what it asked and what it was told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4 import schedules
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.controls import Controls, ControlStore
from core4.database import Database
from core4.errors import Core4Error, Unavailable
from core4.events import EventStore
from core4.inbox import Inbox
from core4.jobs import Job, JobOrder, Owner, derived_id, utcnow
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.schedules import Schedule, ScheduleStore
from core4.users import UserStore
from tests.chaos.evidence import History
from tests.chaos.ledger import note
from tests.helpers import FAST

T = TypeVar("T")

NAME, WORKER = "tests.chaos.Job", "worker@here"
# Nothing waits: whoever wants a retry to be due later says so.
OPTIONS = {"attempts": 3, "error_time": 0.001, "defer_time": 0.001, "defer_max": 3600}


def new_owner(worker: str = WORKER) -> Owner:
    return Owner(uuid.uuid4().hex, worker, socket.gethostname(), os.getpid())


@dataclass
class Actor:
    """One process's stores and its diary. A refusal is returned as None, as is an unknown outcome."""

    database: Database
    settings: Settings
    history: History
    ledger: Path
    owner: Owner = field(default_factory=new_owner)

    def __post_init__(self) -> None:
        self.queue = JobQueue(self.database, self.settings)
        self.logs = LogStore(self.database)
        self.registry = WorkerRegistry(self.database)
        self.catalogue = Catalogue(self.database)
        self.users = UserStore(self.database, self.settings)
        self.controls = ControlStore(self.database)
        self.schedules = ScheduleStore(self.database)
        self.events = EventStore(self.database)
        self.executions: dict[str, str] = {}
        self.kept: dict[str, Any] = {}

    async def prepare(self) -> None:
        """Make the indexes of all stores."""
        stores = (self.queue.store, self.logs, self.registry, self.users, self.controls)
        for store in (*stores, Inbox(self.database)):
            await store.prepare()

    async def register(self) -> None:
        """Be a living worker."""
        await self.registry.register(
            self.owner, slots=4, namespaces=["DEFAULT"], jobs=[NAME], version="chaos"
        )

    # ------------------------------------------------------------------ as a client

    async def enqueue(
        self,
        key: str,
        *,
        once: bool = False,
        unique: bool = True,
        keep_stopped: bool = True,
        chain: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job:
        """Enqueue; an unknown or refused one raises, as nothing can go on without it.

        With `once` under an id that is derived from the key, so that it may be asked for again. `chain` are
        fields of the order that say how the job hangs together with others.
        """
        job_id = derived_id(key) if once else None
        order = JobOrder(
            name=NAME,
            args={"key": key},
            options={**OPTIONS, **options},
            unique=unique,
            keep_stopped=keep_stopped,
            username="chaos",
            **(chain or {}),
        )
        job = await self._ask(
            "enqueue",
            key,
            lambda: self.queue.enqueue(order, job_id=job_id, once=once),
            result=lambda job: job.id,
        )
        if job is None:
            raise Unavailable("not enqueued")
        return job

    async def enqueue_several(self, keys: Sequence[str]) -> None:
        """Enqueue them in one call."""
        orders = [JobOrder(name=NAME, args={"key": key}, options=OPTIONS, username="chaos") for key in keys]
        made = asyncio.ensure_future(self.queue.enqueue_many(orders))

        async def made_of(number: int) -> ObjectId:
            job = (await made)[number]
            if isinstance(job, Job):
                return job.id
            raise job

        asks = (
            self._ask("enqueue", key, partial(made_of, number), result=str) for number, key in enumerate(keys)
        )
        await asyncio.gather(*asks)

    async def send(self, key: str, message_id: str) -> None:
        """Put a message into the inbox, and note whether that was confirmed."""
        # All of it is due at once, as with `OPTIONS`.
        body = json.dumps({"name": NAME, "kwargs": {"key": key}, **OPTIONS}).encode()
        inbox = Inbox(self.database)
        await self._ask(
            "message",
            key,
            lambda: inbox.send("DEFAULT", body, message_id=message_id),
            result=lambda _: message_id,
        )

    async def kill(self, job_id: ObjectId) -> Job | None:
        """Kill, and note what it was told."""
        told = await self._ask("kill", job_id, lambda: self.queue.kill(job_id, by="chaos"))
        return told[0] if told else None

    async def kill_chain(self, job_id: ObjectId) -> None:
        """Kill all of a chain."""
        await self._ask("kill_chain", job_id, lambda: self.queue.kill_chain(job_id, by="chaos"))

    async def remove(self, job_id: ObjectId) -> Job | None:
        """Remove, and note what it was told."""
        return await self._ask("remove", job_id, lambda: self.queue.remove(job_id, by="chaos"))

    async def restart(self, job_id: ObjectId) -> ObjectId | None:
        """Restart, and note the id it was told."""
        return await self._ask("restart", job_id, lambda: self.queue.restart(job_id, by="chaos"), result=str)

    # ------------------------------------------------------------------ as a worker

    async def claim(self, limit: int = 1) -> list[Job]:
        """Claim up to `limit` jobs; each is an operation of its own, known only when it has succeeded."""
        number = self.history.invoke(self.owner.id, "claim", "")
        try:
            jobs = await self.queue.claims.claim(self.owner, namespaces=["DEFAULT"], limit=limit)
        except PyMongoError as error:
            self.history.answer(number, "info", repr(error))
            return []
        for job in jobs:
            assert job.lease is not None
            self.history.answer(number, "ok", target=job.id, lease=job.lease.id)
            number = self.history.invoke(self.owner.id, "claim", "")
        if not jobs:
            self.history.answer(number, "fail")
        return jobs

    async def start(self, job: Job) -> Job | None:
        """Start, once more if nobody knows, and note the execution's start."""
        started = await self._twice("start", job, lambda: self.queue.start(job, pid=None))
        if started is not None:
            token = self.executions[str(job.id)] = uuid.uuid4().hex
            note(str(self.ledger), "start", str(job.id), started.trial, token)
        return started

    async def progress(self, job: Job, value: float = 0.5) -> None:
        """Report progress."""
        assert job.lease is not None
        await self._ask(
            "progress", job.id, lambda: self.queue.progress(job, value, "half"), lease=job.lease.id
        )

    async def finish(self, job: Job, kind: str = "complete") -> Job | None:
        """End the execution, and record its outcome: complete, failed, deferred, killed or odd."""
        token = self.executions.get(str(job.id), "")
        note(str(self.ledger), "end", str(job.id), job.trial, token or "-")
        outcome = {
            "complete": Outcome.complete({"token": token} if token else None),
            "failed": Outcome.failed("RuntimeError('no')", []),
            "deferred": Outcome.deferred("later"),
            "killed": Outcome.killed("killed"),
            "odd": Outcome.complete({"n": 2**70}),  # cannot be stored
        }[kind]
        return await self._twice("finish", job, lambda: self.queue.finish(job, outcome, log_seq=job.log_seq))

    async def release(self, job: Job, delay: float = 0.0) -> Job | None:
        """Give a job back."""
        assert job.lease is not None
        call = lambda: self.queue.release(job, reason="released", delay=delay)  # noqa: E731
        return await self._ask("release", job.id, call, lease=job.lease.id)

    async def run(self, job: Job, kind: str = "complete") -> Job | None:
        """Start and finish."""
        started = await self.start(job)
        return await self.finish(started, kind) if started else None

    async def start_several(self, jobs: Sequence[Job]) -> list[Job]:
        """Start jobs in one call, as a worker does it, and note each execution's start."""

        async def call() -> list[Job | Core4Error]:
            return await self.queue.start_many([(job, os.getpid()) for job in jobs])

        started = await self._several("start", jobs, call)
        for job in started:
            token = self.executions[str(job.id)] = uuid.uuid4().hex
            note(str(self.ledger), "start", str(job.id), job.trial, token)
        return started

    async def finish_several(self, jobs: Sequence[Job]) -> list[Job]:
        """End executions, and record their outcomes in one call."""
        ends = []
        for job in jobs:
            token = self.executions[str(job.id)]
            note(str(self.ledger), "end", str(job.id), job.trial, token)
            ends.append((job, Outcome.complete({"token": token}), job.log_seq))
        return await self._several("finish", jobs, lambda: self.queue.finish_many(ends))

    async def run_all(self) -> int:
        """Claim and complete what there is; how many."""
        jobs = await self.claim(10)
        await asyncio.gather(*(self.run(job) for job in jobs))
        return len(jobs)

    # ------------------------------------------------------------------ as a scheduler

    async def fire(self, schedule: Schedule, instant: datetime) -> Job | None:
        """Make the job of an instant; its arguments have the key `fire`."""
        call = lambda: schedules.fire(self.queue, {"_id": NAME}, schedule, instant)  # noqa: E731
        return await self._ask("enqueue", "fire", call, result=lambda job: job.id)

    # ------------------------------------------------------------------ as upkeep

    async def force_due(self) -> None:
        """Instead of waiting: everything that waits for a time has waited long enough."""
        late = {"query_at": {"$gt": utcnow()}}
        raw = self.database.collection("sys.queue")
        await raw.update_many(late, {"$set": {"query_at": utcnow()}})
        await self.forget_starts()

    async def forget_starts(self) -> None:
        """Instead of waiting: whatever was started is long ago."""
        raw = self.database.collection("sys.control")
        past = utcnow() - timedelta(days=1)
        await raw.update_many({"kind": "rate"}, {"$set": {"times": [], "wake_at": past}})

    async def upkeep(self) -> None:
        """What each worker does for all of them."""
        await self.queue.rescue(self.registry.alive_ids)
        await self.queue.outbox.sweep()
        await self.queue.expire()
        await self.queue.promote()
        await self.queue.claims.wake_held()
        await self.queue.claims.wake_rated()
        await self.queue.claims.unpark(Controls())  # in the end nothing is paused

    # ------------------------------------------------------------------ the diary

    async def _twice(self, op: str, job: Job, call: Callable[[], Awaitable[T]]) -> T | None:
        """As a worker does it: after an unknown outcome the same call once more, under the same lease."""
        assert job.lease is not None
        lease = job.lease.id
        number = self.history.invoke(self.owner.id, op, job.id, lease=lease)
        for last in (False, True):
            try:
                found = await call()
            except (PyMongoError, Unavailable) as error:
                if last:
                    self.history.answer(number, "info", repr(error))
            except Core4Error as error:
                self.history.answer(number, "fail", repr(error))
                return None
            else:
                self.history.answer(number, "ok")
                return found
        return None

    async def _several(
        self, op: str, jobs: Sequence[Job], call: Callable[[], Awaitable[Sequence[Job | Core4Error]]]
    ) -> list[Job]:
        """`_twice` for a call that is about several jobs, each an operation of its own."""
        leases = [job.lease.id for job in jobs if job.lease is not None]
        numbers = [
            self.history.invoke(self.owner.id, op, job.id, lease=lease)
            for job, lease in zip(jobs, leases, strict=True)
        ]
        for last in (False, True):
            try:
                found = await call()
            except (PyMongoError, Unavailable) as error:
                for number in numbers if last else ():
                    self.history.answer(number, "info", repr(error))
                continue
            for number, each in zip(numbers, found, strict=True):
                failed = isinstance(each, Core4Error)
                self.history.answer(number, "fail" if failed else "ok", repr(each) if failed else None)
            return [each for each in found if isinstance(each, Job)]
        return []

    async def _ask(
        self,
        op: str,
        target: object,
        call: Callable[[], Awaitable[T]],
        *,
        lease: str | None = None,
        result: Callable[[T], object] = lambda _: None,
    ) -> T | None:
        number = self.history.invoke(self.owner.id, op, target, lease=lease)
        try:
            found = await call()
        except (PyMongoError, Unavailable) as error:
            self.history.answer(number, "info", repr(error))
            return None
        except Core4Error as error:
            self.history.answer(number, "fail", repr(error))
            return None
        self.history.answer(number, "ok", result(found))
        return found


def fast_settings(url: str, database: str, home: Path) -> Settings:
    """Settings with timings that show failures within seconds."""
    return Settings.load(environ=FAST, mongo_url=url, mongo_database=database, home=home, slots=2)
