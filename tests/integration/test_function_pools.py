"""Shipped functions on pools of real workers: scenarios 3, 4, 5 and 11 of the document.

The document has ten workers. ``CORE4_TEST_POOL`` says how many there are here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from core4 import workers
from core4.callers import Functions, Job
from core4.client import Client
from core4.config import Settings
from core4.database import Database
from core4.handles import JobFailed
from core4.registry import WorkerRegistry
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Api, serving
from tests.integration.test_functions import ANN, KEY
from tests.integration.test_pool import POOL, count_up
from tests.integration.test_workers import environ
from tests.jobs import shipped

__all__ = ["environ"]  # a fixture

pytestmark = pytest.mark.asyncio

T = TypeVar("T")


class Desk:
    """Who sends functions from a thread, beside the API."""

    def __init__(self, api: Api, folder: Path) -> None:
        self._api, self._folder = api, folder
        # Nobody dies here, and nobody is to be taken for dead on a busy machine.
        patience = {"heartbeat": 5.0, "dead_after": 60.0}
        keys = {"function_keys": (KEY,), "function_folders": (str(folder),)}
        self.workers: dict[str, Any] = {"functions": True, **keys, **patience}

    async def do(self, script: Callable[[Functions], T]) -> T:
        def run() -> T:
            with Functions(Client(self._api.root, ANN), key=KEY) as functions:
                return script(functions)

        return await asyncio.to_thread(run)

    def file(self, name: str) -> Path:
        """A file that functions may see, and that is not there."""
        return self._folder / name

    def busy(self, count: int) -> Callable[[], Awaitable[bool]]:
        """A look whether so many functions run."""

        async def look() -> bool:
            running = await self.do(lambda functions: functions.find(state="RUNNING"))
            assert len(running) == count, len(running)
            return True

        return look


@pytest.fixture
async def desk(
    environ: dict[str, str], settings: Settings, database: Database, tmp_path: Path
) -> AsyncIterator[Desk]:
    folder = tmp_path / "functions"
    folder.mkdir()
    users = UserStore(database, settings)
    await users.prepare()
    await users.add(*ANN, allow=["cop", "code"])
    async with serving(replace(settings, functions=True), database) as api:
        yield Desk(api, folder)
    users.close()


def waiting(functions: Functions, gate: Path, count: int) -> list[Job]:
    return [functions.schedule(shipped.waits_for, path=str(gate)) for _ in range(count)]


def results_of(ids: Sequence[str], functions: Functions) -> list[Any]:
    return functions.results(ids, timeout=300)


@pytest.mark.timeout(900)
@pytest.mark.row("M14", "M27", "M28")
async def test_functions_that_wait_for_workers_in_windows(desk: Desk, registry: WorkerRegistry) -> None:
    """Scenario 3: nothing is there, twenty are NEW, and four workers in tmux make them OK."""
    assert await desk.do(lambda functions: functions.find()) == []
    gate = desk.file("gate")
    new = await desk.do(lambda functions: [job.id for job in waiting(functions, gate, 20)])
    assert len(await desk.do(lambda functions: functions.find(state="NEW"))) == 20

    workers.workers_tmux_start(4, **desk.workers)
    await eventually_async(desk.busy(4), 180, what="each worker has one", every=0.5)
    assert {row["type"] for row in await registry.up()} == {"tmux"}
    assert len(await desk.do(lambda functions: functions.find(state="NEW"))) == 16
    gate.touch()
    assert await desk.do(partial(results_of, new)) == ["OK"] * 20
    assert len(await desk.do(lambda functions: functions.find(state="OK"))) == 20


@pytest.mark.timeout(900)
@pytest.mark.row("M30", "M12", "M38")
async def test_functions_before_the_pool_and_after_it(desk: Desk, registry: WorkerRegistry) -> None:
    """Scenarios 4 and 5: ten wait and the pool comes; then twenty slow ones come, and it grows to its most.

    When they have ended it is as small as it may be, and its supervisor lives. Each has run once.
    """
    counter = desk.file("counter")
    early = await desk.do(
        lambda functions: [
            functions.schedule(shipped.counted, path=str(counter), number=n).id for n in range(10)
        ]
    )
    pool = workers.workers_subprocess_start(minimum=1, maximum=POOL, **desk.workers)
    assert await desk.do(partial(results_of, early)) == list(range(10))
    assert sorted(map(int, counter.read_text().split())) == list(range(10))

    gate = desk.file("gate")
    slow = await desk.do(lambda functions: [job.id for job in waiting(functions, gate, 20)])
    await eventually_async(desk.busy(POOL), 180, what="each worker has one", every=0.5)
    assert len(await registry.up()) == POOL
    assert pool.alive
    gate.touch()
    assert await desk.do(partial(results_of, slow)) == ["OK"] * 20
    await eventually_async(lambda: count_up(registry, 1), 180, what="the pool has shrunk")
    assert pool.alive


@pytest.mark.timeout(900)
@pytest.mark.row("M29", "M15", "M16", "M42")
async def test_good_and_bad_functions_on_a_fixed_pool(desk: Desk, registry: WorkerRegistry) -> None:
    """Scenario 11: 12 in all, then 34, of which 30 are OK and 4 failed, exactly one for its time."""
    workers.workers_subprocess_start(POOL, **desk.workers)
    await eventually_async(lambda: count_up(registry, POOL), 180, what="the pool is up")
    gate = desk.file("gate")

    def first(functions: Functions) -> None:
        bad = functions.schedule(shipped.divide, return_queues=["fixed.end"], a=1)
        (told,) = functions.wait_queues(["fixed.end"], 1, die=False)
        assert (told.id, told.state, told.error_cat) == (bad.id, "ERROR", "ERROR")
        jobs = [functions.schedule(shipped.addition, a=n, b=n) for n in range(10)]
        jobs.append(functions.schedule(shipped.divide, a=1))
        functions.wait(jobs, timeout=300, die=False)
        assert [job.state for job in jobs] == ["OK"] * 10 + ["ERROR"]
        assert len(functions.find()) == 12
        assert functions.find(state=("NEW", "RUNNING")) == []

    def second(functions: Functions) -> list[str]:
        jobs = waiting(functions, gate, 20)
        jobs.append(functions.schedule(shipped.spins, timeout=1))
        jobs.append(functions.schedule(shipped.divide, a=1))
        return [job.id for job in jobs]

    def last(ids: Sequence[str], functions: Functions) -> None:
        jobs = functions.wait(ids, timeout=300, die=False)
        assert [job.error_cat for job in jobs] == ["NA"] * 20 + ["TIMEOUT", "ERROR"]
        every = functions.find()
        assert [len(every), len(functions.find(state="OK")), len(functions.find(state="ERROR"))] == [
            34,
            30,
            4,
        ]
        assert sum(job.error_cat == "TIMEOUT" for job in every) == 1
        assert all(job.time_stop >= job.time_start > 0 for job in every)
        with pytest.raises(JobFailed):
            functions.wait(ids, die=True)

    await desk.do(first)
    ids = await desk.do(second)
    await eventually_async(desk.busy(POOL), 180, what="each worker has one", every=0.5)
    gate.touch()
    await desk.do(partial(last, ids))
