"""`max_running`: at most so many of a name or key at a time, across all workers."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from core4.config import Settings
from core4.database import Database
from core4.jobs import Job
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.store import QUEUE
from tests.database import SmallDatabase
from tests.helpers import ROOT
from tests.integration.driver import OWNER, claim, held, order

JOBS, PROCESSES, LIMIT = 200, 4, 3


@pytest.fixture(params=[False, True], ids=["peek", "find-and-modify"])
async def queue(request: pytest.FixtureRequest, database: SmallDatabase, settings: Settings) -> JobQueue:
    """Both shapes of the claim pass the same tests; one of them with all indexes."""
    database.find_and_modify, database.every_index = request.param, not request.param
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    return queue


async def put(queue: JobQueue, count: int, name: str = "a.B", *, first: int = 0, **options: Any) -> list[Job]:
    return [
        await queue.enqueue(order(name, args={"n": n}, options={"max_running": 2, **options}))
        for n in range(first, first + count)
    ]


async def test_no_more_than_the_limit_is_claimed(queue: JobQueue) -> None:
    """The rest leaves the line uncharged; each that ends lets the first of them follow."""
    jobs = await put(queue, 4)
    first, second = await claim(queue)

    assert {first.document["slot"], second.document["slot"]} == {"a.B#0", "a.B#1"}
    assert await claim(queue) == []
    for job in jobs[2:]:
        found = await queue.store.get(job.id)
        assert (found.document["held"], found.state, found.claims) == ("max_running", State.PENDING, 0)

    after = await queue.finish(await queue.start(first), Outcome.complete(None), log_seq=0)
    assert "slot" not in after.document
    assert await held(queue, jobs[2]) is None
    assert await held(queue, jobs[3]) == "max_running"
    assert [job.id for job in await claim(queue)] == [jobs[2].id]


@pytest.mark.parametrize("end", ["release", "fail", "kill", "rescue"])
async def test_whatever_ends_a_job_frees_its_slot(queue: JobQueue, end: str) -> None:
    jobs = await put(queue, 2, max_running=1, attempts=2)
    (job,) = await claim(queue)
    assert await held(queue, jobs[1]) is not None or await claim(queue) == []
    if end == "release":
        await queue.release(job, reason="test", delay=60)
    elif end == "fail":
        await queue.finish(await queue.start(job), Outcome.failed("boom", []), log_seq=0)
    elif end == "kill":
        await queue.kill(job.id, by="ann")
        await queue.finish(await queue.start(job), Outcome.killed("killed"), log_seq=0)
    else:
        await queue.start(job)

        async def nobody() -> list[str]:
            return []

        await queue.rescue(nobody)

    assert [one.id for one in await claim(queue)] == [jobs[1].id]


async def test_a_key_is_shared_by_names(queue: JobQueue) -> None:
    await put(queue, 1, "a.B", max_running=1, max_running_key="licence")
    await put(queue, 1, "c.D", max_running=1, max_running_key="licence")

    (job,) = await claim(queue)
    assert job.document["slot"] == "licence#0"
    assert await claim(queue) == []


async def test_a_pinned_job_stays_pinned(queue: JobQueue) -> None:
    await put(queue, 1, max_running=1)
    (running,) = await claim(queue)
    (pinned,) = await put(queue, 1, first=1, max_running=1, worker=OWNER.worker)
    assert await claim(queue) == []
    assert await held(queue, pinned) == "max_running"

    await queue.finish(await queue.start(running), Outcome.complete(None), log_seq=0)
    assert await held(queue, pinned) == "worker"
    assert [job.id for job in await claim(queue)] == [pinned.id]


async def test_upkeep_wakes_whom_a_dead_process_did_not(queue: JobQueue, database: Database) -> None:
    jobs = await put(queue, 3, max_running=1)
    (running,) = await claim(queue)
    assert await claim(queue) == []
    assert await queue.claims.wake_held() == 0
    await database.collection(QUEUE).delete_one({"_id": running.id})

    assert await queue.claims.wake_held() == 1
    assert [job.id for job in await claim(queue)] == [jobs[1].id]


async def test_a_thousand_held_in_front_slow_nobody_behind(queue: JobQueue, database: Database) -> None:
    """They leave the index in one go: later claims look at none of them."""
    await put(queue, 1, max_running=1)
    assert len(await claim(queue)) == 1
    more = (order("a.B", args={"n": n}, options={"max_running": 1}) for n in range(1, 1001))
    await asyncio.gather(*map(queue.enqueue, more))
    await queue.enqueue(order("c.D"))

    assert [job.name for job in await claim(queue, 1)] == ["c.D"]
    assert await database.collection(QUEUE).find({"due": True}).to_list(None) == []


@pytest.mark.parametrize("shape", ["peek", "one"])
async def test_four_processes_never_run_more_than_the_limit(
    mongo_url: str, database: Database, settings: Settings, tmp_path: Path, shape: str
) -> None:
    """By the ledger of the jobs themselves, and all of them are done."""
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    orders = (order("a.B", args={"n": n}, options={"max_running": LIMIT}) for n in range(JOBS))
    wanted = {str(job.id) for job in await asyncio.gather(*map(queue.enqueue, orders))}
    ledger = tmp_path / "ledger"

    async def process(number: int) -> int:
        environ = {**os.environ, "SLOTTER_URL": mongo_url, "SLOTTER_LEDGER": str(ledger)}
        command = ("-m", "tests.integration.slotter", database.name, f"w{number}-", shape)
        started = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, env=environ)
        return await started.wait()

    assert await asyncio.gather(*map(process, range(PROCESSES))) == [0] * PROCESSES
    running: set[str] = set()
    most = 0
    for line in ledger.read_text().splitlines():
        sign, job_id = line.split()
        (running.add if sign == "+" else running.remove)(job_id)
        most = max(most, len(running))
        wanted.discard(job_id) if sign == "-" else None
    assert wanted == set()
    assert 1 < most <= LIMIT
    assert await queue.store.counts() == {}
