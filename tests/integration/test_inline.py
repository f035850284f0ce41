"""Inline jobs on a real worker with a real host process: together, apart in what they say, and in trouble."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from bson import ObjectId

from core4.changes import Change
from core4.claims import Claimed
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.states import State
from core4.worker.daemon import Worker
from tests.helpers import FAST, Command, eventually_async, program
from tests.integration.test_worker import House, gone, written

AWAITING = str(Path(__file__).parent.parent / "jobs" / "awaiting.py")
NAME = "tests.jobs.Shared"


class InlineHouse(House):
    """A house whose workers run inline jobs."""

    def inline(self, *targets: str, **settings: Any) -> Any:
        return self.worker(*(targets or (AWAITING,)), **{"slots": 20, "inline_block": 1.0, **settings})

    async def put(self, what: str, options: dict[str, Any] | None = None, **args: Any) -> ObjectId:
        return await self.enqueue(what, name=NAME, options={"max_parallel": None, **(options or {})}, **args)

    async def beats(self, times: int) -> None:
        """Wait until the worker has shown so often that it is alive."""
        seen: set[Any] = set()

        async def look() -> bool:
            seen.update([row["beat"] for row in await self.registry.up()])
            return len(seen) > times

        await eventually_async(look, what=f"{times} heartbeats")

    async def neighbour(self, tmp_path: Path) -> tuple[ObjectId, Path, int]:
        """A job that waits until the test writes a file; its id, that file, and its host's pid."""
        pidfile, gate = tmp_path / f"pid{os.urandom(4).hex()}", tmp_path / "gate"
        job_id = await self.put("waits", pidfile=str(pidfile), value=str(gate))
        return job_id, gate, await written(pidfile)


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> InlineHouse:
    return InlineHouse(database, settings, queue, logs, registry)


def runs(worker: Worker, job_id: ObjectId) -> bool:
    return any(each.job.id == job_id for each in worker._executions.values())


def reasons(job: Job) -> list[str]:
    return [entry["reason"] for entry in job.document["history"] if entry["reason"]]


# ---------------------------------------------------------------------- together


async def test_many_share_one_process_and_wait_for_one_another(house: InlineHouse, tmp_path: Path) -> None:
    """None of them could end if they did not all run at the same time."""
    async with house.inline(slots=25):
        ids = [await house.put("meets", pidfile=str(tmp_path), value=25) for _ in range(25)]
        jobs = [await house.reach(job_id) for job_id in ids]

    assert {job.state for job in jobs} == {State.COMPLETE}
    assert len({job.document["result"]["pid"] for job in jobs}) == 1


async def test_a_host_has_no_secret_and_no_driver(house: InlineHouse) -> None:
    async with house.inline() as running:
        where = (await house.reach(await house.put("where"))).document["result"]

    assert where["pid"] not in (os.getpid(), running.worker._launcher.pid)
    assert (where["modules"], where["environ"]) == ([], [])


async def test_each_log_has_what_its_job_says_and_nothing_else(house: InlineHouse) -> None:
    async with house.inline():
        ids = {me: await house.put("talks", value=me) for me in ("ann", "bob", "cid")}
        for job_id in ids.values():
            assert (await house.reach(job_id)).state is State.COMPLETE

    for me, job_id in ids.items():
        own = [*await house.messages(job_id)][1:-1]  # between start and done
        out, err = await house.messages(job_id, "stdout"), await house.messages(job_id, "stderr")
        said = [line for line in own if not line.startswith("progress [")]
        logged = [line for n in range(10) for line in (f"{me} log {n}", f"{me} library {n}")]
        assert said == [*logged, f"{me} thread"]
        assert [line.split(" - ")[1] for line in own if line.startswith("progress [")] == [
            f"{me} at {n}" for n in range(10)
        ]
        last = [f"{me} task True", f"{me} thread True", f"{me} bytes", f"{me} unterminated"]
        assert out == [*(f"{me} print {n}" for n in range(10)), *last]
        assert err == [line for n in range(10) for line in (f"{me} error {n}", f"{me} noise {n}")]


async def test_a_job_enqueues_defers_fails_and_exits(house: InlineHouse) -> None:
    async with house.inline():
        parent = await house.reach(await house.put("enqueues", value=5))
        child = await house.reach(ObjectId(parent.document["result"]))
        blocked = await house.reach(await house.put("enqueues_on_the_loop"))
        deferred = await house.reach(await house.put("defers", options={"defer_time": 60}), State.DEFERRED)
        failed = await house.reach(await house.put("raises"))
        softly = await house.reach(await house.put("exits_softly"))
        in_a_task = await house.reach(await house.put("exits_in_a_task"))

    assert (child.state, child.document["result"]) == (State.COMPLETE, 5)
    assert child.document["enqueued"]["parent_id"] == parent.id
    assert "await self.enqueue_async" in blocked.document["last_error"]["exception"]
    assert deferred.document["last_error"]["exception"] == "not yet"
    assert failed.document["last_error"]["exception"] == "RuntimeError('as told')"
    assert 'raise RuntimeError("as told")' in "".join(failed.document["last_error"]["traceback"])
    assert "held back" in await house.messages(failed.id)
    assert softly.document["last_error"]["exception"] == "SystemExit('that is it')"
    assert in_a_task.document["result"] == "SystemExit('that is it')"


async def test_the_caps_of_output_and_result_hold(house: InlineHouse) -> None:
    async with house.inline(log_cap=4096, result_cap=2000):
        talkers = [await house.put(what, value=5000) for what in ("prints", "floods")]
        boaster = await house.reach(await house.put("answer", value="x" * 3000))
        for job_id in talkers:
            assert (await house.reach(job_id)).state is State.COMPLETE
            texts = [row["message"] for row in await house.lines(job_id)]
            assert sum(text.startswith("output cut: ") for text in texts) == 1
            assert sum(map(len, texts)) < 80_000

    assert "over the limit of 2000" in boaster.document["last_error"]["exception"]


async def test_a_forked_child_has_no_voice_and_no_part_in_the_loop(house: InlineHouse) -> None:
    async with house.inline():
        job_id = await house.put("forks")
        job = await house.reach(job_id)

    assert job.document["result"] == "from the parent"
    assert "from the child" not in " ".join([row["message"] for row in await house.lines(job_id)][1:])


async def test_what_is_printed_below_python_is_in_the_workers_log(
    house: InlineHouse, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="core4.worker.host"):
        async with house.inline():
            job = await house.reach(await house.put("prints_below"))

    assert job.state is State.COMPLETE
    assert "from below" in [getattr(record, "line", None) for record in caplog.records]


async def test_what_a_job_leaves_behind_is_cancelled(house: InlineHouse) -> None:
    async with house.inline() as running:
        job = await house.reach(await house.put("leaves_a_task"))
        host = running.worker._hosts._current

        async def empty() -> bool:
            return host is not None and not host._jobs

        await eventually_async(empty, what="nothing is left on the host")
        assert host is not None
        assert host.usable

    assert job.document["result"] == "left"


async def test_what_cannot_be_cancelled_takes_the_host_with_it(house: InlineHouse, tmp_path: Path) -> None:
    """But not the result, which was reported before; and not the neighbours."""
    async with house.inline(grace=0.2):
        other, gate, _ = await house.neighbour(tmp_path)
        pidfile = tmp_path / "pid"
        job = await house.reach(await house.put("leaves_a_stubborn_task", pidfile=str(pidfile)))
        await gone(await written(pidfile))
        gate.touch()
        neighbour = await house.reach(other)

    assert (job.state, job.document["result"]) == (State.COMPLETE, "left")
    assert_spared(neighbour)


# ---------------------------------------------------------------------- ended on purpose


def assert_spared(job: Job, evicted: int = 1) -> None:
    """It lost its host, ran again inline, and was not charged."""
    assert job.state is State.COMPLETE, job.document["last_error"]
    assert (job.attempts_left, job.crashes, job.evicted) == (0, 0, evicted)
    assert job.trial >= 2
    assert any(reason.startswith("inline host ended") or "in a step" in reason for reason in reasons(job))


async def test_a_kill_of_one_leaves_the_others_alone(house: InlineHouse, tmp_path: Path) -> None:
    async with house.inline():
        other, gate, host = await house.neighbour(tmp_path)
        doomed, _, same = await house.neighbour(tmp_path)
        await house.queue.kill(doomed, by="me")
        killed = await house.reach(doomed)
        gate.touch()
        neighbour = await house.reach(other)

    assert host == same
    assert (killed.state, killed.trial) == (State.KILLED, 1)
    assert (neighbour.state, neighbour.trial, neighbour.document["result"]["pid"]) == (
        State.COMPLETE,
        1,
        host,
    )


@pytest.mark.parametrize("what", ["refuses", "spins"])
async def test_a_kill_of_one_that_does_not_end_spares_the_others(
    house: InlineHouse, tmp_path: Path, what: str
) -> None:
    async with house.inline(grace=0.5, inline_block=60):
        other, gate, host = await house.neighbour(tmp_path)
        pidfile = tmp_path / "pid"
        doomed = await house.put(what, pidfile=str(pidfile))
        await written(pidfile)
        await house.beats(3)
        await house.queue.kill(doomed, by="me")
        killed = await house.reach(doomed)
        gate.touch()
        neighbour = await house.reach(other)
        await gone(host)

    assert (killed.state, killed.trial) == (State.KILLED, 1)
    assert_spared(neighbour)
    assert neighbour.document["result"]["pid"] != host


@pytest.mark.parametrize("what", ["tidies_up", "spins"])
async def test_an_attempt_past_its_timeout_is_ended_as_failed(
    house: InlineHouse, tmp_path: Path, what: str
) -> None:
    """One that awaits, and one that never yields."""
    async with house.inline(grace=0.3, inline_block=60):
        other, gate, _ = await house.neighbour(tmp_path)
        options = {"timeout": 0.7, "attempts": 2, "error_time": 0.01}
        job = await house.reach(await house.put(what, options=options, pidfile=str(tmp_path / "pid")))
        gate.touch()
        neighbour = await house.reach(other)

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "TIMEOUT")
    assert job.document["last_error"]["exception"] == "timeout: it ran for more than 0.7 seconds"
    assert (neighbour.state, neighbour.attempts_left, neighbour.crashes) == (State.COMPLETE, 0, 0)
    assert neighbour.trial == (1 if what == "tidies_up" else 3)


# ---------------------------------------------------------------------- a loop that stands still


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("spins", "in spins"),
        ("holds_the_lock", "in holds_the_lock"),
        ("spins_in_a_callback", ""),
    ],
)
async def test_who_blocks_the_loop_is_charged_and_nobody_else(
    house: InlineHouse, tmp_path: Path, what: str, place: str
) -> None:
    """The worker sees it, without a timeout, and beats meanwhile: nobody is declared dead."""
    async with house.inline() as running:
        owner = running.worker.owner
        others = [await house.neighbour(tmp_path) for _ in range(3)]
        job = await house.reach(await house.put(what, pidfile=str(tmp_path / "pid")))
        others[0][1].touch()
        neighbours = [await house.reach(other) for other, _, _ in others]
        assert running.worker.owner is owner

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 1, "TIMEOUT")
    words = job.document["last_error"]["exception"]
    assert words.startswith("blocked: it kept the loop of all inline jobs for more than 1 seconds")
    assert place in words
    if place:
        assert "awaiting.py" in "".join(job.document["last_error"]["traceback"])
    for neighbour in neighbours:
        assert_spared(neighbour)
        assert f"inline host ended: job {job.id} blocked its loop" in reasons(neighbour)


# ---------------------------------------------------------------------- a host that dies


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("segfaults", "was ended by signal 11 (SIGSEGV) in a step of this job"),
        ("exits_hard", "ended with exit code 7"),
    ],
)
async def test_who_takes_the_host_down_is_charged_and_nobody_else(
    house: InlineHouse, tmp_path: Path, what: str, words: str
) -> None:
    async with house.inline():
        others = [await house.neighbour(tmp_path) for _ in range(2)]
        job = await house.reach(await house.put(what))
        others[0][1].touch()
        neighbours = [await house.reach(other) for other, _, _ in others]

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 1, "CRASH")
    assert words in job.document["last_error"]["exception"]
    if what == "segfaults":
        assert "in segfaults" in "".join(job.document["last_error"]["traceback"])
    for neighbour in neighbours:
        assert_spared(neighbour)


async def test_if_nobody_knows_who_it_was_each_runs_alone(house: InlineHouse, tmp_path: Path) -> None:
    """Then the guilty one is found out, and the others complete, uncharged."""
    async with house.inline():
        other, gate, host = await house.neighbour(tmp_path)
        job = await house.reach(await house.put("crashes_in_a_thread"))
        gate.touch()
        neighbour = await house.reach(other)

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "CRASH")
    assert "the job process ended with exit code 9" in job.document["last_error"]["exception"]
    assert (neighbour.state, neighbour.attempts_left, neighbour.trial) == (State.COMPLETE, 0, 2)
    assert neighbour.document["result"]["pid"] != host


async def test_who_makes_too_many_processes_is_found_out(house: InlineHouse, tmp_path: Path) -> None:
    """They are counted for the whole host; alone the job is seen, and its processes end with it."""
    async with house.inline(max_processes=10):
        other, gate, _ = await house.neighbour(tmp_path)
        job = await house.reach(await house.put("multiplies", value=30))
        gate.touch()
        neighbour = await house.reach(other)

    assert (job.state, job.trial, job.document["error_cat"]) == (State.ERROR, 2, "CRASH")
    assert re.fullmatch(r"processes: it had \d+, 10 are allowed", job.document["last_error"]["exception"])
    assert any(reason.startswith("inline host ended: it had") for reason in reasons(job))
    assert (neighbour.state, neighbour.attempts_left, neighbour.crashes) == (State.COMPLETE, 0, 0)


async def test_a_host_that_is_killed_from_outside_costs_nobody(house: InlineHouse, tmp_path: Path) -> None:
    async with house.inline():
        others = [await house.neighbour(tmp_path) for _ in range(3)]
        os.kill(others[0][2], signal.SIGKILL)
        others[0][1].touch()
        jobs = [await house.reach(other) for other, _, _ in others]
        after = await house.reach(await house.put("answer", value=1))

    assert {(job.state, job.attempts_left, job.crashes) for job in jobs} == {(State.COMPLETE, 0, 0)}
    assert after.state is State.COMPLETE


async def test_an_innocent_job_is_evicted_three_times_at_most(house: InlineHouse, tmp_path: Path) -> None:
    """Then it has a process of its own, where nobody else can end it."""
    async with house.inline():
        other, gate, _ = await house.neighbour(tmp_path)
        for trial in range(1, 4):

            async def again(trial: int = trial) -> bool:
                job = await house.queue.store.get(other)
                return job.trial == trial and job.claims == 0 and job.state is State.RUNNING

            await eventually_async(again, what=f"attempt {trial} runs")
            await house.reach(await house.put("exits_hard"))
        await eventually_async(lambda: runs_again(house, other, 4), what="attempt 4 runs")
        await house.reach(await house.put("exits_hard"))
        gate.touch()
        job = await house.reach(other)

    assert (job.state, job.trial, job.evicted) == (State.COMPLETE, 4, 3)


async def runs_again(house: InlineHouse, job_id: ObjectId, trial: int) -> bool:
    return (await house.queue.store.get(job_id)).trial == trial


# ---------------------------------------------------------------------- hostile


async def test_hostile_frames_end_in_a_clear_state(house: InlineHouse) -> None:
    async with house.inline():
        for value in ("\xff\xff\xff\xff", "\0\0\0\x02[]", '\0\0\0\x0b{"log": 1  }'):
            job = await house.reach(await house.put("sends", value=value))
            assert (job.state, job.document["error_cat"]) == (State.ERROR, "CRASH")
            assert "frame" in job.document["last_error"]["exception"]
        after = await house.reach(await house.put("answer", value=1))

    assert after.state is State.COMPLETE


async def test_only_the_first_end_counts(house: InlineHouse) -> None:
    async with house.inline():
        job = await house.reach(await house.put("ends_twice"))

    assert (job.state, job.document["result"]) == (State.COMPLETE, "forged")
    assert [entry["state"] for entry in job.document["history"]].count("complete") == 1


async def test_a_line_of_full_names_is_not_read_again_and_again(
    house: InlineHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nothing else stands in it and nothing comes: it is when there is room for another of the name."""
    async with house.inline(slots=4) as running:
        worker, claim, looks = running.worker, running.worker._backend.claim, list[int]()

        async def counted(*args: Any, **more: Any) -> Claimed:
            claimed: Claimed = await claim(*args, **more)
            looks.append(len(claimed))
            return claimed

        async def nothing_else() -> bool:
            return bool(worker._prospects._barren == {NAME})

        monkeypatch.setattr(worker._backend, "claim", counted)
        one = {"max_parallel": 1}
        pidfile, gate = tmp_path / "pid", tmp_path / "gate"
        first = await house.put("waits", one, pidfile=str(pidfile), value=str(gate))
        await written(pidfile)
        behind = [await house.put("answer", one) for _ in range(6)]
        await eventually_async(nothing_else, what="nothing else is in line")
        # What comes with another name runs beside, whatever stands before it.
        other = await house.reach(await house.enqueue("answer", name="tests.jobs.Awaiting"))
        await eventually_async(nothing_else, what="nothing else is in line")
        looks.clear()
        gate.touch()
        done = [await house.reach(job_id) for job_id in (first, *behind)]

    assert {job.state for job in (other, *done)} == {State.COMPLETE}
    starts = [job.started_at for job in done]
    assert starts == sorted(starts, key=str)
    assert [count for count in looks if count] == [1] * 6
    assert looks.count(0) <= 3, looks


async def test_what_comes_into_an_empty_line_is_not_read_there(
    house: InlineHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word of it brings all that its claim needs."""
    async with house.inline(slots=4, poll=100.0) as running:
        prospects, claims = running.worker._prospects, running.worker._backend._queue.claims
        peek, reads = claims._peek_namespace, list[Any]()

        async def counted(*args: Any) -> Any:
            reads.append(args)
            return await peek(*args)

        async def at_the_end() -> bool:
            return prospects._arrived is not None and not running.worker._holding.locked()

        monkeypatch.setattr(claims, "_peek_namespace", counted)
        await house.reach(await house.put("answer"))
        await eventually_async(at_the_end, what="the line is known to be empty")
        reads.clear()
        done = [await house.reach(await house.put("answer")) for _ in range(5)]

    assert {job.state for job in done} == {State.COMPLETE}
    assert not reads


async def test_what_comes_while_its_name_is_full_is_not_forgotten(house: InlineHouse, tmp_path: Path) -> None:
    """Nor if the last look at the line was before the name was full, as a caller took its slot back since."""
    other, one = "tests.jobs.Awaiting", {"max_parallel": 1}
    gate = str(tmp_path / "gate")
    waiting = [await house.put("waits", one, pidfile=str(tmp_path / f"pid{n}"), value=gate) for n in range(2)]
    # A look without a reason is far away.
    async with house.inline(slots=4, poll=100.0) as running:
        worker = running.worker

        async def nothing_beside(*names: str) -> bool:
            return bool(worker._prospects._barren == set(names))

        await eventually_async(lambda: nothing_beside(NAME), what="nothing else is in line")
        document = (await house.queue.store.get(waiting[0])).document
        caller = Job.from_document({**document, "_id": ObjectId(), "name": other})
        worker._slots.take(caller)
        behind = await house.enqueue("answer", name=other, options=one)
        await eventually_async(lambda: nothing_beside(NAME, other), what="it is left in line")
        assert (await house.queue.store.get(behind)).state is State.PENDING
        worker._slots.leave(caller)
        assert (await house.reach(behind)).state is State.COMPLETE
        Path(gate).touch()
        assert {(await house.reach(job_id)).state for job_id in waiting} == {State.COMPLETE}


async def test_the_next_attempt_may_begin_before_the_end_of_the_last_is_known_here(
    house: InlineHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply comes late: in the database the job is due again. Both are this worker's, and apart."""
    async with house.inline(slots=2) as running:
        worker, finish = running.worker, running.worker._backend.finish
        pidfile, gate = tmp_path / "pid", tmp_path / "gate"
        told = asyncio.Event()

        async def finish_late(job: Job, outcome: Outcome, *, log_seq: int) -> Job:
            ended: Job = await finish(job, outcome, log_seq=log_seq)
            if job.trial == 1:
                await told.wait()
            return ended

        async def gone() -> bool:
            return len(worker._executions) == 1

        monkeypatch.setattr(worker._backend, "finish", finish_late)
        again = {"attempts": 2, "error_time": 0}
        job_id = await house.put("waits_in_the_end", again, pidfile=str(pidfile), value=str(gate))
        await written(pidfile)
        assert len(worker._executions) == 2
        told.set()
        await eventually_async(gone, what="the first attempt is over")
        assert runs(worker, job_id)
        assert worker._slots.free == 1
        gate.touch()
        job = await house.reach(job_id)

    assert (job.state, job.trial, job.crashes) == (State.COMPLETE, 2, 0)
    assert (await house.messages(job_id)).count("start execution") == 2


# ---------------------------------------------------------------------- what begins with its claim


async def test_on_a_host_that_is_there_a_job_begins_with_its_claim(house: InlineHouse) -> None:
    """One write less; not a job that runs at most once: it must not have begun before its body can."""

    async def writes(options: dict[str, Any]) -> int:
        job = await house.reach(await house.put("answer", options))
        assert (job.state, job.trial) == (State.COMPLETE, 1)
        claimed, ended = (entry["rev"] for entry in job.document["history"][-2:])
        return int(ended - claimed)

    async with house.inline():
        assert await writes({}) == 2  # which starts the host
        assert await writes({}) == 1
        assert await writes({"max_crashes": 1}) == 2


async def test_who_was_frozen_after_a_claim_runs_no_body(
    house: InlineHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have the job by then."""
    # Its next heartbeat is far away.
    async with house.inline(heartbeat=100.0, dead_after=1000.0) as running:
        await house.reach(await house.put("answer"))
        worker, claim = running.worker, running.worker._backend.claim
        frozen: list[ObjectId] = []

        async def claim_late(*args: Any, **more: Any) -> Claimed:
            claimed: Claimed = await claim(*args, **more)
            if claimed and not frozen:
                frozen.extend(job.id for job in claimed)
                worker._renewed -= 1000  # what the clock shows to who wakes up
            return claimed

        monkeypatch.setattr(worker._backend, "claim", claim_late)
        lost = await house.put("answer", pidfile=str(tmp_path / "pid"))

        async def given_up() -> bool:
            return bool(frozen) and not runs(worker, lost)

        await eventually_async(given_up, what="the job is given up")
        worker._renewed += 1000
        worker._look.set()
        job = await house.reach(lost)

    assert frozen == [lost]
    assert (job.state, job.trial, job.crashes) == (State.COMPLETE, 2, 0)
    assert (await house.messages(lost)).count("start execution") == 1


async def test_a_kill_that_comes_with_the_claim_is_heard(
    house: InlineHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the worker knows that it has the job."""
    # Its next heartbeat, which comes with a look at what it holds, is far away.
    async with house.inline(heartbeat=100.0, dead_after=1000.0) as running:
        await house.reach(await house.put("answer"))
        worker, claim, hear = running.worker, running.worker._backend.claim, running.worker._watch.hear
        told = asyncio.Event()

        def overhear(change: Change) -> None:
            hear(change)
            if change.fields.get("killed_at") is not None:
                told.set()

        async def claim_and_kill(*args: Any, **more: Any) -> Claimed:
            claimed: Claimed = await claim(*args, **more)
            for job in claimed:
                await house.queue.kill(job.id, by="tests")
                await told.wait()
            return claimed

        monkeypatch.setattr(worker._watch, "hear", overhear)
        monkeypatch.setattr(worker._backend, "claim", claim_and_kill)
        job_id = await house.put("waits", pidfile=str(tmp_path / "pid"), value=str(tmp_path / "never"))
        job = await house.reach(job_id)

    assert job.state is State.KILLED


# ---------------------------------------------------------------------- the worker's own ends


async def test_a_worker_that_stops_gives_its_inline_jobs_back(house: InlineHouse, tmp_path: Path) -> None:
    async with house.inline(drain=0.2) as running:
        waiting, _, host = await house.neighbour(tmp_path)
        polite = await house.put("tidies_up", pidfile=str(tmp_path / "polite"))
        stubborn = await house.put("refuses", pidfile=str(tmp_path / "stubborn"))
        await written(tmp_path / "polite")
        await written(tmp_path / "stubborn")
        running.stop.set()
        async with asyncio.timeout(30):
            await running.task
        await gone(host)

    assert (await house.queue.store.get(polite)).document["result"] == "tidied up"
    for job_id in (waiting, stubborn):
        job = await house.queue.store.get(job_id)
        assert (job.state, job.attempts_left, job.crashes) == (State.PENDING, 1, 0)
        assert "the worker stops" in reasons(job)


async def test_a_lost_lease_ends_one_job_and_not_its_host(house: InlineHouse, tmp_path: Path) -> None:
    async with house.inline() as running:
        other, gate, host = await house.neighbour(tmp_path)
        lost, _, _ = await house.neighbour(tmp_path)
        held = await house.queue.store.get(lost)
        await house.database.collection("sys.queue").update_one(
            {"_id": lost}, {"$set": {"lease.id": "stolen", "lease.owner": "thief"}, "$inc": {"rev": 1}}
        )

        async def dropped() -> bool:
            return not runs(running.worker, lost)

        await eventually_async(dropped, what="the worker gives the lost job up")
        gate.touch()
        neighbour = await house.reach(other)
        after = await house.queue.store.get(lost)

    assert held.lease is not None
    assert (neighbour.state, neighbour.trial, neighbour.document["result"]["pid"]) == (
        State.COMPLETE,
        1,
        host,
    )
    assert (after.state, after.held_by("stolen")) == (State.RUNNING, True)


async def test_a_worker_that_cannot_renew_ends_its_host_at_once(house: InlineHouse, tmp_path: Path) -> None:
    async with house.inline() as running:
        job_id, gate, host = await house.neighbour(tmp_path)
        await running.worker._start_over(running.worker.owner, "told by a test", hand_back=True)
        await gone(host)
        gate.touch()
        job = await house.reach(job_id)

    assert (job.state, job.attempts_left, job.crashes) == (State.COMPLETE, 0, 0)


async def test_kill_9_of_the_worker_leaves_no_process(
    house: InlineHouse, mongo_url: str, database_name: str, tmp_path: Path
) -> None:
    environ = {**FAST, "CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}
    with Command([program("core4"), "worker", AWAITING], environ, cwd=tmp_path) as command:
        command.wait_for("ready")
        waiting, _, _ = await house.neighbour(tmp_path)
        spinning = await house.put("spins", pidfile=str(tmp_path / "pid"))
        await written(tmp_path / "pid")
        command.process.kill()
        command.wait()

        command.assert_nothing_left()
    await house.registry.bury(-60)
    await house.queue.rescue(house.registry.alive_ids)
    for job_id in (waiting, spinning):
        job = await house.queue.store.get(job_id)
        assert (job.state, job.crashes) == (State.PENDING, 1)


# ---------------------------------------------------------------------- reload


VERSION = """
import asyncio, os
from core4 import CoreJob
class Versioned(CoreJob):
    author = "me"
    inline = True
    async def execute(self, what, pidfile="", value=""):
        if pidfile:
            open(pidfile + ".part", "w").write(str(os.getpid()))
            os.rename(pidfile + ".part", pidfile)
        while value and not os.path.exists(value):
            await asyncio.sleep(0.02)
        return VERSION
VERSION = {version}
"""


async def test_new_code_gets_a_new_host_and_the_old_one_goes_on(house: InlineHouse, tmp_path: Path) -> None:
    file = tmp_path / "versioned.py"
    file.write_text(VERSION.format(version=1))
    async with house.inline(str(file), reload=True) as running:
        gate, pidfile = tmp_path / "gate", tmp_path / "pid"
        name = "versioned.Versioned"
        old = await house.enqueue("wait", name=name, pidfile=str(pidfile), value=str(gate))
        host = await written(pidfile)
        launcher = running.worker._launcher
        file.write_text(VERSION.format(version=22))

        async def reloaded() -> bool:
            return running.worker._launcher is not launcher

        await eventually_async(reloaded, what="the changed file is loaded")
        new = await house.reach(await house.enqueue("now", name=name))
        assert psutil.pid_exists(host)
        gate.touch()
        ended = await house.reach(old)
        await gone(host)

    assert (ended.document["result"], ended.trial, new.document["result"]) == (1, 1, 22)


async def test_a_module_with_threads_runs_its_inline_jobs_in_processes(
    house: InlineHouse, tmp_path: Path
) -> None:
    file = tmp_path / "threading_one.py"
    file.write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n" + VERSION.format(version=3)
    )
    async with house.inline(str(file)) as running:
        job = await house.reach(await house.enqueue("now", name="threading_one.Versioned"))
        assert running.worker._hosts._current is None

    assert (job.state, job.document["result"]) == (State.COMPLETE, 3)


async def test_limits_of_parallel_runs_hold(house: InlineHouse, tmp_path: Path) -> None:
    """max_parallel of a worker and max_running of all, as for processes."""
    async with house.inline():
        for options in ({"max_parallel": 1}, {"max_running": 1}):
            folder = tmp_path / next(iter(options))
            folder.mkdir()
            first = await house.put("meets", options=options, pidfile=str(folder), value=2)
            second = await house.put("meets", options=options, pidfile=str(folder), value=1)
            await eventually_async(partial(seen, folder), what="one of them runs")
            assert (await house.queue.store.get(second)).state is not State.COMPLETE
            (folder / "third").touch()
            assert (await house.reach(first)).state is State.COMPLETE
            assert (await house.reach(second)).state is State.COMPLETE


async def seen(folder: Path) -> bool:
    return bool(list(folder.iterdir()))


async def test_the_order_of_an_inline_job_has_no_memory_limit(house: InlineHouse) -> None:
    """One that has it all the same, from a time when it was not inline, gets a process."""
    async with house.inline() as running:
        job = await house.reach(await house.put("answer", value=1, options={"memory_limit": 2**33}))
        assert running.worker._hosts._current is None

    assert job.state is State.COMPLETE
