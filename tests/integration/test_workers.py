"""Workers from Python, under the names that myjobs documents; and several pools on one database."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from core4 import workers
from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import FINAL, State
from tests.helpers import FAST, eventually_async
from tests.integration.test_pool import LEDGER, Supervise, Work, count_up, living, supervise

__all__ = ["supervise"]  # a fixture

pytestmark = pytest.mark.asyncio

UNRULY = str(Path(__file__).parent.parent / "jobs" / "unruly.py")
SCRIPT = """
import os
from core4.workers import worker_start
print(os.getpid())
raise SystemExit(worker_start(jobs=[os.environ["JOBS"]]))
"""


@pytest.fixture
def environ(
    mongo_url: str, database_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """Settings of the test's database for this process; all that it starts is stopped."""
    given = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_HOME": str(tmp_path / "home"),
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield given
    workers.stop(graceful=False)


@pytest.fixture
def work(queue: JobQueue, tmp_path: Path) -> Work:
    return Work(queue, tmp_path / "ledger")


async def status(name: str, state: str) -> bool:
    found = workers.workers_find()
    assert name in found, found
    assert found[name].state == state, found
    return True


@pytest.mark.row("M31", "M32")
async def test_a_worker_in_the_caller_runs_one_job(
    environ: dict[str, str], registry: WorkerRegistry, work: Work
) -> None:
    """Two jobs, one is left; the worker was the caller itself."""
    await work.put(2, 0.1)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "JOBS": LEDGER},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    (row,) = await registry.list()

    assert (row["pid"], row["type"], row["label"], row["state"]) == (
        *(int(done.stdout), "inprocess", "w1", "down"),
    )
    assert work.starts() == 1


@pytest.mark.row("M32")
async def test_a_worker_of_the_command_line_runs_one_job(
    supervise: Supervise, registry: WorkerRegistry, work: Work
) -> None:
    await work.put(2, 0.1)
    with supervise("--once", CORE4_SLOTS="4") as command:
        code = await asyncio.to_thread(command.wait)
    (row,) = await registry.list()

    assert (code, row["state"], work.starts()) == (0, "down", 1)


@pytest.mark.row("M28", "M29", "M33", "M35")
async def test_single_workers_in_windows_and_processes(
    environ: dict[str, str], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 8 with the documented names: two workers, started again in vain; one of them is halted.

    It finishes its job, and is HALTED then, without a pid; the other waits on. A child process is a third.
    """
    gate = tmp_path / "gate"
    monkeypatch.setenv("CORE4_DEAD_AFTER", "60")  # nobody is to be taken for dead on a busy machine

    async def states(**wanted: str) -> dict[str, workers.Worker]:
        found = workers.workers_find()
        assert {name: worker.state for name, worker in found.items()} == wanted
        return found

    workers.worker_tmux_start(jobs=[LEDGER])
    await eventually_async(lambda: states(w1="WAITING"), what="w1 waits")
    workers.start_worker("tmux", 2, jobs=[LEDGER])
    both = await eventually_async(lambda: states(w1="WAITING", w2="WAITING"), what="two workers wait")
    workers.worker_tmux_start(1, jobs=[LEDGER])
    workers.workers_tmux_start(2, jobs=[LEDGER])
    assert [(each.nr, each.type, each.current_job) for each in both.values()] == [
        *((1, "tmux", None), (2, "tmux", None))
    ]
    assert all(each.time_start <= each.last_update and not each.error for each in both.values())

    await work.put(2, 0.0, gate=gate)
    busy = await eventually_async(lambda: states(w1="BUSY", w2="BUSY"), what="both are busy")
    assert {each.current_job for each in busy.values()} == set(map(str, work.ids))
    assert {each.pid for each in busy.values()} == {each.pid for each in both.values()}
    busy["w1"].stop()
    await eventually_async(lambda: halting("w1"), what="w1 is told")
    gate.touch()
    await eventually_async(work.done, what="no job is lost")
    left = await eventually_async(lambda: states(w2="WAITING"), what="w1 has ended, w2 waits")
    ended = workers.workers_find("HALTED", every=True)["w1"]
    assert (ended.pid, left["w2"].pid, work.starts()) == (0, both["w2"].pid, 2)

    pool = workers.worker_subprocess_start(3, jobs=[LEDGER])
    found = await eventually_async(lambda: states(w2="WAITING", w3="WAITING"), what="a child process")
    assert (found["w3"].type, pool.alive) == ("subprocess", True)


async def halting(name: str) -> bool:
    return workers.workers_find()[name].halt


@pytest.mark.row("M30", "M36")
async def test_jobs_before_the_pool_and_after_it(environ: dict[str, str], work: Work) -> None:
    """Scenarios 4 and 5 of the document: ten jobs wait, the pool comes; then more come."""
    await work.put(10, 0.3)
    pool = workers.workers_subprocess_start(minimum=1, maximum=3, jobs=[LEDGER])
    await eventually_async(work.done, 120, what="the first ten are done")
    await work.put(6, 0.5)
    await eventually_async(work.done, 120, what="the others are done")

    async def healthy() -> list[workers.Worker]:
        found, well, bad = workers.workers_check()
        assert (1 <= well <= 3, bad) == (True, 0), found
        return found

    found = await eventually_async(healthy, what="all are well")
    assert pool.alive
    assert {worker.type for worker in found} == {"subprocess"}
    assert workers.stop()
    assert (pool.alive, workers.workers_find()) == (False, {})
    ended = workers.workers_find("HALTED", every=True)
    assert {worker.pid for worker in ended.values()} == {0}


@pytest.mark.row("M29", "M35", "M34")
async def test_a_fixed_pool_with_good_and_bad_jobs(
    environ: dict[str, str], queue: JobQueue, work: Work, tmp_path: Path
) -> None:
    """Scenario 11 of the document; then one worker is told to end, and another one is ended under its job."""
    workers.workers_subprocess_start(3, jobs=[LEDGER, UNRULY])

    async def put(what: str, value: Any = None, **options: Any) -> Any:
        args = {"what": what, "value": value, "pidfile": str(tmp_path / what)}
        order = JobOrder(name="tests.jobs.Unruly", args=args, unique=False, options=options)
        return (await queue.enqueue(order)).id

    await work.put(20, 0.1)
    bad = [await put("raises"), await put("spin", timeout=1.0), await put("raises")]

    async def over() -> bool:
        assert all([(await queue.store.get(job_id)).state in FINAL for job_id in bad])
        return await work.done()

    await eventually_async(over, 120, what="all are over")
    ends = [(await queue.store.get(job_id)).document["error_cat"] for job_id in bad]
    assert ends == ["ERROR", "TIMEOUT", "ERROR"]

    await eventually_async(lambda: status("w1", "WAITING"), what="w1 is idle")
    (tmp_path / "sleep").unlink(missing_ok=True)
    job_id = await put("sleep", 600, max_crashes=1)
    await eventually_async(lambda: written(tmp_path / "sleep"), 60, what="it runs")
    (busy,) = workers.workers_find("BUSY").values()
    idle = next(iter(workers.workers_find("WAITING").values()))
    idle.stop()
    busy.stop(hard=True)

    async def one_left() -> bool:
        assert set(workers.workers_find()) == {"w1", "w2", "w3"} - {idle.name, busy.name}
        return True

    await eventually_async(one_left, 60, what="one is left")
    job = await queue.store.get(job_id)
    assert busy.current_job == str(job_id)
    assert (job.state, job.document["error_cat"]) == (State.ERROR, "HALTED")


async def written(path: Path) -> bool:
    return path.exists()


@pytest.mark.row("M38")
async def test_two_pools_keep_their_limits_while_everybody_is_killed(
    supervise: Supervise, registry: WorkerRegistry, work: Work
) -> None:
    """Children and a supervisor die at random; nothing is lost, no number is given twice, no limit passed."""
    rng = random.Random(7)
    first, second = supervise("--processes", "2"), supervise("--min", "1", "--max", "2")
    most = [0, 0]

    def limits() -> None:
        for n, command in enumerate((first, second)):
            most[n] = max(most[n], len(psutil.Process(command.process.pid).children()))

    async def done(count: int) -> bool:
        limits()
        assert work.begun("end") >= count
        return True

    with second:
        with first:
            await eventually_async(lambda: count_up(registry, 3), 60, what="both pools are up")
            await work.put(24, 0.5)
            for ended in (3, 6, 9):
                await eventually_async(partial(done, ended), 60, what=f"{ended} jobs are done")
                os.kill(rng.choice(await living(registry, state="up"))["pid"], signal.SIGKILL)
            first.process.kill()
            first.wait()
            first.assert_nothing_left()
        with supervise("--processes", "2") as first:
            await eventually_async(work.done, 120, what="all jobs are done")
            limits()
            rows = await living(registry, state="up")

    assert most[0] <= 2
    assert most[1] <= 2
    assert len({row["nr"] for row in rows}) == len(rows)
    assert work.starts() <= 24 + 3 + 2
