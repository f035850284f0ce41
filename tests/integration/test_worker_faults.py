"""Real workers on a database that loses replies, lets writes come late, or is away; and a frozen one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from bson import ObjectId

from core4.config import Settings
from core4.database import Database
from core4.embedded import EmbeddedServer, running
from core4.faults import PERMIT, VARIABLE
from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.states import FINAL
from tests.chaos.checker import check
from tests.chaos.evidence import History, opened, read_ledger
from tests.chaos.recovery import gathered
from tests.helpers import FAST, ROOT, Command, eventually_async, program

NAME = "tests.chaos.Job"


@contextmanager
def worker(settings: Settings, name: str = "worker", *, fault: str = "") -> Iterator[Command]:
    """The installed `core4 worker` with the chaos job, under a fault."""
    faults = {VARIABLE: fault, PERMIT: "1"} if fault else {}
    environ = {
        **FAST,
        "CORE4_MONGO_URL": str(settings.mongo_url),
        "CORE4_MONGO_DATABASE": settings.mongo_database,
        "CORE4_HOME": str(settings.home),
        "CORE4_SLOTS": "2",
        "PYTHONPATH": str(ROOT),
        **faults,
    }
    args: list[str | Path] = [program("core4"), "worker", "--name", name, ROOT / "tests/chaos/jobs.py"]
    with Command(args, environ, cwd=ROOT) as command:
        yield command


class Bench:
    """Enqueues, waits and judges."""

    def __init__(self, database: Database, queue: JobQueue, home: Path, history: History) -> None:
        self.database, self.queue, self.home, self.history = database, queue, home, history

    async def enqueue(self, key: str, **more: Any) -> ObjectId:
        """A job that notes what happens to it."""
        options = {"attempts": 1, **more.pop("options", {})}
        args = {"key": key, "ledger": str(self.home / "ledger"), **more}
        number = self.history.invoke("test", "enqueue", key)
        job = await self.queue.enqueue(JobOrder(name=NAME, args=args, options=options, username="test"))
        self.history.answer(number, "ok", job.id)
        return job.id

    async def state(self, job_id: ObjectId) -> str:
        return (await self.queue.store.get(job_id)).state

    async def wait_for(self, job_id: ObjectId, *states: str, timeout: float = 60) -> dict[str, Any]:
        """The document when the job is in one of these states."""

        async def look() -> dict[str, Any]:
            job = await self.queue.store.get(job_id)
            assert job.state in states, f"{job.state}: {job.document['history']}"
            return dict(job.document)

        return await eventually_async(look, timeout, what=f"{job_id} in {states}")

    async def wait_for_start(self, job_id: ObjectId) -> None:
        """Wait until its code runs, not only until it is held."""

        async def look() -> bool:
            return any(note.job == str(job_id) for note in read_ledger(self.home / "ledger"))

        await eventually_async(look, 30, what=f"a start of {job_id}")

    async def workers(self, **where: Any) -> list[dict[str, Any]]:
        return await self.database.collection("sys.worker").find(where).to_list(None)

    async def judge(self, **more: Any) -> None:
        """Everything that was enqueued is final, once."""

        async def moved() -> bool:
            return not await self.database.collection("sys.queue").find_one({"settle": True})

        await eventually_async(moved, 30, what="an empty outbox")
        verdict = check(await gathered(self.database, self.home / "history", self.home / "ledger", **more))
        assert verdict.ok, str(verdict)


@pytest.fixture
def bench(database: Database, queue: JobQueue, tmp_path: Path) -> Iterator[Bench]:
    with opened(tmp_path / "history") as history:
        yield Bench(database, queue, tmp_path, history)


@pytest.mark.parametrize("fault", ["lose", "late 0.3", "late 2.5"])
async def test_a_claim_without_an_answer(fault: str, settings: Settings, bench: Bench) -> None:
    """The worker is well and does not know that it holds a job: it finds out, and the job is not charged."""
    job_id = await bench.enqueue("k1")
    with worker(settings, fault=f"{fault} store:cas:update_one 1") as command:
        document = await bench.wait_for(job_id, "complete")
        assert "worker.claim_failed" in command.output

    assert document["crashes"] == 0
    assert document["trial"] == 1
    await bench.judge()


async def test_a_worker_that_was_frozen_past_its_death(settings: Settings, bench: Bench) -> None:
    """Its job is run by another one; when it wakes it claims again, as somebody new."""
    with worker(settings, "first") as first:
        first.wait_for("ready")
        (before,) = await bench.workers()
        job_id = await bench.enqueue("k1", seconds=2.0)
        await bench.wait_for_start(job_id)
        first.process.send_signal(signal.SIGSTOP)
        with worker(settings, "second"):
            rerun = await bench.wait_for(job_id, "complete")
            first.process.send_signal(signal.SIGCONT)
            pinned = {"worker": f"first@{socket.gethostname()}"}
            again = await bench.enqueue("k2", options=pinned)
            await bench.wait_for(again, "complete")
            states = {row["_id"]: row["state"] for row in await bench.workers(name=before["name"])}

    assert states.pop(before["_id"]) == "dead"
    assert list(states.values()) == ["up"]
    assert rerun["crashes"] == 1
    assert rerun["history"][-1]["worker"].startswith("second@")
    await bench.judge(pauses=True)


async def test_an_outage_of_the_database_kills_nobody(tmp_path: Path) -> None:
    """Away for longer than it takes to be declared dead, all workers alive: nobody is charged for it."""
    with EmbeddedServer(tmp_path / "home") as server, opened(tmp_path / "history") as history:
        settings = Settings.load(environ=FAST, mongo_url=server.url, home=tmp_path / "home")
        database = await Database.connect(server.url)
        queue = JobQueue(database, settings)
        await queue.store.prepare()
        bench = Bench(database, queue, tmp_path, history)
        state = running(tmp_path / "home")
        assert state is not None
        with worker(settings, "first") as first, worker(settings, "second") as second:
            for command in (first, second):
                command.wait_for("ready")
            jobs = [await bench.enqueue(f"k{n}", seconds=3.0) for n in range(4)]
            for job_id in jobs:
                await bench.wait_for_start(job_id)
            process = psutil.Process(state.pid)
            process.suspend()
            try:
                for command in (first, second):
                    command.wait_for("worker.leases_lost")
            finally:
                process.resume()
            documents = [await bench.wait_for(job_id, *FINAL) for job_id in jobs]
        await bench.judge()
        await database.close()

    assert [document["state"] for document in documents] == ["complete"] * 4
    assert [document["crashes"] for document in documents] == [0] * 4
