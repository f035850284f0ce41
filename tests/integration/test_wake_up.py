"""What wakes a worker: the change stream, however often it breaks off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bson import ObjectId

from core4.database import Database
from core4.states import State
from tests.helpers import eventually_async
from tests.integration.test_calls import CALLING, SPACES
from tests.integration.test_lending import house
from tests.integration.test_schedules import Wire
from tests.integration.test_task_runs import Floor
from tests.integration.test_worker import House

__all__ = ["house"]  # the fixture

CUTS = 100
POLL = 60.0  # seconds: whoever waits for a look of the worker's own waits for 45 at least


async def test_a_job_of_one_worker_that_another_process_makes_due(house: House) -> None:
    """It stands in no line: its worker hears that it waits no longer."""
    async with House(
        house.database, replace(house.settings, poll=POLL), house.queue, house.logs, house.registry
    ).worker() as running:
        options = {"worker": running.worker.owner.worker, "attempts": 2, "error_time": 1.0}
        job_id = await house.enqueue("raises", options=options)
        await house.reach(job_id, State.FAILED)
        await eventually_async(house.queue.promote, what="it is due, and this test was the first to see it")
        job = await house.reach(job_id, timeout=30)
    assert (job.state, job.trial) == (State.ERROR, 2)


async def test_no_job_waits_for_a_look_when_the_stream_breaks_off(
    mongo_url: str, house: House, tmp_path: Path
) -> None:
    """A hundred cuts: under load and, each fifth, of an idle worker, with a job in the same moment."""
    wire = Wire(mongo_url)
    await wire.mend()
    url = f"mongodb://127.0.0.1:{wire.port}/?directConnection=true"
    far = await Database.connect(url, house.database.name, timeout=0.5)
    cut_off = House(far, replace(house.settings, poll=POLL), house.queue, house.logs, house.registry)
    async with cut_off.worker(CALLING, namespaces=SPACES, slots=4):
        floor = Floor(house, tmp_path)
        ids: list[ObjectId] = []
        for n in range(CUTS):
            if n % 5 == 0:
                [await house.reach(job_id, timeout=40) for job_id in ids[-5:]]
            await wire.snap()
            ids.append(await floor.submit("CALL:add", a=n, b=1))
        ended = [await house.reach(job_id, timeout=40) for job_id in ids]
    await far.close()
    await wire.cut()

    assert [job.document["result"] for job in ended] == [n + 1 for n in range(CUTS)]
    assert {job.state for job in ended} == {State.COMPLETE}
