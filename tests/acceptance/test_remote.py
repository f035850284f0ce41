"""Workers without a database, as real processes, through a restart of the only API.

Each is in a network of its own, in which the API's port is all that there is, unless this machine allows no
such thing (a container without rights). ``CORE4_TEST_REMOTE_JOBS`` says how many jobs; the full load is 500.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from contextlib import AsyncExitStack
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
from tests.island import Ferry, means

SECRET = "0123456789abcdef"
WORKERS = 3
JOBS = int(os.environ.get("CORE4_TEST_REMOTE_JOBS", "40"))
LEDGER_JOBS = ROOT / "tests" / "jobs" / "ledger.py"
# An API that is restarted on a busy machine must not be taken for dead.
PATIENT = {**FAST, "CORE4_HEARTBEAT": "1", "CORE4_DEAD_AFTER": "30", "CORE4_WORKER_SECRET": SECRET}

# Connects to each of the addresses, and says where that succeeded.
PROBE = """
import socket, sys
for address in sys.argv[1:]:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=60).close()
        print(address)
    except OSError:
        pass
"""


@pytest.mark.timeout(900)
@pytest.mark.row("F18", "F60")
async def test_workers_over_http_drain_a_queue_while_the_api_is_restarted(
    mongo_url: str, database: Database, queue: JobQueue, registry: WorkerRegistry, tmp_path: Path
) -> None:
    """Each job runs once, all workers get some, none has the database's address or a way to it."""
    port, ledger = free_port(), tmp_path / "ledger"
    home = urlsplit(mongo_url)
    api_settings = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database.name}
    api = [program("core4"), "api", "--port", str(port)]
    worker = [program("core4"), "worker", str(LEDGER_JOBS), "--manager", f"http://127.0.0.1:{port}"]

    def order(n: int) -> JobOrder:
        args = {"ledger": str(ledger), "n": n, "seconds": 0.1}
        return JobOrder(name="tests.jobs.LedgerJob", args=args, username="ann")

    async def ended() -> int:
        return await queue.store.journaled({"state": State.COMPLETE.value})

    async with Ferry(port) as ferry, AsyncExitStack() as everything:
        first = everything.enter_context(Command(api, {**PATIENT, **api_settings}, cwd=tmp_path))
        first.wait_for("ready")
        workers = []
        for n in range(WORKERS):
            own = {**PATIENT, "CORE4_HOME": str(tmp_path / f"home{n}"), "CORE4_SLOTS": "2"}
            command = Command(ferry.aboard([*worker, "--name", f"w{n}"]), own, cwd=tmp_path)
            workers.append(everything.enter_context(command))
        ids = [(await queue.enqueue(order(n))).id for n in range(JOBS)]

        async def some(least: int) -> bool:
            return await ended() >= least

        async def empty() -> bool:
            return await queue.store.count({}) == 0

        await eventually_async(lambda: some(JOBS // 4), 300, what="a quarter has ended")
        rows = await registry.up()
        assert len(rows) == WORKERS
        _assert_apart(workers, home.port)
        await _assert_no_way(ferry, f"{home.hostname}:{home.port}")
        first.kill_everything()
        second = everything.enter_context(Command(api, {**PATIENT, **api_settings}, cwd=tmp_path))
        second.wait_for("ready")
        await eventually_async(lambda: some(JOBS), 400, what="all have ended")
        # The last one is in the journal before it leaves the queue.
        await eventually_async(empty, what="the queue is empty")
        assert {row["_id"] for row in await registry.up()} == {row["_id"] for row in rows}  # nobody lost his

    words = Counter(tuple(line.split()[:2]) for line in ledger.read_text().splitlines())
    assert words == Counter({(word, str(job_id)): 1 for job_id in ids for word in ("start", "end")})
    jobs = [await queue.store.get(job_id) for job_id in ids]
    assert len({job.document["history"][-1]["worker"] for job in jobs}) == WORKERS


def _assert_apart(workers: list[Command], port: int | None) -> None:
    """No process of a worker knows the database's address, has a connection to it, or is in its network."""
    here = os.readlink("/proc/self/ns/net")
    for command in workers:
        for process in marked(command.mark):
            try:
                if means():
                    assert os.readlink(f"/proc/{process.pid}/ns/net") != here
                assert "CORE4_MONGO_URL" not in process.environ()
                remote = {each.raddr[1:2] for each in process.net_connections("tcp")}
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
            assert (port,) not in remote


async def _assert_no_way(ferry: Ferry, database: str) -> None:
    """From where a worker is, the API can be reached and the database cannot; from here, both can."""
    both = [f"127.0.0.1:{ferry.port}", database]
    command = [sys.executable, "-c", PROBE, *both]

    async def reached(words: list[str]) -> list[str]:
        probe = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        said, _ = await probe.communicate()
        return said.decode().split()

    assert await reached(command) == both
    if means():
        assert await reached([str(word) for word in ferry.aboard(command)]) == both[:1]
