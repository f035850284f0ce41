"""Jobs that call others and wait for them, on real workers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from core4 import children as children_module
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from core4.store import JOURNAL, QUEUE
from tests.helpers import FAST
from tests.integration.test_task_runs import ETL, Floor
from tests.integration.test_worker import House

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLING = str(Path(ETL).with_name("calling.py"))
SPACES = ("CALL", "ETL")
PATIENT: dict[str, Any] = {"slots": 1, "dead_after": 20.0}  # nobody dies here, however busy the machine is


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(mongo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    home = tmp_path_factory.mktemp("calls")
    name = f"test_calls_{os.getpid()}"
    settings = Settings.load(environ=FAST, mongo_url=mongo_url, mongo_database=name, home=home, **PATIENT)
    database = await Database.connect(mongo_url, name)
    queue, logs, registry = JobQueue(database, settings), LogStore(database), WorkerRegistry(database)
    for store in (queue.store, logs, registry):
        await store.prepare()
    ledger = home / "ledger"
    ledger.touch()
    os.environ["ETL_LEDGER"] = str(ledger)
    try:
        yield House(database, settings, queue, logs, registry)
    finally:
        del os.environ["ETL_LEDGER"]
        await database.drop()
        await database.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def floor(house: House) -> AsyncIterator[Floor]:
    """A worker with one slot."""
    async with house.worker(CALLING, ETL, namespaces=SPACES, slots=1):
        yield Floor(house, Path(os.environ["ETL_LEDGER"]))


async def children(house: House, job: Job) -> list[Job]:
    """Those that it has made; one that has just ended may be on its way to the journal, or in both."""
    found: dict[Any, Job] = {}
    for name in (QUEUE, JOURNAL):
        rows = await house.database.collection(name).find({"enqueued.parent_id": job.id}).to_list(None)
        found |= {row["_id"]: Job.from_document(row, journal=name == JOURNAL) for row in rows}
    return list(found.values())


@pytest.mark.row("F47")
async def test_a_job_calls_another_and_gets_its_result(floor: Floor) -> None:
    """The caller's only slot is lent: the called job, of another kind, runs in it. Its result is consumed."""
    both = await floor.ended(await floor.submit("CALL:fan", n=2))

    assert both.document["result"] == [2, 4]
    made = await children(floor.house, both)
    assert sorted(job.name for job in made) == ["CALL:add"] * 2 + ["CALL:double"] * 2
    assert {job.document["chain_id"] for job in made} == {both.id}
    assert {job.document["consumed"]["id"] for job in made} == {str(both.id)}
    assert {job.username for job in made} == {"ann"}


@pytest.mark.row("F47")
async def test_a_plain_function_calls(floor: Floor) -> None:
    process = await floor.ended(await floor.submit("CALL:fan_in_a_process", n=4))
    handled = await floor.ended(await floor.submit("CALL:catches_in_a_process"))

    assert process.document["result"] == [1, 2, 3, 4]
    assert handled.document["result"] == ["error", "ERROR", "ValueError('from afar')"]


async def test_a_job_calls_itself(floor: Floor) -> None:
    """Far more wait than there are slots."""
    job = await floor.ended(await floor.submit("CALL:fibonacci", n=4))

    assert (job.state, job.document["result"]) == (State.COMPLETE, 3)


async def test_calls_that_never_end_are_refused(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children_module, "MOST_DEEP", 3)

    job = await floor.ended(await floor.submit("CALL:endless", n=1))

    assert job.state is State.ERROR
    assert "3 jobs wait for one another already" in job.document["last_error"]["exception"]


@pytest.mark.row("F47")
async def test_what_fails_raises_in_the_caller(floor: Floor) -> None:
    job = await floor.ended(await floor.submit("CALL:catches"))
    uncaught = await floor.ended(await floor.submit("CALL:does_not_catch"))

    failed, died, unready, refused = job.document["result"]
    assert failed[:4] == ["error", "ERROR", "ValueError('as told')", "CALL:breaks"]
    assert "ended as error (ERROR): ValueError('as told')" in failed[4]
    assert died[:2] == ["error", "CRASH"]
    assert "exit code 3" in died[2]
    assert unready[:2] == ["error", "DEPENDENCY"]
    assert "ETL:fails_before" in unready[2]
    assert refused[:2] == ["refused", "bad_arguments"]
    assert (uncaught.state, uncaught.document["error_cat"]) == (State.ERROR, "ERROR")
    assert "CallFailed" in uncaught.document["last_error"]["exception"]
    assert "ValueError('as told')" in uncaught.document["last_error"]["exception"]
