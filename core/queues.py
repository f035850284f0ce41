"""The queue and the journal: every write of a job document is made here.

A transition is one update of one document whose filter repeats the state, the revision and, for a
held job, the lease that the decision was based on. If somebody else wrote in between, nothing matches
and the decision is made again on what is there now. What needs a second document (a child, the copy
in the journal) is noted in the first one (`outbox`, `settle`) and can be repeated by anyone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal

import bson
from bson import ObjectId
from bson.errors import BSONError
from pymongo import IndexModel
from pymongo.errors import ConnectionFailure, DocumentTooLarge, DuplicateKeyError, PyMongoError, WriteError

from core4 import chains, identifiers, jobs, sanity, states, transitions
from core4.config import Settings
from core4.controls import Controls, RateStore, Starts
from core4.database import Database, Document, Page, refuses_content
from core4.errors import BadArguments, Conflict, JobExists, JobNotFound, LeaseLost, Unavailable
from core4.events import EventStore, audit_of
from core4.jobs import FORCED_BELOW, HISTORY_LIMIT, Job, JobOrder, Lease, Owner, utcnow
from core4.results import has_ended
from core4.retries import Outcome
from core4.states import FINAL, STOPPED, WAITING, Flag, State
from core4.transitions import Change

log = logging.getLogger(__name__)

QUEUE, JOURNAL = "sys.queue", "sys.journal"

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    QUEUE: (
        IndexModel(
            [("due", 1), ("namespace", 1), ("rank", 1)], name="claim", partialFilterExpression={"due": True}
        ),
        IndexModel([("state", 1), ("rank", 1)], name="state"),
        IndexModel(
            [("unique_key", 1)],
            name="unique_key",
            unique=True,
            partialFilterExpression={"unique_key": {"$exists": True}},
        ),
        # One holder of a slot at a time, whatever happens.
        IndexModel(
            [("slot", 1)], name="slot", unique=True, partialFilterExpression={"slot": {"$exists": True}}
        ),
        IndexModel(
            [("slot_key", 1), ("rank", 1)],
            name="slot_key",
            partialFilterExpression={"held": "max_running"},
        ),
        IndexModel([("name", 1), ("rank", 1)], name="rate", partialFilterExpression={"held": "rate_limit"}),
        # Fields that only few documents have: these indexes cost the others nothing.
        IndexModel([("held", 1)], name="held", sparse=True),
        IndexModel([("lease.owner", 1)], name="owner", sparse=True),
        IndexModel([("query_at", 1)], name="query_at", sparse=True),
        IndexModel([("expires", 1)], name="expires", sparse=True),
        IndexModel([("settle", 1)], name="settle", sparse=True),
        IndexModel([("request_id", 1)], name="request_id"),
        IndexModel([("audit", 1)], name="audit", sparse=True),
        IndexModel([("stopped_at", 1)], name="stopped_at", sparse=True),
        IndexModel([("open_deps", 1)], name="open_deps", sparse=True),
        IndexModel([("chain_id", 1)], name="chain_id", sparse=True),
    ),
    JOURNAL: (
        IndexModel([("name", 1), ("_id", 1)], name="name"),
        IndexModel([("request_id", 1)], name="request_id"),
        IndexModel([("state", 1), ("_id", 1)], name="state"),
        IndexModel([("settle", 1)], name="settle", sparse=True),
        IndexModel([("audit", 1)], name="audit", sparse=True),
        IndexModel([("journaled_at", 1)], name="journaled_at", sparse=True),
    ),
}

Action = Literal["kill", "restart", "remove"]

_NO_CONTROLS = Controls()
KEYED = timedelta(hours=24)  # that an Idempotency-Key holds at least
PEEK = 64  # candidates read at once where the server cannot limit a scan
WOKEN = 64  # jobs of a name read and woken at once
RETRIES = 100  # of one decision, if others keep writing the same job
WAITERS = 200  # that are let loose at once


class JobQueue:
    """The only writer of `sys.queue` and `sys.journal`. All methods may be repeated after an error."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._queue = database.collection(QUEUE)
        self._journal = database.collection(JOURNAL)
        self._rates = RateStore(database)
        self._events = EventStore(database)
        self._horizon: dict[str, int] = {}

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)
        await self._events.prepare()

    # ------------------------------------------------------------------ enqueue and read

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
            found = await self.document(job_id)
            if found is not None:
                return Job.from_document(found[0], journal=found[1])
        waits = await self._await(order.dependencies) if order.dependencies else []
        document = chains.document(order, job_id or ObjectId(), utcnow(), open_deps=waits)
        job = await self._insert(document)
        await self._try_settle(job)
        return job

    async def _await(self, dependencies: Sequence[ObjectId], *, missing: bool = False) -> list[ObjectId]:
        """Have the end of these jobs told to whoever waits for them; those that have not completed.

        Raises: BadArguments for an id that no job has, unless they may be `missing`.
        """
        waits = []
        for index, job_id in enumerate(dependencies):
            try:
                _, job = await self._transition(job_id, transitions.wait_for)
            except JobNotFound:
                if missing:
                    waits.append(job_id)
                    continue
                problem = {"pointer": f"/dependencies/{index}", "message": f"no job has the id {job_id}"}
                raise BadArguments([problem]) from None
            if job.state is not State.COMPLETE and job_id not in waits:
                waits.append(job_id)
        return waits

    async def document(self, job_id: ObjectId) -> tuple[Document, bool] | None:
        """The stored document of a job and whether it is the journal's; None if there is none."""
        queued = await self._queue.find_one({"_id": job_id})
        if queued is not None and not queued.get("settle"):
            return queued, False
        # It may be in both while it is moved: then the journal is right.
        journaled = await self._journal.find_one({"_id": job_id})
        if journaled is not None:
            return journaled, True
        return (queued, False) if queued is not None else None

    async def get(self, job_id: ObjectId) -> Job:
        """The job of this id, from the queue or the journal.

        Raises: JobNotFound.
        """
        found = await self.document(job_id)
        if found is None:
            raise JobNotFound(job_id)
        return Job.from_document(found[0], journal=found[1])

    async def page(
        self,
        where: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (("_id", 1),),
        page: int = 0,
        per_page: int = 10,
        journal: bool = False,
        fields: Sequence[str] | None = None,
        args_room: int | None = None,
    ) -> Page:
        """One page of documents; a negative `page` counts from the end. `where` is a trusted filter.

        Arguments that do not fit into `args_room` bytes any more are left out: `args` of such a row is None
        and `omitted` names it.
        """
        table = self._journal if journal else self._queue
        total = await table.count_documents(dict(where)) if where else await table.estimated_document_count()
        pages = -(-total // per_page)
        number = pages + page if page < 0 else page
        if number < 0 or number >= pages:
            return Page([], total, page, per_page)
        cursor = table.find(dict(where), list(fields) if fields else None)
        rows: list[Document] = []
        # One by one: what is left out must not be held together, either.
        async for row in cursor.sort(list(sort)).skip(number * per_page).limit(per_page):
            if args_room is not None and row.get("args"):
                size = len(bson.encode(row["args"]))
                if size > args_room:
                    row |= {"args": None, "omitted": ["args"]}
                else:
                    args_room -= size
            rows.append(row)
        return Page(rows, total, page, per_page)

    async def ids(self, where: Mapping[str, Any], *, limit: int, journal: bool = False) -> list[ObjectId]:
        """The first ids behind a trusted filter."""
        table = self._journal if journal else self._queue
        rows = await table.find(dict(where), {"_id": 1}).sort("_id", 1).limit(limit).to_list(None)
        return [row["_id"] for row in rows]

    async def count(self, where: Mapping[str, Any], *, journal: bool = False) -> int:
        """How many there are behind a trusted filter."""
        return await (self._journal if journal else self._queue).count_documents(dict(where))

    async def of_request(self, request_id: str, limit: int = 2) -> list[ObjectId]:
        """The ids of jobs that a request has made, at most `limit`."""
        where = {"request_id": request_id}
        queued = await self.ids(where, limit=limit)
        journaled = await self.ids(where, limit=limit, journal=True)
        return sorted({*queued, *journaled})[:limit]

    async def results(
        self, where: Mapping[str, Any], *, page: int, per_page: int, fields: Sequence[str]
    ) -> Page:
        """One page of ended jobs whose result nobody has pulled; those in the queue come first.

        `where` is a trusted filter.
        """
        ended = {"state": {"$in": sorted(FINAL)}, "consumed": None, **where}
        queued = await self._queue.count_documents(ended)
        total = queued + await self._journal.count_documents(ended)
        pages = -(-total // per_page)
        first = (pages + page if page < 0 else page) * per_page
        if not 0 <= first < total:
            return Page([], total, page, per_page)
        names = [*fields, "settle"]
        found = self._queue.find(ended, names).sort("_id", 1).skip(first).limit(per_page)
        rows = await self._not_journaled(await found.to_list(None))
        if len(rows) < per_page:
            here = {row["_id"] for row in rows}  # one of these may be moved in just this moment
            found = self._journal.find(ended, names).sort("_id", 1).skip(max(first - queued, 0))
            moved = await found.limit(per_page - len(rows)).to_list(None)
            rows += [row for row in moved if row["_id"] not in here]
        return Page(rows, total, page, per_page)

    async def _not_journaled(self, rows: Sequence[Document]) -> list[Document]:
        """Documents of the queue without what is in the journal already, where it is right."""
        moving = [row["_id"] for row in rows if row.get("settle")]
        if not moving:
            return list(rows)
        copied = await self._journal.find({"_id": {"$in": moving}}, {"_id": 1}).to_list(None)
        done = {row["_id"] for row in copied}
        return [row for row in rows if row["_id"] not in done]

    async def counts(self, where: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Number of jobs in the queue by state."""
        pipeline: list[Mapping[str, Any]] = [{"$match": dict(where)}] if where else []
        pipeline.append({"$group": {"_id": "$state", "n": {"$sum": 1}}})
        return {row["_id"]: row["n"] for row in await self._database.aggregate(QUEUE, pipeline)}

    async def journaled(self, where: Mapping[str, Any] | None = None) -> int:
        """Number of jobs in the journal."""
        if where:
            return await self._journal.count_documents(dict(where))
        return await self._journal.estimated_document_count()

    # ------------------------------------------------------------------ what a worker does

    async def claim(
        self,
        owner: Owner,
        *,
        namespaces: Sequence[str],
        limit: int = 1,
        full: Collection[str] = (),
        forced: bool = False,
        controls: Controls = _NO_CONTROLS,
    ) -> list[Job]:
        """Up to `limit` due jobs of `namespaces`, now held by `owner`, first in line first.

        `full` are names of jobs that this worker must not start now, `controls` is what operators hold
        back. With `forced` only jobs with force are taken: they are the first in rank, so the same index
        gives them.
        """
        where: Document = {"name": {"$nin": list(full)}} if full else {}
        if forced:
            where["rank"] = {"$lt": FORCED_BELOW}
        namespaces = controls.opened(namespaces)
        claimed: list[Job] = []
        again = True
        while again and not claimed:
            claimed, paused, again = await self._claim_some(owner, namespaces, where, limit, controls)
            for name in paused:
                await self.park(name)
        return claimed

    async def _claim_some(
        self, owner: Owner, namespaces: Sequence[str], where: Document, limit: int, controls: Controls
    ) -> tuple[list[Job], set[str], bool]:
        """Some due jobs, the paused names that were met, and whether others left the line."""
        closed: Document = {"namespace": {"$nin": controls.closed}} if controls.closed else {}
        pinned = await self._pinned(owner, {**where, **closed}, limit)
        if pinned or not self._database.find_and_modify:
            waiting = await self._peek(namespaces, where, limit + 8)
            candidates = sorted([*pinned, *waiting], key=lambda doc: doc["rank"])
            paused = {doc["name"] for doc in candidates if controls.of_name(doc["name"])}
            free = [doc for doc in candidates if doc["name"] not in paused]
            taken = [await self._admitted(job) for job in await self._take(owner, free, limit)]
            return [job for job in taken if job is not None], paused, bool(paused) or None in taken
        claimed: list[Job] = []
        while len(claimed) < limit:
            job = await self._find_and_claim(owner, namespaces, where)
            if job is None:
                break
            if controls.of_name(job.name):
                await self._put_aside(job, "paused")
                return claimed, {job.name}, True
            admitted = await self._admitted(job)
            claimed += [admitted] if admitted else []
        return claimed, set(), False

    async def _admitted(self, job: Job) -> Job | None:
        """The claimed job within its limits across all workers; None if it has left the line for them."""
        slots = job.slots()
        free = await self._free(slots)
        # Only a job that finds a slot uses up one of its starts.
        if (free or not slots) and not await self._within_rate(job):
            return None
        return await self._slotted(job, free) if slots else job

    async def _within_rate(self, job: Job) -> bool:
        """True if the job may be started now by its `rate_limit`; else it has left the line."""
        if job.rate_limit is None:
            return True
        free_at = await self._rates.take(job.name, job.rate_limit)
        if free_at is None:
            return True
        await self._put_aside(job, "rate_limit")
        await self._park_all(job, "rate_limit", name=job.name, rate_limit=job.document["rate_limit"])
        await self._rates.expect(job.name, free_at)
        return False

    async def _slotted(self, job: Job, free: Sequence[str]) -> Job | None:
        """The claimed job with one of the free slots of its `max_running`; None if all are taken."""
        lease = transitions.lease_of(job)
        for slot in free:
            try:
                return await self._held(job, lease, partial(transitions.take_slot, lease=lease, slot=slot))
            except DuplicateKeyError:
                continue  # somebody else was faster
            except LeaseLost:
                return None
        await self._put_aside(job, "max_running")
        key = job.document["slot_key"]
        await self._park_all(job, "max_running", slot_key=key)
        if await self._free(job.slots()):  # since then: whoever freed it may have found nobody to wake
            await self._wake(key)
        return None

    async def _park_all(self, job: Job, held: str, **same: Any) -> None:
        """Take all out of the line that stand in it for the same: each would be claimed to be put aside."""
        pinned: Document = {"held": "worker", "worker": job.worker, "query_at": None}
        line: Document = pinned if job.worker else {"due": True}
        await self._queue.update_many(
            {**line, **same}, {"$set": {"held": held}, "$unset": {"due": 1}, "$inc": {"rev": 1}}
        )

    async def _free(self, slots: Sequence[str]) -> list[str]:
        if not slots:
            return []
        rows = await self._queue.find({"slot": {"$in": list(slots), "$exists": True}}, {"slot": 1}).to_list(
            None
        )
        free = sorted(set(slots) - {row["slot"] for row in rows})
        random.shuffle(free)
        return free

    async def _wake(self, key: str) -> bool:
        """Put the first that waits for a slot of this key back in line, if there is a free one."""
        where = {"held": "max_running", "slot_key": key}
        for _ in range(RETRIES):
            found = await self._queue.find(where).sort("rank", 1).limit(1).to_list(None)
            if not found:
                return False
            first = Job.from_document(found[0])
            if not await self._free(first.slots()):
                return False
            if await self._cas(first, transitions.wake(first, "a slot is free")) is not None:
                return True
        return False

    async def _try_wake(self, key: str) -> None:
        """After a slot became free; if it cannot be done now, `wake_held` will."""
        try:
            await self._wake(key)
        except PyMongoError as error:
            log.warning("job.unwoken", extra={"slot_key": key, "error": str(error)[:200]})

    async def _put_aside(self, job: Job, held: str) -> None:
        lease = transitions.lease_of(job)
        with suppress(LeaseLost):  # then somebody else has it
            after = await self._held(job, lease, lambda seen: transitions.put_aside(seen, lease, held))
            await self._try_settle(after)

    async def start(self, job: Job, *, pid: int | None = None) -> Job:
        """Record that the attempt begins.

        Raises: LeaseLost if the job is no longer held under its lease, or has been finished before.
        """
        lease = transitions.lease_of(job)
        if await self._journal.find_one({"_id": job.id}, {"_id": 1}) is not None:
            # An id that is in the journal is done: this is a leftover of a move or a late insert.
            await self._queue.delete_one({"_id": job.id, "lease.id": lease.id})
            raise LeaseLost(job.id, lease.id)

        return await self._held(job, lease, lambda seen: transitions.start(seen, lease, pid))

    async def progress(self, job: Job, value: float | None, message: str | None) -> None:
        """Store how far the job is.

        Raises: LeaseLost.
        """
        lease = transitions.lease_of(job)
        text = None if message is None else transitions.clean(message)
        result = await self._queue.update_one(
            {"_id": job.id, "state": State.RUNNING.value, "lease.id": lease.id},
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
        return await self._held(job, lease, lambda seen: transitions.flag(seen, lease, what, reason))

    async def finish(self, job: Job, outcome: Outcome, *, log_seq: int) -> Job:
        """Record how the attempt ended; `log_seq` is the number of its last log line.

        A repeated call after a lost reply finds its own record and returns it.

        Raises: LeaseLost if another attempt or a rescuer holds or has ended the job.
        """
        lease = transitions.lease_of(job)
        if jobs.too_deep(outcome.result):
            outcome = _unstorable(f"nested deeper than {jobs.RESULT_DEPTH} levels")
        try:
            after = await self._held(
                job, lease, lambda seen: transitions.finish(seen, lease, outcome, log_seq)
            )
        except (BSONError, DocumentTooLarge, OverflowError, UnicodeError, WriteError) as error:
            # A full disk refuses the small one, too: then all of this is repeated.
            if isinstance(error, WriteError) and not refuses_content(error):
                raise
            small = _unstorable(str(error))
            after = await self._held(job, lease, lambda seen: transitions.finish(seen, lease, small, log_seq))
        await self._try_settle(after)
        return after

    async def release(self, job: Job, *, reason: str, delay: float = 0.0, evicted: int = 0) -> Job:
        """Put a held job back in line, uncharged, due after `delay` seconds.

        `evicted` counts the hosts of inline jobs that it lost through no fault of its own.

        Raises: LeaseLost.
        """
        lease = transitions.lease_of(job)
        after = await self._held(
            job, lease, lambda seen: transitions.release(seen, lease, reason, delay, evicted)
        )
        await self._try_settle(after)
        return after

    async def running(self, owner_id: str) -> list[Job]:
        """All jobs held by this owner."""
        documents = await self._queue.find({"lease.owner": owner_id}).to_list(None)
        return [Job.from_document(document) for document in documents]

    # ------------------------------------------------------------------ what people ask for

    async def kill(self, job_id: ObjectId, *, by: str) -> tuple[Job, bool]:
        """End a job: at once if nobody runs it, else its worker is told to. Says whether that was news.

        Raises: JobNotFound; Conflict if the job has another outcome already.
        """
        before, after = await self._transition(job_id, lambda seen: transitions.kill(seen, by))
        await self._try_settle(after)
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
                    before, after = await self._transition(
                        job.id,
                        lambda seen: None if seen.has_ended else transitions.kill(seen, by, chain=True),
                    )
                    await self._try_settle(after)
                    if not before.has_ended:
                        told[job.id] = after, after.rev != before.rev
        raise Unavailable(f"the chain of [{job_id}] is busy, try again")

    async def open_chain(self, job_id: ObjectId) -> list[Job]:
        """The jobs of this one's chain that may go on, or of which something may follow.

        Raises: JobNotFound.
        """
        first = await self.get(job_id)
        chain_id = first.document.get("chain_id") or first.id
        rows = await self._queue.find({"chain_id": chain_id}).to_list(None)
        rows += [row] if (row := await self._queue.find_one({"_id": chain_id, "chain_id": None})) else []
        found = [Job.from_document(row) for row in rows]
        return [
            job for job in found if (job.outbox if job.has_ended else not job.document.get("chain_killed"))
        ]

    async def remove(self, job_id: ObjectId, *, by: str) -> Job:
        """Move a job that does not run to the journal; one that is being killed follows when it has ended.

        Raises: JobNotFound if it is not in the queue; Conflict if it runs.
        """
        _, after = await self._transition(job_id, lambda seen: transitions.remove(seen, by))
        await self._try_settle(after)
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

        before, after = await self._transition(job_id, plan)
        assert child_id is not None
        if after.state in FINAL and after.document.get("outbox"):
            await self._settle(after)
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

    async def would(self, action: Action, job_id: ObjectId) -> tuple[Job, bool]:
        """The job as it is, and whether `action` would change it now. Writes nothing.

        Raises: what the action would, except JobExists of a restart, which only the try can tell.
        """
        seen = await self.get(job_id)
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
                await self._transition(job_id, plan)
                break
            except ConnectionFailure as error:
                if last:
                    raise Unavailable(
                        f"the database did not answer: the result of job [{job_id}] may or may not be taken",
                        job_id=str(job_id),
                    ) from error
        assert taken is not None
        return taken

    # ------------------------------------------------------------------ pauses

    async def park(self, name: str) -> int:
        """Take the jobs of a paused name out of the line, so that they are in nobody's way."""
        update: Document = {"$set": {"held": "paused"}, "$unset": {"due": 1}, "$inc": {"rev": 1}}
        free = await self._queue.update_many({"due": True, "name": name}, update)
        pinned = await self._queue.update_many({"held": "worker", "query_at": None, "name": name}, update)
        return free.modified_count + pinned.modified_count

    async def unpark(self, controls: Controls) -> int:
        """Put back in line what was parked and is not paused any more; any worker may repeat it."""
        parked = [{"$match": {"held": "paused"}}, {"$group": {"_id": "$name"}}]
        names = [row["_id"] for row in await self._database.aggregate(QUEUE, parked)]
        done = 0
        for name in names:
            if controls.of_name(name):
                continue
            where: Document = {"held": "paused", "name": name}
            free = await self._queue.update_many(
                {**where, "worker": None}, {"$set": {"due": True}, "$unset": {"held": 1}, "$inc": {"rev": 1}}
            )
            pinned = await self._queue.update_many(
                {**where, "worker": {"$ne": None}}, {"$set": {"held": "worker"}, "$inc": {"rev": 1}}
            )
            done += free.modified_count + pinned.modified_count
        return done

    async def load(self) -> tuple[list[Document], list[Document]]:
        """How many jobs run, and how many wait: rows of `name`, `namespace`, `worker` and `n`.

        `worker` is who runs them; of waiting ones who may, if that is only one.
        """
        running = await self._grouped([State.RUNNING], "$locked.worker")
        return running, await self._grouped(sorted(WAITING), "$worker")

    async def _grouped(self, found: Sequence[State], worker: str) -> list[Document]:
        by = {"name": "$name", "namespace": "$namespace", "worker": worker}
        pipeline: list[Mapping[str, Any]] = [
            {"$match": {"state": {"$in": [state.value for state in found]}}},
            {"$group": {"_id": by, "n": {"$sum": 1}}},
        ]
        rows = await self._database.aggregate(QUEUE, pipeline)
        return [{"worker": None, **row["_id"], "n": row["n"]} for row in rows]

    # ------------------------------------------------------------------ upkeep, by any worker

    async def promote(self) -> int:
        """Make due what has waited long enough."""
        late = {"query_at": {"$lte": utcnow()}}
        free = await self._queue.update_many(
            {**late, "worker": None}, {"$set": {"due": True}, "$unset": {"query_at": 1}, "$inc": {"rev": 1}}
        )
        pinned = await self._queue.update_many(
            {**late, "held": "worker"}, {"$unset": {"query_at": 1}, "$inc": {"rev": 1}}
        )
        return free.modified_count + pinned.modified_count

    async def wake_held(self) -> int:
        """Wake whom a dead process did not: as many per key as there are free slots."""
        rated = [{"$match": {"held": "rate_limit"}}, {"$group": {"_id": "$name"}}]
        for row in await self._database.aggregate(QUEUE, rated):
            await self._rates.expect(row["_id"])
        keys: list[Mapping[str, Any]] = [
            {"$match": {"held": "max_running"}},
            {"$group": {"_id": "$slot_key", "n": {"$sum": 1}}},
        ]
        woken = 0
        for row in await self._database.aggregate(QUEUE, keys):
            first = await self._queue.find_one({"held": "max_running", "slot_key": row["_id"]})
            free = await self._free(Job.from_document(first).slots()) if first else []
            for _ in range(min(len(free), row["n"])):
                woken += await self._wake(row["_id"])
        return woken

    async def wake_rated(self) -> int:
        """Put back in line what was held by a rate limit: as many per name as may be started now."""
        expected, now = await self._rates.expected()
        return sum([await self._wake_name(starts, now) for starts in expected])

    async def _wake_name(self, starts: Starts, now: datetime) -> int:
        where = {"held": "rate_limit", "name": starts.name}
        first = await self._queue.find(where).sort("rank", 1).limit(1).to_list(None)
        if not first:
            await self._rates.look_again(starts, None)
            return 0
        rate = Job.from_document(first[0]).rate_limit
        assert rate is not None
        count = min(rate.left(starts.times, now), WOKEN)
        found = await self._queue.find(where).sort("rank", 1).limit(count).to_list(None) if count else []
        window = timedelta(seconds=rate.seconds)
        ends = [start + window for start in starts.times if start + window > now]
        later = now if count == WOKEN else min(ends, default=now + window)
        if not await self._rates.look_again(starts, later):
            return 0  # somebody else does it
        woken = 0
        for job in map(Job.from_document, found):
            woken += await self._cas(job, transitions.wake(job, "may be started again")) is not None
        return woken

    async def expire(self, limit: int = 200) -> int:
        """End deferred jobs whose window has passed."""
        done = 0
        for document in await self._queue.find({"expires": {"$lte": utcnow()}}).limit(limit).to_list(None):
            seen = Job.from_document(document)
            if seen.state is not State.DEFERRED:
                continue
            done += await self._cas_and_settle(seen, transitions.expire(seen))
        return done

    async def rescue(self, alive: Callable[[], Awaitable[Collection[str]]]) -> int:
        """Take running jobs away from owners that are not `alive`, and from nobody; returns how many.

        Whoever is alive is asked after the jobs were read: a worker that registered in between is in.
        """
        documents = await self._queue.find({"state": State.RUNNING.value}).to_list(None)
        if not documents:
            return 0
        owners = await alive()
        rescued = 0
        for document in documents:
            job = Job.from_document(document)
            if job.lease is None or job.lease.owner not in owners:
                change = transitions.rescue(job, self._settings.max_crashes, self._settings.max_claims)
                if job.lease is None:
                    change = replace(change, move="reclaim")
                rescued += await self._cas_and_settle(job, change)
        return rescued

    async def sweep(self, limit: int = 500) -> int:
        """Do what a dead process left undone: children not made, jobs not journaled, actions not told."""
        done = 0
        for table, journal in ((self._queue, False), (self._journal, True)):
            for document in await table.find({"settle": True}).limit(limit).to_list(None):
                done += await self._try_settle(Job.from_document(document, journal=journal))
            for document in await table.find({"audit": True}).limit(limit).to_list(None):
                await self._try_tell(Job.from_document(document, journal=journal))
        return done

    # ------------------------------------------------------------------ repairs, for `core4.doctor`

    async def mend(self, job_id: ObjectId, *, by: str) -> None:
        """Make right what `core4.sanity` finds wrong with a document and one update can mend.

        Raises: JobNotFound; JobExists if its place has been taken.
        """
        try:
            _, after = await self._transition(job_id, lambda seen: sanity.mend(seen, by))
        except DuplicateKeyError as error:
            seen = await self.get(job_id)
            holder = await self._queue.find_one({"unique_key": jobs.unique_key(seen.name, seen.args)})
            raise JobExists(holder["_id"] if holder else job_id, seen.name) from error
        await self._try_settle(after)

    async def restore_child(self, job_id: ObjectId, *, by: str) -> None:
        """Make the child that a job names as its restart and that does not exist.

        Raises: JobNotFound.
        """

        async def plan(seen: Job) -> Change | None:
            child_id = seen.document["enqueued"].get("child_id")
            if child_id is None or seen.document.get("outbox") or await self.document(child_id):
                return None
            return sanity.with_child(seen, child_id, by)

        _, after = await self._transition(job_id, plan)
        await self._try_settle(after)

    async def drop_twin(self, job_id: ObjectId) -> None:
        """Delete a job from the queue that the journal has with its end: the journal is right."""
        queued, journaled = await asyncio.gather(
            self._queue.find_one({"_id": job_id}), self._journal.find_one({"_id": job_id})
        )
        if queued and journaled and not queued.get("settle") and has_ended(journaled):
            await self._queue.delete_one({"_id": job_id, "rev": queued["rev"]})

    async def recall(self, job_id: ObjectId, *, by: str) -> None:
        """Bring a job back that is in the journal without an end.

        It is inserted where no worker sees it, and put in line when the journal has let it go: whoever
        starts a job and finds it there takes it for done.
        """
        found = await self._journal.find_one({"_id": job_id})
        if found is None or has_ended(found):
            return
        document = sanity.recalled(Job.from_document(found, journal=True), by)
        for _ in range(2):
            try:
                await self._queue.insert_one(document)
                break
            except DuplicateKeyError:
                if await self._queue.find_one({"_id": job_id}, {"_id": 1}):
                    break  # an earlier try did it, or it had never left
                document.pop("unique_key", None)  # somebody took its place: it runs beside that one
        await self._journal.delete_one({"_id": job_id, "rev": found["rev"], "state": found["state"]})
        await self.mend(job_id, by=by)

    # ------------------------------------------------------------------ retention, by any worker

    async def retire(self, before: datetime, limit: int) -> int:
        """Let stopped jobs go that ended before that time, up to `limit`; how many have."""
        found = self._queue.find({"stopped_at": {"$lt": before}}).sort("stopped_at", 1).limit(limit)
        done = 0
        for document in await found.to_list(None):
            seen = Job.from_document(document)
            if seen.state in STOPPED:
                done += await self._cas_and_settle(seen, transitions.retire(seen))
        return done

    async def opened(self, ids: Collection[ObjectId]) -> set[ObjectId]:
        """Those of the jobs that are in the queue and not over."""
        found = self._queue.find({"_id": {"$in": list(ids)}}, {"state": 1})
        return {row["_id"] for row in await found.to_list(None) if row["state"] not in FINAL}

    async def forgettable(self, before: datetime, limit: int) -> list[ObjectId]:
        """Up to `limit` jobs that are in the journal since before that time, and that nothing needs any more.

        Needed are a job whose move or restart is not done; one whose `Idempotency-Key` may still be sent
        again; and one whose parent goes on, which must find its child should it ask for it once more.
        """
        low: datetime | None = None
        names = ("journaled_at", "settle", "audit", "outbox", "request_hash", "enqueued")
        while True:
            span = {"$lt": before, **({"$gte": low} if low else {})}
            found = self._journal.find({"journaled_at": span}, list(names))
            rows = await found.sort("journaled_at", 1).limit(limit).to_list(None)
            parents = await self.opened({row["enqueued"]["parent_id"] for row in rows} - {None})
            young = utcnow() - KEYED
            free = [row["_id"] for row in rows if not _needed(row, parents, young)]
            if free or len(rows) < limit or rows[-1]["journaled_at"] == low:
                return free
            low = rows[-1]["journaled_at"]  # all of these are needed: look behind them

    async def forget(self, ids: Collection[ObjectId], before: datetime) -> int:
        """Delete these jobs from the journal, unless something has been begun with them meanwhile."""
        if not ids:
            return 0
        where = {"_id": {"$in": list(ids)}, "journaled_at": {"$lt": before}, "settle": None, "audit": None}
        return (await self._journal.delete_many(where)).deleted_count

    # ------------------------------------------------------------------ inside: writing

    async def _insert(self, document: Document) -> Job:
        for _ in range(3):
            try:
                await self._queue.insert_one(document)
                return await self._try_tell(Job.from_document(document))
            except DuplicateKeyError as error:
                # Its own id first: a job that is there may have lost its place, or violate both indexes.
                found = await self.document(document["_id"])
                if found is not None:
                    return Job.from_document(found[0], journal=found[1])
                where = {"unique_key": document.get("unique_key", "")}
                holder = await self._queue.find_one(where, {"_id": 1})
                if holder is not None:
                    raise JobExists(holder["_id"], document["name"]) from error
                # The holder left in this moment: the place is free.
            except ConnectionFailure as error:
                return await self._inserted(document["_id"], error)
        raise Unavailable("the queue is busy with this job, try again")

    async def _inserted(self, job_id: ObjectId, cause: Exception) -> Job:
        """The job, if an insert whose reply was lost has arrived."""
        try:
            return await self.get(job_id)
        except (PyMongoError, JobNotFound):
            raise Unavailable(
                f"the database did not answer: job [{job_id}] may or may not be stored", job_id=str(job_id)
            ) from cause

    async def _transition(
        self, job_id: ObjectId, plan: Callable[[Job], Change | Awaitable[Change | None] | None]
    ) -> tuple[Job, Job]:
        """Read a job, let `plan` decide and write that, until nobody wrote in between: (before, after)."""
        for _ in range(RETRIES):
            before = await self.get(job_id)
            if before.rev == 1 and not before.journal:
                before = await self._without_leftover(before)
            if transitions.settles(before):
                # Half way to the journal: help it there, so that a document which is being copied
                # is never written.
                try:
                    await self._settle(before)
                except JobExists:
                    pass  # says something to whoever asked for that restart, and nothing here
                before = await self.get(job_id)
            decided = plan(before)
            change = decided if isinstance(decided, Change) or decided is None else await decided
            if change is None:
                return before, before
            after = await self._cas(before, change)
            if after is not None:
                return before, after
        raise Unavailable(f"job [{job_id}] is busy, try again")

    async def _without_leftover(self, fresh: Job) -> Job:
        """The journal's document if there is one: then this one is an insert that came late, and goes."""
        document = await self._journal.find_one({"_id": fresh.id})
        if document is None:
            return fresh
        await self._queue.delete_one({"_id": fresh.id, "rev": fresh.rev})
        return Job.from_document(document, journal=True)

    async def _held(self, job: Job, lease: Lease, plan: Callable[[Job], Change | None]) -> Job:
        """The same for the holder of a lease, starting from the document it has at hand."""
        seen = job
        for _ in range(RETRIES):
            change = plan(seen)
            if change is None:
                return seen
            after = await self._cas(seen, change)
            if after is not None:
                return after
            try:
                seen = await self.get(job.id)
            except JobNotFound:
                raise LeaseLost(job.id, lease.id) from None
        raise Unavailable(f"job [{job.id}] is busy, try again")

    async def _cas(self, seen: Job, change: Change) -> Job | None:
        """Write `change` if the document is still the one that was `seen`; the job after it, or None."""
        change = transitions.signed(change, identifiers.request_id())
        move = states.MOVES[change.move]
        target = State(change.set.get("state", seen.state))
        if seen.state not in move.sources or target not in move.targets:
            raise AssertionError(f"illegal move {change.move}: {seen.state} -> {target}")
        where: Document = {"_id": seen.id, "state": seen.state.value, "rev": seen.rev}
        if move.held:
            where["lease.id"] = transitions.lease_of(seen).id
        rev = change.rev or seen.rev + 1
        update: Document = {"$set": {**change.set, "rev": rev}}
        if change.unset:
            update["$unset"] = dict.fromkeys(change.unset, 1)
        if change.entry is not None:
            update["$push"] = {"history": {"$each": [change.entry], "$slice": -HISTORY_LIMIT}}
        table = self._journal if seen.journal else self._queue
        result = await table.update_one(where, update)
        if not result.matched_count:
            return None
        if "slot" in change.unset and seen.document.get("slot"):
            await self._try_wake(seen.document["slot_key"])
        after = Job.from_document(transitions.applied(seen.document, change, rev), journal=seen.journal)
        return await self._try_tell(after) if change.set.get("audit") else after

    async def _try_tell(self, job: Job) -> Job:
        """Tell the audit what was done to a job; if it cannot be done now, a sweep or the move will."""
        try:
            if not job.document.get("audit"):  # just enqueued
                await self._events.add(audit_of(job.document))
                return job
            await self._events.complete(audit_of(job.document))
            table = self._journal if job.journal else self._queue
            # Not a revision of its own: nothing that anybody decides on has changed.
            await table.update_one({"_id": job.id, "rev": job.rev}, {"$unset": {"audit": 1}})
        except PyMongoError as error:
            log.warning("job.untold", extra={"job_id": str(job.id), "error": str(error)[:200]})
            return job
        told = {name: value for name, value in job.document.items() if name != "audit"}
        return Job.from_document(told, journal=job.journal)

    async def _cas_and_settle(self, seen: Job, change: Change) -> int:
        after = await self._cas(seen, change)
        if after is None:
            return 0
        await self._try_settle(after)
        return 1

    # ------------------------------------------------------------------ inside: claiming

    async def _pinned(self, owner: Owner, some: Document, limit: int) -> list[Document]:
        where: Document = {"held": "worker", "worker": owner.worker, "query_at": None, **some}
        return await self._queue.find(where).sort("rank", 1).limit(limit).to_list(None)

    async def _peek(self, namespaces: Sequence[str], some: Document, count: int) -> list[Document]:
        found: list[Document] = []
        for namespace in namespaces:
            found += await self._peek_namespace(namespace, some, count)
        return found

    async def _peek_namespace(self, namespace: str, some: Document, count: int) -> list[Document]:
        """The first in line. Where the server reads all that match, a bound on the rank keeps that few."""
        where: Document = {"due": True, "namespace": namespace, **some}
        if "rank" in some:  # bound already, and what it finds says nothing of the rest of the line
            return await self._queue.find(where).sort("rank", 1).limit(count).to_list(None)
        horizon = self._horizon.get(namespace)
        if horizon is not None:
            near = {**where, "rank": {"$lt": horizon}}
            found = await self._queue.find(near).sort("rank", 1).limit(count).to_list(None)
            if found:
                return found
        found = await self._queue.find(where).sort("rank", 1).limit(max(PEEK, count)).to_list(None)
        if len(found) >= max(PEEK, count):
            self._horizon[namespace] = found[-1]["rank"] + 1
        else:
            self._horizon.pop(namespace, None)
        return found

    async def _take(self, owner: Owner, candidates: Sequence[Document], limit: int) -> list[Job]:
        taken: list[Job] = []
        index = 0
        while index < len(candidates) and len(taken) < limit:
            seen = Job.from_document(candidates[index])
            index += 1
            if seen.state not in WAITING:
                continue  # only a hand puts it in line; see core4.doctor
            job = await self._cas(seen, transitions.claim(seen, owner))
            if job is None:
                index += random.randrange(3)  # others read the same line: do not race for each place in it
            else:
                taken.append(job)
        return taken

    async def _find_and_claim(self, owner: Owner, namespaces: Sequence[str], some: Document) -> Job | None:
        where: Document = {"due": True, "namespace": {"$in": list(namespaces)}, **some}
        where["state"] = {"$in": sorted(WAITING)}
        document = await self._queue.find_one_and_update(
            where, transitions.claim_pipeline(owner), sort=[("rank", 1)], return_document=True
        )
        return Job.from_document(document) if document else None

    # ------------------------------------------------------------------ inside: second documents

    async def _try_settle(self, job: Job) -> int:
        """Settle now if it can be done; if not, a sweep will."""
        if not transitions.settles(job):
            return 0
        try:
            await self._settle(job)
            return 1
        except JobExists:
            return 1
        except PyMongoError as error:
            log.warning("job.unsettled", extra={"job_id": str(job.id), "error": str(error)[:200]})
            return 0

    async def _settle(self, job: Job) -> None:
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
        ready: list[Job] = []
        delivered: list[Mapping[str, Any]] = []
        for _ in range(RETRIES):
            for note in transitions.deliverable(job):
                if note in delivered:
                    continue
                try:
                    ready += await self._deliver(job, note)
                except JobExists as error:
                    refused = error
                delivered.append(note)
            caught_up = await self._catch_up(job)
            if caught_up is not job:
                job = caught_up
                continue
            settled: Job | None = job
            if job.outbox or not transitions.leaves(job):
                settled = await self._cas(job, transitions.settled(job, unlink=refused is not None))
            if settled is not None:
                if not settled.journal and transitions.leaves(settled):
                    await self._move(settled)
                break
            found = await self.document(job.id)
            if found is None or not found[0].get("settle"):
                break  # somebody else has done it
            job = Job.from_document(found[0], journal=found[1])
        if refused is not None:
            raise refused
        return ready

    async def _deliver(self, job: Job, note: Mapping[str, Any]) -> list[Job]:
        """Do what one note says; it may have been done before. Returns the jobs that have to settle now."""
        match note["kind"]:
            case "restart":
                return await self._restart(job, note)
            case "job":
                return await self._follow(job, note)
            case "release":
                return await self._release_waiters(job)
        raise AssertionError(f"unknown kind of note: {note['kind']}")

    async def _catch_up(self, job: Job) -> Job:
        """The blocked job after a look at its prerequisites: some may have ended before it was there."""
        if job.state is not State.BLOCKED or job.removed_at is not None:
            return job
        for prerequisite in job.document.get("open_deps", ()):
            found = await self.document(prerequisite)
            other = Job.from_document(found[0], journal=found[1]) if found else None
            change = _told(job, prerequisite, other)
            if change is None:
                continue
            after = await self._cas(job, change)
            if after is None:
                return await self.get(job.id)
            job = after
        return job

    async def _release_waiters(self, ended: Job) -> list[Job]:
        """Tell all that wait for this job how it ended."""
        ready: list[Job] = []
        for _ in range(RETRIES):
            rows = await self._queue.find({"open_deps": ended.id}).limit(WAITERS).to_list(None)
            if not rows:
                return ready
            for row in rows:
                seen = Job.from_document(row)
                change = _told(seen, ended.id, ended)
                after = await self._cas(seen, change) if change is not None else None
                ready += [after] if after is not None and after.document.get("settle") else []
        raise Unavailable(f"too many jobs wait for [{ended.id}]")

    async def _follow(self, parent: Job, note: Mapping[str, Any]) -> list[Job]:
        """Insert a job that follows; its id is derived, so that any number of tries makes one."""
        if await self._journal.find_one({"_id": note["target"]}, {"_id": 1}) is not None:
            return []
        job = await self._insert(chains.follower(parent, note, utcnow()))
        return [job] if job.document.get("settle") else []

    async def _restart(self, parent: Job, note: Mapping[str, Any]) -> list[Job]:
        """Insert the child of a restart; its id is derived, so that any number of tries makes one."""
        child_id = note["target"]
        if await self._journal.find_one({"_id": child_id}, {"_id": 1}) is not None:
            return []
        again = [await self._newest(each) for each in parent.document.get("dependencies", ())]
        order = chains.again(parent, note, again)
        # Of a job that has run all have completed; else what is gone will be found to be.
        waits = [] if parent.trial else await self._await(again, missing=True)
        child = chains.document(order, child_id, utcnow(), open_deps=waits)
        child["trial"] = parent.trial
        try:
            job = await self._insert(child)
        except JobExists:
            if not note.get("promised"):
                raise
            # A third took the place between two updates. The child's id was given away long before:
            # it runs beside the third rather than not at all.
            del child["unique_key"]
            job = await self._insert(child)
        return [job] if job.document.get("settle") else []

    async def _newest(self, job_id: ObjectId) -> ObjectId:
        """The job, or the last of those that restarts have put in its place."""
        for _ in range(RETRIES):
            found = await self.document(job_id)
            child_id = found[0]["enqueued"].get("child_id") if found else None
            if child_id is None:
                break
            job_id = child_id
        return job_id

    async def _is_open(self, child_id: ObjectId, parent: Job) -> bool:
        found = await self.document(child_id)
        if found is None:  # noted, not yet made: that is still to come
            return any(note["kind"] == "restart" for note in parent.outbox)
        document, journaled = found
        return not journaled and document["state"] not in FINAL

    async def _move(self, job: Job) -> None:
        """Copy to the journal, then delete exactly what was copied; repeatable by anyone at any point."""
        for _ in range(RETRIES):
            copy = {
                key: value
                for key, value in job.document.items()
                if key not in ("settle", "audit", "stopped_at", *transitions.LINE)
            }
            copy["journaled_at"] = utcnow()
            # No job leaves the queue before all that was done to it is told.
            await self._events.complete(audit_of(job.document))
            try:
                await self._journal.replace_one({"_id": job.id, "rev": {"$lt": job.rev}}, copy, upsert=True)
            except DuplicateKeyError:
                pass  # this revision or a newer one is there
            deleted = await self._queue.delete_one({"_id": job.id, "rev": job.rev})
            if deleted.deleted_count:
                return
            document = await self._queue.find_one({"_id": job.id})
            if document is None:
                return
            job = Job.from_document(document)


def _needed(row: Document, parents: Collection[ObjectId], young: datetime) -> bool:
    if row.get("settle") or row.get("audit") or row.get("outbox") or row["enqueued"]["parent_id"] in parents:
        return True
    return bool(row.get("request_hash")) and row["enqueued"]["at"] > young


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


def _unstorable(why: str) -> Outcome:
    return Outcome.failed(f"the result cannot be stored: {transitions.clean(why)[:500]}", [])
