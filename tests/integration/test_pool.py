"""Pools of workers as the installed program runs them, on a real database with real jobs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from bson import ObjectId

from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.registry import LIVING, WorkerRegistry
from core4.states import State
from tests.helpers import FAST, Command, eventually_async, program
from tests.jobs.ledger import LedgerJob

pytestmark = pytest.mark.asyncio

LEDGER = str(Path(__file__).parent.parent / "jobs" / "ledger.py")
Supervise = Callable[..., Command]


@pytest.fixture
def supervise(mongo_url: str, database_name: str, tmp_path: Path) -> Supervise:
    """`core4 worker` with these options, on the test's database."""

    def make(*options: str, **settings: str) -> Command:
        environ = {
            **FAST,
            "CORE4_MONGO_URL": mongo_url,
            "CORE4_MONGO_DATABASE": database_name,
            "CORE4_HOME": str(tmp_path / "home"),
            "CORE4_DRAIN": "20",
            **settings,
        }
        return Command([program("core4"), "worker", LEDGER, *options], environ, cwd=tmp_path)

    return make


class Work:
    """Jobs that note what happens to them."""

    def __init__(self, queue: JobQueue, path: Path) -> None:
        self._queue, self._path = queue, path
        self.ids: list[ObjectId] = []

    async def put(self, count: int, seconds: float, **options: Any) -> None:
        for _ in range(count):
            args = {"ledger": str(self._path), "n": len(self.ids), "seconds": seconds}
            order = JobOrder(name=LedgerJob.qual_name, args=args, unique=False, options=options)
            self.ids.append((await self._queue.enqueue(order)).id)

    async def done(self) -> bool:
        return self.begun("end") >= len(self.ids) and all(
            [(await self._queue.store.get(job_id)).state is State.COMPLETE for job_id in self.ids]
        )

    def begun(self, event: str = "start") -> int:
        """Jobs that have noted this event."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return len({line.split()[1] for line in lines if line.startswith(event)})

    def starts(self) -> int:
        """How often jobs have begun, together."""
        return self._path.read_text().count("start")


@pytest.fixture
def work(queue: JobQueue, tmp_path: Path) -> Work:
    return Work(queue, tmp_path / "ledger")


async def living(registry: WorkerRegistry, **where: Any) -> list[dict[str, Any]]:
    """The workers that are up."""
    return await registry.list(where={"state": {"$in": LIVING}, **where})


async def count_up(registry: WorkerRegistry, count: int) -> bool:
    rows = await registry.up()
    assert len(rows) == count, [(row["label"], row["state"], row["pid"]) for row in rows]
    return True


def children(command: Command) -> list[psutil.Process]:
    """The workers of a pool."""
    return psutil.Process(command.process.pid).children()


@pytest.mark.row("M30")
async def test_a_pool_follows_the_work(supervise: Supervise, registry: WorkerRegistry, work: Work) -> None:
    """30 slow jobs: it grows to its maximum and not beyond, drains, shrinks to its minimum."""
    with supervise("--min", "1", "--max", "4") as command:
        command.wait_for("jobs.loaded")
        await eventually_async(lambda: count_up(registry, 1), what="one worker is up")
        await work.put(30, 1.0)
        await eventually_async(lambda: count_up(registry, 4), 60, what="the pool has grown")
        assert len(children(command)) == 4
        await eventually_async(work.done, 90, what="all jobs are done")
        await eventually_async(lambda: count_up(registry, 1), 60, what="the pool has shrunk")
        rows = await registry.list()

    assert len(rows) == 4
    assert {row["type"] for row in rows} == {"subprocess"}
    assert work.starts() == 30
    assert {row["state"] for row in await registry.list()} == {"down"}


@pytest.mark.row("M29", "M38", "M39")
async def test_a_fixed_pool_has_its_number_whatever_happens(
    supervise: Supervise, registry: WorkerRegistry, work: Work
) -> None:
    """Killed children and a frozen one are replaced; their jobs run again; one that is halted is not."""
    with supervise("--processes", "3") as command:
        await eventually_async(lambda: count_up(registry, 3), 60, what="three workers are up")
        await work.put(12, 1.0)
        await eventually_async(lambda: begun(work, 3), 60, what="three jobs run")
        killed, frozen, _ = (row["pid"] for row in await registry.up())
        os.kill(killed, signal.SIGKILL)
        os.kill(frozen, signal.SIGSTOP)
        await eventually_async(work.done, 90, what="all jobs are done")
        await eventually_async(lambda: count_up(registry, 3), 60, what="three workers are up again")
        rows = await registry.list()
        survivors = await registry.up()
        os.kill(survivors[0]["pid"], signal.SIGUSR1)
        await eventually_async(lambda: count_up(registry, 2), 60, what="one has ended")
        command.wait_for("pool.grows")

    dead = {row["pid"]: row["error"] for row in rows if row["state"] == "dead"}
    assert dead[killed] == "its process ended: SIGKILL"
    assert dead[frozen].startswith("no sign of life for")
    assert {row["nr"] for row in survivors} == {1, 2, 3}
    assert len(await registry.list()) == 5
    assert work.starts() <= 12 + 2


async def begun(work: Work, count: int) -> bool:
    return work.begun() >= count
