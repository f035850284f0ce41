"""Tasks on a real worker, one for all tests of this module."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from bson import ObjectId

from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.errors import BadArguments, JobInvalid
from core4.jobs import Job, derived_id
from core4.logs import LogStore
from core4.messages import Message, bind
from core4.orders import make_order
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from core4.store import JOURNAL, QUEUE
from tests.helpers import FAST, eventually_async
from tests.integration.test_worker import House

pytestmark = pytest.mark.asyncio(loop_scope="module")

ETL = str(Path(__file__).parent.parent / "jobs" / "etl.py")


class Floor:
    """A running worker with the tasks, and what tests ask of it."""

    def __init__(self, house: House, ledger: Path) -> None:
        self.house, self.queue, self.ledger = house, house.queue, ledger
        self.catalogue = Catalogue(house.database)

    async def submit(self, name: str, **args: Any) -> ObjectId:
        entry = await self.catalogue.get(name)
        assert entry is not None
        return (await self.queue.enqueue(make_order(entry, args, args_cap=10_000, username="ann"))).id

    async def ended(self, job_id: ObjectId) -> Job:
        """The job when it has ended; one that follows is made a moment after the end of its parent."""
        await eventually_async(lambda: self.queue.store.document(job_id), what=f"job [{job_id}]")
        return await self.house.reach(job_id)

    async def follower(self, job: Job, edge: str = "after", index: int = 0) -> Job:
        return await self.ended(derived_id(job.id, edge, index))

    async def handlers(self, job: Job) -> set[ObjectId]:
        """The ids of those that were made; one that has just ended may be on its way to the journal."""
        where = {"enqueued.parent_id": job.id, "name": "ETL:failure_notify"}
        tables = [self.house.database.collection(name) for name in (QUEUE, JOURNAL)]
        return {row["_id"] for table in tables for row in await table.find(where).to_list(None)}

    def noted(self, name: str) -> list[float]:
        lines = [line.split() for line in self.ledger.read_text().splitlines()]
        return [float(line[1]) for line in lines if line[0] == name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def floor(mongo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Floor]:
    home = tmp_path_factory.mktemp("tasks")
    name = f"test_tasks_{os.getpid()}"
    settings = Settings.load(environ=FAST, mongo_url=mongo_url, mongo_database=name, home=home, slots=3)
    database = await Database.connect(mongo_url, name)
    queue, logs, registry = JobQueue(database, settings), LogStore(database), WorkerRegistry(database)
    for store in (queue.store, logs, registry):
        await store.prepare()
    house = House(database, settings, queue, logs, registry)
    ledger = home / "ledger"
    ledger.touch()
    os.environ["ETL_LEDGER"] = str(ledger)
    try:
        async with house.worker(ETL, namespaces=("DEFAULT", "ETL", "A", "B")):
            yield Floor(house, ledger)
    finally:
        del os.environ["ETL_LEDGER"]
        await database.drop()
        await database.close()


@pytest.mark.row("F21")
async def test_plain_and_coroutine_functions_run(floor: Floor) -> None:
    plain = await floor.ended(await floor.submit("A:twice", n=4))
    coroutine = await floor.ended(await floor.submit("ETL:failure_notify", job_failed={"message": "none"}))

    assert (plain.state, plain.document["result"]) == (State.COMPLETE, 8)
    assert (coroutine.state, coroutine.document["result"]) == (State.COMPLETE, {"message": "none"})


@pytest.mark.row("F23")
async def test_a_function_in_two_namespaces_has_two_queues(floor: Floor) -> None:
    first, second = [await floor.ended(await floor.submit(f"{one}:twice", n=1)) for one in ("A", "B")]

    assert [first.namespace, second.namespace] == ["A", "B"]
    assert [first.priority, second.priority] == [0, 5]


@pytest.mark.row("F28")
async def test_further_positional_arguments(floor: Floor) -> None:
    """With three and with five, as a queue says them and by name."""
    entry = await floor.catalogue.get("DEFAULT:basic")
    assert entry is not None
    three = bind(entry, Message(name="basic", namespace="DEFAULT", args=(1, 2, 3)))
    five = bind(entry, Message(name="basic", namespace="DEFAULT", args=(1, 2, 3, 4, 5)))

    assert (await floor.ended(await floor.submit("DEFAULT:basic", **three))).document["result"] == [1, 2, 3]
    assert (await floor.ended(await floor.submit("DEFAULT:basic", **five))).document["result"] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert (await floor.ended(await floor.submit("DEFAULT:basic", a=1, b=2))).document["result"] == [1, 2]
    with pytest.raises(BadArguments, match="/args/0"):
        await floor.submit("DEFAULT:basic", a=1, b=2, args=["x"])


@pytest.mark.row("F35")
@pytest.mark.row("F38")
async def test_a_failure_is_retried_once(floor: Floor) -> None:
    """Fails once: success, and nothing is handled. Fails twice: failed, handled once, with the reason."""
    saved = await floor.ended(await floor.submit("ETL:fails_once", key="k"))
    lost = await floor.ended(await floor.submit("ETL:fails", key="k"))

    assert (saved.state, saved.trial, saved.document["result"]) == (State.COMPLETE, 2, 2)
    assert (lost.state, lost.trial) == (State.ERROR, 2)
    handler = await floor.ended(derived_id(lost.id, "failure", _ended_from(lost)))
    assert handler.document["args"]["job_failed"]["message"] == "task fails failed"
    assert handler.document["args"]["job_failed"]["error"] == "RuntimeError('as always')"
    assert len(await floor.handlers(lost)) == 1
    assert await floor.handlers(saved) == set()
    assert await floor.queue.store.document(derived_id(lost.id, "after", 0)) is None


def _ended_from(job: Job) -> int:
    """The revision that the last move was made from."""
    return int(job.document["history"][-1]["rev"]) - 1


@pytest.mark.row("F36")
async def test_never_means_one_attempt(floor: Floor) -> None:
    job = await floor.ended(await floor.submit("ETL:never_again", key="k"))

    assert (job.state, job.trial, len(floor.noted("never_again-k"))) == (State.ERROR, 1, 1)


@pytest.mark.row("F37")
async def test_always_means_until_it_works(floor: Floor) -> None:
    """Five failures, then success; another job is not held up, and each round of two is handled."""
    job_id = await floor.submit("ETL:stubborn", key="k")
    other = await floor.ended(await floor.submit("A:twice", n=2))
    job = await floor.ended(job_id)

    assert other.document["result"] == 4
    assert (job.state, job.trial, job.document["result"]) == (State.COMPLETE, 6, 6)
    assert len(await floor.handlers(job)) == 2


@pytest.mark.row("F39")
async def test_a_chain_passes_its_results_on(floor: Floor) -> None:
    """extract -> transform -> load -> compute, of which the last has prerequisites of its own."""
    entry = await floor.catalogue.get("ETL:extract")
    assert entry is not None
    extract = await floor.ended(await floor.submit("ETL:extract", url="http://stats"))
    transform = await floor.follower(extract)
    load = await floor.follower(transform)
    compute = await floor.follower(load)

    assert transform.document["args"] == {"data": {"a": 1, "b": 2, "c": 3}}
    assert load.document["args"] == {"data": {"a": 3, "b": 4, "c": 5}}
    assert compute.document["result"]["computed"] == {"a": 3, "b": 4, "c": 5}
    assert {job.document["chain_id"] for job in (extract, transform, load, compute)} == {extract.id}


@pytest.mark.row("F40")
@pytest.mark.row("F41")
@pytest.mark.row("F42")
async def test_prerequisites_run_together_and_nest(floor: Floor) -> None:
    """deploy and prepare wait for each other, so they run at the same time; then configure, then compute."""
    floor.ledger.write_text("")
    job = await floor.ended(await floor.submit("ETL:compute", data={}))

    assert job.state is State.COMPLETE
    ends = [floor.noted("deploy_environment-ends")[0], floor.noted("prepare_db-ends")[0]]
    assert max(ends) <= floor.noted("configure_environment")[0] <= floor.noted("compute")[0]
    journal = floor.house.database.collection(JOURNAL)

    async def only_its_own_is_listed() -> bool:
        """As soon as it, too, has come to the journal."""
        rows = await journal.find({"chain_id": job.id, "consumed": None}).to_list(None)
        return [row["_id"] for row in rows] == [job.id]

    await eventually_async(only_its_own_is_listed)


@pytest.mark.row("F43")
async def test_a_prerequisite_that_fails_keeps_its_parent_from_running(floor: Floor) -> None:
    job = await floor.ended(await floor.submit("ETL:after_failure"))

    assert (job.state, job.document["error_cat"], job.trial) == (State.ERROR, "DEPENDENCY", 0)
    assert "ETL:fails_before" in job.document["last_error"]["exception"]
    assert floor.noted("after_failure") == []


async def test_a_hook_that_nobody_publishes_is_refused_at_first_use(floor: Floor) -> None:
    with pytest.raises(JobInvalid, match=r"\[ETL:lost\] names \[ETL:not_there\]"):
        await floor.submit("ETL:lost")


async def test_a_task_submits_another(floor: Floor) -> None:
    job = await floor.ended(await floor.submit("ETL:submits"))
    child = await floor.ended(ObjectId(job.document["result"]))

    assert (child.name, child.document["result"]) == ("A:twice", 8)
