"""What somebody with a database does for all, a look at a time: whom it asks, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from core4.attendance import CROWD, Attendance, Contact
from core4.changes import Change
from core4.config import Settings
from core4.database import Database, Document
from core4.events import EVENT, EventStore
from core4.jobs import Job, JobOrder, Owner, utcnow
from core4.queues import JobQueue
from core4.registry import WORKER, WorkerRegistry
from core4.retries import Outcome
from core4.states import State
from core4.store import QUEUE

FAR = 3600.0
SLOW = 600.0  # seconds of silence: nobody is dead because this machine is slow
FIRST = Owner("first", "first@here", "here", 1)


class Chores:
    """What looks after the dead, step by step, and how often it looked at the jobs that run."""

    def __init__(self, database: Database, settings: Settings, queue: JobQueue) -> None:
        self.contact = Contact()
        self.contact.since = time.monotonic() - FAR
        self.attendance = Attendance(
            database,
            replace(settings, dead_after=SLOW),
            queue,
            contact=self.contact,
            name=lambda: "me",
            woken=lambda: None,
            live=lambda: True,
        )
        self.looks = 0
        rescue = queue.rescue

        async def counted(alive: Callable[[], Awaitable[Collection[str]]]) -> int:
            self.looks += 1
            return await rescue(alive)

        queue.rescue = counted  # type: ignore[method-assign]

    async def step(self) -> int:
        """One look; how many jobs it has rescued."""
        return await self.attendance._rescue()


async def held_by(queue: JobQueue, registry: WorkerRegistry, owner: Owner, **options: Any) -> Job:
    await registry.register(owner, slots=1, namespaces=["DEFAULT"], jobs=["a.Job"], version="1")
    await queue.enqueue(JobOrder(name="a.Job", args={"n": owner.id}, username="me", options=options))
    (job,) = await queue.claims.claim(owner, namespaces=["DEFAULT"])
    return job


@pytest.mark.parametrize("ends", ["buried", "condemned"])
async def test_jobs_are_looked_at_when_somebody_has_gone(
    database: Database, settings: Settings, queue: JobQueue, registry: WorkerRegistry, ends: str
) -> None:
    """Whoever has ended or buried it, and died before he rescued: each looks that has known it."""
    job = await held_by(queue, registry, FIRST)
    chores = Chores(database, settings, queue)
    assert [await chores.step() for _ in range(3)] == [0, 0, 0]
    assert chores.looks == 1  # the first; nobody has gone since
    if ends == "buried":
        assert await registry.bury(-FAR) == [FIRST.id]
    else:
        assert await registry.condemn(FIRST.id, "its process ended")
    chores.contact.lost()
    assert await chores.step() == 0  # whoever was cut off says of nobody that he is dead
    chores.contact.since = time.monotonic() - FAR
    assert [await chores.step() for _ in range(2)] == [1, 0]
    assert (await queue.store.get(job.id)).state is State.PENDING
    assert chores.looks == 2


async def test_who_seems_silent_is_judged_by_the_clock_of_the_server(
    database: Database, settings: Settings, queue: JobQueue, registry: WorkerRegistry
) -> None:
    """A process that was frozen has seen nobody renew; that makes nobody dead."""
    job = await held_by(queue, registry, FIRST)
    chores = Chores(database, settings, queue)
    assert await chores.step() == 0
    seen = chores.attendance._seen
    seen[FIRST.id] = seen[FIRST.id][0], time.monotonic() - FAR
    assert await chores.step() == 0
    assert await registry.alive_ids() == {FIRST.id}
    old = utcnow() - timedelta(seconds=FAR)
    await database.collection(WORKER).update_one({"_id": FIRST.id}, {"$set": {"beat": old}})
    await chores.step()
    seen = chores.attendance._seen
    seen[FIRST.id] = seen[FIRST.id][0], time.monotonic() - FAR
    assert await chores.step() == 1
    assert (await queue.store.get(job.id)).state is State.PENDING


async def test_a_crowd_reads_all_the_living_seldom_and_finds_the_silent_at_each_look(
    database: Database, settings: Settings, queue: JobQueue, registry: WorkerRegistry
) -> None:
    """Up to forty do as ever; and who has found one dead looks again how many are left."""
    job = await held_by(queue, registry, FIRST)
    beat = utcnow()
    more = [
        {"_id": f"worker{number}", "state": "up", "beat": beat, "namespaces": ["DEFAULT"]}
        for number in range(CROWD)
    ]
    await database.collection(WORKER).insert_many(more[1:])
    chores = Chores(database, replace(settings, rescue_every=60.0), queue)
    attendance, reads = chores.attendance, 0
    living = attendance._registry.living

    async def counted() -> list[Document]:
        nonlocal reads
        reads += 1
        return await living()

    attendance._registry.living = counted  # type: ignore[method-assign]
    assert [await chores.step() for _ in range(3)] == [0, 0, 0]
    assert (reads, attendance.crowd("DEFAULT"), attendance.crowd("other")) == (3, CROWD, CROWD)
    assert attendance._rescue_every == 60

    await database.collection(WORKER).insert_one(more[0])
    assert [await chores.step() for _ in range(3)] == [0, 0, 0]
    assert (reads, attendance.crowd(None)) == (4, CROWD + 1)
    assert 60 < attendance._rescue_every < 62
    old = utcnow() - timedelta(seconds=SLOW * 2)
    await database.collection(WORKER).update_one({"_id": FIRST.id}, {"$set": {"beat": old}})
    assert await chores.step() == 1
    assert (await queue.store.get(job.id)).state is State.PENDING
    assert reads == 4
    await chores.step()
    assert (reads, attendance.crowd(None)) == (5, CROWD)


async def test_a_window_is_expected(
    database: Database, settings: Settings, queue: JobQueue, registry: WorkerRegistry
) -> None:
    """When a deferred job expires is known, by what is stored and by what is heard."""
    owner = replace(FIRST, id="other")
    await held_by(queue, registry, owner, defer_time=FAR)
    (job,) = await queue.store.running(owner.id)
    await queue.finish(await queue.start(job), Outcome.deferred("later"), log_seq=0)
    assert await queue.expires_in(60) is None
    soon = utcnow() + timedelta(seconds=30)
    await database.collection(QUEUE).update_one({"_id": job.id}, {"$set": {"expires": soon}})
    left = await queue.expires_in(FAR)
    assert left is not None
    assert left <= 30
    chores = Chores(database, settings, queue)
    chores.attendance._late.looking()
    late = {"expires": utcnow() - timedelta(seconds=1)}
    chores.attendance.hear(Change("update", QUEUE, job.id, late))
    await chores.attendance._late.wait()  # else a minute
    await database.collection(QUEUE).update_one({"_id": job.id}, {"$set": late})
    assert await queue.expire() == 1
    assert await queue.expires_in(FAR) is None


async def rows_of(database: Database) -> list[Document]:
    return await database.collection(EVENT).find({}).to_list(None)


async def test_the_same_counts_are_kept_once(database: Database) -> None:
    """An idle system writes only the finest bucket again; a higher total, and another bucket, all of them."""
    store = EventStore(database)
    await store.prepare()
    now = utcnow().replace(hour=12, minute=30, second=0, microsecond=0)
    await store.count(now, 20, {"pending": 1})
    assert [row["total"] for row in await rows_of(database)] == [1, 1, 1, 1]
    await database.collection(EVENT).update_many({}, {"$set": {"total": -1}})  # who writes it tells
    await store.count(now + timedelta(seconds=20), 20, {"pending": 1})
    assert sorted([row["total"] for row in await rows_of(database)]) == [-1, -1, -1, -1, 1]
    await store.count(now + timedelta(seconds=40), 20, {"pending": 2})
    assert sorted([row["total"] for row in await rows_of(database)]) == [-1, 1, 2, 2, 2, 2]
