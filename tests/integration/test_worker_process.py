"""The installed `core4 worker` as a process: its signals, its end, what it says of broken files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from bson import ObjectId

from core4.jobs import JobOrder
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from tests.helpers import FAST, Command, eventually_async, program

UNRULY = str(Path(__file__).parent.parent / "jobs" / "unruly.py")
NAME = "tests.jobs.Unruly"


@pytest.fixture
def command(mongo_url: str, database_name: str, tmp_path: Path) -> Command:
    """`core4 worker` on the test's database."""
    environ = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_DRAIN": "60",
    }
    return Command([program("core4"), "worker", UNRULY], environ, cwd=tmp_path)


async def begin(queue: JobQueue, what: str, pidfile: Path, value: object = 1) -> tuple[ObjectId, int]:
    """Enqueue a job and wait until it runs; its id, and the pid it has written."""
    job = await queue.enqueue(
        JobOrder(name=NAME, args={"what": what, "pidfile": str(pidfile), "value": value})
    )

    async def look() -> int:
        return int(pidfile.read_text()) if pidfile.exists() else 0

    return job.id, await eventually_async(look, what="the job runs")


async def test_sigterm_lets_the_job_end(command: Command, queue: JobQueue, tmp_path: Path) -> None:
    with command:
        command.wait_for("ready")
        job_id, _ = await begin(queue, "sleep", tmp_path / "pid")
        command.process.terminate()

        assert command.wait() == 0
        command.assert_nothing_left()
    assert (await queue.store.get(job_id)).state is State.COMPLETE


async def test_sigterm_ends_one_that_was_started_with_sigint_ignored(
    command: Command, queue: JobQueue, tmp_path: Path
) -> None:
    """As a script does to what it starts with `&`: the worker and its helpers still obey."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command.args]
    with Command(ignoring, command.environ, cwd=tmp_path) as started:
        started.wait_for("ready")
        job_id, _ = await begin(queue, "sleep", tmp_path / "pid")
        started.process.terminate()

        assert started.wait() == 0
        started.assert_nothing_left()
    assert (await queue.store.get(job_id)).state is State.COMPLETE


async def test_a_second_signal_ends_it_at_once(
    command: Command, queue: JobQueue, registry: WorkerRegistry, tmp_path: Path
) -> None:
    with command:
        command.wait_for("ready")
        job_id, _ = await begin(queue, "ignore_term", tmp_path / "pid")
        command.interrupt()
        command.wait_for("worker.draining")
        command.interrupt()

        assert command.wait() == 0
        command.assert_nothing_left()
    job = await queue.store.get(job_id)
    assert (job.state, job.attempts_left, job.crashes) == (State.PENDING, 1, 0)
    assert (await registry.list())[0]["state"] == "down"


@pytest.mark.parametrize("what", ["double_fork", "subprocess_tree", "ignore_term"])
async def test_kill_9_leaves_no_process_and_the_job_comes_back(
    command: Command, queue: JobQueue, registry: WorkerRegistry, tmp_path: Path, what: str
) -> None:
    with command:
        command.wait_for("ready")
        job_id, _ = await begin(queue, what, tmp_path / "pid", "stay")
        command.process.kill()
        command.wait()

        command.assert_nothing_left()
    await registry.bury(-60)
    await queue.rescue(registry.alive_ids)
    job = await queue.store.get(job_id)
    assert (job.state, job.crashes) == (State.PENDING, 1)


async def test_a_signal_for_all_its_processes_is_the_workers_to_handle(
    command: Command, queue: JobQueue, tmp_path: Path
) -> None:
    """As from a service manager that signals the whole control group; jobs are ended by what it says."""
    with command:
        command.wait_for("ready")
        worker = psutil.Process(command.process.pid)
        helpers = [
            child for child in worker.children(recursive=True) if "core4.worker.launcher" in child.cmdline()
        ]
        job_id, pid = await begin(queue, "sleep", tmp_path / "pid")
        for process in (*helpers, psutil.Process(psutil.Process(pid).ppid()), worker):
            os.kill(process.pid, signal.SIGTERM)

        assert command.wait() == 0
    assert (await queue.store.get(job_id)).state is State.COMPLETE


async def test_a_worker_without_a_job_that_loads_ends(command: Command, tmp_path: Path) -> None:
    """Who looks after it sees that it does not run, and why."""
    (tmp_path / "broken_file.py").write_text("import no_such_module_at_all\n")
    command.args = [program("core4"), "worker", str(tmp_path / "broken_file.py")]
    with command:
        assert command.wait() == 1

    assert "no job can be loaded" in command.output
    assert "No module named 'no_such_module_at_all'" in command.output
    assert '"ready"' not in command.output


async def test_a_broken_file_is_shown_with_its_traceback(
    command: Command, tmp_path: Path, registry: WorkerRegistry
) -> None:
    (tmp_path / "broken_file.py").write_text("def f():\n    return undefined_name\n\nf()\n")
    command.args = [*command.args, str(tmp_path / "broken_file.py")]
    command.environ = {**command.environ, "CORE4_LOG_FORMAT": "text"}
    with command:
        command.wait_for("ready")
        broken = (await registry.up())[0]["broken"]

    assert len(broken) == 1
    assert "broken_file.py: NameError" in broken[0]
    assert "jobs.broken" in command.output
    assert "    return undefined_name\n" in command.output
    assert "importlib" not in command.output
    assert f"job={NAME}" in command.output
