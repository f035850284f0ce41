"""Slots that are lent: how many run, how many wait, and what becomes of those that were called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job
from core4.logs import LogStore
from core4.orders import make_order
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from core4.store import QUEUE, JobStore
from tests.helpers import FAST, ROOT, Command, eventually_async, program
from tests.integration.test_calls import CALLING, PATIENT, SPACES
from tests.integration.test_schedules import Wire
from tests.integration.test_task_runs import ETL, Floor
from tests.integration.test_worker import House


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> House:
    patient = replace(settings, **PATIENT)
    return House(database, patient, queue, logs, registry)


async def test_no_more_run_than_there_are_slots(house: House, tmp_path: Path) -> None:
    """Who continues takes a slot first: with two slots never three run, and those that wait do not count."""
    async with house.worker(CALLING, namespaces=SPACES, slots=2):
        floor = Floor(house, tmp_path)
        ids = [await floor.submit("CALL:around", folder=str(tmp_path), n=n) for n in range(4)]
        ended = [await floor.ended(job_id) for job_id in ids]

    assert {job.state for job in ended} == {State.COMPLETE}
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    assert len(spans) == 12
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 2


async def test_a_limit_to_those_that_wait(house: House, tmp_path: Path) -> None:
    """Then only what somebody waits for is started, or all of a backlog would wait in memory."""
    gate = tmp_path / "gate"
    async with house.worker(CALLING, namespaces=SPACES, slots=1, max_waiting=2) as running:
        floor = Floor(house, tmp_path)
        ids = [await floor.submit("CALL:calls_waits", gate=str(gate)) for _ in range(4)]
        await eventually_async(lambda: waited_for(house, 2), what="two callers wait")
        gate.write_text("go")
        ended = [await floor.ended(job_id) for job_id in ids]

    assert [job.document["result"] for job in ended] == ["go"] * 4
    assert running.worker._slots.lent == 0


async def waited_for(house: House, callers: int) -> bool:
    """So many have called, and as many of the called as there are slots run."""
    states = [
        (row["name"], row["state"])
        async for row in house.database.collection(QUEUE).find({}, ["name", "state"])
    ]
    called = [state for name, state in states if name == "CALL:waits"]
    calling = [state for name, state in states if (name, state) == ("CALL:calls_waits", "running")]
    assert len(calling) <= callers, states
    return len(calling) == len(called) == callers and "running" in called


async def test_a_caller_that_is_killed_takes_along_what_it_waits_for(house: House, tmp_path: Path) -> None:
    """Whether it runs inline or in a process; and who stops waiting ends what it has called."""
    gate, mark = tmp_path / "gate", tmp_path / "mark"
    async with house.worker(CALLING, namespaces=SPACES, slots=3):
        floor = Floor(house, tmp_path)
        for name in ("CALL:calls_waits", "CALL:calls_waits_in_a_process"):
            caller = await floor.submit(name, gate=str(gate))
            called = await running_child(house, caller)
            await house.queue.kill(caller, by="ann")
            assert (await house.reach(caller)).state is State.KILLED
            assert (await house.reach(called)).state is State.KILLED
        fickle = await floor.submit("CALL:gives_up", gate=str(gate), mark=str(mark))
        called = await running_child(house, fickle)
        mark.touch()
        assert (await house.reach(fickle)).document["result"] == "cancelled True"
        killed = await house.reach(called)

    assert killed.state is State.KILLED
    assert killed.document["history"][-2]["by"] == f"job {fickle}"


async def running_child(house: House, job_id: ObjectId) -> ObjectId:
    async def look() -> ObjectId | None:
        where = {"enqueued.parent_id": job_id, "state": "running"}
        row = await house.database.collection(QUEUE).find_one(where)
        return row["_id"] if row else None

    found = await eventually_async(look, what="the called job runs")
    assert found is not None
    return found


async def test_what_is_called_may_run_elsewhere(house: House, tmp_path: Path) -> None:
    """On a worker that stops in the middle of it, and then on another: the caller waits on."""
    gate = tmp_path / "gate"
    async with house.worker(ETL, CALLING, namespaces=("ETL",), slots=1):
        floor = Floor(house, tmp_path)
        entry = await floor.catalogue.get("CALL:calls_waits")
        assert entry is not None
        order = make_order(entry, {"gate": str(gate)}, args_cap=1000, namespace="ETL")
        caller = (await house.queue.enqueue(order)).id
        async with house.worker(CALLING, namespaces=("CALL",), slots=1, worker_name="first", drain=0.0):
            called = await running_child(house, caller)
        assert (await house.queue.store.get(called)).state is State.PENDING
        async with house.worker(CALLING, namespaces=("CALL",), slots=1, worker_name="second"):
            gate.write_text("from there")
            ended = await house.reach(caller)

    assert ended.document["result"] == "from there"
    assert ended.trial == 1
    ran = [entry["worker"] for entry in (await house.queue.store.get(called)).document["history"]]
    assert {name.partition("@")[0] for name in ran if name} == {"first", "second"}


@pytest.mark.row("F47")
async def test_one_query_looks_at_all_that_is_waited_for(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ended = JobStore.ended

    async def counted(store: JobStore, ids: Any) -> Any:
        asked.append(len(ids))
        return await ended(store, ids)

    monkeypatch.setattr(JobStore, "ended", counted)
    gate = tmp_path / "gate"
    async with house.worker(CALLING, namespaces=SPACES, slots=8):
        floor = Floor(house, tmp_path)
        ids = [await floor.submit("CALL:calls_waits", gate=str(gate)) for _ in range(4)]
        for job_id in ids:
            await running_child(house, job_id)
        await eventually_async(_true(lambda: 4 in asked), what="a look at all four")
        gate.write_text("go")
        for job_id in ids:
            assert (await floor.ended(job_id)).document["result"] == "go"


def _true(look: Any) -> Any:
    async def looked() -> bool:
        return bool(look())

    return looked


@pytest.mark.row("F47")
async def test_one_slot_is_enough_for_a_pipeline(
    mongo_url: str, database_name: str, queue: JobQueue, catalogue: Catalogue, tmp_path: Path
) -> None:
    """`pipeline` calls `compute`, which has prerequisites that have prerequisites, on one real worker."""
    environ = {
        **FAST,
        "CORE4_DEAD_AFTER": "20",
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_SLOTS": "1",
        "CORE4_NAMESPACES": "CALL",
    }
    ended = []
    with Command([program("core4"), "worker", CALLING], environ, cwd=ROOT) as worker:
        worker.wait_for("ready")
        for name in ("CALL:pipeline", "CALL:plain_pipeline"):
            entry = await catalogue.get(name)
            assert entry is not None
            job = await queue.enqueue(make_order(entry, {}, args_cap=1000))

            async def look(job_id: ObjectId = job.id) -> Job | None:
                found = await queue.store.get(job_id)
                return found if found.has_ended else None

            ended.append(await eventually_async(look, 60, what=name))

    expected = [{"computed": 0}, {"computed": 1}]
    assert [job and job.document["result"] for job in ended] == [expected, expected]


async def test_a_wait_outlives_an_outage_of_the_database(
    mongo_url: str, house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The called job ends while nobody can be told; the caller waits on, in the same attempt."""
    caplog.set_level("INFO", logger="core4.worker.executor")
    gate, wire = tmp_path / "gate", Wire(mongo_url)
    await wire.mend()
    url = f"mongodb://127.0.0.1:{wire.port}/?directConnection=true"
    far = await Database.connect(url, house.database.name, timeout=0.5)
    cut_off = House(far, house.settings, house.queue, house.logs, house.registry)
    async with cut_off.worker(CALLING, namespaces=SPACES, slots=1):
        caller = await Floor(house, tmp_path).submit("CALL:calls_waits", gate=str(gate))
        # Until its worker knows that both are recorded as started: it would have to ask again.
        await eventually_async(_true(lambda: caplog.text.count("job.started") == 2), what="both run")
        await wire.cut()
        gate.write_text("meanwhile")
        await eventually_async(_true(lambda: "job.ended" in caplog.text), what="it ends, and nobody is told")
        await wire.mend()
        ended = await house.reach(caller)
    await wire.cut()
    await far.close()

    assert (ended.document["result"], ended.trial) == ("meanwhile", 1)
