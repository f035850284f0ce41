"""The queue on a real server: every transition, and what two at once do to each other."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from bson import ObjectId

from core4 import jobs
from core4.claims import Claimed
from core4.config import Settings
from core4.database import Database
from core4.errors import Conflict, JobExists, JobNotFound, LeaseLost
from core4.jobs import Job, JobOrder, Owner, utcnow
from core4.options import DEFAULTS
from core4.queues import JobQueue
from core4.retention import Retention
from core4.retries import Outcome
from core4.states import Flag, State
from core4.store import JOURNAL, QUEUE
from tests.database import SmallDatabase
from tests.helpers import unsettled

pytestmark = pytest.mark.asyncio

NAMESPACES = ["DEFAULT"]
OPTIONS_OF_0_1 = {
    *("attempts", "error_time", "defer_time", "defer_max", "zombie_time", "wall_time"),
    *("progress_interval", "max_parallel", "priority", "force", "worker"),
}


def owner(worker: str = "worker@here") -> Owner:
    return Owner(id=uuid.uuid4().hex, worker=worker, hostname=socket.gethostname(), pid=1)


def order(n: int = 0, **more: Any) -> JobOrder:
    return JobOrder(**{"name": "tests.Job", "args": {"n": n}, "username": "ann", **more})


@pytest.fixture(params=[False, True], ids=["peek", "find-and-modify"])
async def queue(request: pytest.FixtureRequest, database: SmallDatabase, settings: Settings) -> JobQueue:
    """Both shapes of the claim pass the same tests; one of them with all indexes."""
    database.find_and_modify, database.every_index = request.param, not request.param
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    return queue


async def run(queue: JobQueue, who: Owner | None = None) -> Job:
    """Claim and start the first job in line."""
    (job,) = await queue.claims.claim(who or owner(), namespaces=NAMESPACES)
    return await queue.start(job, pid=1)


async def stored(queue: JobQueue, job_id: ObjectId) -> tuple[dict[str, Any], bool]:
    found = await queue.store.document(job_id)
    assert found is not None
    return found


async def both(database: Database, job_id: ObjectId) -> tuple[int, int]:
    """How often a job is in the queue and in the journal."""
    where = {"_id": job_id}
    return (
        len(await database.collection(QUEUE).find(where).to_list(None)),
        len(await database.collection(JOURNAL).find(where).to_list(None)),
    )


def path(document: dict[str, Any]) -> list[str]:
    return [entry["state"] for entry in document["history"]]


async def test_a_job_runs_to_its_journal(queue: JobQueue, database: Database) -> None:
    """Pending, running, complete: then it is in the journal once and nowhere else."""
    enqueued = await queue.enqueue(order())
    job = await run(queue)
    await queue.progress(job, 0.5, "half")
    done = await queue.finish(job, Outcome.complete({"sum": 3}), log_seq=jobs.first_seq(1))

    document, journaled = await stored(queue, enqueued.id)
    assert journaled
    assert await both(database, enqueued.id) == (0, 1)
    assert document["state"] == done.state == State.COMPLETE
    assert document["result"] == {"sum": 3}
    assert document["prog"] == {"value": 1.0, "message": ""}
    assert document["log_seq"] == jobs.first_seq(1)
    assert document["trial"] == 1
    assert document["attempts_left"] == 0
    assert path(document) == ["pending", "running", "complete"]
    revs = [entry["rev"] for entry in document["history"]]
    assert revs == sorted(set(revs))
    assert document["rev"] == revs[-1]
    assert "lease" not in document
    assert "unique_key" not in document


@pytest.mark.row("S31")
async def test_same_name_and_arguments_is_the_same_job(queue: JobQueue) -> None:
    """One open job per name and arguments, whatever their order; also without arguments."""
    first = await queue.enqueue(order(args={"a": 1, "b": {"c": 2, "d": 3}}))
    with pytest.raises(JobExists) as caught:
        await queue.enqueue(order(args={"b": {"d": 3, "c": 2}, "a": 1}))
    assert caught.value.job_id == first.id
    await queue.enqueue(order(args={}))
    with pytest.raises(JobExists):
        await queue.enqueue(order(args={}))
    await queue.enqueue(order(args={"a": 2}))
    await queue.enqueue(order(args={"a": 2}, unique=False))


async def test_complete_frees_the_place_and_stopped_keeps_it(queue: JobQueue) -> None:
    """The key is free in the finish write; an error holds it until it is removed."""
    await queue.enqueue(order())
    await queue.finish(await run(queue), Outcome.complete(None), log_seq=0)
    failed = await queue.enqueue(order())
    await queue.finish(await run(queue), Outcome.failed("boom", []), log_seq=0)
    with pytest.raises(JobExists):
        await queue.enqueue(order())
    await queue.remove(failed.id, by="ann")
    await queue.enqueue(order())


async def test_once_means_one_job_per_id_also_when_it_is_journaled(
    queue: JobQueue, database: Database
) -> None:
    """Waiting, running or done: the same id is the same job."""
    job_id = jobs.derived_id("tests", "once")
    first = await queue.enqueue(order(unique=False), job_id=job_id, once=True)
    assert (await queue.enqueue(order(unique=False), job_id=job_id, once=True)).rev == first.rev
    await queue.finish(await run(queue), Outcome.complete(None), log_seq=0)
    again = await queue.enqueue(order(unique=False), job_id=job_id, once=True)
    assert (again.state, again.journal) == (State.COMPLETE, True)
    assert await both(database, job_id) == (0, 1)


@pytest.mark.row("S32")
async def test_defaults_of_a_fresh_job(queue: JobQueue) -> None:
    """A job enqueued without options has core4's defaults (core4.md 3.2)."""
    job = await queue.enqueue(order())
    document, _ = await stored(queue, job.id)
    expected = {
        "attempts": 1,
        "attempts_left": 1,
        "error_time": 600,
        "defer_time": 300,
        "defer_max": 3600,
        "zombie_time": 1800,
        "wall_time": None,
        "progress_interval": 5,
        "max_parallel": 15,
        "priority": 0,
        "force": False,
        "worker": None,
        "trial": 0,
        "state": "pending",
    }
    assert {key: document[key] for key in expected} == expected


@pytest.mark.row("S34")
async def test_what_is_stored_is_what_was_enqueued(queue: JobQueue) -> None:
    """The job returned by enqueue equals the one loaded from the queue, field by field."""
    job = await queue.enqueue(order(args={"deep": {"$a.b": [1, 2.5, None, "é"]}}, options={"priority": 7}))
    assert await queue.store.get(job.id) == job


@pytest.mark.row("S36")
async def test_order_is_force_then_priority_then_time(queue: JobQueue) -> None:
    """Jobs come out as they came in; a higher priority passes; force passes all."""
    ids = [(await queue.enqueue(order(n))).id for n in range(3)]
    urgent = await queue.enqueue(order(3, options={"priority": 1}))
    forced = await queue.enqueue(order(4, options={"priority": -5, "force": True}))
    low = await queue.enqueue(order(5, options={"priority": -1}))
    claimed = [await queue.claims.claim(owner(), namespaces=NAMESPACES) for _ in range(6)]
    assert [job.id for (job,) in claimed] == [forced.id, urgent.id, *ids, low.id]
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES) == []


@pytest.mark.row("S37")
async def test_each_job_is_claimed_once(queue: JobQueue) -> None:
    """Twenty claimers at once on thirty jobs: each job has one holder."""
    wanted = {(await queue.enqueue(order(n))).id for n in range(30)}

    async def claimer() -> list[ObjectId]:
        mine, got = owner(), []
        while jobs := await queue.claims.claim(mine, namespaces=NAMESPACES, limit=2):
            got += [job.id for job in jobs]
        return got

    claims = [job_id for got in await asyncio.gather(*(claimer() for _ in range(20))) for job_id in got]
    assert len(claims) == len(set(claims))
    # A claimer that lost all its races may have left early: what is left is still in line.
    left = await queue.claims.claim(owner(), namespaces=NAMESPACES, limit=30)
    assert {*claims, *(job.id for job in left)} == wanted


async def test_a_claim_tells_whether_another_may_find_more(queue: JobQueue) -> None:
    """Not if the line was seen to its end; yes if it took all that it might, or passed some over."""
    await queue.enqueue(order(0, options={"worker": "me@here"}))
    for n in range(1, 5):
        await queue.enqueue(order(n))
    where: Any = {"owner": owner("me@here"), "namespaces": NAMESPACES}

    async def look(**more: Any) -> tuple[int, bool, bool]:
        claimed = await queue.claims.claim(**where, **more)
        return len(claimed), claimed.more, claimed.pinned

    assert await look(limit=2) == (2, True, True)  # one of them was its own: there may be others
    assert await look(limit=2) == (2, True, False)
    assert await look(limit=2, rooms={"tests.Full": 0}) == (1, True, True)
    assert await look(limit=2) == (0, False, False)
    own = await queue.enqueue(order(5, options={"worker": "me@here"}))
    assert await look(limit=2, pinned=False) == (0, False, False)
    (job,) = await queue.claims.claim(**where, limit=2)
    assert job.id == own.id


async def test_many_are_stored_in_their_order(queue: JobQueue) -> None:
    """Of two with the same arguments the first one is the job."""
    count = 500
    orders = [order(n) for n in range(count)]
    orders[251] = orders[3]
    found = await queue.enqueue_many(orders)
    (twice,) = [row for row in found if not isinstance(row, Job)]
    assert isinstance(twice, JobExists)
    assert found.index(twice) == 251
    jobs = [row for row in found if isinstance(row, Job)]
    assert [job.args["n"] for job in jobs] == [n for n in range(count) if n != 251]
    assert twice.facts["job_id"] == str(jobs[3].id)
    stored = await queue.store.queue.find({}, {"rank": 1}).sort("rank", 1).to_list(None)
    assert [row["_id"] for row in stored] == [job.id for job in jobs]


async def test_what_is_known_to_have_come_is_claimed_without_reading(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in line first, of the own namespaces only; who was too late for one of them has to read."""
    jobs = [await queue.enqueue(order(n, options={"priority": n})) for n in range(4)]
    elsewhere = await queue.enqueue(order(4, namespace="elsewhere"))
    arrived = [job.document for job in (*jobs, elsewhere)]
    me, reads = owner(), list[Any]()
    peek = queue.claims._peek_namespace

    async def counted(*args: Any) -> Any:
        reads.append(args)
        return await peek(*args)

    monkeypatch.setattr(queue.claims, "_peek_namespace", counted)

    async def claim(**more: Any) -> Claimed:
        return await queue.claims.claim(me, namespaces=NAMESPACES, pinned=False, **more)

    first = await claim(limit=2, arrived=arrived)
    assert [job.id for job in first] == [jobs[3].id, jobs[2].id]
    assert first.more
    late = await claim(limit=4, arrived=arrived)
    assert {job.id for job in late} == {jobs[1].id, jobs[0].id}
    assert late.more  # it has lost two of them: others may stand there
    assert not (await claim(limit=4, arrived=[])).more
    assert not reads
    # Who gets nothing of what came looks for itself: of several that came, another stands there, say.
    other = await queue.enqueue(order(5))
    assert [job.id for job in await claim(limit=4, arrived=arrived)] == [other.id]
    assert reads
    reads.clear()
    assert await claim(limit=4, arrived=[], forced=True) == []
    assert reads  # not all that comes is forced


async def test_a_claim_tells_whether_there_is_nothing_for_it(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside names that are full, too; not if it was too late for what it has seen."""
    where: Any = {"owner": owner(), "namespaces": NAMESPACES, "limit": 2, "rooms": {"tests.Full": 0}}
    await queue.enqueue(order(name="tests.Full"))
    assert (await queue.claims.claim(**where)).barren

    await queue.enqueue(order())

    async def too_late(*args: Any) -> None:
        return None

    monkeypatch.setattr(queue.store, "cas", too_late)
    lost = await queue.claims.claim(**where)
    monkeypatch.undo()
    assert (len(lost), lost.barren) == (0, False)
    taken = await queue.claims.claim(**where)
    assert (len(taken), taken.barren) == (1, False)


async def test_other_namespaces_and_full_names_stay(queue: JobQueue) -> None:
    """A worker takes only from its namespaces, and no name that is at its limit here."""
    await queue.enqueue(order(namespace="other"))
    await queue.enqueue(order(name="tests.Full"))
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES, rooms={"tests.Full": 0}) == []
    (job,) = await queue.claims.claim(owner(), namespaces=["x", "other"])
    assert job.namespace == "other"


async def test_no_more_of_a_name_are_claimed_than_its_jobs_allow(queue: JobQueue) -> None:
    """Each says itself beside how many of its name it may run."""
    for n in range(4):
        await queue.enqueue(order(n, options={"max_parallel": 2}))
    other = await queue.enqueue(order(4, name="tests.Other", options={"max_parallel": None}))
    where: Any = {"owner": owner(), "namespaces": NAMESPACES, "limit": 10}

    first = await queue.claims.claim(**where, rooms={order().name: 1})
    assert [job.args["n"] for job in first] == [0, 4]
    assert first[-1].id == other.id
    assert first.more
    second = await queue.claims.claim(**where)
    assert [job.args["n"] for job in second] == [1, 2]
    assert second.more
    assert [job.args["n"] for job in await queue.claims.claim(**where)] == [3]


async def test_a_pinned_job_waits_for_its_worker(queue: JobQueue) -> None:
    """Only the named worker gets it, in order with the jobs for all."""
    pinned = await queue.enqueue(order(1, options={"worker": "me@here"}))
    common = await queue.enqueue(order(2))
    first = await queue.enqueue(order(3, options={"priority": 9}))
    (job,) = await queue.claims.claim(owner("other@here"), namespaces=NAMESPACES)
    assert job.id == first.id
    claimed = await queue.claims.claim(owner("me@here"), namespaces=NAMESPACES, limit=5)
    assert [job.id for job in claimed] == [pinned.id, common.id]


async def test_a_pinned_job_is_retried_by_its_worker(queue: JobQueue) -> None:
    """Failing and being due again, it is still for that worker only."""
    pinned = await queue.enqueue(order(options={"worker": "me@here", "attempts": 2, "error_time": 0.01}))
    me = owner("me@here")
    await queue.finish(await run(queue, me), Outcome.failed("no", []), log_seq=0)
    while not await queue.promote():
        await asyncio.sleep(0)
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES) == []
    (job,) = await queue.claims.claim(me, namespaces=NAMESPACES)
    assert job.id == pinned.id


async def test_failed_is_due_again_after_error_time(queue: JobQueue) -> None:
    """A failed attempt waits, then runs again, and the last one ends as error with its traceback."""
    await queue.enqueue(order(options={"attempts": 2, "error_time": 0.05}))
    job = await queue.finish(await run(queue), Outcome.failed("ValueError()", ["line 1"]), log_seq=0)
    assert (job.state, job.attempts_left) == (State.FAILED, 1)
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES) == []
    while not await queue.promote():
        await asyncio.sleep(0.01)
    job = await queue.finish(await run(queue), Outcome.failed("ValueError()", ["line 1"]), log_seq=0)
    document, journaled = await stored(queue, job.id)
    assert not journaled
    assert document["state"] == "error"
    assert document["last_error"]["traceback"] == ["line 1"]
    assert path(document) == ["pending", "running", "failed", "running", "error"]


async def test_deferred_past_its_window_is_inactive(queue: JobQueue) -> None:
    """Whether it is due or not when the window ends."""
    job = await queue.enqueue(order(options={"defer_time": 60, "defer_max": 0.01}))
    deferred = await queue.finish(await run(queue), Outcome.deferred("later"), log_seq=0)
    assert deferred.state is State.DEFERRED
    assert deferred.attempts_left == 1
    while not await queue.expire():
        await asyncio.sleep(0.01)
    document, _ = await stored(queue, job.id)
    assert document["state"] == "inactive"
    assert await queue.promote() == 0


@pytest.mark.row("S39")
async def test_failed_never_turns_inactive(queue: JobQueue) -> None:
    """The window is for deferring: a failed job is retried up to its attempts, then it is an error."""
    await queue.enqueue(order(options={"attempts": 3, "error_time": 0.01, "defer_max": 0.01}))
    for expected in (State.FAILED, State.FAILED, State.ERROR):
        job = await queue.finish(await run(queue), Outcome.failed("no", []), log_seq=0)
        assert job.state is expected
        assert await queue.expire() == 0
        while expected is State.FAILED and not await queue.promote():
            await asyncio.sleep(0.01)


async def test_only_the_holder_writes(queue: JobQueue) -> None:
    """After a rescue the old holder is refused everything, and a repeated finish is no error."""
    await queue.enqueue(order())
    old = await run(queue)

    async def nobody() -> set[str]:
        return set()

    assert await queue.rescue(nobody) == 1
    with pytest.raises(LeaseLost):
        await queue.progress(old, 0.9, "late")
    with pytest.raises(LeaseLost):
        await queue.finish(old, Outcome.complete("stale"), log_seq=0)
    with pytest.raises(LeaseLost):
        await queue.release(old, reason="late")
    document, _ = await stored(queue, old.id)
    assert document["state"] == "pending"
    assert document["crashes"] == 1
    assert document["attempts_left"] == 1
    while not await queue.promote():
        await asyncio.sleep(0.05)
    new = await run(queue)
    first = await queue.finish(new, Outcome.complete("fresh"), log_seq=0)
    again = await queue.finish(new, Outcome.complete("fresh"), log_seq=0)
    assert (first.state, again.state, again.rev) == (State.COMPLETE, State.COMPLETE, first.rev)
    assert (await stored(queue, new.id))[0]["result"] == "fresh"


@pytest.mark.row("S41")
@pytest.mark.parametrize("what", ["wall", "zombie"])
async def test_a_flag_is_set_once_and_the_job_goes_on(queue: JobQueue, what: Flag) -> None:
    """By its holder only; a later attempt finds it set; its reason is in the history."""
    await queue.enqueue(order(options={"attempts": 2}))
    job = await run(queue)
    flagged = await queue.flag(job, what, reason="too long")
    again = await queue.flag(job, what, reason="too long")
    at = flagged.document[f"{what}_at"]
    assert at is not None
    assert (again.rev, again.document[f"{what}_at"]) == (flagged.rev, at)
    await queue.finish(job, Outcome.failed("boom", []), log_seq=0)
    with pytest.raises(LeaseLost):
        await queue.flag(job, what, reason="too long")
    await queue.restart(job.id, by="ann")
    second = await run(queue)
    assert (await queue.flag(second, what, reason="too long")).rev == second.rev
    done = await queue.finish(second, Outcome.complete(1), log_seq=0)
    document, _ = await stored(queue, done.id)
    assert document[f"{what}_at"] == at
    assert [note["reason"] for note in document["history"]].count("too long") == 1


async def test_what_kills_its_workers_ends_as_poison(queue: JobQueue, settings: Settings) -> None:
    """Crashes are counted apart from attempts; the last one is an error of category CRASH."""
    job = await queue.enqueue(order(options={"attempts": 1}))

    async def nobody() -> set[str]:
        return set()

    for _ in range(settings.max_crashes - 1):
        await run(queue)
        await queue.rescue(nobody)
        await queue.store.queue.update_one({"_id": job.id}, {"$set": {"query_at": utcnow()}})
        assert await queue.promote() == 1
    await run(queue)
    await queue.rescue(nobody)
    document, _ = await stored(queue, job.id)
    assert (document["state"], document["error_cat"]) == ("error", "CRASH")
    assert document["attempts_left"] == 1


async def test_the_living_keep_their_jobs(queue: JobQueue) -> None:
    """Only jobs whose owner is not alive are taken away."""
    await queue.enqueue(order())
    me = owner()
    job = await run(queue, me)

    async def alive() -> set[str]:
        return {me.id}

    assert await queue.rescue(alive) == 0
    assert (await queue.store.running(me.id))[0].id == job.id


async def test_a_document_that_cannot_be_read_holds_up_no_other(queue: JobQueue) -> None:
    """Broken by hand, it stays as it is for the doctor to tell; what is done to many goes on behind it."""
    bad, good = [await queue.enqueue(order(n)) for n in range(2)]
    who, table = owner(), queue.store.queue
    await table.update_one({"_id": bad.id}, {"$unset": {"attempts": 1}})
    assert (await run(queue, who)).id == good.id

    lease = {"id": "x", "owner": who.id, "at": utcnow()}
    long_ago = utcnow() - timedelta(days=1)
    marks = {"settle": True, "audit": True, "expires": long_ago, "stopped_at": long_ago}
    await table.update_one({"_id": bad.id}, {"$set": {"state": "running", "lease": lease, **marks}})
    before = await table.find_one({"_id": bad.id})
    assert [job.id for job in await queue.store.running(who.id)] == [good.id]

    async def nobody() -> set[str]:
        return set()

    assert await queue.rescue(nobody) == 1
    assert (await queue.store.get(good.id)).state is State.PENDING
    assert await queue.expire() == 0
    assert await queue.outbox.sweep() == 0
    assert await Retention(queue.store, queue.outbox).retire(utcnow(), 10) == 0
    assert await table.find_one({"_id": bad.id}) == before


async def test_release_is_free(queue: JobQueue) -> None:
    """A released job is due at once or after the delay, and nothing is charged."""
    await queue.enqueue(order())
    (job,) = await queue.claims.claim(owner(), namespaces=NAMESPACES)
    released = await queue.release(job, reason="unknown here", delay=30)
    assert (released.state, released.attempts_left, released.claims) == (State.PENDING, 1, 0)
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES) == []


async def test_evictions_are_counted_and_free(queue: JobQueue) -> None:
    await queue.enqueue(order())
    for _ in range(2):
        (job,) = await queue.claims.claim(owner(), namespaces=NAMESPACES)
        job = await queue.release(await queue.start(job, pid=1), reason="its host ended", evicted=1)

    assert (job.state, job.evicted, job.attempts_left, job.crashes) == (State.PENDING, 2, 1, 0)


@pytest.mark.row("S43")
async def test_kill_of_what_nobody_runs_is_done_at_once(queue: JobQueue) -> None:
    """Pending, failed and deferred jobs end as killed; a second kill changes nothing."""
    pending = await queue.enqueue(order(1))
    killed, changed = await queue.kill(pending.id, by="ann")
    assert (killed.state, changed) == (State.KILLED, True)
    assert await queue.claims.claim(owner(), namespaces=NAMESPACES) == []
    again, changed = await queue.kill(pending.id, by="bob")
    assert (again.rev, changed) == (killed.rev, False)
    document, _ = await stored(queue, pending.id)
    assert document["killed_at"] is not None
    assert document["finished_at"] is not None
    assert document["history"][-1]["by"] == "ann"

    await queue.enqueue(order(2, options={"attempts": 2}))
    failed = await queue.finish(await run(queue), Outcome.failed("x", []), log_seq=0)
    assert (await queue.kill(failed.id, by="ann"))[0].state is State.KILLED


async def test_kill_of_a_running_job_flags_it(queue: JobQueue) -> None:
    """Its worker ends it; a result that was faster stands, a failure is the kill's."""
    for outcome, state in (
        (Outcome.killed("on request"), State.KILLED),
        (Outcome.failed("SystemExit()", []), State.KILLED),
        (Outcome.complete(1), State.COMPLETE),
    ):
        job = await queue.enqueue(order(unique=False))
        held = await run(queue)
        flagged, changed = await queue.kill(job.id, by="ann")
        assert (flagged.state, changed) == (State.RUNNING, True)
        assert (await queue.finish(held, outcome, log_seq=0)).state is state
        if state is State.COMPLETE:
            with pytest.raises(Conflict):
                await queue.kill(job.id, by="ann")


async def test_kill_of_nothing(queue: JobQueue) -> None:
    """An id that no job has."""
    with pytest.raises(JobNotFound):
        await queue.kill(ObjectId(), by="ann")


@pytest.mark.row("S40")
@pytest.mark.parametrize("state", ["pending", "failed", "deferred", "inactive", "error", "killed"])
async def test_remove_keeps_the_state(queue: JobQueue, database: Database, state: str) -> None:
    """Out of the queue, one row in the journal with the state it had; removed twice is not found."""
    job = await put(queue, State(state))
    await queue.remove(job.id, by="ann")
    assert await both(database, job.id) == (0, 1)
    document, _ = await stored(queue, job.id)
    assert document["state"] == state
    assert document["removed_at"] is not None
    with pytest.raises(JobNotFound):
        await queue.remove(job.id, by="ann")


async def put(queue: JobQueue, state: State, **more: Any) -> Job:
    """A job in the queue in this state."""
    options = {"attempts": 2 if state is State.FAILED else 1, "defer_max": 0.001}
    job = await queue.enqueue(order(options=options, **more))
    if state is State.PENDING:
        return job
    if state is State.KILLED:
        return (await queue.kill(job.id, by="ann"))[0]
    deferred = state in (State.DEFERRED, State.INACTIVE)
    outcome = Outcome.deferred("later") if deferred else Outcome.failed("no", [])
    job = await queue.finish(await run(queue), outcome, log_seq=0)
    while state is State.INACTIVE and not await queue.expire():
        await asyncio.sleep(0.01)
    return await queue.store.get(job.id)


async def test_remove_of_a_running_job_waits_for_its_kill(queue: JobQueue, database: Database) -> None:
    """Running is refused; with a kill under way the wish is stored and done with it."""
    job = await queue.enqueue(order())
    held = await run(queue)
    with pytest.raises(Conflict):
        await queue.remove(job.id, by="ann")
    await queue.kill(job.id, by="ann")
    await queue.remove(job.id, by="ann")
    await queue.finish(held, Outcome.killed("on request"), log_seq=0)
    assert await both(database, job.id) == (0, 1)
    assert (await stored(queue, job.id))[0]["state"] == "killed"


@pytest.mark.row("S44")
@pytest.mark.parametrize("state", ["failed", "deferred"])
async def test_restart_of_a_waiting_job_is_now(queue: JobQueue, state: str) -> None:
    """Same id, due at once, second trial."""
    job = await put(queue, State(state))
    assert await queue.restart(job.id, by="ann") == job.id
    again = await run(queue)
    assert (again.id, again.trial) == (job.id, 2)
    assert (await queue.finish(again, Outcome.complete(1), log_seq=0)).state is State.COMPLETE


@pytest.mark.row("S44")
@pytest.mark.parametrize("state", ["error", "killed", "inactive", "complete"])
async def test_restart_of_an_ended_job_is_a_new_one(queue: JobQueue, database: Database, state: str) -> None:
    """New id, linked both ways, the old one journaled; asked twice it is the same child."""
    if state == "complete":
        await queue.enqueue(order())
        job = await queue.finish(await run(queue), Outcome.complete(1), log_seq=0)
    else:
        job = await put(queue, State(state))
    child_id = await queue.restart(job.id, by="bob")
    assert child_id != job.id
    assert await queue.restart(job.id, by="bob") == child_id
    parent, journaled = await stored(queue, job.id)
    child, _ = await stored(queue, child_id)
    assert journaled
    assert (parent["enqueued"]["child_id"], child["enqueued"]["parent_id"]) == (child_id, job.id)
    assert (child["args"], child["name"], child["state"]) == (parent["args"], parent["name"], "pending")
    assert child["attempts_left"] == child["attempts"]
    assert child["enqueued"]["username"] == "bob"
    assert "outbox" not in parent
    assert "settle" not in parent
    with pytest.raises(JobExists):
        await queue.enqueue(order())
    await queue.finish(await run(queue), Outcome.complete(2), log_seq=0)
    assert (await both(database, job.id), await both(database, child_id)) == ((0, 1), (0, 1))
    later = await queue.restart(job.id, by="bob")
    assert later not in (job.id, child_id)


@pytest.mark.row("S47")
async def test_a_claim_of_forced_jobs_takes_no_other(queue: JobQueue) -> None:
    """In their order, from all namespaces and those for this worker; the others keep theirs."""
    me = owner("me@here")
    for n in range(70):
        await queue.enqueue(order(n, options={"priority": 1000}))
    plain = [await queue.claims.claim(me, namespaces=NAMESPACES)]
    low = await queue.enqueue(order(100, options={"force": True, "priority": -1000}))
    high = await queue.enqueue(order(101, options={"force": True}, namespace="other"))
    full = await queue.enqueue(order(102, options={"force": True}, name="tests.Full"))
    mine = await queue.enqueue(order(103, options={"force": True, "worker": "me@here"}))
    await queue.enqueue(order(104, options={"worker": "me@here"}))
    await queue.enqueue(order(105, options={"force": True, "worker": "you@here"}))

    where: dict[str, Any] = {"namespaces": ["DEFAULT", "other"], "forced": True}
    claimed = await queue.claims.claim(me, **where, limit=10, rooms={"tests.Full": 0})
    assert {job.id for job in claimed} == {low.id, high.id, mine.id}
    assert claimed[-1].id == low.id
    assert await queue.claims.claim(me, namespaces=NAMESPACES, forced=True, rooms={"tests.Full": 0}) == []
    assert [job.id for job in await queue.claims.claim(me, **where, limit=10)] == [full.id]
    assert await queue.claims.claim(me, **where) == []
    while jobs := await queue.claims.claim(owner(), namespaces=NAMESPACES, limit=8):
        plain.append(jobs)
    assert [job.args["n"] for some in plain for job in some] == list(range(70))


async def test_a_job_of_an_older_version_runs_and_is_restarted(queue: JobQueue, database: Database) -> None:
    """Options that came later are not in its document: their defaults count."""
    old = await queue.enqueue(order(options={"attempts": 2}))
    later = dict.fromkeys(set(DEFAULTS) - OPTIONS_OF_0_1, 1)
    assert later
    await database.collection(QUEUE).update_one({"_id": old.id}, {"$unset": later})
    await queue.finish(await run(queue), Outcome.failed("boom", []), log_seq=0)
    await queue.restart(old.id, by="ann")
    failed = await queue.finish(await run(queue), Outcome.failed("boom", []), log_seq=0)
    assert failed.state is State.ERROR
    child_id = await queue.restart(old.id, by="ann")
    child, _ = await stored(queue, child_id)
    assert {name: child[name] for name in DEFAULTS} == {**DEFAULTS, "attempts": 2}


async def test_restart_while_a_kill_is_under_way(queue: JobQueue, database: Database) -> None:
    """The child's id is known at once; the child follows when the old job has ended."""
    job = await queue.enqueue(order())
    held = await run(queue)
    with pytest.raises(Conflict):
        await queue.restart(job.id, by="ann")
    await queue.kill(job.id, by="ann")
    child_id = await queue.restart(job.id, by="ann")
    assert await queue.restart(job.id, by="ann") == child_id
    assert await queue.store.document(child_id) is None
    await queue.finish(held, Outcome.killed("on request"), log_seq=0)
    assert (await stored(queue, child_id))[0]["state"] == "pending"
    assert await both(database, job.id) == (0, 1)


async def test_restart_finds_its_place_taken(queue: JobQueue) -> None:
    """Another job with the same key was enqueued when the parent gave its place up: refused, nothing lost."""
    error = await put(queue, State.ERROR)
    await queue.store.queue.update_one({"_id": error.id}, {"$unset": {"unique_key": 1}})
    other = await queue.enqueue(order())
    with pytest.raises(JobExists) as caught:
        await queue.restart(error.id, by="ann")
    assert caught.value.job_id == other.id
    document, journaled = await stored(queue, error.id)
    assert not journaled
    assert document["state"] == "error"
    assert document["enqueued"].get("child_id") is None
    await queue.remove(other.id, by="ann")
    assert await queue.restart(error.id, by="ann") != error.id


async def test_restart_of_what_waits_is_refused(queue: JobQueue) -> None:
    """A pending job is going to run anyway; a removed one never ran."""
    job = await queue.enqueue(order())
    with pytest.raises(Conflict):
        await queue.restart(job.id, by="ann")
    await queue.remove(job.id, by="ann")
    with pytest.raises(Conflict):
        await queue.restart(job.id, by="ann")


async def test_tasks_leave_the_queue_when_they_stop(queue: JobQueue, database: Database) -> None:
    """Only job classes stay where they stopped."""
    job = await queue.enqueue(order(keep_stopped=False))
    await queue.finish(await run(queue), Outcome.failed("no", []), log_seq=0)
    assert await both(database, job.id) == (0, 1)
    child = await queue.restart(job.id, by="ann")
    assert (await stored(queue, child))[0]["state"] == "pending"


async def test_a_sweep_finishes_what_a_dead_process_began(queue: JobQueue, database: Database) -> None:
    """Died after the finish, after the copy to the journal, or before the child was made."""
    with unsettled(queue):
        done = await queue.enqueue(order(1))
        await queue.finish(await run(queue), Outcome.complete(1), log_seq=0)
        copied = await queue.enqueue(order(2))
        await queue.finish(await run(queue), Outcome.complete(2), log_seq=0)
        document, _ = await stored(queue, copied.id)
        await database.collection(JOURNAL).insert_one({k: v for k, v in document.items() if k != "settle"})
        killing = await queue.enqueue(order(3))
        held = await run(queue)
        await queue.kill(killing.id, by="ann")
        child_id = await queue.restart(killing.id, by="ann")
        await queue.finish(held, Outcome.killed("x"), log_seq=0)

    assert await queue.outbox.sweep() == 3
    assert await queue.outbox.sweep() == 0
    for job_id in (done.id, copied.id, killing.id):
        assert await both(database, job_id) == (0, 1)
    assert (await stored(queue, child_id))[0]["state"] == "pending"


async def test_what_is_in_the_journal_never_runs(queue: JobQueue, database: Database) -> None:
    """An insert that arrives after the job was finished and journaled is found out before the start."""
    job = await queue.enqueue(order())
    document, _ = await stored(queue, job.id)
    await queue.finish(await run(queue), Outcome.complete(1), log_seq=0)
    await database.collection(QUEUE).insert_one(document)
    (late,) = await queue.claims.claim(owner(), namespaces=NAMESPACES)
    with pytest.raises(LeaseLost):
        await queue.start(late, pid=1)
    assert await both(database, job.id) == (0, 1)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "result",
    [
        *(2**70, "\ud800", {"a": "x" * 17_000_000}, {"nul\0key": 1}, nested(65), {"a": nested(300)}),
        *({"$ref": "x", "$id": 1}, [{"a": {"$ref": "x", "$id": 1, "$db": "d"}}], [float("inf")]),
    ],
    ids=["int", "surrogate", "huge", "nul", "deep", "deeper", "reference", "inner", "infinite"],
)
async def test_a_result_that_cannot_be_stored_is_an_error(queue: JobQueue, result: Any) -> None:
    """It never stays running."""
    await queue.enqueue(order())
    job = await queue.finish(await run(queue), Outcome.complete(result), log_seq=0)
    assert job.state is State.ERROR
    assert "cannot be stored" in job.document["last_error"]["exception"]


async def test_results_that_cannot_be_stored_keep_no_others(queue: JobQueue) -> None:
    """Of those that are finished together; whatever comes back is what was stored."""
    for number in range(3):
        await queue.enqueue(order(args={"n": number}))
    held = await queue.claims.claim(owner(), namespaces=NAMESPACES, limit=3)
    started = await queue.start_many([(job, 1) for job in held])
    results = [{"$ref": "x", "$id": 1}, {"ref": "x"}, {"a": 1.5}]
    ends = [
        (job, Outcome.complete(result), 0)
        for job, result in zip(started, results, strict=True)
        if isinstance(job, Job)
    ]
    found = await queue.finish_many(ends)
    assert [each.state for each in found if isinstance(each, Job)] == ["error", "complete", "complete"]
    stored = [(await queue.store.get(job.id)).document["result"] for job in held]
    assert stored == [None, {"ref": "x"}, {"a": 1.5}]


async def test_a_result_that_the_server_refuses_is_an_error(queue: JobQueue) -> None:
    """Small enough to be sent, too large beside the arguments: repeating that would never end."""
    await queue.enqueue(order(args={"a": "x" * 9_000_000}))
    job = await queue.finish(await run(queue), Outcome.complete("x" * 9_000_000), log_seq=0)
    assert job.state is State.ERROR
    assert "cannot be stored" in job.document["last_error"]["exception"]


async def test_a_result_of_many_levels_reaches_the_journal(queue: JobQueue, database: Database) -> None:
    await queue.enqueue(order())
    job = await queue.finish(await run(queue), Outcome.complete(nested(64)), log_seq=0)
    assert job.state is State.COMPLETE
    assert await both(database, job.id) == (0, 1)


async def test_a_message_that_cannot_be_stored_is_escaped(queue: JobQueue) -> None:
    """Names of files may come with lone surrogates; one must not end all reports of the job."""
    await queue.enqueue(order())
    job = await run(queue)
    await queue.progress(job, 0.5, "file \udcff")
    assert (await queue.store.get(job.id)).document["prog"] == {"value": 0.5, "message": "file \\udcff"}


async def test_pages(queue: JobQueue) -> None:
    """Counted after the filter, cut from either end, empty beyond it."""
    ids = [(await queue.enqueue(order(n, args={"n": n, "even": n % 2 == 0}))).id for n in range(25)]
    page = await queue.store.page({}, page=2, per_page=10)
    assert ([row["_id"] for row in page.rows], page.total) == (ids[20:], 25)
    last = await queue.store.page({}, page=-1, per_page=10)
    assert [row["_id"] for row in last.rows] == ids[20:]
    even = await queue.store.page({"args.even": True}, sort=[("args.n", -1)], page=0, per_page=5)
    assert (even.total, [row["args"]["n"] for row in even.rows]) == (13, [24, 22, 20, 18, 16])
    assert (await queue.store.page({}, page=9)).rows == []
    assert (await queue.store.page({"name": "none"})).total == 0
    assert await queue.store.counts() == {"pending": 25}


@pytest.mark.parametrize(
    "where",
    [{}, {"state": {"$in": ["complete", "error"]}}, {"name": "b", "state": "killed"}, {"n": {"$gte": 40}}],
)
async def test_pages_of_the_journal_are_the_same_span_by_span(
    queue: JobQueue, database: Database, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that reads all that a range holds gives the same rows as one that seeks, in either order."""
    monkeypatch.setattr("core4.store.COUNTED", 50)  # so many are not read for a page
    states = ["complete", "error", "killed", "inactive", "pending"]  # one that waited may have been removed
    now = int(time.time())
    rows = [
        {
            "_id": ObjectId(struct.pack(">IQ", now + 60 - n**4 // 20, n)),
            "n": n,
            "state": states[n % 5],
            "name": "ab"[n % 2],
        }
        for n in range(60)
    ]
    await queue.store.journal.insert_many(rows)

    async def page(**how: Any) -> Any:
        found = []
        for seeks in (True, False):
            database.find_and_modify = seeks
            found.append(await queue.store.page(where, per_page=7, journal=True, fields=["n"], **how))
        assert found[0].rows == found[1].rows
        assert (found[0].total, found[0].more) == (found[1].total, found[1].more)
        return found[1]

    newest = [await page(sort=[("_id", -1)], page=number) for number in range(4)]
    for direction in (1, -1):
        told, behind = [], {"_id": {"$gt": ObjectId(bytes(12))}} if direction > 0 else {}
        while True:
            part = await page(sort=[("_id", direction)], behind=behind, counted=False)
            told += [row["n"] for row in part.rows]
            if not part.more:
                break
            behind = {"_id": {"$gt" if direction > 0 else "$lt": part.rows[-1]["_id"]}}
        assert told == [row["n"] for row in sorted(rows, key=_id, reverse=direction < 0) if _fits(row, where)]
    assert [row["n"] for part in newest for row in part.rows] == told[:28]


def _id(row: Mapping[str, Any]) -> ObjectId:
    found: ObjectId = row["_id"]
    return found


def _fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether one of the filters above finds the row."""
    state, name = where.get("state"), where.get("name")
    states = state["$in"] if isinstance(state, dict) else [state or row["state"]]
    return row["state"] in states and name in (None, row["name"]) and row["n"] >= (40 if "n" in where else 0)


async def test_a_slow_count_of_all_is_kept_for_a_while(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that reads the journal for its number does so for a twentieth of the time; others always."""
    await queue.store.journal.insert_one({"state": "complete"})
    assert await queue.store.journaled() == 1
    await queue.store.journal.insert_one({"state": "complete"})
    assert await queue.store.journaled() == 2
    monkeypatch.setattr("core4.store.SLOW_COUNT", -1.0)
    monkeypatch.setattr("core4.store.COUNT_SHARE", 1e-9)
    assert await queue.store.journaled() == 2
    await queue.store.journal.insert_one({"state": "complete"})
    assert await queue.store.journaled() == 2


async def test_who_counts_by_reading_stops(
    queue: JobQueue, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a filter more than so many are not counted, and the page says so."""
    monkeypatch.setattr("core4.store.COUNTED", 10)
    rows = [{"_id": ObjectId(struct.pack(">IQ", 10**9 + n, n)), "state": "complete"} for n in range(25)]
    await queue.store.journal.insert_many(rows)
    database.find_and_modify = False
    where = {"state": "complete"}
    page = await queue.store.page(where, sort=[("_id", -1)], journal=True, per_page=5)
    assert (page.total, page.at_least, page.more, len(page.rows)) == (10, True, True, 5)
    all_ = await queue.store.page({}, sort=[("_id", -1)], journal=True, per_page=5)
    assert (all_.rows, all_.total, all_.at_least) == (page.rows, 25, False)
    last = await queue.store.page(where, sort=[("_id", -1)], journal=True, per_page=5, page=-1)
    assert (last.total, [row["_id"] for row in last.rows]) == (25, [row["_id"] for row in rows[4::-1]])


@pytest.mark.parametrize("rival", ["kill", "remove", "restart", "rescue", "claim"])
async def test_finish_against_others(queue: JobQueue, database: Database, rival: str) -> None:
    """Whoever comes first, there is one outcome, told truthfully."""

    async def nobody() -> set[str]:
        return set()

    for _ in range(5):
        await queue.enqueue(order(unique=False))
        held = await run(queue)  # a child of the round before may be first in line
        others: dict[str, Callable[[], Awaitable[Any]]] = {
            "kill": partial(queue.kill, held.id, by="ann"),
            "remove": partial(queue.remove, held.id, by="ann"),
            "restart": partial(queue.restart, held.id, by="ann"),
            "rescue": partial(queue.rescue, nobody),
            "claim": partial(queue.claims.claim, owner(), namespaces=NAMESPACES),
        }
        finished: Any
        answer: Any
        finished, answer = await asyncio.gather(
            queue.finish(held, Outcome.complete(1), log_seq=0), others[rival](), return_exceptions=True
        )
        document, journaled = await stored(queue, held.id)
        if isinstance(finished, LeaseLost):
            assert rival == "rescue"
            assert (document["state"], answer) == ("pending", 1)
        else:
            assert isinstance(finished, Job)
            assert (document["state"], journaled) == ("complete", True)
        recorded = [e for e in document["history"] if e["state"] == "complete" and e["lease"]]
        assert len(recorded) == (document["state"] == "complete")
        assert not isinstance(answer, BaseException) or isinstance(answer, Conflict | JobNotFound)


async def test_claim_against_kill(queue: JobQueue) -> None:
    """Killed and never claimed, or claimed and flagged: never both."""
    for n in range(10):
        job = await queue.enqueue(order(n))
        claimed, (killed, _) = await asyncio.gather(
            queue.claims.claim(owner(), namespaces=NAMESPACES), queue.kill(job.id, by="ann")
        )
        document, _ = await stored(queue, job.id)
        if claimed:
            assert document["state"] == "running"
            assert document["killed_at"] is not None
        else:
            assert document["state"] == killed.state == State.KILLED


async def test_times_are_in_order(queue: JobQueue) -> None:
    """The window of a deferred job starts with its first attempt."""
    await queue.enqueue(order(options={"defer_max": 100}))
    job = await run(queue)
    assert job.inactive_at is not None
    assert job.started_at is not None
    assert job.inactive_at - job.started_at == timedelta(seconds=100)
