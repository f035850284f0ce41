"""Workers without a database, as real processes, through a restart of the only API.

``CORE4_TEST_REMOTE_JOBS`` says how many jobs; the full load is 500.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from core4.database import Database
from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from tests.helpers import FAST, ROOT, Command, eventually_async, free_port, marked, program

SECRET = "0123456789abcdef"
WORKERS = 3
JOBS = int(os.environ.get("CORE4_TEST_REMOTE_JOBS", "40"))
LEDGER_JOBS = ROOT / "tests" / "jobs" / "ledger.py"
# An API that is restarted on a busy machine must not be taken for dead.
PATIENT = {**FAST, "CORE4_HEARTBEAT": "1", "CORE4_DEAD_AFTER": "30", "CORE4_WORKER_SECRET": SECRET}


@pytest.mark.timeout(900)
@pytest.mark.row("F18", "F60")
async def test_workers_over_http_drain_a_queue_while_the_api_is_restarted(
    mongo_url: str, database: Database, queue: JobQueue, registry: WorkerRegistry, tmp_path: Path
) -> None:
    """Each job runs once, all workers get some, none has the database's address or a connection to it."""
    port, ledger = free_port(), tmp_path / "ledger"
    api_settings = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database.name}
    api = [program("core4"), "api", "--port", str(port)]
    worker = [program("core4"), "worker", str(LEDGER_JOBS), "--manager", f"http://127.0.0.1:{port}"]

    def order(n: int) -> JobOrder:
        args = {"ledger": str(ledger), "n": n, "seconds": 0.1}
        return JobOrder(name="tests.jobs.LedgerJob", args=args, username="ann")

    async def ended() -> int:
        return await queue.store.journaled({"state": State.COMPLETE.value})

    with ExitStack() as everything:
        first = everything.enter_context(Command(api, {**PATIENT, **api_settings}, cwd=tmp_path))
        first.wait_for("ready")
        workers = []
        for n in range(WORKERS):
            own = {**PATIENT, "CORE4_HOME": str(tmp_path / f"home{n}"), "CORE4_SLOTS": "2"}
            workers.append(everything.enter_context(Command([*worker, "--name", f"w{n}"], own, cwd=tmp_path)))
        ids = [(await queue.enqueue(order(n))).id for n in range(JOBS)]

        async def some(least: int) -> bool:
            return await ended() >= least

        await eventually_async(lambda: some(JOBS // 4), 300, what="a quarter has ended")
        rows = await registry.up()
        assert len(rows) == WORKERS
        _assert_apart(workers, urlsplit(mongo_url).port)
        first.kill_everything()
        second = everything.enter_context(Command(api, {**PATIENT, **api_settings}, cwd=tmp_path))
        second.wait_for("ready")
        await eventually_async(lambda: some(JOBS), 400, what="all have ended")
        assert await queue.store.count({}) == 0
        assert {row["_id"] for row in await registry.up()} == {row["_id"] for row in rows}  # nobody lost his

    words = Counter(tuple(line.split()[:2]) for line in ledger.read_text().splitlines())
    assert words == Counter({(word, str(job_id)): 1 for job_id in ids for word in ("start", "end")})
    jobs = [await queue.store.get(job_id) for job_id in ids]
    assert len({job.document["history"][-1]["worker"] for job in jobs}) == WORKERS


def _assert_apart(workers: list[Command], port: int | None) -> None:
    """No process of a worker knows the database's address, or has a connection to it."""
    for command in workers:
        for process in marked(command.mark):
            try:
                assert "CORE4_MONGO_URL" not in process.environ()
                remote = {each.raddr[1:2] for each in process.net_connections("tcp")}
            except psutil.NoSuchProcess:
                continue
            assert (port,) not in remote
