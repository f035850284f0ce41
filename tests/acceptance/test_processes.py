"""A user's own file of tasks, served by several processes with one command.

``CORE4_TEST_PROCESS_JOBS`` says how many jobs.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from tests.applications import SECRET, Manager, example
from tests.helpers import FAST, Command, eventually_async, program

JOBS = int(os.environ.get("CORE4_TEST_PROCESS_JOBS", "200"))
PROCESSES = 5

TASKS = """
import asyncio
import os

from core4 import task


@task(retry_policy="never")
async def count(n: int, together: int) -> int:
    \"\"\"Notes that it runs, and where; the first ones wait until all of them do.\"\"\"
    with open("ledger", "a") as file:
        file.write(f"{n} {os.getpid()}\\n")
    while n < together and len(begun(together)) < together:
        await asyncio.sleep(0.02)
    return n


def begun(together):
    with open("ledger") as file:
        return {line.split()[0] for line in file if int(line.split()[0]) < together}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the file of tasks is, and their ledger."""
    (tmp_path / "my_tasks.py").write_text(TASKS)
    (tmp_path / "ledger").touch()
    return tmp_path


def ledger(folder: Path) -> list[list[str]]:
    """Number and process of each run."""
    return [line.split() for line in (folder / "ledger").read_text().splitlines()]


def counted(runs: list[list[str]]) -> dict[str, int]:
    """How often each number ran."""
    return Counter(n for n, _ in runs)


@pytest.mark.timeout(240)
@pytest.mark.row("F17")
async def test_five_processes(
    mongo_url: str, database_name: str, queue: JobQueue, registry: WorkerRegistry, folder: Path
) -> None:
    """Each job runs once, and each process has run some."""
    own = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}
    environ = {**FAST, **own, "CORE4_DEAD_AFTER": "30", "CORE4_HOME": str(folder / "home")}
    command = [program("core4"), "worker", "my_tasks.py", "--processes", str(PROCESSES)]
    with Command(command, environ, cwd=folder):
        for n in range(JOBS):
            args = {"n": n, "together": PROCESSES}
            await queue.enqueue(JobOrder(name="DEFAULT:count", args=args, username="ann"))

        async def ended() -> bool:
            return await queue.store.journaled({"state": State.COMPLETE.value}) == JOBS

        await eventually_async(ended, 150, what="all have ended", every=0.5)
        assert len(await registry.up()) == PROCESSES

    runs = ledger(folder)
    assert counted(runs) == {str(n): 1 for n in range(JOBS)}
    assert len({pid for _, pid in runs}) == PROCESSES


@pytest.mark.timeout(240)
@pytest.mark.row("F17", "F18")
async def test_processes_without_a_database(
    mongo_url: str, database_name: str, registry: WorkerRegistry, folder: Path
) -> None:
    """The same command for a manager elsewhere: one that dies is replaced."""
    moved = ("os.environ['DB_PATH'] = '/mnt/jobs_database/'", "")
    (folder / "job_manager.py").write_text(example("readme_manager", moved))
    own = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}

    async def up(dead: int = 0) -> list[int]:
        """The processes of the pool, which the manager's own worker is not in."""
        pids = [row["pid"] for row in await registry.up() if row["pid"] != manager.command.process.pid]
        assert len(pids) == 2
        assert dead not in pids
        return pids

    with Manager(folder, "job_manager", **own) as manager:
        environ = {**FAST, "CORE4_WORKER_SECRET": SECRET, "CORE4_HOME": str(folder / "home")}
        options = ["--processes", "2", "--manager", manager.url]
        with Command([program("core4"), "worker", "my_tasks.py", *options], environ, cwd=folder) as pool:
            ids = [manager.submit("count", n=n, together=2) for n in range(2)]
            assert [manager.pull(each) for each in ids] == [0, 1]
            first, second = await eventually_async(up, 60, what="two are up")
            os.kill(first, signal.SIGKILL)
            assert second in await eventually_async(lambda: up(first), 60, what="another one is up")
            ids = [manager.submit("count", n=n, together=4) for n in (2, 3)]
            assert [manager.pull(each) for each in ids] == [2, 3]
            assert SECRET not in str([each.cmdline() for each in psutil.Process(pool.process.pid).children()])

    assert counted(ledger(folder)) == {str(n): 1 for n in range(4)}
