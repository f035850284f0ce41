"""Two at once on one job: whatever falls between whose writes, it is as if one had come after the other.

One of the two is held before each of its writes in turn until the other one is done. What both were told and
what is stored then must be what one of the two orders gives when nothing is held.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import pytest

from core4 import faults, jobs
from core4.config import Settings
from core4.database import Database
from core4.errors import Core4Error
from core4.faults import Faults, Hit
from core4.jobs import Job, JobOrder, Owner, utcnow
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.store import JOURNAL, QUEUE

pytestmark = pytest.mark.asyncio

T = TypeVar("T")
numbers = itertools.count()


@dataclass
class Gate(Faults):
    """Holds its process before one write until it is opened; counts the writes."""

    at: int = 0
    at_function: str = ""
    writes: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def perform(self, hit: Hit, write: Callable[[], Awaitable[T]]) -> T:
        self.writes += 1
        if self.writes == self.at or hit.function == self.at_function:
            self.reached.set()
            await self.opened.wait()
        return await write()


@dataclass
class Subject:
    """One job in the middle of the race, and who holds or held it."""

    database: Database
    settings: Settings
    queue: JobQueue
    namespace: str
    holder: Owner
    job: Job
    handle: Job | None = None

    def through(self, gate: Gate) -> JobQueue:
        """A queue whose writes go through the gate."""
        with faults.armed(gate):
            return JobQueue(self.database, self.settings)


def owner() -> Owner:
    return Owner(uuid.uuid4().hex, "worker@here", "here", 1)


def order(namespace: str) -> JobOrder:
    options = {"attempts": 2, "error_time": 3600, "defer_time": 3600, "priority": 5}
    return JobOrder(
        name="tests.Job", args={"in": namespace}, namespace=namespace, options=options, username="ann"
    )


# ---------------------------------------------------------------------- where the race begins

Begin = Callable[[Subject], Awaitable[None]]


async def take(subject: Subject) -> Job:
    (job,) = await subject.queue.claims.claim(subject.holder, namespaces=[subject.namespace])
    subject.handle = await subject.queue.start(job)
    return subject.handle


async def raw(subject: Subject, **fields: Any) -> None:
    await subject.database.collection(QUEUE).update_one({"_id": subject.job.id}, {"$set": fields})


async def pending(subject: Subject) -> None:
    await subject.queue.release(await take(subject), reason="for a stale holder")


async def failed(subject: Subject) -> None:
    await subject.queue.finish(await take(subject), Outcome.failed("no", []), log_seq=0)
    await raw(subject, query_at=utcnow() - timedelta(seconds=1))


async def deferred(subject: Subject) -> None:
    await subject.queue.finish(await take(subject), Outcome.deferred("later"), log_seq=0)
    late = utcnow() - timedelta(seconds=1)
    await raw(subject, query_at=late, expires=late)


async def running(subject: Subject) -> None:
    await take(subject)


async def killing(subject: Subject) -> None:
    await running(subject)
    await subject.queue.kill(subject.job.id, by="ann")


async def killing_to_restart(subject: Subject) -> None:
    await killing(subject)
    await subject.queue.restart(subject.job.id, by="ann")


async def error(subject: Subject) -> None:
    await raw(subject, attempts_left=1)
    await subject.queue.finish(await take(subject), Outcome.failed("no", []), log_seq=0)


async def complete(subject: Subject) -> None:
    await subject.queue.finish(await take(subject), Outcome.complete(1), log_seq=0)


async def moving(subject: Subject) -> None:
    """Complete, and whoever wrote that has died before the first write of the move to the journal."""
    await take(subject)
    gate = Gate(at_function="move")
    ending = subject.through(gate).finish(holder(subject), Outcome.complete(1), log_seq=0)
    task = asyncio.create_task(ending)
    await gate.reached.wait()
    task.cancel()
    await asyncio.wait({task})


STATES: Mapping[str, Begin] = {
    "pending": pending,
    "failed": failed,
    "deferred": deferred,
    "running": running,
    "killing": killing,
    "killing-to-restart": killing_to_restart,
    "error": error,
    "complete": complete,
}

# ---------------------------------------------------------------------- who races

Op = Callable[[Subject, JobQueue], Awaitable[Any]]


def holder(subject: Subject) -> Job:
    assert subject.handle is not None
    return subject.handle


async def claim(subject: Subject, queue: JobQueue) -> Any:
    return len(await queue.claims.claim(owner(), namespaces=[subject.namespace]))


async def finish(subject: Subject, queue: JobQueue) -> Any:
    return (await queue.finish(holder(subject), Outcome.complete(2), log_seq=7)).state


async def fail(subject: Subject, queue: JobQueue) -> Any:
    return (await queue.finish(holder(subject), Outcome.failed("no", []), log_seq=7)).state


async def release(subject: Subject, queue: JobQueue) -> Any:
    return (await queue.release(holder(subject), reason="drained")).state


async def kill(subject: Subject, queue: JobQueue) -> Any:
    job, changed = await queue.kill(subject.job.id, by="ann")
    return job.state, changed


async def restart(subject: Subject, queue: JobQueue) -> Any:
    child = await queue.restart(subject.job.id, by="ann")
    return "same" if child == subject.job.id else "child"


async def remove(subject: Subject, queue: JobQueue) -> Any:
    return (await queue.remove(subject.job.id, by="ann")).state


async def expire(subject: Subject, queue: JobQueue) -> Any:
    return await queue.expire()


async def promote(subject: Subject, queue: JobQueue) -> Any:
    return await queue.promote()


async def rescue(subject: Subject, queue: JobQueue) -> Any:
    async def others() -> set[str]:
        documents = await subject.database.collection(QUEUE).find({"state": "running"}).to_list(None)
        return {document["lease"]["owner"] for document in documents} - {subject.holder.id}

    return await queue.rescue(others)


async def sweep(subject: Subject, queue: JobQueue) -> Any:
    await queue.outbox.sweep()  # how much it found to do depends on who was faster: no answer


async def pull(subject: Subject, queue: JobQueue) -> Any:
    job = await queue.consume(subject.job.id, by="bob")
    return f"{job.state} {job.document['result']}"


async def enqueue(subject: Subject, queue: JobQueue) -> Any:
    """A third party wants the same place."""
    await queue.enqueue(order(subject.namespace))


OPS: Mapping[str, Op] = {
    each.__name__: each
    for each in (
        claim,
        finish,
        fail,
        release,
        kill,
        restart,
        remove,
        expire,
        promote,
        rescue,
        sweep,
        pull,
        enqueue,
    )
}


# Upkeep and claims come again: if somebody writes between their look and their write they may leave it.
MAY_MISS = {"claim": "0", "expire": "0", "promote": "0", "rescue": "0", "sweep": "None"}

Answers = tuple[str, str, str]  # told to the one, told to the other, stored in the end
WRITES: dict[tuple[str, str], int] = {}  # of each operation, by where the race begins
PARTS = 3  # tests by which the races from one state are done: each stays far below its timeout


async def told(operation: Awaitable[Any]) -> str:
    """What the caller of an operation learns."""
    try:
        return f"{await operation!s}"
    except Core4Error as refused:
        return refused.code


# ---------------------------------------------------------------------- the race


class Track:
    """Makes subjects, races on them, and cleans up."""

    def __init__(self, database: Database, settings: Settings, state: str) -> None:
        self._database, self._settings, self._state = database, settings, state
        self._queue = JobQueue(database, settings)
        self._orders: dict[tuple[str, str], Answers] = {}
        self._begun: Subject | None = None
        self._stored: dict[str, list[dict[str, Any]]] = {}  # where the race begins, by collection

    async def subject(self) -> Subject:
        """One job in the state of this track; brought there once, and put back there for each race."""
        for name in (QUEUE, JOURNAL):
            await self._database.collection(name).delete_many({})
        if self._begun is None:
            return await self._begin()
        for name, documents in self._stored.items():
            await self._database.collection(name).insert_many(documents)
        return replace(self._begun)

    async def _begin(self) -> Subject:
        namespace = f"n{next(numbers)}"
        job = await self._queue.enqueue(order(namespace))
        subject = Subject(self._database, self._settings, self._queue, namespace, owner(), job)
        await {**STATES, "moving": moving}[self._state](subject)
        self._begun = replace(subject)
        for name in (QUEUE, JOURNAL):
            if documents := await self._database.collection(name).find({}).to_list(None):
                self._stored[name] = documents
        return subject

    async def alone(self, op: str) -> int:
        """How many writes an operation makes when nobody is in its way; always as many, so counted once."""
        if (self._state, op) not in WRITES:
            subject, gate = await self.subject(), Gate()
            await told(OPS[op](subject, subject.through(gate)))
            WRITES[self._state, op] = gate.writes
        return WRITES[self._state, op]

    async def solo(self, op: str) -> tuple[str, str]:
        """What one alone gives."""
        subject = await self.subject()
        return await told(OPS[op](subject, subject.queue)), await self.shape(subject)

    async def in_order(self, first: str, second: str) -> Answers:
        """What one after the other gives; always the same, so it is looked at once."""
        if (first, second) not in self._orders:
            self._orders[first, second] = await self._in_order(first, second)
        return self._orders[first, second]

    async def _in_order(self, first: str, second: str) -> Answers:
        subject = await self.subject()
        answer = await told(OPS[first](subject, subject.queue))
        return answer, await told(OPS[second](subject, subject.queue)), await self.shape(subject)

    async def held(self, slow: str, fast: str, at: int) -> Answers:
        """The fast one runs as a whole before the slow one's write number `at`."""
        return await self.held_on(await self.subject(), slow, fast, Gate(at=at))

    async def held_on(self, subject: Subject, slow: str, fast: str, gate: Gate) -> Answers:
        """The same, with a subject and a gate at hand."""
        task = asyncio.create_task(told(OPS[slow](subject, subject.through(gate))))
        await asyncio.wait({task, asyncio.create_task(gate.reached.wait())}, return_when="FIRST_COMPLETED")
        answer = await told(OPS[fast](subject, subject.queue))
        gate.opened.set()
        gate.reached.set()
        return await task, answer, await self.shape(subject)

    async def orders(self, slow: str, fast: str) -> list[Answers]:
        """What is legal: (told to slow, told to fast, stored) for one order and for the other."""
        legal = [await self.in_order(slow, fast), _turned(await self.in_order(fast, slow))]
        if slow in MAY_MISS:
            answer, shape = await self.solo(fast)
            legal.append((MAY_MISS[slow], answer, shape))
        return legal

    async def shape(self, subject: Subject) -> str:
        """All that is stored, without what differs from race to race."""
        # What is left half way is finished by the next sweep.
        await subject.queue.outbox.sweep()
        rows = []
        for name in (QUEUE, JOURNAL):
            for document in await self._database.collection(name).find({}).to_list(None):
                who = "job" if document["_id"] == subject.job.id else "other"
                rows.append(f"{who} in {name}: {_shape(document)}")
        return "\n".join(sorted(rows))


def _turned(answers: Answers) -> Answers:
    second, first, shape = answers
    return first, second, shape


def _shape(document: Mapping[str, Any]) -> str:
    shown = {
        "state": document["state"],
        "due": document.get("due"),
        "later": document.get("query_at") is not None,
        "key": document.get("unique_key") is not None,
        "held": document.get("lease") is not None,
        "killed": document["killed_at"] is not None,
        "removed": document["removed_at"] is not None,
        "child": document["enqueued"].get("child_id") is not None,
        "outbox": len(document.get("outbox", ())),
        "left": document["attempts_left"],
        "crashes": document["crashes"],
        "claims": document["claims"],
        "trial": document["trial"],
        "fence": document["fence"],
        "result": document["result"],
        "pulled": document.get("consumed") is not None,
        "states": [entry["state"] for entry in document["history"]],
    }
    return str(shown)


def _place_taken(slow: str, fast: str, found: Answers) -> bool:
    """No order gives this, and yet it is right: a third takes the place between a parent and its child.

    No update spans two documents. A restart that is still asked for is refused then; the child of one that
    was acknowledged before runs beside the third.
    """
    answer, _, shape = found
    if fast != "enqueue" or found[1] != "None":
        return False
    return (slow == "restart" and answer == "job_exists") or shape.count("other in") == 2


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("state", STATES)
async def test_held_at_each_write(
    state: str, part: int, database: Database, settings: Settings, queue: JobQueue
) -> None:
    """Any operation in the gap before any write of any other: as one after the other, and told so."""
    await race(Track(database, settings, state), pairs(list(OPS))[part::PARTS])


async def test_against_the_move_to_the_journal(
    database: Database, settings: Settings, queue: JobQueue
) -> None:
    """A restart, or another wish, in each gap of the move of a complete job; and the move in theirs."""
    track = Track(database, settings, "moving")
    assert await track.alone("sweep") == 2  # the copy and the delete: the gaps that this is about
    await race(track, pairs(["sweep", "restart", "remove", "kill", "enqueue"]))


def pairs(ops: Sequence[str]) -> list[tuple[str, str]]:
    """Each of the operations with each, itself included."""
    return list(itertools.combinations_with_replacement(ops, 2))


async def race(track: Track, pairs: Sequence[tuple[str, str]]) -> None:
    """The two of each pair against each other, in both roles."""
    wrong, races = [], 0
    # Both roles in one test: they are judged by the same two orders.
    for slow, fast in dict.fromkeys(both for pair in pairs for both in (pair, pair[::-1])):
        # Before the first write all is as it was: who has nothing to do then is not in a race.
        for at in range(1 if await track.alone(fast) else 2, await track.alone(slow) + 1):
            found, legal = await track.held(slow, fast, at), await track.orders(slow, fast)
            races += 1
            if found not in legal and not _place_taken(slow, fast, found):
                wrong.append(f"{slow} held at {at} by {fast}:\n{found}\n not one of\n{legal}")
    assert races > 0
    assert not wrong, f"{len(wrong)} of {races}\n" + "\n\n".join(wrong)


@pytest.mark.parametrize("end", ["finish", "fail", "release", "rescue"])
async def test_an_acknowledged_restart_survives_a_third(
    end: str, database: Database, settings: Settings, queue: JobQueue
) -> None:
    """Who takes the place between the end of a killed job and its child does not cost the child its life."""
    track = Track(database, settings, "killing-to-restart")
    subject = await track.subject()
    child = await queue.restart(subject.job.id, by="ann")  # the same answer as before
    await track.held_on(subject, end, "enqueue", Gate(at_function="insert"))

    parent = await queue.store.get(subject.job.id)
    assert parent.document["enqueued"]["child_id"] == child
    assert (await queue.store.get(child)).state == "pending"


@pytest.mark.parametrize("other", ["kill", "remove", "restart"])
async def test_nobody_else_is_told_of_a_third(
    other: str, database: Database, settings: Settings, queue: JobQueue
) -> None:
    """A restart that lost its place while it was half done: the kill of another user is told of the kill."""
    track = Track(database, settings, "error")
    subject = await track.subject()
    gate = Gate(at_function="insert")
    restarting = asyncio.create_task(told(restart(subject, subject.through(gate))))
    await gate.reached.wait()
    await enqueue(subject, subject.queue)
    answer = await told(OPS[other](subject, subject.queue))
    gate.opened.set()

    assert await restarting == "job_exists"
    assert answer == {"kill": "conflict", "remove": "error", "restart": "job_exists"}[other]


@pytest.mark.parametrize("op", ["kill", "remove", "restart"])
async def test_a_leftover_in_the_queue_is_nobodys_job(
    op: str, database: Database, settings: Settings, queue: JobQueue
) -> None:
    """An insert that lands when its job has long been done: who asks for something is told of the outcome."""
    track = Track(database, settings, "pending")
    subject = await track.subject()
    late = jobs.new_document(order(subject.namespace), subject.job.id, utcnow())
    (job,) = await queue.claims.claim(subject.holder, namespaces=[subject.namespace])
    await queue.finish(await queue.start(job), Outcome.complete(1), log_seq=0)
    await database.collection(QUEUE).insert_one(late)
    answer = await told(OPS[op](subject, queue))

    assert answer == {"kill": "conflict", "remove": "job_not_found", "restart": "child"}[op]
    assert await database.collection(QUEUE).find_one({"_id": subject.job.id}) is None
