"""What a change of one job asks for in other documents.

It is noted in the job's own document with the change (`outbox`, `settle`) and can be done by anyone, any
number of times: a child, a follower, word to those that wait for it, its end in a return queue, its move to
the journal.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bson import ObjectId
from pymongo import DeleteOne, ReplaceOne
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

from core4 import chains, transitions
from core4.database import Document, exactly, only_duplicates
from core4.errors import BadArguments, Conflict, JobExists, JobNotFound, Unavailable
from core4.events import audit_of
from core4.jobs import Job, utcnow
from core4.returns import record_of
from core4.states import FINAL, State
from core4.store import RETRIES, JobStore, readable
from core4.transitions import Change

log = logging.getLogger(__name__)

WAITERS = 200  # that are let loose at once


class Outbox:
    """Settles jobs. Whoever is about to write a job that is half way to the journal settles it first."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def transition(
        self, job_id: ObjectId, plan: Callable[[Job], Change | Awaitable[Change | None] | None]
    ) -> tuple[Job, Job]:
        """Read a job, let `plan` decide and write that, until nobody wrote in between: (before, after)."""
        for _ in range(RETRIES):
            before = await self._store.get(job_id)
            if before.rev == 1 and not before.journal:
                before = await self._without_leftover(before)
            if transitions.settles(before):
                # Half way to the journal: help it there, so that a document which is being copied
                # is never written.
                try:
                    await self.settle(before)
                except JobExists:
                    pass  # says something to whoever asked for that restart, and nothing here
                before = await self._store.get(job_id)
            decided = plan(before)
            change = decided if isinstance(decided, Change) or decided is None else await decided
            if change is None:
                return before, before
            after = await self._store.cas(before, change)
            if after is not None:
                return before, after
        raise Unavailable(f"job [{job_id}] is busy, try again")

    async def _without_leftover(self, fresh: Job) -> Job:
        """The journal's document if there is one: then this one is an insert that came late, and goes."""
        document = await self._store.journal.find_one({"_id": fresh.id})
        if document is None:
            return fresh
        await self._store.queue.delete_one({"_id": fresh.id, "rev": exactly(fresh.rev)})
        return Job.from_document(document, journal=True)

    async def cas_and_settle(self, seen: Job, change: Change) -> int:
        after = await self._store.cas(seen, change)
        if after is None:
            return 0
        await self.try_settle(after)
        return 1

    async def wait_for(self, dependencies: Sequence[ObjectId], *, missing: bool = False) -> list[ObjectId]:
        """Have the end of these jobs told to whoever waits for them; those that have not completed.

        Raises: BadArguments for an id that no job has or will have, unless they may be `missing`.
        """
        waits = []
        for index, job_id in enumerate(dependencies):
            try:
                _, job = await self.transition(job_id, transitions.wait_for)
            except JobNotFound:
                if missing or await self._is_promised(job_id):
                    waits.append(job_id)
                    continue
                problem = {"pointer": f"/dependencies/{index}", "message": f"no job has the id {job_id}"}
                raise BadArguments([problem]) from None
            if job.state is not State.COMPLETE and job_id not in waits:
                waits.append(job_id)
        return waits

    # ------------------------------------------------------------------ settling

    async def try_settle(self, job: Job) -> int:
        """Settle now if it can be done; if not, a sweep will."""
        if not transitions.settles(job):
            return 0
        try:
            await self.settle(job)
            return 1
        except JobExists:
            return 1
        except PyMongoError as error:
            log.warning("job.unsettled", extra={"job_id": str(job.id), "error": str(error)[:200]})
            return 0

    async def settle_many(self, jobs: Sequence[Job]) -> None:
        """`try_settle` for several; what is the same for many of them is done together."""
        settling = [job for job in jobs if transitions.settles(job)]
        done: set[ObjectId] = set()
        together = (
            (self.move_many, [job for job in settling if _only_moves(job)]),
            (self._hush_many, [job for job in settling if _only_hushes(job)]),
        )
        for settle, some in together:
            if len(some) < 2:
                continue
            try:
                done |= await settle(some)
            except PyMongoError as error:
                log.warning("job.unsettled", extra={"jobs": len(some), "error": str(error)[:200]})
                done |= {job.id for job in some}  # a sweep does it
        await asyncio.gather(*(self.try_settle(job) for job in settling if job.id not in done))

    async def settle(self, job: Job) -> None:
        """Do what is noted in the outbox, then move the job to the journal if it leaves the queue.

        What that makes ready to settle in turn is settled, too.
        """
        refused: JobExists | None = None
        waiting = deque([job])
        while waiting:
            each = waiting.popleft()
            try:
                waiting.extend(await self._settle_one(each))
            except JobExists as error:
                refused = error if each is job else refused
        if refused is not None:
            raise refused

    async def _settle_one(self, job: Job) -> list[Job]:
        """Settle one job; the others that it made ready for it."""
        refused: JobExists | None = None
        broken: list[ObjectId] = []  # promised children that are not to be
        ready: list[Job] = []
        delivered: list[Mapping[str, Any]] = []
        for _ in range(RETRIES):
            for note in transitions.deliverable(job):
                if note in delivered:
                    continue
                try:
                    ready += await self.deliver(job, note)
                except JobExists as error:
                    refused = error
                    broken.append(note["target"])
                delivered.append(note)
            caught_up = await self._catch_up(job)
            if caught_up is not job:
                job = caught_up
                continue
            settled: Job | None = job
            if job.outbox or not transitions.leaves(job):
                settled = await self._store.cas(job, transitions.settled(job, broken=broken))
            if settled is not None:
                if settled.outbox and transitions.settles(settled):
                    job = settled  # somebody may wait for the child that is taken back
                    continue
                if not settled.journal and transitions.leaves(settled):
                    await self.move(settled)
                break
            found = await self._store.document(job.id)
            if found is None or not found[0].get("settle"):
                break  # somebody else has done it
            job = Job.from_document(found[0], journal=found[1])
        if refused is not None:
            raise refused
        return ready

    async def deliver(self, job: Job, note: Mapping[str, Any]) -> list[Job]:
        """Do what one note says; it may have been done before. Returns the jobs that have to settle now."""
        match note["kind"]:
            case "restart":
                return await self.make_child(job, note)
            case "job":
                return await self._make_follower(job, note)
            case "release":
                # Of a promised child that is not to be there is nothing to tell.
                return await self._release_waiters(note["target"], job if note["target"] == job.id else None)
            case "post":
                await self._store.returns.put(record_of(job.document, note))
                return []
            case "hush":
                return await self._end_called(job, note["fence"])
        raise AssertionError(f"unknown kind of note: {note['kind']}")

    # ------------------------------------------------------------------ notes

    async def make_child(self, parent: Job, note: Mapping[str, Any]) -> list[Job]:
        """Insert the child of a restart; its id is derived, so that any number of tries makes one."""
        child_id = note["target"]
        if await self._store.journal.find_one({"_id": child_id}, {"_id": 1}) is not None:
            return await self._keep_promise(child_id)
        again = [await self._newest(each) for each in parent.document.get("dependencies", ())]
        order = chains.again(parent, note, again)
        # Of a job that has run all have completed; else what is gone will be found to be.
        waits = [] if parent.trial else await self.wait_for(again, missing=True)
        child = chains.document(order, child_id, utcnow(), open_deps=waits)
        child["trial"] = parent.trial
        try:
            job = await self._store.insert(child)
        except JobExists:
            if not note.get("promised"):
                raise
            # A third took the place between two updates. The child's id was given away long before:
            # it runs beside the third rather than not at all.
            del child["unique_key"]
            job = await self._store.insert(child)
        return [*([job] if job.document.get("settle") else []), *await self._keep_promise(child_id)]

    async def _keep_promise(self, child_id: ObjectId) -> list[Job]:
        """Have those that waited for this job before it was made told of its end: when it comes, or now."""
        if await self._store.queue.find_one({"open_deps": child_id}, {"_id": 1}) is None:
            return []
        _, child = await self.transition(child_id, transitions.wait_for)
        return await self._release_waiters(child_id, child) if child.has_ended else []

    async def _is_promised(self, job_id: ObjectId) -> bool:
        """True if the job is to take the place of another which has not ended, or has in this moment."""
        noted = {"outbox.target": job_id}
        tables = (
            (self._store.queue, {"$or": [{"state": State.RUNNING.value}, {"settle": True}], **noted}),
            (self._store.journal, {"settle": True, **noted}),
        )
        for table, where in tables:
            rows = await table.find(where, {"outbox": 1}).to_list(None)
            notes = [note for row in rows for note in row["outbox"]]
            if any(note["kind"] == "restart" and note["target"] == job_id for note in notes):
                return True
        return False

    async def _newest(self, job_id: ObjectId) -> ObjectId:
        """The job, or the last of those that restarts have put in its place."""
        for _ in range(RETRIES):
            found = await self._store.document(job_id)
            child_id = found[0]["enqueued"].get("child_id") if found else None
            if child_id is None:
                break
            job_id = child_id
        return job_id

    async def _make_follower(self, parent: Job, note: Mapping[str, Any]) -> list[Job]:
        """Insert a job that follows; its id is derived, so that any number of tries makes one."""
        if await self._store.journal.find_one({"_id": note["target"]}, {"_id": 1}) is not None:
            return []
        job = await self._store.insert(chains.follower(parent, note, utcnow()))
        return [job] if job.document.get("settle") else []

    async def _release_waiters(self, job_id: ObjectId, ended: Job | None) -> list[Job]:
        """Tell all that wait for this job how it ended, or (None) that it never will."""
        ready: list[Job] = []
        for _ in range(RETRIES):
            rows = await self._store.queue.find({"open_deps": job_id}).limit(WAITERS).to_list(None)
            waiting = list(readable(rows))
            if not waiting:
                return ready
            for seen in waiting:
                change = _told(seen, job_id, ended)
                after = await self._store.cas(seen, change) if change is not None else None
                ready += [after] if after is not None and after.document.get("settle") else []
        raise Unavailable(f"too many jobs wait for [{job_id}]")

    async def _end_called(self, caller: Job, fence: int) -> list[Job]:
        """End what the attempts of a job have called, up to that of `fence`; later ones are heard."""
        where = {
            "chain_id": caller.document.get("chain_id") or caller.id,
            "enqueued.parent_id": caller.id,
            "consumed.fence": {"$lte": fence},
        }
        ready: list[Job] = []
        for row in await self._store.queue.find(where, {"_id": 1}).to_list(None):
            with suppress(Conflict, JobNotFound):  # it has ended
                _, after = await self.transition(
                    row["_id"], lambda seen: transitions.kill(seen, f"job {caller.id}")
                )
                ready += [after] if transitions.settles(after) else []
        return ready

    async def _hush_many(self, jobs: Sequence[Job]) -> set[ObjectId]:
        """Settle those rescued jobs that have called nothing, which are most of them; their ids."""
        called = {
            "chain_id": {"$in": [job.document.get("chain_id") or job.id for job in jobs]},
            "enqueued.parent_id": {"$in": [job.id for job in jobs]},
            "consumed.fence": {"$exists": True},
        }
        rows = await self._store.queue.find(called, {"enqueued.parent_id": 1}).to_list(None)
        callers = {row["enqueued"]["parent_id"] for row in rows}
        quiet = [(job, transitions.settled(job)) for job in jobs if job.id not in callers]
        return set(await self._store.cas_many(quiet)) if quiet else set()

    async def _catch_up(self, job: Job) -> Job:
        """The blocked job after a look at its prerequisites: some may have ended before it was there."""
        if job.state is not State.BLOCKED or job.removed_at is not None:
            return job
        for prerequisite in job.document.get("open_deps", ()):
            other = await self._awaited(prerequisite)
            if other is None:
                if await self._is_promised(prerequisite):
                    continue  # whoever makes it finds who waits for it
                other = await self._awaited(prerequisite)  # it may have been made in between
            change = _told(job, prerequisite, other)
            if change is None:
                continue
            after = await self._store.cas(job, change)
            if after is None:
                return await self._store.get(job.id)
            job = after
        return job

    async def _awaited(self, job_id: ObjectId) -> Job | None:
        """The job, which tells its end; that could not be asked for while it was only promised."""
        found = await self._store.document(job_id)
        if found is None:
            return None
        job = Job.from_document(found[0], journal=found[1])
        if transitions.wait_for(job) is None:
            return job
        return (await self.transition(job_id, transitions.wait_for))[1]

    # ------------------------------------------------------------------ to the journal

    async def move(self, job: Job) -> None:
        """Copy to the journal, then delete exactly what was copied; repeatable by anyone at any point."""
        for _ in range(RETRIES):
            copy = _journaled(job)
            # No job leaves the queue before all that was done to it is told.
            await self._store.events.complete(audit_of(job.document))
            try:
                await self._store.journal.insert_one(copy)
            except DuplicateKeyError:
                # This revision or another: only an older one is replaced.
                await self._store.journal.replace_one({"_id": job.id, "rev": {"$lt": job.rev}}, copy)
            deleted = await self._store.queue.delete_one({"_id": job.id, "rev": exactly(job.rev)})
            if deleted.deleted_count:
                return
            document = await self._store.queue.find_one({"_id": job.id})
            if document is None:
                return
            job = Job.from_document(document)

    async def move_many(self, jobs: Sequence[Job]) -> set[ObjectId]:
        """`move` for several, each step for all of them at once; the ids of those that have moved, or none.

        Raises: PyMongoError.
        """
        await self._store.events.complete([line for job in jobs for line in audit_of(job.document)])
        copies = [_journaled(job) for job in jobs]
        try:
            await self._store.journal.insert_many(copies, ordered=False)
        except BulkWriteError as error:
            if not only_duplicates(error):
                raise
            older = [ReplaceOne({"_id": copy["_id"], "rev": {"$lt": copy["rev"]}}, copy) for copy in copies]
            await self._store.journal.bulk_write(older, ordered=False)
        # This revision of each, or a newer one, is in the journal now.
        copied = [DeleteOne({"_id": job.id, "rev": exactly(job.rev)}) for job in jobs]
        deleted = await self._store.queue.bulk_write(copied, ordered=False)
        # If one was not deleted, each is looked at alone: to move again does no harm.
        return {job.id for job in jobs} if deleted.deleted_count == len(jobs) else set()

    async def sweep(self, limit: int = 500) -> int:
        """Do what a dead process left undone: children not made, jobs not journaled, actions not told."""
        done = 0
        for table, journal in ((self._store.queue, False), (self._store.journal, True)):
            unsettled = await table.find({"settle": True}).limit(limit).to_list(None)
            for job in readable(unsettled, journal=journal):
                done += await self.try_settle(job)
            untold = await table.find({"audit": True}).limit(limit).to_list(None)
            for job in readable(untold, journal=journal):
                await self._store.try_tell(job)
        return done


def _only_moves(job: Job) -> bool:
    """True if nothing but the move to the journal is left to do for a job that has ended."""
    return job.has_ended and not job.outbox and not job.journal and transitions.leaves(job)


def _only_hushes(job: Job) -> bool:
    """True if nothing is left to do but to end what a rescued job has called."""
    noted = [note["kind"] for note in job.outbox]
    return noted == ["hush"] and not job.has_ended and not job.removed_at


def _journaled(job: Job) -> Document:
    """What of a job is kept in the journal."""
    gone = ("settle", "audit", "stopped_at", *transitions.LINE)
    copy = {key: value for key, value in job.document.items() if key not in gone}
    return {**copy, "journaled_at": utcnow()}


def _told(waiting: Job, prerequisite: ObjectId, other: Job | None) -> Change | None:
    """What becomes of a waiting job by what there is of a prerequisite; None if nothing yet."""
    if other is None:
        return transitions.prerequisite_failed(waiting, prerequisite, f"[{prerequisite}] is gone")
    if other.state is State.COMPLETE:
        return transitions.unblock(waiting, prerequisite)
    if not other.has_ended:
        return None
    how = f"ended as {other.state}" if other.state in FINAL else f"was removed while {other.state}"
    reason = (other.document.get("last_error") or {}).get("exception")
    why = f"{other.name} [{prerequisite}] {how}" + (f": {reason}" if reason else "")
    return transitions.prerequisite_failed(waiting, prerequisite, why)
