"""Pools of workers as the installed program runs them, on a real database with real jobs.

``CORE4_TEST_POOL`` says how large they grow; the document has 10.
"""

from __future__ import annotations

import os
import random
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
POOL = int(os.environ.get("CORE4_TEST_POOL", "4"))
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

    async def put(self, count: int, seconds: float, *, gate: Path | None = None, **options: Any) -> None:
        """Jobs that take so long; those with a gate end when that file is there."""
        for _ in range(count):
            args = {
                "ledger": str(self._path),
                "n": len(self.ids),
                "seconds": seconds,
                "gate": gate and str(gate),
            }
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


@pytest.mark.timeout(900)
@pytest.mark.row("M30", "M34")
async def test_a_pool_follows_the_work(
    supervise: Supervise, registry: WorkerRegistry, work: Work, tmp_path: Path
) -> None:
    """30 slow jobs: it grows to its maximum and not beyond, drains, shrinks to its minimum.

    Children are killed at random meanwhile, then their supervisor, with which all end: nothing is lost.
    """
    rng, gate, limits = random.Random(11), tmp_path / "gate", ("--min", "1", "--max", str(POOL))

    async def grown(command: Command, starts: int) -> bool:
        assert len(children(command)) <= POOL
        await count_up(registry, POOL)
        assert work.starts() >= starts, work.starts()
        return True

    patient = {"CORE4_DEAD_AFTER": "15"}  # nobody is to be taken for dead on a busy machine
    with supervise(*limits, **patient) as first:
        await eventually_async(lambda: count_up(registry, 1), 120, what="one worker is up")
        await work.put(30, 0.0, gate=gate, max_crashes=10)
        await eventually_async(lambda: grown(first, POOL), 300, what="the pool has grown, all are busy")
        for n in (1, 2):
            os.kill(rng.choice(await registry.up())["pid"], signal.SIGKILL)
            await eventually_async(lambda n=n: grown(first, POOL + n), 300, what="another took its place")  # type: ignore[misc]
        first.process.kill()
        first.wait()
        first.assert_nothing_left(60)
    with supervise(*limits, **patient) as second:
        await eventually_async(lambda: grown(second, 2 * POOL + 2), 300, what="all are busy again")
        gate.touch()
        await eventually_async(work.done, 300, what="all jobs are done")
        await eventually_async(lambda: count_up(registry, 1), 300, what="the pool has shrunk")
        rows = await registry.list()

    assert work.starts() >= 30 + 2 + POOL
    assert {row["type"] for row in rows} == {"subprocess"}
    assert [row["state"] for row in rows].count("dead") >= 2 + POOL
    assert {row["state"] for row in await registry.list()} == {"dead", "down"}


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
