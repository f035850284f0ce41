"""The audit: who did what, from the store to the API; and that a job's history tells all of each attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId

from core4 import identifiers
from core4.config import Settings
from core4.database import Database
from core4.errors import Conflict
from core4.events import EventStore, audit_of, bucket_of
from core4.faults import Faults, armed
from core4.jobs import Job, Owner, utcnow
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.states import State
from tests.database import PatientDatabase
from tests.integration.driver import ADMIN, Api, Runner, order

OWNER = Owner("owner", "worker@here", "here", 1)
NOW = datetime(2026, 3, 15, 12, 34, 56, tzinfo=UTC)


@pytest.fixture
async def events(database: Database) -> EventStore:
    events = EventStore(database)
    await events.prepare()
    return events


async def told(events: EventStore, **where: Any) -> list[tuple[str, str]]:
    """Name and author of each line, oldest first; those that are under way included."""
    await events.database.landed()
    page = await events.page(where, descending=False, per_page=100)
    return [(row["name"], row["author"]) for row in page.rows]


# ---------------------------------------------------------------------- what is done to jobs


async def test_every_action_on_a_job_has_its_line(api: Api, events: EventStore) -> None:
    """Enqueue, kill, restart and remove: who, what, which request; listed by the API, newest first."""
    first = await api.enqueue(n=1)
    for verb in ("kill", "restart"):
        headers = {"X-Request-ID": f"by-{verb}"}
        answer = await api.call(
            "PUT", f"/job/{verb}/{first}", json={} if verb == "kill" else {"follow": False}, headers=headers
        )
        assert answer.status == 200
    child = answer.data
    assert (await api.call("PUT", f"/job/remove/{child}")).status == 200
    await events.database.landed()

    listed = await api.call("GET", "/event", json={"filter": {"author": ADMIN[0]}})
    names = [(row["name"], row["job_id"]) for row in listed.data]
    assert sorted(names) == sorted(
        [
            ("job.enqueue", str(first)),
            ("job.kill", str(first)),
            ("job.restart", str(first)),
            ("job.enqueue", child),
            ("job.remove", child),
        ]
    )
    by_request = await api.call("GET", "/event", json={"filter": {"request_id": "by-restart"}})
    assert {(row["name"], row["job_id"]) for row in by_request.data} == {
        ("job.restart", str(first)),
        ("job.enqueue", child),
    }
    (kill,) = (await api.call("GET", "/event", json={"filter": {"name": "job.kill"}})).data
    assert (kill["qual_name"], kill["outcome"], kill["data"]["state"]) == ("tests.Job", "done", "killed")
    assert kill["_id"].startswith(f"{first}.")


@pytest.mark.parametrize("verb", ["lose", "late 0"])
async def test_a_line_that_could_not_be_told_is_told_by_a_sweep(
    database: Database, settings: Settings, events: EventStore, verb: str
) -> None:
    """The action holds, its line is derived from the document, and however often it is told it is one."""
    with armed(Faults.parse(f"{verb} events:add:insert_many 0")) as faults:
        queue = JobQueue(database, settings)
        await queue.store.prepare()
        job = await queue.enqueue(order(args={"n": 1}))
        with identifiers.about(request_id="r1"):
            await queue.kill(job.id, by="bob")
        await faults.landed()

    await JobQueue(database, settings).outbox.sweep()
    await JobQueue(database, settings).outbox.sweep()
    stored = await database.collection("sys.queue").find_one({"_id": job.id})
    assert stored is not None
    assert "audit" not in stored
    assert await told(events, job_id=str(job.id)) == [("job.enqueue", "ann"), ("job.kill", "bob")]
    (kill,) = (await events.page({"name": "job.kill"})).rows
    assert kill["request_id"] == "r1"


async def test_enqueues_are_told_together_and_nobody_waits(
    mongo_url: str, database: Database, settings: Settings, events: EventStore
) -> None:
    """One write for all of them, which a connection that is closed makes first."""
    with armed(Faults()) as faults:
        patient = await PatientDatabase.connect(mongo_url, database.name)
        queue = JobQueue(patient, settings)
        for n in range(5):
            await queue.enqueue(order(args={"n": n}))
        before = await told(events)
        await patient.close()

    assert before == []
    assert await told(events) == [("job.enqueue", "ann")] * 5
    assert [hit.site for hit in faults.trace].count("events:add:insert_many") == 1


async def test_no_job_leaves_the_queue_untold(
    database: Database, settings: Settings, events: EventStore
) -> None:
    """Somebody died after the insert: the line comes with the move to the journal."""
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    job = await queue.enqueue(order(args={"n": 1}))
    await database.collection("sys.event").delete_many({})
    (held,) = await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
    await queue.finish(await queue.start(held), Outcome.complete(1), log_seq=0)

    assert await told(events) == [("job.enqueue", "ann")]
    assert (await queue.store.get(job.id)).journal


async def test_poison_and_rescue_are_told(
    database: Database, settings: Settings, queue: JobQueue, registry: WorkerRegistry, events: EventStore
) -> None:
    """Who lost its worker is rescued twice and then poison; the lost worker is named."""
    job = await queue.enqueue(order(options={"attempts": 9}))
    for _ in range(3):
        await database.collection("sys.queue").update_many({}, {"$set": {"query_at": utcnow()}})
        await queue.promote()
        (held,) = await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
        await queue.start(held)
        await queue.rescue(registry.alive_ids)

    assert [name for name, _ in await told(events, job_id=str(job.id))] == [
        "job.enqueue",
        "job.rescue",
        "job.rescue",
        "job.poison",
    ]
    (poison,) = (await events.page({"name": "job.poison"})).rows
    assert poison["data"]["worker"] == OWNER.worker
    assert "3 of 3 times its worker was lost" in poison["data"]["reason"]


# ---------------------------------------------------------------------- what is done otherwise


async def test_what_operators_do_has_its_line(api: Api, runner: Runner, events: EventStore) -> None:
    """Pauses, schedules and sign-ins, refused ones with the reason."""
    await api.call("PUT", "/control/pause", json={"scope": "job", "target": "tests.Job", "reason": "why"})
    await api.call("PUT", "/control/resume", json={"scope": "job", "target": "tests.Job"})
    await api.call("PUT", "/control/halt", json={"reason": "move"})
    await api.call("PUT", "/schedule/nightly", json={"qual_name": "tests.Job", "expression": "0 3 * * *"})
    for verb in ("pause", "resume"):
        await api.call("PUT", f"/schedule/{verb}/nightly")
    refused = await api.call("PUT", "/schedule/reset/nightly")
    await api.call("DELETE", "/schedule/nightly")
    await api.call("GET", "/login")
    await api.call("GET", "/login", auth=("mallory", "guess"))

    by_admin = [name for name, author in await told(events) if author == ADMIN[0]]
    assert by_admin == [
        "control.pause",
        "control.resume",
        "control.halt",
        "schedule.change",
        "schedule.pause",
        "schedule.resume",
        "schedule.reset",
        "schedule.delete",
        "session.login",
    ]
    rows = {row["name"]: row for row in (await events.page({}, per_page=100)).rows}
    assert rows["control.pause"]["data"] == {"scope": "job", "target": "tests.Job", "reason": "why"}
    assert rows["schedule.reset"]["outcome"] == (
        "done" if refused.status == 200 else f"refused: {refused.body['detail']}"
    )
    assert (rows["session.refused"]["author"], rows["session.refused"]["data"]) == (
        "mallory",
        {"remote": "127.0.0.1"},
    )
    assert "guess" not in str(rows)


async def test_the_audit_is_not_filled_by_strangers(api: Api, events: EventStore) -> None:
    """However many names are guessed, few lines are kept."""
    for number in range(15):
        assert (await api.call("GET", "/job", auth=(f"mallory{number}", "guess"))).status == 401

    assert len(await told(events, name="session.refused")) == 10


async def test_an_action_without_its_line_cannot_exist(
    database: Database, settings: Settings, events: EventStore
) -> None:
    """If the line cannot be stored nothing is done; one whose end is not known says nothing of it."""
    done = []

    async def act(store: EventStore, error: BaseException | None = None) -> None:
        async with store.action("test.act", "ann", n=1):
            done.append(1)
            if error:
                raise error

    with armed(Faults.parse("late 0 events:action:insert_one")):
        store = EventStore(database)
        with pytest.raises(Exception, match="connection lost"):
            await act(store)
    assert done == []
    await act(events)
    with pytest.raises(Conflict):
        await act(events, Conflict("taken"))
    with pytest.raises(asyncio.CancelledError):
        await act(events, asyncio.CancelledError())

    # The first call's line may have been stored, too: it came late.
    outcomes = [row["outcome"] for row in (await events.page({"name": "test.act"}, per_page=10)).rows]
    assert (outcomes.count("done"), outcomes.count("refused: taken")) == (1, 1)
    assert set(outcomes) == {None, "done", "refused: taken"}


async def test_only_administrators_read_the_audit(api: Api) -> None:
    """Others are refused, and what is not in the grammar is 400."""
    await api.users.add("carol", "secret", ["job://tests.Job/x"])

    assert (await api.call("GET", "/event", auth=("carol", "secret"))).status == 403
    assert (await api.call("GET", "/event", auth=None)).status == 401
    for wrong in ({"filter": {"channel": "queue"}}, {"filter": {"data.n": 1}}, {"sort": [["name", 1]]}):
        assert (await api.call("GET", "/event", json=wrong)).status == 400


# ---------------------------------------------------------------------- every way an attempt can end

End = Callable[[JobQueue, Job, WorkerRegistry], Awaitable[Any]]


async def _start_and(queue: JobQueue, job: Job, outcome: Outcome) -> None:
    await queue.finish(await queue.start(job), outcome, log_seq=0)


ENDS: dict[str, tuple[bool, str, End]] = {
    "complete": (True, "complete", lambda q, j, r: _start_and(q, j, Outcome.complete(1))),
    "failed": (True, "failed", lambda q, j, r: _start_and(q, j, Outcome.failed("ValueError('x')", []))),
    "crashed": (True, "failed", lambda q, j, r: _start_and(q, j, Outcome.crashed("signal 9"))),
    "deferred": (True, "deferred", lambda q, j, r: _start_and(q, j, Outcome.deferred("later"))),
}


async def _killed(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    started = await queue.start(job)
    await queue.kill(job.id, by="ann")
    await queue.finish(started, Outcome.killed("killed on request"), log_seq=0)


async def _released(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.release(await queue.start(job), reason="the worker stops")


async def _given_back(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.release(job, reason="unknown")


async def _release_killed(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.kill(job.id, by="ann")
    await queue.release(job, reason="the worker stops")


async def _rescued(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.start(job)
    await queue.rescue(registry.alive_ids)


async def _rescued_unstarted(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.rescue(registry.alive_ids)


async def _rescue_killed(queue: JobQueue, job: Job, registry: WorkerRegistry) -> None:
    await queue.start(job)
    await queue.kill(job.id, by="ann")
    await queue.rescue(registry.alive_ids)


ENDS |= {
    "killed": (True, "killed", _killed),
    "released": (True, "pending", _released),
    "given-back": (False, "pending", _given_back),
    "release-killed": (False, "killed", _release_killed),
    "rescued": (True, "pending", _rescued),
    "rescued-unstarted": (False, "pending", _rescued_unstarted),
    "rescue-killed": (True, "killed", _rescue_killed),
}


@pytest.mark.parametrize("way", ENDS)
async def test_history_tells_all_of_an_attempt(queue: JobQueue, registry: WorkerRegistry, way: str) -> None:
    """Its lease, worker, start, end and reason, in the entry with which it ended."""
    started, state, end = ENDS[way]
    await queue.enqueue(order(options={"attempts": 2}))
    (held,) = await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
    assert held.lease is not None
    await end(queue, held, registry)

    job = await queue.store.get(held.id)
    (claimed,) = [
        entry
        for entry in job.document["history"]
        if entry["lease"] == held.lease.id and entry["state"] == "running"
    ]
    (ended,) = [entry for entry in job.document["history"] if entry.get("ended")]
    assert (ended["ended"], ended["state"], ended["worker"]) == (held.lease.id, state, OWNER.worker)
    assert (ended["started"] is not None) is started
    assert ended["at"] >= (ended["started"] or claimed["at"]) >= claimed["at"]
    assert ended["reason"] or state == "complete"
    assert ended["attempt"] == int(started)


# ---------------------------------------------------------------------- state counts


@pytest.mark.row("S53")
async def test_history_buckets(api: Api, events: EventStore) -> None:
    """The highest total per bucket: day, hour, minute, second by span; sorted, paged, of their channel."""
    now = utcnow().replace(minute=30, second=30, microsecond=0) - timedelta(hours=3)
    for offset, running in ((0, 1), (20, 5), (40, 2), (3600, 3), (3660, 4)):
        await events.count(now + timedelta(seconds=offset), 20, {"pending": 1, "running": running})
        await events.count(now + timedelta(seconds=offset), 20, {"pending": 1})  # less, and late: not kept
    await events.tell("test.other", "ann")

    async def rows(span: timedelta, **more: Any) -> list[dict[str, Any]]:
        start = (now - timedelta(minutes=1)).isoformat()
        end = (now - timedelta(minutes=1) + span).isoformat()
        body = {"startDate": start, "endDate": end, **more}
        answer = await api.call("GET", "/queue/history", json=body)
        assert answer.body["total_count"] >= answer.body["count"]
        return list(answer.data)

    seconds = await rows(timedelta(hours=3), sort=1)
    assert [row["total"] for row in seconds] == [2, 6, 3, 4, 5]
    assert [row["total"] for row in await rows(timedelta(hours=3))] == [5, 4, 3, 6, 2]
    assert seconds[1].keys() == {"created", "total", "pending", "running"}
    minutes = await rows(timedelta(days=2), sort=1)
    assert [row["total"] for row in minutes] == [6, 3, 4, 5]
    hours = await rows(timedelta(days=40), sort=1)
    assert [row["total"] for row in hours] == [6, 5]
    assert all(row["created"].endswith(":00:00") for row in hours)
    days = await rows(timedelta(days=400), sort=1)
    assert max(row["total"] for row in days) == 6
    pages = [await rows(timedelta(hours=3), sort=1, page=n, perPage=2) for n in range(4)]
    assert [row["total"] for page in pages for row in page] == [2, 6, 3, 4, 5]
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    reversed_dates = {"startDate": "2026-02-01", "endDate": "2026-01-01"}
    assert (await api.call("GET", "/queue/history", json=reversed_dates)).status == 400
    for wrong in ({"startDate": "soon"}, {"sort": 2}, {"perPage": 0}, {"page": "x"}):
        assert (await api.call("GET", "/queue/history", json=wrong)).status == 400


async def test_history_answers_beside_many_events(api: Api, database: Database, events: EventStore) -> None:
    """Twenty thousand other events are in nobody's way."""
    line = {"channel": "audit", "bucket": None, "created": utcnow(), "name": "test.noise", "author": "x"}
    table = database.fast("sys.event")
    for portion in range(2):
        await table.insert_many([{**line, "_id": f"{portion}.{n}"} for n in range(10_000)])
    await events.count(utcnow(), 20, {"running": 7})

    answer = await api.call("GET", "/queue/history")
    assert [row["total"] for row in answer.data] == [7]


@pytest.mark.parametrize(
    ("span", "ago", "bucket"),
    [
        pytest.param(timedelta(hours=5), timedelta(0), "second", id="hours"),
        pytest.param(timedelta(days=5), timedelta(0), "minute", id="days"),
        pytest.param(timedelta(days=90), timedelta(0), "hour", id="months"),
        pytest.param(timedelta(days=900), timedelta(0), "day", id="years"),
        pytest.param(timedelta(hours=5), timedelta(days=10), "minute", id="hours-last-week"),
        pytest.param(timedelta(hours=5), timedelta(days=100), "hour", id="hours-months-ago"),
        pytest.param(timedelta(hours=5), timedelta(days=4000), "day", id="hours-years-ago"),
    ],
)
def test_bucket_of_a_span(span: timedelta, ago: timedelta, bucket: str) -> None:
    """By its length, and never finer than what is kept of that time."""
    assert bucket_of(NOW - ago - span, NOW - ago, NOW) == bucket


def test_the_enqueue_is_told_however_long_the_history() -> None:
    """The bounded history may have lost its first entry; the document has not."""
    document = {
        "_id": ObjectId(),
        "name": "tests.Job",
        "state": State.PENDING,
        "force": True,
        "request_id": "r",
        "enqueued": {"at": NOW, "username": "ann"},
        "history": [{"rev": 500, "at": NOW, "state": "killed", "action": "kill", "by": "bob"}],
    }
    first, second = audit_of(document)

    assert (first["name"], first["author"], first["data"]) == ("job.enqueue", "ann", {"force": True})
    assert (second["name"], second["author"], second["_id"]) == ("job.kill", "bob", f"{document['_id']}.500")


async def test_a_pull_is_told_and_a_look_is_not(api: Api, runner: Runner, events: EventStore) -> None:
    """Who has taken a result, and by which request; once."""
    first, second = [await api.enqueue(n=n) for n in range(2)]
    for _ in range(2):
        await (await runner.start()).finish(Outcome.complete(1))
    await api.call("POST", "/job/view/result", json={"job_id": str(first)})
    for job_id in (first, first, second):
        headers = {"X-Request-ID": f"pull-{job_id}"}
        await api.call("POST", "/job/pull/result", json={"job_id": str(job_id)}, headers=headers)

    page = await events.page({"name": "job.pull"}, per_page=10)
    assert sorted((row["job_id"], row["author"], row["request_id"]) for row in page.rows) == sorted(
        (str(job_id), ADMIN[0], f"pull-{job_id}") for job_id in (first, second)
    )
