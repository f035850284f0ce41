"""What is too old goes, what is needed stays: each kind by its setting, any number of sweepers at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from core4.config import Settings
from core4.database import Database
from core4.errors import ResultGone
from core4.events import EventStore
from core4.jobs import Job, Owner, utcnow
from core4.logs import Line, LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.users import UserStore
from core4.worker.cleaner import PORTION, Cleaner
from tests.integration.driver import order

OWNER = Owner("owner", "worker@here", "here", 1)
DAYS = 10.0
KEPT: dict[str, Any] = dict.fromkeys(
    ("keep_stopped_days", "keep_journal_days", "keep_log_days", "keep_event_days"), DAYS
)


@pytest.fixture
def cleaner(database: Database, settings: Settings, queue: JobQueue) -> Cleaner:
    """A sweeper that keeps everything for ten days."""
    return Cleaner(database, replace(settings, **KEPT), queue)


async def run(queue: JobQueue, logs: LogStore, *, outcome: Outcome | None = None, **more: Any) -> Job:
    """A job that has run, with a line of log."""
    await queue.enqueue(order(**{"args": {"n": str(ObjectId())}, **more}))
    (held,) = await queue.claims.claim(OWNER, namespaces=["DEFAULT"])
    started = await queue.start(held)
    await logs.append(started, "here", [Line((started.fence << 32) + 1, 0.0, "INFO", "line")])
    return await queue.finish(started, outcome or Outcome.complete(1), log_seq=1)


async def age(database: Database, days: float, *jobs: Job) -> None:
    """As if everything about these jobs had happened that much earlier."""
    ids, then = [job.id for job in jobs], utcnow() - timedelta(days=days)
    for table, field in (("journal", "journaled_at"), ("queue", "stopped_at")):
        where = {"_id": {"$in": ids}, field: {"$exists": True}}
        await database.collection(f"sys.{table}").update_many(
            where, {"$set": {field: then, "enqueued.at": then}}
        )
    await database.collection("sys.log").update_many({"job": {"$in": ids}}, {"$set": {"created": then}})


async def left(database: Database, table: str) -> set[ObjectId]:
    rows = await database.collection(f"sys.{table}").find({}).to_list(None)
    return {row["job"] if table == "log" else row["_id"] for row in rows}


async def test_jobs_leave_the_journal_with_their_log(
    cleaner: Cleaner, database: Database, queue: JobQueue, logs: LogStore
) -> None:
    """Only what is older than the setting, however many sweepers are at it."""
    old, young = [await run(queue, logs) for _ in range(2)], await run(queue, logs)
    await age(database, DAYS + 1, *old)
    await age(database, DAYS - 1, young)
    await asyncio.gather(*(cleaner.step() for _ in range(3)))

    assert await left(database, "journal") == {young.id}
    assert await left(database, "log") == {young.id}


async def test_a_stopped_job_goes_to_the_journal_and_can_be_restarted(
    cleaner: Cleaner, database: Database, queue: JobQueue, logs: LogStore
) -> None:
    """Its place is free then; as is said in its history. A younger one stays."""
    once = order(args={"n": 1}, options={"attempts": 1})
    failed = Outcome.failed("ValueError('x')", [])
    old = await run(queue, logs, outcome=failed, args={"n": 1}, options={"attempts": 1})
    young = await run(queue, logs, outcome=failed, args={"n": 2}, options={"attempts": 1})
    await age(database, DAYS + 1, old)
    await age(database, DAYS - 1, young)
    assert (await cleaner.step())["stopped"] == 1

    found = await queue.store.get(old.id)
    assert (found.journal, found.state) == (True, "error")
    assert found.document["history"][-1]["reason"] == "stopped for longer than it is kept"
    assert not (await queue.store.get(young.id)).journal
    assert (await queue.enqueue(once)).id != old.id
    child_id = await queue.restart(young.id, by="ann")
    assert (await queue.store.get(child_id)).keep_stopped


@pytest.mark.parametrize("needed", ["settle", "audit", "outbox", "key", "parent"])
async def test_what_is_needed_stays(
    cleaner: Cleaner, database: Database, queue: JobQueue, logs: LogStore, needed: str
) -> None:
    """Half-done moves, untold actions, keys of the last 24 hours, children of a parent that goes on."""
    parent = await queue.enqueue(order("tests.Parent", namespace="other"))
    more: dict[str, Any] = {"parent_id": parent.id} if needed == "parent" else {}
    job = await run(queue, logs, **more)
    await age(database, DAYS + 1, job)
    fields: dict[str, Any] = {
        "settle": {"settle": True},
        "audit": {"audit": True},
        "outbox": {"outbox": [{"edge": "x"}]},
        "key": {"request_hash": "x", "enqueued.at": utcnow() - timedelta(hours=23)},
        "parent": {"rev": job.rev},
    }
    await database.collection("sys.journal").update_one({"_id": job.id}, {"$set": fields[needed]})
    await cleaner.step()
    assert job.id in await left(database, "journal")

    if needed == "parent":
        await queue.kill(parent.id, by="ann")
    else:
        gone = dict.fromkeys(("settle", "audit", "outbox", "request_hash"), 1)
        await database.collection("sys.journal").update_one({"_id": job.id}, {"$unset": gone})
    await cleaner.step()
    assert job.id not in await left(database, "journal")


async def test_needed_ones_hide_nothing_behind_them(
    cleaner: Cleaner, database: Database, queue: JobQueue, logs: LogStore
) -> None:
    """More than a portion of jobs that stay, older than one that goes."""
    journal = database.collection("sys.journal")
    then = utcnow() - timedelta(days=DAYS + 2)
    row = {"settle": True, "enqueued": {"parent_id": None}}
    rows = [
        {**row, "_id": ObjectId(), "journaled_at": then + timedelta(seconds=n)} for n in range(PORTION + 5)
    ]
    await journal.insert_many(rows)
    job = await run(queue, logs)
    await age(database, DAYS + 1, job)
    done = await cleaner.step()

    assert done["journal"] == 1
    assert job.id not in await left(database, "journal")


async def test_log_lines_go_but_not_those_of_an_open_job(
    cleaner: Cleaner, database: Database, queue: JobQueue, logs: LogStore
) -> None:
    """An attempt of long ago still tells why its job is retried today."""
    failed = Outcome.failed("ValueError('x')", [])
    retried = await run(queue, logs, outcome=failed, options={"attempts": 5, "error_time": 3600})
    over = await run(queue, logs)
    for job in (retried, over):
        then = utcnow() - timedelta(days=DAYS + 1)
        await database.collection("sys.log").update_many({"job": job.id}, {"$set": {"created": then}})
    await cleaner.step()

    assert await left(database, "log") == {retried.id}
    assert over.id in await left(database, "journal")


async def test_the_audit_the_counts_workers_and_tokens_end_too(
    cleaner: Cleaner, database: Database, settings: Settings, registry: WorkerRegistry
) -> None:
    """Each by its age; what is young or alive stays."""
    events, users = EventStore(database), UserStore(database, settings)
    table = database.collection("sys.event")
    for name in ("old", "young"):
        await events.tell(f"test.{name}", "ann", key=name)
    await table.update_one({"_id": "old"}, {"$set": {"created": utcnow() - timedelta(days=DAYS + 1)}})
    await events.count(utcnow() - timedelta(days=8), 20, {"running": 1})
    for name in ("down", "up"):
        await registry.register(replace(OWNER, id=name), slots=1, namespaces=[], jobs=[], version="1")
    await registry.leave(replace(OWNER, id="down"))
    ended = {"ended_at": utcnow() - timedelta(days=8)}
    await database.collection("sys.worker").update_one({"_id": "down"}, {"$set": ended})
    await users.prepare()
    ann = await users.add("ann", "secret")
    _, expires = await users.issue(ann)
    late = {"expires": utcnow() - timedelta(seconds=1), "name_lower": "bob", "_id": "late"}
    await database.collection("sys.token").insert_one(late)
    await cleaner.step()

    rows = await table.find({}).to_list(None)
    assert {row["_id"] for row in rows if row["channel"] == "audit"} == {"young"}
    assert sorted(row["bucket"] for row in rows if row["channel"] == "queue") == ["day", "hour", "minute"]
    assert await left(database, "worker") == {"up"}
    assert [row["expires"] for row in await database.collection("sys.token").find({}).to_list(None)] == [
        expires
    ]
    users.close()


async def test_none_days_keep_for_ever(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore
) -> None:
    job = await run(queue, logs)
    stopped = await run(queue, logs, outcome=Outcome.failed("x", []), options={"attempts": 1})
    await age(database, 36000, job, stopped)
    for_ever: dict[str, Any] = dict.fromkeys(KEPT, 0.0)
    cleaner = Cleaner(database, replace(settings, **for_ever), queue)
    await cleaner.step()

    assert await left(database, "journal") == {job.id}
    assert await left(database, "queue") == {stopped.id}
    assert await left(database, "log") == {job.id, stopped.id}


async def test_results_that_nobody_pulls_expire(
    queue: JobQueue, logs: LogStore, database: Database, settings: Settings
) -> None:
    """The job stays; who asks for the result is told why there is none, once a result was pulled by whom."""
    old, young, pulled = [await run(queue, logs) for _ in range(3)]
    await queue.consume(pulled.id, by="ann")
    await age(database, 11, old, pulled)
    cleaner = Cleaner(database, replace(settings, keep_result_days=DAYS), queue)
    assert (await cleaner.step())["result"] == 1
    assert (await cleaner.step())["result"] == 0

    assert (await queue.store.get(old.id)).document["result"] is None
    assert (await queue.store.get(young.id)).document["result"] == 1
    with pytest.raises(ResultGone, match="has expired at"):
        await queue.consume(old.id, by="ann")
    with pytest.raises(ResultGone, match="was pulled by ann"):
        await queue.consume(pulled.id, by="bob")
    assert (await queue.consume(young.id, by="bob")).document["result"] == 1
