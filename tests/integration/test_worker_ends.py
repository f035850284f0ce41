"""How one worker is told to end, what it runs until then, and for whom."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from core4.config import DEBUG, Settings
from core4.controls import ControlStore
from core4.database import Database
from core4.jobs import JobOrder
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry, described
from core4.states import State
from tests.integration.test_worker import NAME, House, Running, written

pytestmark = pytest.mark.asyncio


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> House:
    return House(database, settings, queue, logs, registry)


@pytest.fixture
async def controls(database: Database) -> ControlStore:
    controls = ControlStore(database)
    await controls.prepare()
    return controls


async def status(house: House, running: Running) -> str:
    """What readers are told of a worker, in myjobs' words."""
    row = {row["_id"]: row for row in await house.registry.list()}[running.worker.owner.id]
    held = await house.queue.store.held_by([row["_id"]])
    return str(described(row, held.get(row["_id"], []), 3)["status"])


@pytest.mark.row("M33")
async def test_a_worker_that_is_halted_finishes_its_job(
    house: House, controls: ControlStore, tmp_path: Path
) -> None:
    """However long that takes; it claims nothing more, and its neighbour goes on."""
    async with (
        house.worker(slots=1, drain=0.0) as first,
        house.worker(slots=1, namespaces=("other",)) as second,
    ):
        told_idle = await status(house, first)
        job_id = await house.enqueue("sleep", value=3, pidfile=str(tmp_path / "pid"))
        await written(tmp_path / "pid")
        told_busy = await status(house, first)
        await controls.stop(first.worker.owner.id, by="ann")
        left = await house.enqueue("answer")
        async with asyncio.timeout(30):
            await first.task
        told_after = [await status(house, first), await status(house, second)]

    assert (told_idle, told_busy, told_after) == ("WAITING", "BUSY", ["HALTED", "WAITING"])
    assert (await house.queue.store.get(job_id)).state is State.COMPLETE
    assert (await house.queue.store.get(left)).state is State.PENDING


@pytest.mark.row("M34", "M15")
async def test_a_hard_stop_puts_the_job_back_in_line_or_ends_it_as_its_policy_says(
    house: House, controls: ControlStore, tmp_path: Path
) -> None:
    async with house.worker(slots=2, drain=60.0) as running:
        again = await house.enqueue("sleep", value=600, pidfile=str(tmp_path / "again"))
        once = await house.enqueue(
            "sleep", value=600, pidfile=str(tmp_path / "once"), options={"max_crashes": 1}
        )
        await written(tmp_path / "again")
        await written(tmp_path / "once")
        await controls.stop(running.worker.owner.id, by="ann")
        await controls.stop(running.worker.owner.id, by="ann", hard=True)
        async with asyncio.timeout(30):
            await running.task
        told = await status(house, running)
    requeued, ended = await house.queue.store.get(again), await house.queue.store.get(once)

    assert told == "HALTED"
    assert (requeued.state, requeued.attempts_left, requeued.crashes) == (State.PENDING, 1, 0)
    assert (ended.state, ended.document["error_cat"]) == (State.ERROR, "HALTED")


@pytest.mark.row("M32")
async def test_a_worker_for_one_job_runs_one_and_stops(house: House) -> None:
    async with house.worker(slots=4, worker_jobs=1) as running, asyncio.timeout(30):
        jobs = [await house.enqueue("answer", value=n) for n in range(2)]
        await running.task
    found = [await house.queue.store.get(job_id) for job_id in jobs]

    assert [job.state for job in found] == [State.COMPLETE, State.PENDING]
    assert await status(house, running) == "HALTED"


@pytest.mark.row("M37")
async def test_a_worker_limits_every_job_on_it(house: House) -> None:
    """One without a limit of its own, too; a job's own limit that is shorter holds."""
    async with house.worker(worker_timeout=1.0) as running:
        job_id = await house.enqueue("spin", pidfile=os.devnull)
        own = await house.enqueue("spin", pidfile=os.devnull, options={"timeout": 0.5})
        job, shorter = await house.reach(job_id), await house.reach(own)
        row = {row["_id"]: row for row in await house.registry.list()}[running.worker.owner.id]

    assert (job.state, job.document["error_cat"]) == (State.ERROR, "TIMEOUT")
    assert "1 seconds, the limit of its worker" in job.document["last_error"]["exception"]
    assert "0.5 seconds" in shorter.document["last_error"]["exception"]
    assert row["timeout"] == 1.0


@pytest.mark.row("M43")
async def test_a_debug_job_is_for_a_debug_worker_alone(house: House) -> None:
    """Whoever else is up runs what came later, and not this."""
    order = JobOrder(name=NAME, args={"what": "answer"}, namespace=DEBUG, unique=False)
    async with house.worker():
        job_id = (await house.queue.enqueue(order)).id
        await house.reach(await house.enqueue("answer"))
        ignored = (await house.queue.store.get(job_id)).state
    plain = await house.enqueue("answer")
    async with house.worker(namespaces=(DEBUG,), worker_debug=True) as running:
        done = await house.reach(job_id)
        (row,) = [row for row in await house.registry.list() if row["_id"] == running.worker.owner.id]

    assert (ignored, done.state) == (State.PENDING, State.COMPLETE)
    assert row["debug"] is True
    assert row["pid"] == os.getpid()
    assert (await house.queue.store.get(plain)).state is State.PENDING
