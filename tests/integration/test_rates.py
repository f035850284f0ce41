"""`rate_limit`: at most so many starts of a name in any window of time, by all workers together.

Time passes by moving the stored starts into the past: what is tested is never how long something took.
"""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4.config import Settings
from core4.controls import CONTROL, RateStore
from core4.database import Database
from core4.jobs import Job, new_document, utcnow
from core4.options import Rate
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.store import QUEUE
from tests.database import SmallDatabase
from tests.helpers import ROOT
from tests.integration.driver import OWNER, claim, held, order

LIMIT, PROCESSES = 10, 3


@pytest.fixture(params=[False, True], ids=["peek", "find-and-modify"])
async def queue(request: pytest.FixtureRequest, database: SmallDatabase, settings: Settings) -> JobQueue:
    """Both shapes of the claim pass the same tests; one of them with all indexes."""
    database.find_and_modify, database.every_index = request.param, not request.param
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    return queue


async def put(queue: JobQueue, count: int, name: str = "a.B", *, first: int = 0, **options: Any) -> list[Job]:
    return [
        await queue.enqueue(order(name, args={"n": n}, options={"rate_limit": "2/1h", **options}))
        for n in range(first, first + count)
    ]


async def pass_time(database: Database, hours: float = 1) -> None:
    """As the stored starts see it."""
    controls = database.collection(CONTROL)
    for row in await controls.find({"kind": "rate"}).to_list(None):
        past = {"times": [time - timedelta(hours=hours) for time in row.get("times", ())]}
        if row.get("wake_at"):
            past["wake_at"] = row["wake_at"] - timedelta(hours=hours)
        await controls.update_one({"_id": row["_id"]}, {"$set": past})


def ids(jobs: list[Job]) -> list[Any]:
    return [job.id for job in jobs]


async def test_no_more_than_the_limit_is_started(queue: JobQueue, database: Database) -> None:
    """The rest leaves the line uncharged, and follows in its order when time has passed."""
    jobs = await put(queue, 5)
    assert ids(await claim(queue)) == ids(jobs[:2])
    assert await claim(queue) == []
    for job in jobs[2:]:
        found = await queue.store.get(job.id)
        assert (found.document["held"], found.state, found.claims) == ("rate_limit", State.PENDING, 0)
    assert await queue.claims.wake_rated() == 0

    await pass_time(database, 0.5)
    assert await queue.claims.wake_rated() == 0
    await pass_time(database, 0.5)
    (urgent,) = await put(queue, 1, first=5, priority=1)
    assert await queue.claims.wake_rated() == 2
    # Who was enqueued since, with priority, is first; one of the woken is held again.
    assert ids(await claim(queue)) == [urgent.id, jobs[2].id]
    assert await held(queue, jobs[3]) == "rate_limit"

    await pass_time(database)
    assert await queue.claims.wake_rated() == 2
    assert ids(await claim(queue)) == ids(jobs[3:])
    await pass_time(database)
    assert await queue.claims.wake_rated() == 0
    assert await queue.claims.wake_rated() == 0
    assert await database.collection(CONTROL).find({"wake_at": {"$ne": None}}).to_list(None) == []


async def test_a_retry_is_a_start(queue: JobQueue, database: Database) -> None:
    """Whatever became of the start before: it is what the limit is for."""
    (job,) = await put(queue, 1, rate_limit="1/1h", attempts=2, error_time=0.001)
    (claimed,) = await claim(queue)
    await queue.finish(await queue.start(claimed), Outcome.failed("boom", []), log_seq=0)
    while not await queue.promote():
        pass
    assert await claim(queue) == []
    assert await held(queue, job) == "rate_limit"

    await pass_time(database)
    assert await queue.claims.wake_rated() == 1
    assert ids(await claim(queue)) == [job.id]


async def test_pinned_and_slotted_jobs(queue: JobQueue, database: Database) -> None:
    """A job waits for all that it needs, in whatever order that comes; only a start is counted."""
    jobs = await put(queue, 4, rate_limit="3/1h", max_running=1, worker=OWNER.worker)
    (first,) = await claim(queue)
    assert await claim(queue) == []
    (row,) = await database.collection(CONTROL).find({"kind": "rate"}).to_list(None)
    assert len(row["times"]) == 1
    for follower in jobs[1:3]:
        await queue.finish(await queue.start(first), Outcome.complete(None), log_seq=0)
        (first,) = await claim(queue)
        assert first.id == follower.id
    await queue.finish(await queue.start(first), Outcome.complete(None), log_seq=0)
    assert await claim(queue) == []
    assert await held(queue, jobs[3]) == "rate_limit"

    await pass_time(database)
    assert await queue.claims.wake_rated() == 1
    assert await held(queue, jobs[3]) == "worker"
    assert ids(await claim(queue)) == [jobs[3].id]


async def test_a_thousand_held_in_front_slow_nobody_behind(queue: JobQueue, database: Database) -> None:
    """They leave the index in one go, and those that time lets go are looked for, not found in passing."""
    await put(queue, 1, rate_limit="1/1h")
    assert len(await claim(queue)) == 1
    more = (order("a.B", args={"n": n}, options={"rate_limit": "1/60m"}) for n in range(1, 1001))
    rows = [new_document(each, ObjectId(), utcnow()) for each in more]
    await database.collection(QUEUE).insert_many(rows)
    await queue.enqueue(order("c.D"))

    assert [job.name for job in await claim(queue, 1)] == ["c.D"]
    assert await database.collection(QUEUE).find({"due": True}).to_list(None) == []
    await pass_time(database)
    assert await queue.claims.wake_rated() == 1
    assert len(await database.collection(QUEUE).find({"due": True}).to_list(None)) == 1


async def test_who_is_held_and_looked_after_by_nobody(queue: JobQueue, database: Database) -> None:
    """A process that died between the two is made good by upkeep; a killed one leaves nothing behind."""
    jobs = await put(queue, 4, rate_limit="1/1h")
    assert len(await claim(queue)) == 1
    assert await claim(queue) == []
    await database.collection(CONTROL).update_one({}, {"$unset": {"wake_at": 1}})
    await pass_time(database)
    assert await queue.claims.wake_rated() == 0
    await queue.claims.wake_held()
    assert await queue.claims.wake_rated() == 1
    await queue.kill(jobs[1].id, by="ann")
    assert await claim(queue) == []
    await pass_time(database)
    assert await queue.claims.wake_rated() == 1
    assert ids(await claim(queue)) == [jobs[2].id]


async def test_a_window_holds_no_more_wherever_it_begins(database: Database) -> None:
    """By the database's clock, with several that start as fast as they can."""
    store, rate = RateStore(database), Rate.parse("3/0.2s")

    async def start(count: int) -> None:
        while count:
            count -= await RateStore(database).take("a.B", rate) is None

    await asyncio.gather(start(6), start(6))
    (row,) = await database.collection(CONTROL).find({"kind": "rate"}).to_list(None)
    assert len(row["times"]) == 3
    # A larger limit of the same name keeps more of them, and a smaller one forgets none of those.
    larger = Rate.parse("9/0.2s")
    for wanted in (larger, rate, larger):
        while await store.take("a.B", wanted) is not None:
            pass
    times: list[Any] = []
    while len(times) < 12:
        if await store.take("a.B", rate) is None:
            (row,) = await database.collection(CONTROL).find({"kind": "rate"}).to_list(None)
            times.append(row["times"][-1])
    assert all(early <= late for early, late in pairwise(times))
    assert all(late - early >= timedelta(seconds=0.2) for early, late in zip(times, times[3:], strict=False))


@pytest.mark.parametrize("shape", ["peek", "one"])
async def test_processes_never_start_more_than_the_limit(
    mongo_url: str, database: Database, settings: Settings, tmp_path: Path, shape: str
) -> None:
    """By the ledger of the jobs themselves: each window is used up, and not exceeded by one."""
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    options = {"rate_limit": f"{LIMIT}/1h"}
    orders = (order("a.B", args={"n": n}, options=options) for n in range(3 * LIMIT))
    await asyncio.gather(*map(queue.enqueue, orders))
    ledger = tmp_path / "ledger"

    async def process(number: int) -> int:
        environ = {**os.environ, "SLOTTER_URL": mongo_url, "SLOTTER_LEDGER": str(ledger)}
        command = ("-m", "tests.integration.rater", database.name, f"w{number}-", shape)
        started = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, env=environ)
        return await started.wait()

    for window in (1, 2):
        assert await asyncio.gather(*map(process, range(PROCESSES))) == [0] * PROCESSES
        assert len(set(ledger.read_text().splitlines())) == window * LIMIT
        await pass_time(database)
        assert await queue.claims.wake_rated() == LIMIT
