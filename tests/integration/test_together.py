"""What a worker stores for several jobs in one call: each as guarded as alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect

from core4 import transitions
from core4.database import Database
from core4.errors import Core4Error, LeaseLost
from core4.jobs import Job, JobOrder, Owner
from core4.logs import Line, LogStore
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.worker.together import Together

pytestmark = pytest.mark.asyncio

OWNER = Owner("owner", "worker@here", "here", 1)


async def enqueued(queue: JobQueue, count: int, **options: object) -> list[Job]:
    orders = [JobOrder(name="tests.Job", args={"n": n}, unique=False, options=options) for n in range(count)]
    return [await queue.enqueue(order) for order in orders]


async def started(queue: JobQueue, count: int, **options: object) -> list[Job]:
    await enqueued(queue, count, **options)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=count)
    return done(await queue.start_many([(job, 7) for job in claimed]))


def done(found: Sequence[Job | Core4Error]) -> list[Job]:
    jobs = [each for each in found if isinstance(each, Job)]
    assert len(jobs) == len(found), found
    return jobs


def ends(jobs: Sequence[Job]) -> list[tuple[Job, Outcome, int]]:
    return [(job, Outcome.complete(job.args["n"]), job.log_seq) for job in jobs]


async def test_several_jobs_are_claimed_started_and_finished_in_order(queue: JobQueue) -> None:
    """First in line first; each with its own lease, attempt and result, all of them in the journal."""
    orders = await enqueued(queue, 5)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=4)
    begun = done(await queue.start_many([(job, 7) for job in claimed]))
    done(await queue.finish_many(ends(begun)))

    assert [job.id for job in claimed] == [job.id for job in orders[:4]]
    assert len({job.lease.id for job in claimed if job.lease}) == 4
    for number, job in enumerate(claimed):
        found = await queue.store.get(job.id)
        assert found.journal
        assert (found.state, found.trial, found.document["result"]) == (State.COMPLETE, 1, number)
    assert [row["_id"] for row in await queue.store.queue.find({}).to_list(None)] == [orders[4].id]


async def test_a_claim_that_is_flagged_at_once_is_a_claim(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several was taken by another: so the others are read again, and one was told to end."""
    lost, flagged = await enqueued(queue, 2)
    bulk_write = queue.store.queue.bulk_write

    async def in_between(*args: Any, **more: Any) -> Any:
        assert await queue.store.cas(lost, transitions.claim(lost, replace(OWNER, id="other"))) is not None
        result = await bulk_write(*args, **more)
        await queue.kill(flagged.id, by="somebody")
        return result

    monkeypatch.setattr(queue.store.queue, "bulk_write", in_between)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=2)

    assert [job.id for job in claimed] == [flagged.id]
    assert claimed[0].killed_at is not None
    assert claimed[0].rev == (await queue.store.get(flagged.id)).rev


async def test_a_claim_outlives_a_look_into_the_journal_that_fails(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing counts as begun then: the start asks again."""
    await enqueued(queue, 2)

    async def broken(ids: Sequence[ObjectId]) -> set[ObjectId]:
        raise AutoReconnect("gone")

    monkeypatch.setattr(queue.store, "in_journal", broken)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=2, begins=lambda job: 7)
    monkeypatch.undo()

    assert len(claimed) == 2
    assert not claimed.begun
    assert [job.trial for job in done(await queue.start_many([(job, 7) for job in claimed]))] == [1, 1]


async def test_a_window_of_less_than_milliseconds_loses_no_claim(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is compared with what is stored, if one of several was lost to another."""
    mine, lost = await enqueued(queue, 2, defer_max=60.33333)
    bulk_write = queue.store.queue.bulk_write

    async def in_between(*args: Any, **more: Any) -> Any:
        assert await queue.store.cas(lost, transitions.claim(lost, replace(OWNER, id="other"))) is not None
        return await bulk_write(*args, **more)

    monkeypatch.setattr(queue.store.queue, "bulk_write", in_between)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=2, begins=lambda job: 7)

    assert [job.id for job in claimed] == [mine.id]
    assert claimed[0].inactive_at == (await queue.store.get(mine.id)).inactive_at


async def test_what_begins_with_its_claim_needs_no_start(queue: JobQueue) -> None:
    """One write less; but for what may be put aside after its claim, which must not have begun."""
    plain, _ = await enqueued(queue, 2)
    (alone,) = await enqueued(queue, 1, max_running=1)
    (rated,) = await enqueued(queue, 1, rate_limit="5/60s")
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=4, begins=lambda job: 7)
    begun = {job.id: job for job in claimed}

    assert [begun[job.id].trial for job in (plain, alone, rated)] == [1, 0, 0]
    assert begun[plain.id].started_at is not None
    assert begun[plain.id].document["locked"]["pid"] == 7
    found = done(await queue.start_many([(job, 7) for job in claimed]))
    assert [job.trial for job in found] == [1, 1, 1, 1]
    assert all(job.rev == begun[job.id].rev + (begun[job.id].trial == 0) for job in found)
    done(await queue.finish_many(ends(found)))
    assert (await queue.store.get(plain.id)).state is State.COMPLETE


async def test_what_has_begun_with_its_claim_is_given_back_uncharged(queue: JobQueue) -> None:
    """Its worker may have died before its body; then it counts as a crash, as if the body had run."""
    await enqueued(queue, 2)
    back, lost = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=2, begins=lambda job: 7)

    again = await queue.release(back, reason="no process for it")
    assert (again.state, again.crashes, again.document["attempts_left"]) == (State.PENDING, 0, 1)
    assert await queue.store.cas(lost, transitions.rescue(lost, 3, 3)) is not None
    rescued = await queue.store.get(lost.id)
    assert (rescued.state, rescued.crashes) == (State.PENDING, 1)


async def test_a_lost_lease_stands_in_its_place_and_the_others_end(queue: JobQueue) -> None:
    """What another worker holds is not written, whoever else is in the same call."""
    jobs = await started(queue, 3)
    await queue.release(jobs[1], reason="lost")
    found = await queue.finish_many(ends(jobs))

    assert isinstance(found[1], LeaseLost)
    assert (await queue.store.get(jobs[1].id)).state is State.PENDING
    for job in (jobs[0], jobs[2]):
        assert (await queue.store.get(job.id)).journal


@pytest.mark.parametrize("taken", [False, True], ids=["nobody's", "another's"])
async def test_a_lost_lease_is_not_started(queue: JobQueue, taken: bool) -> None:
    """Neither a job that is back in line, nor one that another worker has claimed meanwhile."""
    await enqueued(queue, 3)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=3)
    await queue.release(claimed[0], reason="lost")
    if taken:
        await queue.claims.claim(replace(OWNER, id="other"), namespaces=["DEFAULT"])
    found = await queue.start_many([(job, 7) for job in claimed])

    assert isinstance(found[0], LeaseLost)
    assert (await queue.store.get(claimed[0].id)).trial == 0
    assert [job.trial for job in done(found[1:])] == [1, 1]


async def test_a_leftover_of_the_journal_is_not_started(queue: JobQueue) -> None:
    """An id that is in the journal is done; the others of the call begin."""
    await enqueued(queue, 2)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=2)
    await queue.store.journal.insert_one({**claimed[0].document, "rev": 99})
    found = await queue.start_many([(job, 7) for job in claimed])

    assert isinstance(found[0], LeaseLost)
    assert isinstance(found[1], Job)
    assert await queue.store.queue.find_one({"_id": claimed[0].id}) is None


async def test_a_repeated_call_finds_what_it_has_done(queue: JobQueue) -> None:
    """After a lost reply the same call is made again: one attempt, one outcome."""
    await enqueued(queue, 3)
    claimed = await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=3)
    first = done(await queue.start_many([(job, 7) for job in claimed]))
    again = done(await queue.start_many([(job, 7) for job in claimed]))
    done(await queue.finish_many(ends(first)))
    done(await queue.finish_many(ends(first)))

    assert [job.trial for job in again] == [1, 1, 1]
    assert await queue.store.queue.find_one({}) is None
    rows = await queue.store.journal.find({}).to_list(None)
    assert [[entry["state"] for entry in row["history"]] for row in rows] == [
        ["pending", "running", "complete"]
    ] * 3


async def test_a_result_that_cannot_be_stored_fails_its_job_alone(queue: JobQueue) -> None:
    jobs = await started(queue, 3, attempts=1)
    odd = [(jobs[0], Outcome.complete({"n": 2**70}), 0), *ends(jobs[1:])]
    found = done(await queue.finish_many(odd))

    assert [job.state for job in found] == [State.ERROR, State.COMPLETE, State.COMPLETE]


async def test_outcomes_of_all_kinds_go_together(queue: JobQueue) -> None:
    """Complete, failed for good, failed with attempts left: each ends where it would alone."""
    jobs = await started(queue, 3, attempts=2, error_time=60)
    outcomes = [Outcome.complete(1), Outcome.failed("no", []), Outcome.deferred("later")]
    found = done(await queue.finish_many([(job, each, 0) for job, each in zip(jobs, outcomes, strict=True)]))

    assert [job.state for job in found] == [State.COMPLETE, State.FAILED, State.DEFERRED]
    assert [(await queue.store.get(job.id)).journal for job in jobs] == [True, False, False]


async def test_a_place_that_is_freed_wakes_who_waits_for_it(queue: JobQueue) -> None:
    jobs = await started(queue, 2, max_running=2)
    (waiting,) = await enqueued_more(queue)
    assert not await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
    done(await queue.finish_many(ends(jobs)))

    (claimed,) = await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
    assert claimed.id == waiting.id


async def enqueued_more(queue: JobQueue) -> list[Job]:
    order = JobOrder(name="tests.Job", args={"n": 99}, options={"max_running": 2})
    return [await queue.enqueue(order)]


async def test_lines_of_several_jobs_are_stored_once(database: Database, queue: JobQueue) -> None:
    logs = LogStore(database)
    await logs.prepare()
    jobs = await enqueued(queue, 3)
    batches = [(job, "here", [Line(1, 0.0, "INFO", f"of {job.id}")]) for job in jobs]
    await logs.append_many(batches[:2])
    await logs.append_many(batches)

    for job in jobs:
        assert [line["message"] for line in await logs.tail(job.id, 0)] == [f"of {job.id}"]


async def test_calls_made_meanwhile_go_together() -> None:
    """The first goes alone at once, what comes while it is under way goes next, at most so many."""
    calls: list[list[int]] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def perform(items: Sequence[int]) -> list[int | Exception]:
        calls.append(list(items))
        begun.set()
        await go.wait()
        return [ValueError(str(item)) if item == 3 else item * 2 for item in items]

    together = Together(perform, most=2)
    first = asyncio.create_task(together(1))
    await begun.wait()
    others = [asyncio.create_task(together(n)) for n in (2, 3, 4)]
    go.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)

    assert calls == [[1], [2, 3], [4]]
    assert [found[0], found[1], found[3]] == [2, 4, 8]
    assert isinstance(found[2], ValueError)


async def test_an_error_of_the_call_is_everybodys() -> None:
    async def perform(items: Sequence[ObjectId]) -> list[ObjectId | Exception]:
        raise TimeoutError("no answer")

    together = Together(perform, most=10)
    found = await asyncio.gather(together(ObjectId()), together(ObjectId()), return_exceptions=True)
    assert [type(each) for each in found] == [TimeoutError, TimeoutError]
