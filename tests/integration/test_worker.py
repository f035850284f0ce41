"""The worker on a real database with real job processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect

from core4 import jobs
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.errors import Core4Error
from core4.jobs import Job, JobOrder, Owner
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.states import FINAL, State
from core4.worker import handle
from core4.worker.daemon import IDLE_BEATS, Worker
from core4.worker.direct import Direct
from core4.worker.executor import Execution
from core4.worker.handle import Launcher
from core4.worker.output import MOST_LINES, JobLog
from tests.helpers import eventually_async

UNRULY = str(Path(__file__).parent.parent / "jobs" / "unruly.py")
NAME = "tests.jobs.Unruly"


@dataclass
class House:
    """A database with everything around it, and the workers a test starts."""

    database: Database
    settings: Settings
    queue: JobQueue
    logs: LogStore
    registry: WorkerRegistry

    @asynccontextmanager
    async def worker(self, *targets: str, **settings: Any) -> AsyncIterator[Running]:
        """A worker in this process; stopped at the end of the block."""
        own = replace(self.settings, jobs=targets or (UNRULY,), **settings)
        worker = Worker(Direct(self.database, own), own, Launcher.spawn(own))
        stop, halt = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(worker.run(stop, halt))
        running = Running(worker, stop, halt, task)
        try:
            await eventually_async(lambda: self._is_up(running), what="the worker is up")
            yield running
        finally:
            stop.set()
            halt.set()
            async with asyncio.timeout(40):
                await asyncio.gather(task, return_exceptions=not running.must_succeed)

    async def _is_up(self, running: Running) -> bool:
        if running.task.done():
            running.task.result()
        up = [one["_id"] for one in await self.registry.up()]
        return running.worker.owner.id in up

    async def enqueue(
        self, what: str, *, name: str = NAME, options: Mapping[str, Any] | None = None, **args: Any
    ) -> ObjectId:
        order = JobOrder(
            name=name, args={"what": what, **args}, options=options or {}, unique=False, username="me"
        )
        return (await self.queue.enqueue(order)).id

    async def reach(self, job_id: ObjectId, *states: State, timeout: float = 60) -> Job:
        """Wait until a job is in one of these states (any final one)."""

        async def look() -> Job:
            job = await self.queue.store.get(job_id)
            assert job.state in (states or FINAL), f"{job.state} {job.document['history']}"
            return job

        return await eventually_async(look, timeout, what=f"job in {states or 'a final state'}")

    async def lines(self, job_id: ObjectId) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while rows := await self.logs.tail(job_id, found[-1]["seq"] if found else 0):
            found += rows
        return found

    async def messages(self, job_id: ObjectId, source: str = "log") -> list[str]:
        return [row["message"] for row in await self.lines(job_id) if row["source"] == source]


@dataclass
class Running:
    worker: Worker
    stop: asyncio.Event
    halt: asyncio.Event
    task: asyncio.Task[None]
    must_succeed: bool = True


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> House:
    return House(database, settings, queue, logs, registry)


async def written(path: Path) -> int:
    """The pid that a job has written."""

    async def look() -> int:
        return int(path.read_text()) if path.exists() else 0

    return await eventually_async(look, what=f"{path} is written")


async def gone(pid: int) -> None:
    async def look() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    await eventually_async(look, what=f"process {pid} is gone")


# ---------------------------------------------------------------------- what a worker publishes


async def test_a_worker_publishes_what_it_runs(house: House, catalogue: Catalogue) -> None:
    async with house.worker(UNRULY, "core4.examples", "no.such.module") as running:
        (row,) = await house.registry.up()
        entry = await catalogue.get(NAME)

        assert row["_id"] == running.worker.owner.id
        assert NAME in row["jobs"]
        assert "core4.queue.helper.job.example.DummyJob" in row["jobs"]
        assert entry is not None
        assert entry["schema"]["required"] == ["what"]
        assert entry["author"] == "tests"
    assert await house.registry.up() == []


# ---------------------------------------------------------------------- outcomes


async def test_the_next_job_has_a_process_already(house: House, tmp_path: Path) -> None:
    """It waits since the one before it has begun; the worker's end takes it along."""
    async with house.worker() as running:
        await house.reach(await house.enqueue("answer", value=1))
        launcher = running.worker._launcher
        waiting = await launcher._ahead[False][0]
        job_id = await house.enqueue("sleep", pidfile=str(tmp_path / "pid"), value=600)
        assert await written(tmp_path / "pid") == waiting.pid
        next_one = await launcher._ahead[False][0]
        assert next_one.pid != waiting.pid
        await house.queue.kill(job_id, by="me")
        await house.reach(job_id, State.KILLED)
    await gone(next_one.pid)


async def test_a_job_completes(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("answer", value={"x": [1, "ü"]})
        await house.reach(job_id)
    job = await house.queue.store.get(job_id)  # it is moved just after it is complete

    assert job.state is State.COMPLETE
    assert job.journal
    assert job.document["result"] == {"x": [1, "ü"]}
    assert (job.trial, job.attempts_left, job.document["prog"]["value"]) == (1, 0, 1.0)
    assert job.document["locked"] is None
    lines = await house.lines(job_id)
    assert lines[0]["message"] == "start execution"
    assert lines[-1]["message"].startswith("done execution with [complete] after [")
    assert [line["seq"] for line in lines] == list(range(jobs.first_seq(1), job.log_seq + 1))
    assert {line["level"] for line in lines} == {"INFO"}


@pytest.mark.parametrize(
    ("what", "state", "category", "words"),
    [
        ("raises", State.ERROR, "ERROR", "RuntimeError('as told')"),
        ("exit_softly", State.ERROR, "ERROR", "SystemExit('that is it')"),
        ("segfault", State.ERROR, "CRASH", "signal 11 (SIGSEGV)"),
        ("exit_hard", State.ERROR, "CRASH", "exit code 7"),
        ("kill_itself", State.ERROR, "CRASH", "signal 9 (SIGKILL)"),
        ("close_everything", State.ERROR, "CRASH", "exit code 70"),
        ("kill_its_keeper", State.ERROR, "CRASH", "keeper"),
    ],
)
@pytest.mark.row("S42")
async def test_every_bad_end_is_recorded_and_the_worker_goes_on(
    house: House, tmp_path: Path, what: str, state: State, category: str, words: str
) -> None:
    async with house.worker():
        job_id = await house.enqueue(what, pidfile=str(tmp_path / "pid"), value=600)
        job = await house.reach(job_id)
        after = await house.reach(await house.enqueue("answer"))

    assert (job.state, job.document["error_cat"]) == (state, category)
    assert words in job.document["last_error"]["exception"]
    last = (await house.lines(job_id))[-1]
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith("done execution with [error] after [")
    assert words in last["exception"]["info"]
    assert after.state is State.COMPLETE


@pytest.mark.parametrize(
    "value", ["\xff\xff\xff\xff", "\0\0\0\x02[]", '\0\0\0\x0b{"log": 1  }', "\0\0\0\x02{}"]
)
async def test_a_hostile_frame_ends_the_job(house: House, value: str) -> None:
    async with house.worker():
        job = await house.reach(await house.enqueue("garbage", value=value))

    assert (job.state, job.document["error_cat"]) == (State.ERROR, "CRASH")
    assert "frame" in job.document["last_error"]["exception"]


async def test_a_traceback_of_half_a_million_lines(house: House) -> None:
    """It is cut as soon as it is heard, and the worker goes on."""
    async with house.worker():
        job_id = await house.enqueue("traceback", value=450_000)
        job = await house.reach(job_id)
        after = await house.reach(await house.enqueue("answer"))

    assert (job.state, after.state) == (State.ERROR, State.COMPLETE)
    kept = job.document["last_error"]["traceback"]
    assert len(kept) == 1999
    assert "left out" in kept[999]
    assert (await house.lines(job_id))[-1]["exception"]["text"] == kept


@pytest.mark.row("S38")
async def test_fail_twice_then_succeed(house: House, tmp_path: Path) -> None:
    """Three executions, two of them failed, at least error_time between the starts."""
    (tmp_path / "twice.py").write_text(
        "from core4 import CoreJob\n"
        "class Twice(CoreJob):\n"
        "    author = 'tests'\n"
        "    def execute(self):\n"
        "        if self.attempt < 3: raise ValueError(f'attempt {self.attempt}')\n"
    )
    async with house.worker(str(tmp_path / "twice.py")):
        order = JobOrder(name="twice.Twice", options={"attempts": 5, "error_time": 1})
        job_id = (await house.queue.enqueue(order)).id
        job = await house.reach(job_id)

    lines = await house.lines(job_id)
    ends = [
        line["message"].split("[")[1].split("]")[0] for line in lines if line["message"].startswith("done")
    ]
    starts = [line["epoch"] for line in lines if line["message"] == "start execution"]
    assert (job.state, job.trial, job.attempts_left) == (State.COMPLETE, 3, 2)
    assert ends == ["failed", "failed", "complete"]
    assert min(starts[1] - starts[0], starts[2] - starts[1]) >= 1
    assert [jobs.seq_fence(line["seq"]) for line in lines] == sorted(
        jobs.seq_fence(line["seq"]) for line in lines
    )


@pytest.mark.row("S39")
async def test_a_failing_job_with_a_short_defer_max_ends_in_error(house: House) -> None:
    async with house.worker():
        options = {"attempts": 3, "error_time": 1, "defer_max": 0.5}
        job = await house.reach(await house.enqueue("raises", options=options))

    assert (job.state, job.trial) == (State.ERROR, 3)
    assert [row["state"] for row in job.document["history"] if row["state"] != "running"] == [
        "pending", "failed", "failed", "error",
    ]  # fmt: skip


async def test_a_deferring_job_becomes_inactive(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("defers", options={"defer_time": 0.5, "defer_max": 2})
        job = await house.reach(job_id)

    assert (job.state, job.attempts_left) == (State.INACTIVE, 1)
    assert job.trial >= 2
    assert "done execution with [deferred]" in " ".join(await house.messages(job_id))


# ---------------------------------------------------------------------- output


@pytest.mark.row("S45")
async def test_all_output_becomes_numbered_lines(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("output")
        await house.reach(job_id)

    assert await house.messages(job_id, "stdout") == [
        "café \\xff\\xfe \\x00 end", "printed \\udcff", "from a child", "anew", "from the C library",
    ]  # fmt: skip
    assert await house.messages(job_id, "stderr") == ["to stderr", "unterminated"]


async def test_a_line_of_ten_megabytes_is_cut_into_pieces(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("long_line")
        job = await house.reach(job_id)

    lines = await house.messages(job_id, "stdout")
    assert job.state is State.COMPLETE
    assert lines[-1] == "after"
    assert sum(line.count("x") + line.count("y") for line in lines) == 160 * 65536 + 10
    assert max(map(len, lines)) < 66_000


async def test_every_line_is_stored_once_and_in_order(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("many_lines", value=3000)
        job = await house.reach(job_id)

    assert job.state is State.COMPLETE
    assert await house.messages(job_id, "stdout") == [str(number) for number in range(3000)]
    logged = [text for text in await house.messages(job_id) if text.startswith("line ")]
    assert logged == [f"line {number}" for number in range(3000)]


async def test_output_over_the_cap_is_cut_with_one_mark(house: House) -> None:
    async with house.worker(log_cap=2048):
        job_id = await house.enqueue("many_lines", value=3000)
        job = await house.reach(job_id)

    texts = [row["message"] for row in await house.lines(job_id)]
    assert job.state is State.COMPLETE
    assert sum(text.startswith("output cut: ") for text in texts) == 1
    assert sum(map(len, texts)) < 4096
    assert texts[-1].startswith("done execution with [complete]")


async def test_empty_lines_reach_the_cap_and_the_worker_keeps_its_lease(house: House) -> None:
    """Two million of them: each costs memory here and a document's part there, although it has no text."""
    async with house.worker(log_cap=65536):
        job_id = await house.enqueue("empty_lines", value=32)
        job = await house.reach(job_id)

    texts = await house.messages(job_id, "stdout")
    assert (job.state, job.trial) == (State.COMPLETE, 1)
    assert 0 < len(texts) <= 1024
    assert sum(text.startswith("output cut: ") for text in await house.messages(job_id)) == 1


@pytest.mark.parametrize(
    "exception", [{"info": "i" * 60_000, "text": []}, {"info": "", "text": [""] * 9_000}]
)
async def test_a_forged_exception_reaches_the_cap(house: House, exception: Mapping[str, Any]) -> None:
    frame = {"log": {"level": "INFO", "epoch": 1.0, "message": "forged", "exception": exception}}
    async with house.worker(log_cap=65536):
        job_id = await house.enqueue("frames", value=[frame] * 20)
        job = await house.reach(job_id)

    assert job.state is State.COMPLETE
    assert (await house.messages(job_id)).count("forged") <= 2


async def test_a_reader_of_output_waits_until_enough_is_stored(
    house: House, settings: Settings, logs: LogStore
) -> None:
    job = await house.queue.enqueue(JobOrder(name=NAME, args={}))
    joblog = JobLog(logs, job, "here", settings)
    for number in range(5 * MOST_LINES):
        joblog.write("INFO", str(number))
    writer = asyncio.create_task(joblog.run())

    await joblog.room()

    assert joblog.last_seq - await logs.last_seq(job.id) < MOST_LINES
    await joblog.close(writer, 20)


async def test_progress_reaches_the_document_while_the_job_runs(house: House) -> None:
    async with house.worker("core4.examples"):
        order = JobOrder(
            name="core4.queue.helper.job.example.DummyJob",
            args={"sleep": 4, "loop_time": 0.2},
            options={"progress_interval": 1},
        )
        job_id = (await house.queue.enqueue(order)).id
        seen: set[float] = set()

        async def look() -> bool:
            job = await house.queue.store.get(job_id)
            if job.state is State.RUNNING and job.document["prog"]["value"] is not None:
                seen.add(job.document["prog"]["value"])
            return job.state is State.COMPLETE

        await eventually_async(look)

    assert len(seen) >= 3


@pytest.mark.row("S46")
@pytest.mark.parametrize(("interval", "least", "most"), [(10, 1, 1), (0.1, 5, 30)])
async def test_progress_interval_of_the_order_counts(
    house: House, interval: float, least: int, most: int
) -> None:
    async with house.worker("core4.examples"):
        order = JobOrder(
            name="core4.queue.helper.job.example.DummyJob",
            args={"sleep": 1, "loop_time": 0.05},
            options={"progress_interval": interval},
        )
        job_id = (await house.queue.enqueue(order)).id
        await house.reach(job_id)

    lines = [text for text in await house.messages(job_id) if text.startswith("progress [")]
    assert least <= len(lines) <= most


# ---------------------------------------------------------------------- kill, stop, limits


@pytest.mark.parametrize("what", ["spin", "ignore_term", "subprocess_tree", "handle_term"])
async def test_an_attempt_past_its_timeout_is_ended_as_failed(
    house: House, tmp_path: Path, what: str
) -> None:
    """Also one that never yields, ignores TERM, left children, or has an answer to TERM."""
    async with house.worker():
        job_id = await house.enqueue(
            what,
            pidfile=str(tmp_path / "pid"),
            options={"timeout": 1.5, "attempts": 2, "error_time": 0.01},
        )
        job = await house.reach(job_id)
        await gone(await written(tmp_path / "pid"))

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "TIMEOUT")
    assert [each["state"] for each in job.document["history"]].count("failed") == 1
    assert job.document["last_error"]["exception"] == "timeout: it ran for more than 1.5 seconds"
    last = (await house.lines(job_id))[-1]
    assert last["message"].startswith("done execution with [error] after [")
    assert last["exception"]["info"].startswith("timeout: ")


async def test_a_kill_beats_the_timeout_under_way(house: House, tmp_path: Path) -> None:
    """Whoever asked for the end is told that it was a kill, and nothing is retried."""
    async with house.worker(grace=3.0):
        options = {"timeout": 1, "attempts": 5}
        job_id = await house.enqueue("report_term", pidfile=str(tmp_path / "pid"), options=options)
        await written(tmp_path / "pid")
        await house.queue.kill(job_id, by="me")
        job = await house.reach(job_id)

    assert (job.state, job.trial) == (State.KILLED, 1)
    assert "done execution with [killed]" in (await house.messages(job_id))[-1]


async def test_a_job_within_its_timeout_is_left_alone(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("answer", value=1, options={"timeout": 60})
        assert (await house.reach(job_id)).state is State.COMPLETE


@pytest.mark.row("S41")
@pytest.mark.parametrize(
    ("limit", "field", "line"),
    [
        ("wall_time", "wall_at", "successfully set non-stop job"),
        ("zombie_time", "zombie_at", "successfully set zombie job"),
    ],
)
async def test_an_overdue_job_is_flagged_once_and_completes(
    house: House, limit: str, field: str, line: str
) -> None:
    async with house.worker():
        job_id = await house.enqueue("sleep", value=3, options={limit: 0.3})
        job = await house.reach(job_id)

    assert job.state is State.COMPLETE
    flags = {name: job.document[name] is not None for name in ("wall_at", "zombie_at")}
    assert flags == {"wall_at": False, "zombie_at": False, field: True}
    lines = await house.lines(job_id)
    assert [each["message"] for each in lines if each["level"] == "WARNING"] == [line]
    assert [each["reason"] for each in job.document["history"] if limit in (each["reason"] or "")] != []


async def test_a_flag_is_for_the_job_and_not_for_each_attempt(house: House) -> None:
    async with house.worker():
        options = {"wall_time": 0.2, "wall_action": "kill", "attempts": 2, "error_time": 0.01}
        job_id = await house.enqueue("sleep", value=600, options=options)
        job = await house.reach(job_id)

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "TIMEOUT")
    assert (await house.messages(job_id)).count("successfully set non-stop job") == 1


@pytest.mark.row("S41")
async def test_progress_keeps_a_job_from_being_a_zombie(house: House, tmp_path: Path) -> None:
    """Only when it falls silent it is one; with the action it is ended then."""
    async with house.worker():
        options = {"zombie_time": 2, "zombie_action": "kill"}
        pidfile = str(tmp_path / "pid")
        job_id = await house.enqueue("reports_until_told", pidfile=pidfile, options=options)
        await written(tmp_path / "pid")
        job = await house.queue.store.get(job_id)
        assert (job.state, job.document["zombie_at"]) == (State.RUNNING, None)
        (tmp_path / "pid.enough").touch()
        job = await house.reach(job_id)

    assert (job.state, job.document["error_cat"]) == (State.ERROR, "TIMEOUT")
    assert job.document["zombie_at"] is not None
    assert job.document["last_error"]["exception"] == "zombie_time: no progress for more than 2 seconds"


@pytest.mark.parametrize(("what", "size"), [("eat", 400), ("share_a_meal", 150)])
async def test_a_job_over_its_memory_limit_is_killed(
    house: House, tmp_path: Path, what: str, size: int
) -> None:
    """All its processes count, wherever they went; the attempt failed and is repeated."""
    async with house.worker():
        options = {"memory_limit": "300MB", "attempts": 2, "error_time": 0.01}
        pidfile = str(tmp_path / "pid")
        job_id = await house.enqueue(what, pidfile=pidfile, value=size * 1_000_000, options=options)
        job = await house.reach(job_id)
        await gone(await written(tmp_path / "pid"))

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "CRASH")
    assert re.fullmatch(r"memory: used [34]\d{8} of 300000000 bytes", job.document["last_error"]["exception"])


async def test_a_job_below_its_memory_limit_is_left_alone(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("sleep", value=2, options={"memory_limit": "300MB"})
        assert (await house.reach(job_id)).state is State.COMPLETE


@pytest.mark.row("S47")
async def test_a_machine_without_memory_starts_forced_jobs_only(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """The others wait, the worker says so once in its log, and in its document why."""
    with caplog.at_level("INFO", logger="core4.worker.daemon"):
        async with house.worker(min_free_ram=2**60):
            waiting = await house.enqueue("answer", options={"priority": 1000})
            for number in range(3):
                forced = await house.enqueue("answer", value=number, options={"force": True})
                assert (await house.reach(forced)).state is State.COMPLETE

            async def reason() -> str:
                (row,) = await house.registry.up()
                return str(row.get("gate") or "")

            assert "memory: " in await eventually_async(reason)
            assert (await house.queue.store.get(waiting)).document["history"][-1]["state"] == "pending"
            assert len((await house.queue.store.get(waiting)).document["history"]) == 1
    assert [record.message for record in caplog.records].count("skipped job") == 1

    async with house.worker():
        assert (await house.reach(waiting)).state is State.COMPLETE


@pytest.mark.row("S42")
@pytest.mark.parametrize("what", ["ignore_term", "subprocess_tree", "double_fork"])
async def test_a_kill_request_ends_the_job_and_all_it_started(
    house: House, tmp_path: Path, what: str
) -> None:
    async with house.worker():
        job_id = await house.enqueue(what, pidfile=str(tmp_path / "pid"), value="stay")
        pid = await written(tmp_path / "pid")
        await house.queue.kill(job_id, by="me")
        job = await house.reach(job_id)

        assert job.state is State.KILLED
        assert job.killed_at is not None
        await gone(pid)
        await house.queue.remove(job_id, by="me")
    assert "done execution with [killed]" in (await house.messages(job_id))[-1]


async def test_a_kill_at_once_after_the_enqueue_ends_killed(house: House) -> None:
    async with house.worker():
        for _ in range(5):
            job_id = await house.enqueue("sleep", pidfile="/dev/null", value=600)
            await house.queue.kill(job_id, by="me")
            assert (await house.reach(job_id)).state is State.KILLED


async def test_a_kill_between_claim_and_start_is_heard_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = JobQueue.start_many

    async def killed_first(self: JobQueue, orders: Sequence[tuple[Job, int]]) -> list[Job | Core4Error]:
        for job, _ in orders:
            await self.kill(job.id, by="me")
        return await start(self, orders)

    monkeypatch.setattr(JobQueue, "start_many", killed_first)
    async with house.worker(heartbeat=3600.0, dead_after=36000.0):
        job = await house.reach(await house.enqueue("sleep", pidfile="/dev/null", value=600))

    assert job.state is State.KILLED


async def test_a_result_that_was_faster_than_the_kill_stands(house: House, tmp_path: Path) -> None:
    async with house.worker(grace=20.0):
        job_id = await house.enqueue("handle_term", pidfile=str(tmp_path / "pid"))
        await written(tmp_path / "pid")
        await house.queue.kill(job_id, by="me")
        job = await house.reach(job_id)

    assert (job.state, job.document["result"]) == (State.COMPLETE, "tidied up")


async def test_a_stopping_worker_lets_its_job_end(house: House, tmp_path: Path) -> None:
    async with house.worker(drain=30.0) as running:
        job_id = await house.enqueue("sleep", pidfile=str(tmp_path / "pid"), value=1)
        await written(tmp_path / "pid")
        running.stop.set()
        await running.task
        job = await house.queue.store.get(job_id)

    assert job.state is State.COMPLETE


@pytest.mark.parametrize("how", ["drain is over", "second signal"])
async def test_a_job_that_does_not_end_in_time_goes_back_uncharged(
    house: House, tmp_path: Path, how: str
) -> None:
    drain = 0.5 if how == "drain is over" else 60.0
    async with house.worker(drain=drain) as running:
        job_id = await house.enqueue("ignore_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        running.stop.set()
        if how == "second signal":
            running.halt.set()
        await running.task
        job = await house.queue.store.get(job_id)

        await gone(pid)
    assert (job.state, job.attempts_left, job.crashes, job.lease) == (State.PENDING, 1, 0, None)
    assert job.document["history"][-1]["reason"] == "the worker stops"
    assert (await house.registry.list())[0]["state"] == "down"


async def test_max_parallel_holds_per_worker(house: House) -> None:
    async with house.worker(slots=4):
        for _ in range(6):
            await house.enqueue("sleep", pidfile="/dev/null", value=0.2, options={"max_parallel": 2})
        most = 0

        async def look() -> bool:
            nonlocal most
            # Those that it claimed beyond the limit, and gives back, have no process.
            page = await house.queue.store.page({"locked.pid": {"$gt": 0}})
            most = max(most, page.total)
            return not await house.queue.store.counts()

        await eventually_async(look, 40)

    assert 0 < most <= 2


async def test_an_unknown_name_is_given_back_once(house: House) -> None:
    """A worker that met a name it does not know leaves its jobs to who knows them, and takes none again."""
    async with house.worker():
        first = await house.enqueue("answer", name="other.worker.Job")

        async def due_again() -> bool:
            job = await house.queue.store.get(first)
            return len(job.document["history"]) > 1 and bool(job.document.get("due"))

        await eventually_async(due_again)
        second = await house.enqueue("sleep", name="other.worker.Job", value=1)
        last = await house.enqueue("answer", value=1)
        await house.reach(last)
        jobs = [await house.queue.store.get(first), await house.queue.store.get(second)]

    reasons = [row["reason"] for job in jobs for row in job.document["history"] if row["reason"]]
    assert len(reasons) == 1
    assert "does not know other.worker.Job" in reasons[0]
    assert [(job.state, job.attempts_left, job.crashes) for job in jobs] == [(State.PENDING, 1, 0)] * 2


async def test_arguments_of_another_signature_are_released(house: House) -> None:
    async with house.worker():
        job_id = await house.enqueue("answer", misspelt=1)

        async def look() -> str:
            job = await house.queue.store.get(job_id)
            return str(job.document["history"][-1]["reason"] or "")

        reason = await eventually_async(look)

    assert "another signature" in reason
    assert "/misspelt" in reason


# ---------------------------------------------------------------------- leases


@pytest.mark.row("S37")
async def test_three_workers_run_each_job_once(house: House, tmp_path: Path) -> None:
    async with house.worker(worker_name="a"), house.worker(worker_name="b"), house.worker(worker_name="c"):
        ids = [await house.enqueue("answer", value=number) for number in range(30)]
        done = [await house.reach(job_id) for job_id in ids]

    assert {job.state for job in done} == {State.COMPLETE}
    assert {job.trial for job in done} == {1}
    for job in done:
        assert (await house.messages(job.id)).count("start execution") == 1


@pytest.mark.row("S36")
async def test_jobs_come_in_order_and_a_higher_priority_first(house: House) -> None:
    ids = [await house.enqueue("answer", value=number) for number in range(3)]
    urgent = await house.enqueue("answer", value="urgent", options={"priority": 5})
    async with house.worker(slots=1):
        done = [await house.reach(job_id) for job_id in (*ids, urgent)]

    order = sorted(done, key=lambda job: job.started_at or job.document["enqueued"]["at"])
    assert [job.id for job in order] == [urgent, *ids]


async def test_the_next_body_does_not_wait_for_the_last_end_to_be_stored(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot a second one runs meanwhile; a third only when one of those ends is stored."""
    async with house.worker(slots=1) as running:
        backend, stored = running.worker._backend, asyncio.Event()
        finish, ended = backend.finish, list[ObjectId]()

        async def finish_late(job: Job, outcome: Outcome, *, log_seq: int) -> Job:
            ended.append(job.id)
            await stored.wait()
            return await finish(job, outcome, log_seq=log_seq)

        monkeypatch.setattr(backend, "finish", finish_late)
        ids = [await house.enqueue("answer", value=number) for number in range(3)]

        async def two_ended() -> bool:
            return len(ended) == 2

        await eventually_async(two_ended, what="two bodies have ended")
        assert ended == ids[:2]
        states = [(await house.queue.store.get(job_id)).state for job_id in ids]
        assert states == [State.RUNNING, State.RUNNING, State.PENDING]
        stored.set()
        done = [await house.reach(job_id) for job_id in ids]

    assert {(job.state, job.trial) for job in done} == {(State.COMPLETE, 1)}


async def test_a_worker_that_holds_nothing_asks_seldom_what_it_holds(house: House) -> None:
    """But it finds what a claim has taken for it whose reply it never saw."""
    async with house.worker(heartbeat=0.05, dead_after=600.0, namespaces=("ELSEWHERE",)) as running:
        backend, calls = running.worker._backend, Counter[str]()

        def counted(name: str) -> None:
            call = getattr(backend, name)

            async def count(*args: Any, **named: Any) -> Any:
                calls[name] += 1
                return await call(*args, **named)

            setattr(backend, name, count)

        counted("beat")
        counted("running")
        await eventually_async(lambda: _at_least(calls, "beat", 4 * IDLE_BEATS), what="it has renewed often")
        assert calls["running"] <= 6
        job_id = await house.enqueue("answer", value=1)
        await house.queue.claims.claim(running.worker.owner, namespaces=["DEFAULT"])
        await house.reach(job_id, State.PENDING)
    assert (await house.queue.store.get(job_id)).trial == 0


async def _at_least(calls: Counter[str], name: str, most: int) -> bool:
    return calls[name] >= most


async def test_a_worker_that_was_declared_dead_gives_up_and_starts_over(house: House, tmp_path: Path) -> None:
    async with house.worker(dead_after=600.0) as running:
        job_id = await house.enqueue("ignore_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        (tmp_path / "pid").unlink()
        before = running.worker.owner
        await house.registry.bury(-60)  # everybody is late

        await gone(pid)

        async def look() -> bool:
            return running.worker.owner.id in await house.registry.alive_ids()

        await eventually_async(look, what="a new owner is registered")
        assert running.worker.owner.id != before.id
        job = await house.queue.store.get(job_id)
        assert (job.state, job.lease.owner if job.lease else None) == (State.RUNNING, before.id)
        await house.queue.rescue(house.registry.alive_ids)
        await written(tmp_path / "pid")
        job = await house.reach(job_id, State.RUNNING)
        assert job.lease is not None
        assert (job.lease.owner, job.crashes, job.trial) == (running.worker.owner.id, 1, 2)


async def test_a_worker_without_database_kills_its_jobs_by_its_own_clock(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.worker() as running:
        await house.enqueue("ignore_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        lost = running.worker.owner

        async def refuse(*args: Any, **kwargs: Any) -> bool:
            raise AutoReconnect("cut off")

        registry = running.worker._backend
        with monkeypatch.context() as cut:
            cut.setattr(registry, "beat", refuse)
            cut.setattr(registry, "register", refuse)
            await gone(pid)

        async def look() -> bool:
            owner = running.worker.owner
            return owner.id != lost.id and owner.id in await house.registry.alive_ids()

        await eventually_async(look, what="it comes back as another owner")


async def test_a_job_it_holds_but_does_not_run_is_released(house: House) -> None:
    """As after a claim whose reply was lost."""
    async with house.worker() as running:
        await house.queue.enqueue(JobOrder(name=NAME, args={"what": "answer"}, namespace="elsewhere"))
        (job,) = await house.queue.claims.claim(running.worker.owner, namespaces=["elsewhere"])

        async def look() -> Job:
            seen = await house.queue.store.get(job.id)
            assert seen.lease is None
            return seen

        seen = await eventually_async(look)

    assert (seen.state, seen.document["history"][-1]["reason"]) == (
        State.PENDING,
        "its worker does not run it",
    )


@pytest.mark.row("S37")
@pytest.mark.parametrize("what", ["reports_and_waits", "sleep"])
async def test_a_lost_lease_ends_the_job_and_writes_nothing(house: House, tmp_path: Path, what: str) -> None:
    async with house.worker():
        job_id = await house.enqueue(what, pidfile=str(tmp_path / "pid"), value=600)
        pid = await written(tmp_path / "pid")

        async def nobody() -> set[str]:
            return set()

        async def rescued() -> int:  # a progress report in between makes it look again
            return await house.queue.rescue(nobody)

        await eventually_async(rescued)
        await gone(pid)
        job = await house.queue.store.get(job_id)
    assert job.crashes == 1
    assert all(row["state"] in ("pending", "running") for row in job.document["history"])


async def test_the_jobs_of_a_dead_worker_are_run_by_another(house: House) -> None:
    ghost = Owner("ghost", "ghost@nowhere", "nowhere", 1)
    await house.registry.register(ghost, slots=1, namespaces=["DEFAULT"], jobs=[], version="0")
    job_id = await house.enqueue("answer", value=7)
    (claimed,) = await house.queue.claims.claim(ghost, namespaces=["DEFAULT"])
    await house.queue.start(claimed)
    async with house.worker():
        job = await house.reach(job_id)

    assert (job.state, job.crashes, job.trial) == (State.COMPLETE, 1, 2)
    assert "worker lost" in [row["reason"] for row in job.document["history"]]


# ---------------------------------------------------------------------- trouble


async def test_an_outage_of_the_database_loses_no_line_and_no_result(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tries of a write one is refused, one arrives without a reply, one succeeds."""

    def flaky(method: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        async def call(*args: Any, **kwargs: Any) -> Any:
            turn = next(calls) % 3
            if turn == 0:
                raise AutoReconnect("cut off")
            answer = await method(*args, **kwargs)
            if turn == 1:
                raise AutoReconnect("the reply is lost")
            return answer

        return call

    for owner, names in ((JobQueue, ("start", "progress", "finish")), (LogStore, ("append",))):
        for name in names:
            monkeypatch.setattr(owner, name, flaky(getattr(owner, name)))
    async with house.worker(dead_after=60.0):
        job_id = await house.enqueue("many_lines", value=500)
        job = await house.reach(job_id)

    assert (job.state, job.trial) == (State.COMPLETE, 1)
    assert await house.messages(job_id, "stdout") == [str(number) for number in range(500)]
    assert [row["state"] for row in job.document["history"]] == ["pending", "running", "complete"]


async def test_the_launcher_may_die_while_jobs_run(house: House, tmp_path: Path) -> None:
    async with house.worker() as running:
        job_id = await house.enqueue("handle_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        first = running.worker._launcher.pid
        os.kill(first, signal.SIGKILL)

        after = await house.reach(await house.enqueue("answer", value=1))
        os.kill(pid, signal.SIGTERM)
        job = await house.reach(job_id)

        # Until then processes that have waited for a job take what comes.
        async def replaced() -> bool:
            return running.worker._launcher.pid != first

        await eventually_async(replaced, what="another launcher is there")
    assert (job.state, job.trial, job.document["result"]) == (State.COMPLETE, 1, "tidied up")
    assert after.state is State.COMPLETE


async def test_a_launcher_that_was_stopped_is_replaced(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "START_TIMEOUT", 1.0)
    async with house.worker() as running:
        os.kill(running.worker._launcher.pid, signal.SIGSTOP)
        job = await house.reach(await house.enqueue("answer", value=1))

    assert job.state is State.COMPLETE


async def test_who_calls_nonsense_gets_an_answer(house: House) -> None:
    """Also if nobody foresaw what goes wrong: else it would wait for ever."""
    async with house.worker():
        job = await house.reach(await house.enqueue("calls_nonsense"))

    assert (job.state, job.document["result"]) == (State.COMPLETE, "broken")


async def test_a_job_that_stops_its_keeper_and_dies_has_crashed(house: House) -> None:
    """The keeper is woken again and again: its slot is not lost, and nobody has to kill it."""
    async with house.worker(slots=1):
        job = await house.reach(await house.enqueue("stop_its_keeper_and_die"))
        after = await house.reach(await house.enqueue("answer", value=1))

    assert (job.state, job.document["error_cat"]) == (State.ERROR, "CRASH")
    assert after.state is State.COMPLETE


async def test_a_job_that_stops_its_keeper_can_be_killed(house: House, tmp_path: Path) -> None:
    """Whoever hears first of what: it ends."""
    async with house.worker():
        job_id = await house.enqueue("stop_its_keeper", pidfile=str(tmp_path / "pid"))
        await written(tmp_path / "pid")
        await house.queue.kill(job_id, by="me")
        job = await house.reach(job_id)

    assert job.state in (State.KILLED, State.COMPLETE)


async def test_an_error_in_a_part_of_the_worker_stops_it_and_gives_its_jobs_back(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: JobQueue, ahead: float) -> float | None:
        raise RuntimeError("a mistake of ours")

    async with house.worker() as running:
        running.must_succeed = False
        job_id = await house.enqueue("ignore_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        monkeypatch.setattr(JobQueue, "due_in", broken)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await running.task

        await gone(pid)
        job = await house.queue.store.get(job_id)
    assert (job.state, job.attempts_left, job.crashes) == (State.PENDING, 1, 0)
    assert (await house.registry.list())[0]["state"] == "down"


@pytest.mark.parametrize("step", ["_begin", "_order", "_outcome"])
async def test_what_nobody_foresaw_of_a_job_ends_that_job(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """It is charged; the worker and its other jobs go on."""
    method = getattr(Execution, step)

    def broken(self: Execution, *args: Any) -> Any:
        if self.job.args.get("value") == "poison":
            raise TypeError("not JSON serializable")
        return method(self, *args)

    monkeypatch.setattr(Execution, step, broken)
    async with house.worker() as running:
        owner = running.worker.owner
        other = await house.enqueue("sleep", pidfile="/dev/null", value=1)
        job = await house.reach(
            await house.enqueue("answer", value="poison", options={"attempts": 2, "error_time": 0})
        )

        assert (job.state, job.trial, job.crashes, job.attempts_left) == (State.ERROR, 2, 0, 0)
        assert job.document["error_cat"] == "ERROR"
        assert "not JSON serializable" in job.document["last_error"]["exception"]
        assert (await house.reach(other)).state is State.COMPLETE
        assert running.worker.owner is owner
    told = [record for record in caplog.records if record.message == "job.unforeseen"]
    assert len(told) == 2
    assert all(record.exc_info for record in told)


async def test_a_job_that_nobody_can_end_keeps_no_other_from_running(house: House) -> None:
    """A hand in the database has broken what its retry is made of: it is tried again once a minute."""
    job_id = await house.enqueue("raises", options={"attempts": 2})
    await house.queue.store.queue.update_one({"_id": job_id}, {"$set": {"error_time": "soon"}})
    async with house.worker():

        async def look() -> str:
            return str((await house.queue.store.get(job_id)).document["history"][-1]["reason"] or "")

        assert "cannot be recorded" in await eventually_async(look)
        job = await house.queue.store.get(job_id)
        assert (job.state, job.document.get("due")) == (State.PENDING, None)
        assert (await house.reach(await house.enqueue("answer"))).state is State.COMPLETE


async def test_a_changed_file_is_loaded_again(house: House, tmp_path: Path) -> None:
    """Broken, mended and broken again, while another job goes on."""
    file = tmp_path / "edited.py"
    text = (
        "from core4 import CoreJob\nclass Edited(CoreJob):\n    author = 'tests'\n"
        "    def execute(self, what): return {version}\n"
    )
    file.write_text("1 / 0\n")
    async with house.worker(str(file), UNRULY, reload=True) as running:
        long = await house.enqueue("handle_term", pidfile=str(tmp_path / "pid"))
        pid = await written(tmp_path / "pid")
        for version in (1, 22):
            file.write_text(text.format(version=version))

            async def known() -> bool:
                serves: bool = "edited.Edited" in (await house.registry.up())[0]["jobs"]
                return serves

            await eventually_async(known, what="the mended file is served")

            async def answers(version: int = version) -> bool:
                job = await house.reach(await house.enqueue("x", name="edited.Edited"))
                result: bool = job.document["result"] == version
                return result

            await eventually_async(answers)
        file.write_text("1 / 0\n")

        async def told() -> bool:
            rows = await house.registry.up()
            return any("ZeroDivisionError" in text for text in rows[0].get("broken") or ())

        await eventually_async(told, what="the broken file is told of")
        assert await known()
        assert await answers(22)
        file.write_text(text.format(version=333))
        await eventually_async(lambda: answers(333))
        os.kill(pid, signal.SIGTERM)
        job = await house.reach(long)
        assert running.worker._loaded.problems == []
        assert (await house.registry.up())[0]["broken"] == []
    assert (job.state, job.trial) == (State.COMPLETE, 1)


async def test_what_a_rate_limit_holds_is_started_when_time_has_passed(house: House) -> None:
    """By upkeep, with nobody who asks for it."""
    options = {"rate_limit": "2/0.3s"}
    async with house.worker():
        ids = [await house.enqueue("answer", options=options) for _ in range(7)]
        for job_id in ids:
            assert (await house.reach(job_id)).state is State.COMPLETE
