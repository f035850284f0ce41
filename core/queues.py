"""The moves of a job, from enqueue to the journal.

Each is decided in `core4.transitions` and written by `core4.store` in one guarded update. What it asks for
in other documents is noted with it and settled by `core4.outbox`; who takes which job when is `core4.claims`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

from bson import ObjectId
from bson.errors import BSONError
from pymongo.errors import ConnectionFailure, DocumentTooLarge, WriteError

from core4 import chains, identifiers, jobs, transitions
from core4.claims import Claims
from core4.config import Settings
from core4.database import Database, Document, exactly, refuses_content
from core4.errors import Conflict, Core4Error, JobNotFound, LeaseLost, Unavailable
from core4.jobs import Job, JobOrder, utcnow
from core4.outbox import Outbox
from core4.results import unstorable
from core4.retries import Outcome
from core4.states import FINAL, Flag, State
from core4.store import RETRIES, JobStore, readable
from core4.transitions import Change

Action = Literal["kill", "restart", "remove"]
LATE = 100  # jobs at most that are looked at before those that are due are made so


class JobQueue:
    """All jobs: `store` reads them, `claims` hands them out, `outbox` settles them, the moves are here.

    All methods may be repeated after an error.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._settings = settings
        self.store = JobStore(database)
        self.outbox = Outbox(self.store)
        self.claims = Claims(self.store, self.outbox)

    async def enqueue(self, order: JobOrder, *, job_id: ObjectId | None = None, once: bool = False) -> Job:
        """Store a new job; it is never lost once this has returned.

        With `once` a job of this id that is in the queue or the journal is the answer: for ids that are
        derived from what the job is for. (Should it be journaled in just this moment, `start` finds it.)

        A job with `dependencies` is blocked until they have completed; if one does not, nor does it.

        Raises: JobExists if an open or stopped job has the same name and arguments; BadArguments for a
        dependency that is no job; Unavailable if the database did not answer and does not tell whether the
        job was stored (repeat with the same id).
        """
        if once and job_id is not None:
            found = await self.store.document(job_id)
            if found is not None:
                return Job.from_document(found[0], journal=found[1])
        waits = await self.outbox.wait_for(order.dependencies) if order.dependencies else []
        document = chains.document(order, job_id or ObjectId(), utcnow(), open_deps=waits)
        job = await self.store.insert(document)
        await self.outbox.try_settle(job)
        return job

    async def enqueue_many(self, orders: Sequence[JobOrder]) -> list[Job | Exception]:
        """`enqueue` for several in one round trip; what stood in the way of a job stands in its place.

        Those that wait for others by their ids go alone.
        """
        now, found = utcnow(), dict[int, Job | Exception]()
        documents = {
            number: chains.document(order, ObjectId(), now)
            for number, order in enumerate(orders)
            if not order.dependencies
        }
        if documents:
            jobs = await self.store.add_many(list(documents.values()))
            found.update(zip(documents, jobs, strict=True))
            await self.outbox.settle_many([job for job in jobs if isinstance(job, Job)])
        for number, order in enumerate(orders):
            if order.dependencies:
                try:
                    found[number] = await self.enqueue(order)
                except Exception as error:
                    found[number] = error
        return [found[number] for number in range(len(orders))]

    # ------------------------------------------------------------------ what a worker does

    async def start(self, job: Job, *, pid: int | None = None) -> Job:
        """Record that the attempt begins.

        Raises: LeaseLost if the job is no longer held under its lease, or has been finished before.
        """
        lease = transitions.lease_of(job)
        if await self.store.journal.find_one({"_id": job.id}, {"_id": 1}) is not None:
            # An id that is in the journal is done: this is a leftover of a move or a late insert.
            await self.store.queue.delete_one({"_id": job.id, "lease.id": exactly(lease.id)})
            raise LeaseLost(job.id, lease.id)

        return await self.store.held(job, lease, lambda seen: transitions.start(seen, lease, pid))

    async def start_many(self, orders: Sequence[tuple[Job, int]]) -> list[Job | Core4Error]:
        """`start` for several jobs and the processes they run in; the error of a job stands in its place."""
        ids = [job.id for job, _ in orders]
        done = await self.store.in_journal(ids)
        left = [job for job, _ in orders if job.id not in done]
        # Each under its own lease, whoever may hold the job by now.
        told = {job.id: (transitions.lease_of(job), pid) for job, pid in orders}
        found = await self.store.held_many(left, lambda seen: transitions.start(seen, *told[seen.id]))
        for job, pid in orders:
            if job.id in done:
                found[job.id] = await or_error(self.start(job, pid=pid))
        return [found[job_id] for job_id in ids]

    async def progress(self, job: Job, value: float | None, message: str | None) -> None:
        """Store how far the job is.

        Raises: LeaseLost.
        """
        lease = transitions.lease_of(job)
        text = None if message is None else transitions.clean(message)
        result = await self.store.queue.update_one(
            {"_id": job.id, "state": exactly(State.RUNNING.value), "lease.id": exactly(lease.id)},
            {
                "$set": {"prog.value": value, "prog.message": text, "locked.heartbeat": utcnow()},
                "$inc": {"rev": 1},
            },
        )
        if not result.matched_count:
            raise LeaseLost(job.id, lease.id)

    async def flag(self, job: Job, what: Flag, *, reason: str) -> Job:
        """Note once per job that it runs too long or is silent too long; it goes on.

        Nothing is written, and the lease not checked, if `job` has the note already.

        Raises: LeaseLost.
        """
        lease = transitions.lease_of(job)
        return await self.store.held(job, lease, lambda seen: transitions.flag(seen, lease, what, reason))

    async def finish(self, job: Job, outcome: Outcome, *, log_seq: int) -> Job:
        """Record how the attempt ended; `log_seq` is the number of its last log line.

        A repeated call after a lost reply finds its own record and returns it.

        Raises: LeaseLost if another attempt or a rescuer holds or has ended the job.
        """
        lease = transitions.lease_of(job)
        if why := unstorable(outcome.result):
            outcome = _unstorable(why)
        try:
            after = await self.store.held(
                job, lease, lambda seen: transitions.finish(seen, lease, outcome, log_seq)
            )
        except (BSONError, DocumentTooLarge, OverflowError, UnicodeError, WriteError) as error:
            # A full disk refuses the small one, too: then all of this is repeated.
            if isinstance(error, WriteError) and not refuses_content(error):
                raise
            small = _unstorable(str(error))
            after = await self.store.held(
                job, lease, lambda seen: transitions.finish(seen, lease, small, log_seq)
            )
        await self.outbox.try_settle(after)
        return after

    async def finish_many(self, ends: Sequence[tuple[Job, Outcome, int]]) -> list[Job | Core4Error]:
        """`finish` for several jobs, each with its outcome and the number of its last line.

        The error of a job stands in its place.
        """
        told = {job.id: (transitions.lease_of(job), outcome, log_seq) for job, outcome, log_seq in ends}
        alone = [job.id for job, outcome, _ in ends if unstorable(outcome.result)]

        def plan(seen: Job) -> Change | None:
            return transitions.finish(seen, *told[seen.id])

        wishes = [
            (job, change) for job, _, _ in ends if job.id not in alone and (change := _tried(plan, job))
        ]
        found: dict[ObjectId, Job | Core4Error] = {}
        if len(wishes) > 1:
            written = await self.store.cas_many(wishes)
            await self.outbox.settle_many(list(written.values()))
            found |= written
        # Should one of the others be written after all, that is found.
        left = [each for each in ends if each[0].id not in found]
        moves = [or_error(self.finish(job, outcome, log_seq=log_seq)) for job, outcome, log_seq in left]
        found |= {job.id: each for (job, _, _), each in zip(left, await asyncio.gather(*moves), strict=True)}
        return [found[job_id] for job_id in told]

    async def release(self, job: Job, *, reason: str, delay: float = 0.0, evicted: int = 0) -> Job:
        """Put a held job back in line, uncharged, due after `delay` seconds.

        `evicted` counts the hosts of inline jobs that it lost through no fault of its own.

        Raises: LeaseLost.
        """
        lease = transitions.lease_of(job)
        after = await self.store.held(
            job, lease, lambda seen: transitions.release(seen, lease, reason, delay, evicted)
        )
        await self.outbox.try_settle(after)
        return after

    # ------------------------------------------------------------------ what people ask for

    async def kill(self, job_id: ObjectId, *, by: str) -> tuple[Job, bool]:
        """End a job: at once if nobody runs it, else its worker is told to. Says whether that was news.

        Raises: JobNotFound; Conflict if the job has another outcome already.
        """
        before, after = await self.outbox.transition(job_id, lambda seen: transitions.kill(seen, by))
        await self.outbox.try_settle(after)
        return after, after.rev != before.rev

    async def kill_chain(self, job_id: ObjectId, *, by: str) -> list[tuple[Job, bool]]:
        """End all open jobs of the chain that a job belongs to; nothing follows from those that were faster.

        Returns each job that was told to end, and whether that was news.

        Raises: JobNotFound; Unavailable if the chain grows faster than it is ended: try again.
        """
        told: dict[ObjectId, tuple[Job, bool]] = {}
        for _ in range(RETRIES):
            # What waits first: nothing of it must be let loose by the end of the others.
            left = sorted(await self.open_chain(job_id), key=lambda job: job.state is State.RUNNING)
            if not left:
                return list(told.values())
            for job in left:
                with suppress(Conflict, JobNotFound):  # it ended in this moment: what follows comes next
                    before, after = await self.outbox.transition(
                        job.id,
                        lambda seen: None if seen.has_ended else transitions.kill(seen, by, chain=True),
                    )
                    await self.outbox.try_settle(after)
                    if not before.has_ended:
                        told[job.id] = after, after.rev != before.rev
        raise Unavailable(f"the chain of [{job_id}] is busy, try again")

    async def open_chain(self, job_id: ObjectId) -> list[Job]:
        """The jobs of this one's chain that may go on, or of which something may follow.

        Raises: JobNotFound.
        """
        first = await self.store.get(job_id)
        chain_id = first.document.get("chain_id") or first.id
        rows = await self.store.queue.find({"chain_id": chain_id}).to_list(None)
        rows += [row] if (row := await self.store.queue.find_one({"_id": chain_id, "chain_id": None})) else []
        found = [Job.from_document(row) for row in rows]
        return [
            job for job in found if (job.outbox if job.has_ended else not job.document.get("chain_killed"))
        ]

    async def remove(self, job_id: ObjectId, *, by: str) -> Job:
        """Move a job that does not run to the journal; one that is being killed follows when it has ended.

        Raises: JobNotFound if it is not in the queue; Conflict if it runs.
        """
        _, after = await self.outbox.transition(job_id, lambda seen: transitions.remove(seen, by))
        await self.outbox.try_settle(after)
        return after

    async def restart(self, job_id: ObjectId, *, by: str, hostname: str = "") -> ObjectId:
        """Run a job again: at once if it waits for a retry (same id), as a new job if it has ended.

        Twice while the new job is open gives the same new job. While a kill is under way the wish is
        stored, and the new job follows when the old one has ended.

        Raises: JobNotFound; Conflict if the job waits or runs; JobExists if another job has taken its place.
        """
        return (await self.restarted(job_id, by=by, hostname=hostname))[0]

    async def restarted(self, job_id: ObjectId, *, by: str, hostname: str = "") -> tuple[ObjectId, bool]:
        """`restart`, and whether that was news."""
        child_id: ObjectId | None = None

        async def plan(seen: Job) -> Change | None:
            nonlocal child_id
            child_id, change = await self._plan_restart(seen, by, hostname)
            return change

        before, after = await self.outbox.transition(job_id, plan)
        assert child_id is not None
        if after.state in FINAL and after.document.get("outbox"):
            await self.outbox.settle(after)
        return child_id, after.rev != before.rev

    async def _plan_restart(self, seen: Job, by: str, hostname: str) -> tuple[ObjectId, Change | None]:
        if seen.state in (State.FAILED, State.DEFERRED) and not seen.removed_at:
            return seen.id, transitions.retry_now(seen, by)
        transitions.require_ended(seen)
        wish = seen.state is State.RUNNING
        child_id: ObjectId | None = seen.document["enqueued"].get("child_id")
        if child_id is not None and (wish or await self._is_open(child_id, seen)):
            return child_id, None
        child_id = jobs.derived_id(seen.id, "restart", seen.document.get("restarts", 0))
        request_id = identifiers.request_id()
        return child_id, transitions.link(seen, child_id, by, hostname, wish=wish, request_id=request_id)

    async def _is_open(self, child_id: ObjectId, parent: Job) -> bool:
        found = await self.store.document(child_id)
        if found is None:  # noted, not yet made: that is still to come
            return any(note["kind"] == "restart" for note in parent.outbox)
        document, journaled = found
        return not journaled and document["state"] not in FINAL

    async def would(self, action: Action, job_id: ObjectId) -> tuple[Job, bool]:
        """The job as it is, and whether `action` would change it now. Writes nothing.

        Raises: what the action would, except JobExists of a restart, which only the try can tell.
        """
        seen = await self.store.get(job_id)
        if action == "kill":
            change = transitions.kill(seen, "")
        elif action == "remove":
            change = transitions.remove(seen, "")
        else:
            _, change = await self._plan_restart(seen, "", "")
        return seen, change is not None

    async def consume(self, job_id: ObjectId, *, by: str) -> Job:
        """Take the result of a job that has ended: the job as it was with it, for exactly one caller.

        Raises: JobNotFound; Conflict for a job that has not ended; ResultGone if somebody else has it;
        Unavailable if the database did not answer and does not tell whether the result was taken.
        """
        token = uuid.uuid4().hex  # of this call: it knows its own write by it, should the reply be lost
        taken: Job | None = None

        def plan(seen: Job) -> Change | None:
            nonlocal taken
            change = transitions.consume(seen, by, token)
            taken = seen if change is not None else taken
            return change

        for last in (False, True):
            try:
                await self.outbox.transition(job_id, plan)
                break
            except ConnectionFailure as error:
                if last:
                    raise Unavailable(
                        f"the database did not answer: the result of job [{job_id}] may or may not be taken",
                        job_id=str(job_id),
                    ) from error
        assert taken is not None
        return taken

    # ------------------------------------------------------------------ upkeep, by any worker

    async def promote(self) -> int:
        """Make due what has waited long enough; how many."""
        late = {"query_at": {"$lte": utcnow()}}
        # Somebody else may have done it just now: a look costs a server less than two updates of nothing.
        seen = await self.store.queue.find(late, {"worker": 1}).limit(LATE).to_list(None)
        kinds = {row.get("worker") is not None for row in seen} if len(seen) < LATE else {True, False}
        gone, done = {"$unset": {"query_at": 1}, "$inc": {"rev": 1}}, 0
        if False in kinds:
            free = await self.store.queue.update_many(
                {**late, "worker": None}, {"$set": {"due": True}, **gone}
            )
            done += free.modified_count
        if True in kinds:
            pinned = await self.store.queue.update_many({**late, "held": "worker"}, gone)
            done += pinned.modified_count
        return done

    async def due_in(self, ahead: float) -> float | None:
        """Seconds until the first of those that wait for their time is due; None if none will be `ahead`."""
        return await self._first_in("query_at", {"$lte": utcnow() + timedelta(seconds=ahead)})

    async def expires_in(self, ahead: float) -> float | None:
        """Seconds until the first window of a deferred job has passed; None if none will have `ahead`."""
        soon = {"$lte": utcnow() + timedelta(seconds=ahead), "$exists": True}
        return await self._first_in("expires", soon, state=State.DEFERRED.value)

    async def _first_in(self, field: str, soon: Document, **where: Any) -> float | None:
        found = self.store.queue.find({**where, field: soon}, {field: 1}).sort(field, 1).limit(1)
        for row in await found.to_list(None):
            return float((row[field] - utcnow()).total_seconds())
        return None

    async def expire(self, limit: int = 200) -> int:
        """End deferred jobs whose window has passed."""
        late = {"state": State.DEFERRED.value, "expires": {"$lte": utcnow(), "$exists": True}}
        rows = await self.store.queue.find(late).limit(limit).to_list(None)
        return sum(
            [await self.outbox.cas_and_settle(seen, transitions.expire(seen)) for seen in readable(rows)]
        )

    async def rescue(self, alive: Callable[[], Awaitable[Collection[str]]]) -> int:
        """Take running jobs away from owners that are not `alive`, and from nobody; returns how many.

        Whoever is alive is asked after the jobs were read: a worker that registered in between is in.
        """
        documents = await self.store.queue.find({"state": State.RUNNING.value}).to_list(None)
        if not documents:
            return 0
        owners = await alive()
        lost = [job for job in readable(documents) if job.lease is None or job.lease.owner not in owners]
        # A dead worker leaves as many as it had slots, and each of the living meets them in the same moment.
        wishes = [(job, self._rescue_of(job)) for job in lost]
        written = await self.store.cas_many(wishes) if len(wishes) > 1 else {}
        await self.outbox.settle_many(list(written.values()))
        left = [wish for wish in wishes if wish[0].id not in written]
        return len(written) + sum([await self.outbox.cas_and_settle(*wish) for wish in left])

    def _rescue_of(self, job: Job) -> Change:
        change = transitions.rescue(job, self._settings.max_crashes, self._settings.max_claims)
        return change if job.lease else replace(change, move="reclaim")


def _tried(plan: Callable[[Job], Change | None], job: Job) -> Change | None:
    try:
        return plan(job)
    except LeaseLost:
        return None


async def or_error(move: Awaitable[Job]) -> Job | Core4Error:
    """The job after its move, or what stood in the way of that, for a list of several."""
    try:
        return await move
    except (LeaseLost, Unavailable) as error:
        return error


def _unstorable(why: str) -> Outcome:
    return Outcome.failed(f"the result cannot be stored: {transitions.clean(why)[:500]}", [])
