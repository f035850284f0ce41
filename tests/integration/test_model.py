"""The queue on a real server against a model of it: every move, every refusal, in any order.

``CORE4_TEST_EXAMPLES`` asks for more examples than the suite has time for.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bson import ObjectId
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core4 import states, transitions
from core4.config import Settings
from core4.database import Database
from core4.errors import Conflict, Core4Error, JobExists, JobNotFound, LeaseLost, ResultGone
from core4.jobs import Job, JobOrder, Owner, derived_id, utcnow
from core4.queues import JobQueue
from core4.retention import Retention
from core4.retries import Outcome
from core4.sanity import flaws
from core4.states import FINAL, STOPPED, WAITING, Flag, State
from core4.store import JOURNAL, QUEUE
from tests.database import SmallDatabase

EXAMPLES = int(os.environ.get("CORE4_TEST_EXAMPLES", "60"))
# Hypothesis leaves rules out for whole examples: batches with other seeds until everything was reached.
BATCH, MOST_BATCHES = 30, max(20, EXAMPLES // 30)
ATTEMPTS, MAX_CRASHES, MAX_CLAIMS = 2, 2, 2
FLAGS: tuple[Flag, ...] = ("wall", "zombie")
MANY = 5  # open jobs at once; more say nothing new
OUTCOMES = {
    "complete": Outcome.complete({"n": 1}),
    "failed": Outcome.failed("no", []),
    "deferred": Outcome.deferred("later"),
    "killed": Outcome.killed("killed"),
}
picks = st.integers(0, 119)


@dataclass
class Row:
    """What the model knows of one job."""

    id: ObjectId
    key: str
    keep: bool
    priority: int
    state: State = State.PENDING
    due: bool = True
    later: bool = False  # waits for a time
    holds: bool = True  # its place: no other job of the same key
    lease: str | None = None
    owner: str | None = None
    killed: bool = False
    removed: bool = False
    journal: bool = False
    child: ObjectId | None = None
    wished: bool = False  # a restart that waits for the end of a kill
    restarts: int = 0
    attempts_left: int = ATTEMPTS
    crashes: int = 0
    claims: int = 0
    trial: int = 0
    flags: set[str] = field(default_factory=set)
    pulled: bool = False
    dependencies: list[ObjectId] = field(default_factory=list)
    waits: list[ObjectId] = field(default_factory=list)  # those that have not completed
    written: set[str] = field(default_factory=set)

    def shown(self) -> dict[str, Any]:
        """What has to be found in the database."""
        return {
            "state": self.state.value,
            "due": self.due,
            "later": self.later,
            "holds": self.holds,
            "lease": self.lease,
            "killed": self.killed,
            "removed": self.removed,
            "journal": self.journal,
            "child": self.child,
            "attempts_left": self.attempts_left,
            "crashes": self.crashes,
            "claims": self.claims,
            "trial": self.trial,
            "flags": self.flags,
            "pulled": self.pulled,
            "waits": self.waits,
        }

    @property
    def ended(self) -> bool:
        return self.state in FINAL or (self.removed and self.state is not State.RUNNING)

    @property
    def open(self) -> bool:
        return not self.journal and self.state not in FINAL


def stored(document: dict[str, Any], *, journal: bool) -> dict[str, Any]:
    """The same of a stored document."""
    return {
        "state": document["state"],
        "due": bool(document.get("due")),
        "later": document.get("query_at") is not None,
        "holds": "unique_key" in document and not journal,
        "lease": (document.get("lease") or {}).get("id"),
        "killed": document["killed_at"] is not None,
        "removed": document["removed_at"] is not None,
        "journal": journal,
        "child": document["enqueued"].get("child_id"),
        "attempts_left": document["attempts_left"],
        "crashes": document["crashes"],
        "claims": document["claims"],
        "trial": document["trial"],
        "flags": {flag for flag in FLAGS if document[f"{flag}_at"] is not None},
        "pulled": document.get("consumed") is not None,
        "waits": document.get("open_deps", []),
    }


MOVES: Counter[tuple[str, str, str]] = Counter()  # that were made; a wait for what is only promised counts


def counted(queue: JobQueue) -> JobQueue:
    """The queue, which notes its moves in `MOVES` from now on."""
    write = queue.store.cas

    async def noted(seen: Job, change: transitions.Change) -> Job | None:
        after = await write(seen, change)
        if after is not None:
            MOVES[change.move, seen.state.value, after.state.value] += 1
        return after

    queue.store.cas = noted  # type: ignore[method-assign]
    return queue


class QueueMachine(RuleBasedStateMachine):
    """Random operations on the queue and on the model; after each both say the same."""

    runner: ClassVar[asyncio.Runner]
    database: ClassVar[Database]
    queue: ClassVar[JobQueue]
    refused: ClassVar[Counter[tuple[str, str]]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.handles: list[Job] = []
        self.owners: list[Owner] = []
        self.touched: Row | None = None
        self.judged: dict[ObjectId, dict[str, Any]] = {}  # documents without a flaw

    def do(self, awaitable: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await awaitable

        return self.runner.run(run())

    def raw(self, *rows: Row, **fields: Any) -> None:
        """What time does to documents, at once."""
        if rows:
            where = {"_id": {"$in": [row.id for row in rows]}}
            self.do(self.database.collection(QUEUE).update_many(where, {"$set": fields}))

    def expect(
        self, op: str, state: str, error: type[Core4Error] | None, call: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Run `call`; it must be refused with `error`, or not at all."""
        if error is None:
            return self.do(call())
        self.refused[op, state] += 1
        with pytest.raises(error):
            self.do(call())
        return None

    def row(self, pick: int) -> Row:
        """Every other time the job that was touched last: what is interesting happens to one job."""
        if pick % 2 and self.touched is not None:
            return self.touched
        self.touched = self.rows[-1 - pick // 2 % min(len(self.rows), 2 * MANY)]
        return self.touched

    @initialize()
    def start_empty(self) -> None:
        self.do(self.emptied())
        self.owners = [self.new_owner(number) for number in range(2)]
        # Without a job nothing can happen, and hypothesis leaves a rule out for whole examples.
        for key in "abc":
            self.enqueue(key, key != "c", 0)

    async def emptied(self) -> None:
        tables = (self.database.collection(name) for name in (QUEUE, JOURNAL))
        await asyncio.gather(*(table.delete_many({}) for table in tables))

    def new_owner(self, number: int) -> Owner:
        return Owner(ObjectId().__str__(), f"worker{number}@here", "here", 1)

    # ------------------------------------------------------------------ people

    @precondition(lambda self: sum(row.open for row in self.rows) < MANY)
    @rule(key=st.sampled_from("abcd"), keep=st.booleans(), priority=st.integers(0, 1))
    def enqueue(self, key: str, keep: bool, priority: int) -> None:
        taken = any(row.key == key and row.holds for row in self.rows)
        order = JobOrder(
            name="tests.Job",
            args={"key": key},
            options={"attempts": ATTEMPTS, "priority": priority},
            keep_stopped=keep,
        )
        job = self.expect("enqueue", "taken", JobExists if taken else None, lambda: self.queue.enqueue(order))
        if job is not None:
            self.rows.append(Row(job.id, key, keep, priority))

    @precondition(lambda self: sum(row.open for row in self.rows) < MANY)
    @rule(key=st.sampled_from("abcd"), keep=st.booleans(), chosen=st.lists(picks, min_size=1, max_size=2))
    def enqueue_after(self, key: str, keep: bool, chosen: list[int]) -> None:
        """A job that waits for one or two others, whatever has become of them."""
        # The first may still complete, if there is such a one: else this one fails at once.
        left = [row for row in self.rows if row.open and not row.killed and not row.removed]
        first = left[chosen[0] % len(left)] if left else self.row(chosen[0])
        before = [first, *(self.row(pick) for pick in chosen[1:])]
        taken = any(row.key == key and row.holds for row in self.rows)
        order = JobOrder(
            name="tests.Job",
            args={"key": key},
            options={"attempts": ATTEMPTS},
            keep_stopped=keep,
            dependencies=[row.id for row in before],
        )
        job = self.expect("enqueue", "taken", JobExists if taken else None, lambda: self.queue.enqueue(order))
        if job is not None:
            self.touched = row = Row(job.id, key, keep, 0, dependencies=[each.id for each in before])
            self.rows.append(row)
            self.block(row)

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        row = self.row(pick)
        again = row.state is State.KILLED or (row.state is State.RUNNING and row.killed)
        refused = not again and (row.state in FINAL or row.removed)
        state = "removed" if row.removed else row.state.value
        told = self.expect(
            "kill", state, Conflict if refused else None, lambda: self.queue.kill(row.id, by="ann")
        )
        if refused:
            return
        assert told[1] is not again
        if again:
            return
        row.killed = True
        if row.state is not State.RUNNING:
            self.end(row, State.KILLED)

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def restart(self, pick: int) -> None:
        row = self.row(pick)
        wish = row.state is State.RUNNING and row.killed
        waits = row.state in (State.FAILED, State.DEFERRED) and not row.removed
        error: type[Core4Error] | None = None
        if not waits and row.state not in FINAL and not wish:
            error = Conflict
        child = next((each for each in self.rows if each.id == row.child), None)
        same = row.child is not None and (wish or (child is not None and child.open))
        makes = not waits and error is None and not wish and not same
        if makes and any(each.key == row.key and each.holds for each in self.rows if each is not row):
            error = JobExists
        state = "taken" if error is JobExists else "removed" if row.removed else row.state.value
        told = self.expect("restart", state, error, lambda: self.queue.restart(row.id, by="ann"))
        if error is Conflict:
            return
        if waits:
            assert told == row.id
            row.due, row.later = True, False
        elif same:
            assert told == row.child
        else:
            row.child = derived_id(row.id, "restart", row.restarts)
            row.restarts += 1
            row.wished = True
            assert told == (None if error else row.child)
            if not wish:
                row.holds = False
                self.settle(row)

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        row = self.row(pick)
        error: type[Core4Error] | None = None
        if row.journal or row.removed or row.state is State.COMPLETE:
            error = JobNotFound
        elif row.state is State.RUNNING and not row.killed:
            error = Conflict
        self.expect("remove", row.state.value, error, lambda: self.queue.remove(row.id, by="ann"))
        if error is None:
            row.removed = True
            if row.state is not State.RUNNING:
                row.due = row.later = row.holds = False
                row.waits = []
                self.settle(row)
                self.release_waiters(row)

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def consume(self, pick: int) -> None:
        row = self.row(pick)
        error = None if row.ended and not row.pulled else ResultGone if row.ended else Conflict
        self.expect("consume", row.state.value, error, lambda: self.queue.consume(row.id, by="ann"))
        row.pulled = row.pulled or row.ended

    @precondition(lambda self: self.rows)
    @rule(
        pick=picks, buttons=st.lists(st.sampled_from(("kill", "restart", "remove")), min_size=2, max_size=3)
    )
    def press(self, pick: int, buttons: list[str]) -> None:
        """Somebody who presses one button after the other."""
        self.row(pick)
        for button in buttons:
            getattr(self, button)(1)  # an odd number: the same job
            self.the_same()

    # ------------------------------------------------------------------ workers

    @rule(number=st.integers(0, 1), kind=st.sampled_from(sorted(OUTCOMES)))
    def work(self, number: int, kind: str) -> None:
        """What a worker does most of the time."""
        before = len(self.handles)
        self.claim(number)
        if len(self.handles) > before:
            self.start(1)
            self.finish(1, kind)

    @precondition(lambda self: any(row.waits for row in self.rows))
    @rule(number=st.integers(0, 1), times=st.integers(1, 3))
    def work_off(self, number: int, times: int) -> None:
        """What the blocked ones hope for."""
        for _ in range(times):
            self.work(number, "complete")
            self.the_same()

    @precondition(lambda self: any(row.waits for row in self.rows))
    @rule(button=st.sampled_from(("kill", "restart", "remove")))
    def press_blocked(self, button: str) -> None:
        self.touched = next(row for row in self.rows if row.waits)
        getattr(self, button)(1)

    def waits_for_running(self) -> list[tuple[Row, Row]]:
        """Blocked rows, each with one that it waits for and that somebody runs."""
        running = {row.id: row for row in self.rows if row.state is State.RUNNING}
        return [(row, running[each]) for row in self.rows for each in row.waits if each in running]

    @precondition(lambda self: self.waits_for_running())
    @rule()
    def press_both(self) -> None:
        """One that is blocked and what it waits for: both are killed, and told to run again."""
        blocked, running = self.waits_for_running()[0]
        for row, button in ((blocked, "kill"), (running, "kill"), (running, "restart"), (blocked, "restart")):
            self.touched = row
            getattr(self, button)(1)
            self.the_same()

    @rule(number=st.integers(0, 1))
    def exhaust(self, number: int) -> None:
        """A job that fails until nothing is left of its attempts, if no other gets between."""
        for _ in range(ATTEMPTS):
            self.work(number, "failed")
            self.promote()

    def is_stale(self, job: Job) -> bool:
        assert job.lease is not None
        return all(row.lease != job.lease.id for row in self.rows)

    @precondition(lambda self: any(map(self.is_stale, self.handles)))
    @rule(pick=picks)
    def come_late(self, pick: int) -> None:
        """Somebody who lost a job and does not know: all is refused."""
        stale = [job for job in self.handles if self.is_stale(job)]
        job = stale[-1 - pick % min(len(stale), 5)]
        state = next(row.state.value for row in self.rows if row.id == job.id)
        self.expect("start", state, LeaseLost, lambda: self.queue.start(job))
        self.expect("progress", state, LeaseLost, lambda: self.queue.progress(job, 0.5, "half"))
        self.expect("release", state, LeaseLost, lambda: self.queue.release(job, reason="late"))

    @rule(number=st.integers(0, 1))
    def claim(self, number: int) -> None:
        line = [row for row in self.rows if row.due]
        expected = min(line, key=lambda row: (-row.priority, self.rows.index(row))) if line else None
        jobs = self.do(self.queue.claims.claim(self.owners[number], namespaces=["DEFAULT"]))
        assert [job.id for job in jobs] == ([expected.id] if expected else [])
        if expected is not None:
            (job,) = jobs
            self.touched = expected
            self.handles.append(job)
            expected.state, expected.due, expected.later = State.RUNNING, False, False
            expected.lease, expected.owner = job.lease.id, job.lease.owner
            expected.claims += 1

    def handle(self, pick: int, op: str) -> tuple[Job, Row, str, type[Core4Error] | None]:
        """A job as somebody claimed it at some time, its row, and whether that still counts."""
        # Every other time the newest, else one of the next: older ones are stale in the same way.
        job = self.handles[-1 - (0 if pick % 2 else pick // 2 % min(len(self.handles), 5))]
        self.touched = row = next(row for row in self.rows if row.id == job.id)
        assert job.lease is not None
        lost = row.lease != job.lease.id
        if lost and op == "finish" and job.lease.id in row.written:
            lost = False
        return job, row, job.lease.id, LeaseLost if lost else None

    @precondition(lambda self: self.handles)
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        job, row, _, error = self.handle(pick, "start")
        self.expect("start", row.state.value, error, lambda: self.queue.start(job))
        if error is None and row.claims:
            row.claims = 0
            row.trial += 1

    @precondition(lambda self: self.handles)
    @rule(pick=picks)
    def progress(self, pick: int) -> None:
        job, row, _, error = self.handle(pick, "progress")
        self.expect("progress", row.state.value, error, lambda: self.queue.progress(job, 0.5, "half"))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, what=st.sampled_from(FLAGS))
    def flag(self, pick: int, what: Flag) -> None:
        job, row, _, error = self.handle(pick, "flag")
        if job.document[f"{what}_at"] is not None:  # the holder knows: nothing is written, nothing refused
            self.do(self.queue.flag(job, what, reason="late"))
            return
        self.expect("flag", row.state.value, error, lambda: self.queue.flag(job, what, reason="late"))
        if error is None:
            row.flags.add(what)

    @precondition(lambda self: self.handles)
    @rule(pick=picks, kind=st.sampled_from(sorted(OUTCOMES)))
    def finish(self, pick: int, kind: str) -> None:
        job, row, lease, error = self.handle(pick, "finish")
        self.expect(
            "finish",
            row.state.value,
            error,
            lambda: self.queue.finish(job, OUTCOMES[kind], log_seq=job.fence << 32),
        )
        if error is not None or lease in row.written:
            return
        row.written.add(lease)
        if kind == "complete":
            row.attempts_left = max(row.attempts_left - 1, 0)
            row.holds = False
            self.end(row, State.COMPLETE)
        elif kind == "killed" or row.killed:
            row.killed = True
            self.end(row, State.KILLED)
        elif kind == "deferred":
            self.wait(row, State.DEFERRED)
        else:
            row.attempts_left = max(row.attempts_left - 1, 0)
            if row.attempts_left:
                self.wait(row, State.FAILED)
            else:
                self.end(row, State.ERROR)

    @precondition(lambda self: self.handles)
    @rule(pick=picks, delay=st.sampled_from((0.0, 3600.0)))
    def release(self, pick: int, delay: float) -> None:
        job, row, lease, error = self.handle(pick, "release")
        self.expect(
            "release", row.state.value, error, lambda: self.queue.release(job, reason="enough", delay=delay)
        )
        if error is not None:
            return
        if row.killed:
            row.written.add(lease)
            self.end(row, State.KILLED)
        else:
            row.claims = max(row.claims - 1, 0)
            self.wait(row, State.PENDING, later=delay > 0)

    # ------------------------------------------------------------------ upkeep

    @rule()
    def promote(self) -> None:
        later = [row for row in self.rows if row.later]
        self.raw(*later, query_at=utcnow() - timedelta(seconds=1))
        for row in later:
            row.due, row.later = True, False
        self.do(self.queue.promote())

    @precondition(lambda self: any(row.state is State.DEFERRED and not row.journal for row in self.rows))
    @rule(pick=picks)
    def expire(self, pick: int) -> None:
        deferred = [row for row in self.rows if row.state is State.DEFERRED and not row.journal]
        row = deferred[pick % len(deferred)]
        self.raw(row, expires=utcnow() - timedelta(seconds=1))
        assert self.do(self.queue.expire()) == 1
        self.end(row, State.INACTIVE)

    @precondition(lambda self: any(row.state in STOPPED and not row.journal for row in self.rows))
    @rule(pick=picks)
    def retire(self, pick: int) -> None:
        stopped = [row for row in self.rows if row.state in STOPPED and not row.journal]
        row = stopped[pick % len(stopped)]
        before = utcnow() - timedelta(days=30)
        self.raw(row, stopped_at=before - timedelta(seconds=1))
        assert self.do(Retention(self.queue.store, self.queue.outbox).retire(before, 10)) == 1
        row.journal, row.holds = True, False

    @rule(number=st.integers(0, 1))
    def rescue(self, number: int) -> None:
        """A worker is dead; another one, with another id, takes its place."""
        dead = self.owners[number]
        self.owners[number] = self.new_owner(number)
        alive = {owner.id for owner in self.owners}

        async def ask() -> set[str]:
            return alive

        held = [row for row in self.rows if row.owner == dead.id]
        assert self.do(self.queue.rescue(ask)) == len(held)
        for row in held:
            self.crash(row)

    def crash(self, row: Row) -> None:
        if row.killed:
            return self.end(row, State.KILLED)
        ran = row.claims == 0
        row.crashes += ran
        if row.crashes < MAX_CRASHES and row.claims < MAX_CLAIMS:
            return self.wait(row, State.PENDING, later=ran)
        return self.end(row, State.ERROR)

    @rule()
    def sweep(self) -> None:
        """Nothing died half way: there is nothing to sweep."""
        assert self.do(self.queue.outbox.sweep()) == 0

    # ------------------------------------------------------------------ the model's own moves

    def wait(self, row: Row, state: State, *, later: bool = True) -> None:
        row.state, row.lease, row.owner = state, None, None
        row.later, row.due = later, not later

    def end(self, row: Row, state: State) -> None:
        row.state, row.lease, row.owner, row.due, row.later = state, None, None, False, False
        row.waits = []
        if row.wished and state is State.KILLED:
            row.holds = False
        self.settle(row)
        self.release_waiters(row)

    def settle(self, row: Row) -> None:
        if row.wished:
            row.wished = False
            if any(each.key == row.key and each.holds for each in self.rows):
                row.child = None
            else:
                child = Row(derived_id(row.id, "restart", row.restarts - 1), row.key, row.keep, row.priority)
                child.trial = row.trial
                child.dependencies = [self.newest(each) for each in row.dependencies]
                self.rows.append(child)
                if not row.trial:  # of one that has run all have completed
                    self.block(child)
        stays = row.keep and row.state is not State.COMPLETE and row.child is None
        if row.removed or (row.state in FINAL and not stays):
            row.journal, row.holds = True, False

    def block(self, row: Row) -> None:
        """A new job waits for what has not completed; what has ended it fails with.

        The child of a restart that waits for the end of a kill is waited for before it is made.
        """
        known = {each.id: each for each in self.rows}
        promised = {each.child for each in self.rows if each.wished}
        unique = dict.fromkeys(row.dependencies)
        row.waits = [each for each in unique if each not in known or known[each].state is not State.COMPLETE]
        if not row.waits:
            return
        row.state, row.due = State.BLOCKED, False
        assert {*row.waits} <= {*known, *promised}
        if not {*row.waits} <= {*known}:
            MOVES["promise", "", ""] += 1
        if any(each in known and known[each].ended for each in row.waits):
            self.end(row, State.ERROR)

    def release_waiters(self, ended: Row) -> None:
        """Whoever waits for it is freed, or fails with it."""
        for row in [row for row in self.rows if ended.id in row.waits]:
            if ended.state is not State.COMPLETE:
                self.end(row, State.ERROR)
                continue
            row.waits.remove(ended.id)
            if not row.waits:
                row.state, row.due = State.PENDING, True

    def newest(self, job_id: ObjectId) -> ObjectId:
        """The job, or the last of those that restarts have put in its place."""
        row = next((row for row in self.rows if row.id == job_id), None)
        return job_id if row is None or row.child is None else self.newest(row.child)

    # ------------------------------------------------------------------ what must hold

    async def everything(self) -> list[list[dict[str, Any]]]:
        """The documents of the queue and those of the journal, read at the same time."""
        tables = (self.database.collection(name) for name in (QUEUE, JOURNAL))
        return await asyncio.gather(*(table.find({}).to_list(None) for table in tables))

    @invariant()
    def the_same(self) -> None:
        """The database says what the model says; each job is in one place."""
        found: dict[ObjectId, dict[str, Any]] = {}
        for journal, documents in enumerate(self.do(self.everything())):
            for document in documents:
                assert document["_id"] not in found, "in queue and journal"
                assert not document.get("settle")
                assert not document.get("outbox") or document["state"] == "running"
                if document != self.judged.get(document["_id"]):
                    assert not flaws(Job.from_document(document, journal=bool(journal)))
                    self.judged[document["_id"]] = document
                found[document["_id"]] = stored(document, journal=bool(journal))
        assert found == {row.id: row.shown() for row in self.rows}


async def connected(url: str, name: str, home: Path) -> tuple[Database, JobQueue]:
    database = await SmallDatabase.connect(url, name)
    limits = Settings.load(
        environ={}, mongo_url=url, home=home, max_crashes=MAX_CRASHES, max_claims=MAX_CLAIMS
    )
    queue = counted(JobQueue(database, limits))
    await queue.store.prepare()
    return database, queue


def legal() -> set[str]:
    """Every move of the table that this machine can make."""
    # Progress is no compare-and-set, nothing is paused or limited, and nobody breaks what would have to be
    # mended.
    return set(states.MOVES) - {"progress", "put_aside", "take_slot", "wake", "mend", "reclaim"}


# What people and stale holders are told no for; each was seen often in one batch or another.
REFUSALS = {
    ("enqueue", "taken"),
    *(("kill", state) for state in ("complete", "error", "inactive", "removed")),
    *(("restart", state) for state in ("pending", "blocked", "running", "removed", "taken")),
    *(("remove", state) for state in ("running", "complete", "error", "killed")),
    *((op, state) for op in ("start", "progress", "release") for state in ("pending", "complete", "killed")),
    ("finish", "pending"),
}
FINISHED = {"complete", "failed", "error", "deferred", "killed"}


def missing() -> dict[str, set[Any]]:
    """What was not reached yet."""
    moves = MOVES
    return {
        "moves": (legal() | {"promise"}) - {move for move, _, _ in moves},
        "claims": {*WAITING} - {state for move, state, _ in moves if move == "claim"},
        "finishes": FINISHED - {state for move, _, state in moves if move == "finish"},
        "refusals": REFUSALS - set(QueueMachine.refused),
    }


@pytest.mark.timeout(900)  # a busy machine took eight minutes
def test_queue_and_model_agree(mongo_url: str, database_name: str, tmp_path: Path) -> None:
    """No sequence of operations tells them apart, and every move and refusal was among them."""
    with asyncio.Runner() as runner:
        database, queue = runner.run(connected(mongo_url, database_name, tmp_path))
        QueueMachine.runner, QueueMachine.database, QueueMachine.queue = runner, database, queue
        profile = settings(
            max_examples=BATCH,
            stateful_step_count=60,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        try:
            for number in range(MOST_BATCHES):
                if number * BATCH >= EXAMPLES and not any(missing().values()):
                    break
                run_state_machine_as_test(seed(number)(QueueMachine), settings=profile)
        finally:
            runner.run(database.drop())
            runner.run(database.close())

    assert {what: left for what, left in missing().items() if left} == {}
