"""Tasks from their making to their start: where they come from, what they wait for, how many run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.decorated import entries
from core4.inbox import Inbox
from core4.jobs import Job
from core4.logs import LogStore
from core4.orders import make_order
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from core4.store import JOURNAL, QUEUE
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import serving
from tests.integration.test_calls import CALLING, PATIENT
from tests.integration.test_inline import InlineHouse
from tests.integration.test_task_runs import Floor
from tests.jobs import calling, etl

SCHEDULED = str(Path(CALLING).with_name("scheduled.py"))
NAMESPACES = ("CALL",)


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> InlineHouse:
    return InlineHouse(database, replace(settings, **PATIENT), queue, logs, registry)


async def first(house: InlineHouse, **where: Any) -> Job:
    """The first job like this that has completed."""

    async def look() -> dict[str, Any] | None:
        return await house.database.collection(JOURNAL).find_one({**where, "state": "complete"})

    found = await eventually_async(look, 60, what=f"a job with {where}")
    assert found is not None
    return Job.from_document(found, journal=True)


async def running(house: InlineHouse, name: str) -> int:
    where = {"name": name, "state": "running", "started_at": {"$ne": None}}
    return await house.database.collection(QUEUE).count_documents(where)


@pytest.mark.row("F10")
@pytest.mark.row("F44")
async def test_a_job_is_made_in_four_ways(
    house: InlineHouse, users: UserStore, catalogue: Catalogue, tmp_path: Path
) -> None:
    """API, queue, schedule, and from inside a job: one record. Of two schedulers one makes a tick."""
    floor = Floor(house, tmp_path)
    asked = {"qual_name": "CALL:add", "args": {"a": 1, "b": 2}, "follow": False}
    message = json.dumps({"name": "add", "kwargs": {"a": 1, "b": 2}}).encode()
    workers = {"slots": 2, "namespaces": NAMESPACES, "scheduler": True, "ingest": True}
    async with (
        house.worker(CALLING, SCHEDULED, worker_name="one", **workers),
        house.worker(CALLING, SCHEDULED, worker_name="two", **workers),
        serving(house.settings, house.database) as api,
    ):
        by_api = ObjectId((await api.call("POST", "/job", json=asked)).data)
        await Inbox(house.database).send("CALL", message, message_id="m1")
        inside = await floor.ended(await floor.submit("CALL:submits"))
        made = {
            "api": await first(house, _id=by_api),
            "queue": await first(house, name="CALL:add", request_id="m1"),
            "inside": await first(house, _id=ObjectId(inside.document["result"])),
            "schedule": await first(house, name="CALL:ticks"),
        }
        ticks = await eventually_async(lambda: ticked(house, 3), what="three ticks")

    assert {job.document["result"] for job in made.values()} == {3}
    records = {way: set(job.document) - {"schedule_id", "request_hash"} for way, job in made.items()}
    assert all(record == records["api"] for record in records.values()), {
        way: record ^ records["api"] for way, record in records.items()
    }
    assert made["inside"].document["enqueued"]["parent_id"] == inside.id
    assert len(set(ticks)) == len(ticks)


async def ticked(house: InlineHouse, least: int) -> list[str]:
    """For which instants there are jobs."""
    rows = await house.database.collection(JOURNAL).find({"name": "CALL:ticks"}).to_list(None)
    return [row["request_id"] for row in rows] if len(rows) >= least else []


@pytest.mark.row("F13")
async def test_the_stored_job_has_all_that_follows(queue: JobQueue) -> None:
    """Before anybody has claimed it."""
    hooked = (
        etl.compute,
        etl.failure_notify,
        etl.configure_environment,
        etl.deploy_environment,
        etl.prepare_db,
    )
    others = [_only(each) for each in hooked]
    job = await queue.enqueue(make_order({**_only(etl.load), "hooked": others}, {"data": 1}, args_cap=1000))

    found = (await queue.store.get(job.id)).document
    assert (found["state"], found["namespace"], found["args"]) == ("pending", "ETL", {"data": 1})
    assert (found["retry_policy"], found["attempts"], found["error_time"]) == ("retry_once", 2, 0)
    assert (found["run_after"], found["on_failure"]) == (["ETL:compute"], "ETL:failure_notify")
    assert {each["name"] for each in found["hooks"]} == {each["_id"] for each in others}


def _only(task: Any) -> dict[str, Any]:
    (entry,) = entries(task)
    return entry


@pytest.mark.row("F12")
@pytest.mark.row("F15")
async def test_a_job_waits_for_the_first_worker_that_fits(house: InlineHouse) -> None:
    """One that serves another queue leaves it alone; an idle one starts it before its next look."""
    order = make_order(_only(calling.add), {"a": 1, "b": 2}, args_cap=1000)
    waiting = await house.queue.enqueue(order)
    async with house.inline(CALLING, namespaces=("OTHER",)):
        await house.beats(2)
        assert (await house.queue.store.get(waiting.id)).state is State.PENDING
    async with house.inline(CALLING, namespaces=NAMESPACES, poll=60.0):
        assert (await house.reach(waiting.id)).document["result"] == 3
        soon = await house.queue.enqueue(order)
        assert (await house.reach(soon.id, timeout=40)).document["result"] == 3  # 45 s at the earliest else


@pytest.mark.row("F16")
async def test_no_more_jobs_run_than_there_are_slots(house: InlineHouse, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    order = make_order(_only(calling.waits), {"gate": str(gate)}, args_cap=1000)
    async with house.inline(CALLING, namespaces=NAMESPACES, slots=3):
        ids = [(await house.queue.enqueue(order)).id for _ in range(10)]
        await eventually_async(lambda: _are(house, 3), what="three run")
        await house.beats(2)
        assert await running(house, "CALL:waits") == 3
        gate.write_text("go")
        assert {(await house.reach(job_id)).document["result"] for job_id in ids} == {"go"}


async def _are(house: InlineHouse, count: int) -> bool:
    return await running(house, "CALL:waits") == count
