"""The documents of jobs, in the queue and in the journal: how they are read and how they are written.

A transition is one update of one document whose filter repeats the state, the revision and, for a
held job, the lease that the decision was based on. If somebody else wrote in between, nothing matches
and the decision is made again on what is there now.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import bson
from bson import ObjectId
from bson.errors import BSONError
from pymongo import IndexModel, UpdateOne
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    DocumentTooLarge,
    DuplicateKeyError,
    PyMongoError,
    WriteError,
)

from core4 import database as databases
from core4 import identifiers, states, transitions
from core4.database import Database, Document, Page, ScaleIndex, exactly, refuses_content
from core4.errors import Core4Error, JobExists, JobNotFound, LeaseLost, SourceRefused, Unavailable
from core4.events import EventStore, audit_of
from core4.jobs import HISTORY_LIMIT, Job, Lease, canonical
from core4.remembered import Remembered
from core4.returns import Returns
from core4.spans import Spans
from core4.states import FINAL, WAITING, State
from core4.transitions import Change

log = logging.getLogger(__name__)

QUEUE, JOURNAL = "sys.queue", "sys.journal"

# Jobs of functions are looked for by what their callers call them; other jobs are not in there.
_OF_FUNCTIONS = (
    IndexModel([("label", 1)], name="label", sparse=True),
    ScaleIndex(
        [("category", 1), ("_id", 1)],
        name="category",
        partialFilterExpression={"function": {"$exists": True}},
    ),
)

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
        ScaleIndex(
            [("slot_key", 1), ("rank", 1)],
            name="slot_key",
            partialFilterExpression={"held": "max_running"},
        ),
        ScaleIndex([("name", 1), ("rank", 1)], name="rate", partialFilterExpression={"held": "rate_limit"}),
        # Fields that only few documents have: these indexes cost the others nothing.
        IndexModel([("held", 1)], name="held", sparse=True),
        ScaleIndex([("lease.owner", 1)], name="owner", sparse=True),
        IndexModel([("query_at", 1)], name="query_at", sparse=True),
        ScaleIndex([("expires", 1)], name="expires", sparse=True),
        IndexModel([("settle", 1)], name="settle", sparse=True),
        ScaleIndex([("request_id", 1)], name="request_id"),
        IndexModel([("audit", 1)], name="audit", sparse=True),
        ScaleIndex([("stopped_at", 1)], name="stopped_at", sparse=True),
        IndexModel([("open_deps", 1)], name="open_deps", sparse=True),
        ScaleIndex([("chain_id", 1)], name="chain_id", sparse=True),
        *_OF_FUNCTIONS,
    ),
    JOURNAL: (
        IndexModel([("name", 1), ("_id", 1)], name="name"),
        IndexModel([("request_id", 1)], name="request_id"),
        IndexModel([("state", 1), ("_id", 1)], name="state"),
        IndexModel([("settle", 1)], name="settle", sparse=True),
        IndexModel([("audit", 1)], name="audit", sparse=True),
        IndexModel([("journaled_at", 1)], name="journaled_at", sparse=True),
        *_OF_FUNCTIONS,
    ),
}

FEW = 4  # read at once to find a first one that can be read
SPANNED = 2_000  # entries of the journal above which it is read in spans: to ask for each costs more below
COUNTED = 10_000  # documents at most that a page of some of them counts: counting reads each of them
# What is raised for a document that cannot be stored: by the driver before it sends it, or by the server.
REFUSED = (BSONError, DocumentTooLarge, OverflowError, UnicodeError, BulkWriteError)
SLOW_COUNT, COUNT_SHARE = 0.1, 0.05  # seconds of a count that reads all, and its share of the time
RETRIES = 100  # of one decision, if others keep writing the same job
_UNREADABLE: set[str] = set()  # ids that this process has logged


class JobStore:
    """`sys.queue` and `sys.journal`. All methods may be repeated after an error."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.queue = database.collection(QUEUE)
        self.journal = database.collection(JOURNAL)
        self.events = EventStore(database)
        self.returns = Returns(database)
        self._last_count = 0  # of all in the journal
        self._count_life = 0.0  # seconds for which that is good
        self._journaled: Remembered[None, int] = Remembered(
            lambda _: self._count_journal(), lambda: self._count_life
        )

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self.database.ensure_indexes(INDEXES)
        await self.events.prepare()
        await self.returns.prepare()

    # ------------------------------------------------------------------ reading

    async def document(self, job_id: ObjectId) -> tuple[Document, bool] | None:
        """The stored document of a job and whether it is the journal's; None if there is none."""
        queued = await self.queue.find_one({"_id": job_id})
        if queued is not None and not queued.get("settle"):
            return queued, False
        # It may be in both while it is moved: then the journal is right.
        journaled = await self.journal.find_one({"_id": job_id})
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

    async def ended(self, ids: Sequence[ObjectId]) -> dict[ObjectId, Job | None]:
        """Those of these jobs that have ended; None for one that is nowhere any more."""
        queued = await self.queue.find({"_id": {"$in": list(ids)}}).to_list(None)
        found: dict[ObjectId, Job | None] = {row["_id"]: Job.from_document(row) for row in queued}
        # In this order: whoever leaves the queue is in the journal before.
        left = [job_id for job_id in ids if job_id not in found]
        if left:
            rows = await self.journal.find({"_id": {"$in": left}}).to_list(None)
            moved = {row["_id"]: Job.from_document(row, journal=True) for row in rows}
            found |= {job_id: moved.get(job_id) for job_id in left}
        return {job_id: job for job_id, job in found.items() if job is None or job.has_ended}

    async def in_journal(self, ids: Sequence[ObjectId]) -> set[ObjectId]:
        """Those of these ids that are in the journal."""
        if not ids:
            return set()
        rows = await self.journal.find({"_id": {"$in": list(ids)}}, {"_id": 1}).to_list(None)
        return {row["_id"] for row in rows}

    async def results_before(self, job: Job, *, most: int) -> dict[str, Any]:
        """The results of a job's dependencies by their ids, in the order in which they were named.

        Args:
            most: bytes that they may have together.

        Raises: SourceRefused if one is gone or cannot be read, or for more than that.
        """
        found: dict[str, Any] = {}
        for job_id in job.document.get("dependencies") or ():
            stored = await self.document(job_id)
            if stored is None or stored[0].get("state") != State.COMPLETE:
                raise SourceRefused(f"the result of its dependency [{job_id}] is gone")
            found[str(job_id)] = stored[0].get("result")
            try:
                most -= len(canonical(found[str(job_id)]))
            except (TypeError, ValueError, RecursionError) as error:
                # Stored by an older version, or by hand: drivers make no JSON of all that they are given.
                raise SourceRefused(
                    f"the result of its dependency [{job_id}] is not JSON: {error!s:.200}"
                ) from None
            if most < 0:
                raise SourceRefused("the results of its dependencies are too much to be handed over")
        return found

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
        counted: bool = True,
        behind: Mapping[str, Any] | None = None,
    ) -> Page:
        """One page of documents; a negative `page` counts from the end. `where` is a trusted filter.

        `behind` is what `core4.bookmarks.behind` made of a bookmark. Those behind a filter are counted up to
        `COUNTED` only, but for a page from the end.

        Arguments that do not fit into `args_room` bytes any more are left out: `args` of such a row is None
        and `omitted` names it.
        """
        table = self.journal if journal else self.queue
        limit = None if page < 0 else COUNTED
        reads_all = journal and not self.database.find_and_modify and 0 <= page * per_page <= COUNTED
        spans = Spans.of(table, where, behind or {}, sort) if reads_all else None
        # Pages without a filter renew the last number, as they show it.
        known = 0 if where and counted else self._last_count
        if spans is not None and (known or await self.journaled()) <= SPANNED:
            spans = None  # to read so few costs less than to ask for each state
        total, at_least = await self._total(table, where, limit, spans) if counted else (0, False)
        number = page
        if page < 0:
            number += -(-total // per_page)
            if number < 0:
                return Page([], total, page, per_page)
        found = Page([], total, page, per_page, counted=counted, at_least=at_least)
        skipped, there = number * per_page, {"$and": [where, behind]} if where and behind else behind or where
        if spans is not None:
            ids = await spans.ids(skipped + per_page + 1)
            skipped, there = 0, {"_id": {"$in": ids[skipped:]}}
        cursor = table.find(dict(there), list(fields) if fields else None)
        # One by one: what is left out must not be held together, either. One more than a page tells of more.
        async for row in cursor.sort(list(sort)).skip(skipped).limit(per_page + 1):
            if len(found.rows) == per_page:
                return replace(found, more=True)
            if args_room is not None and row.get("args"):
                size = len(bson.encode(row["args"]))
                if size > args_room:
                    row |= {"args": None, "omitted": ["args"]}
                else:
                    args_room -= size
            found.rows.append(row)
        return found

    async def _total(
        self, table: databases.Collection, where: Mapping[str, Any], limit: int | None, spans: Spans | None
    ) -> tuple[int, bool]:
        """How many there are, up to `limit`, and whether there are more."""
        if spans is not None and limit is not None and where:
            found = await spans.count(limit)
            return min(found, limit), found > limit
        if not where:
            if table is self.queue:
                return await table.estimated_document_count(), False
            return await (self.journaled() if spans else self._count_journal()), False
        if limit is None:
            return await table.count_documents(dict(where)), False
        found = await table.count_documents(dict(where), limit=limit + 1)
        return min(found, limit), found > limit

    async def first(self, where: Mapping[str, Any]) -> Job | None:
        """The first in rank behind a trusted filter."""
        rows = await self.queue.find(dict(where)).sort("rank", 1).limit(FEW).to_list(None)
        return next(readable(rows), None)

    async def ids(self, where: Mapping[str, Any], *, limit: int, journal: bool = False) -> list[ObjectId]:
        """The first ids behind a trusted filter."""
        table = self.journal if journal else self.queue
        rows = await table.find(dict(where), {"_id": 1}).sort("_id", 1).limit(limit).to_list(None)
        return [row["_id"] for row in rows]

    async def count(self, where: Mapping[str, Any], *, journal: bool = False) -> int:
        """How many there are behind a trusted filter."""
        return await (self.journal if journal else self.queue).count_documents(dict(where))

    async def of_request(
        self, request_id: str, allowed: Callable[[str], bool] = lambda name: True, limit: int = 2
    ) -> list[ObjectId]:
        """The ids of jobs of `allowed` names that a request has made, at most `limit`."""
        found: set[ObjectId] = set()
        for journal in (False, True):
            table = self.journal if journal else self.queue
            names = await table.distinct("name", {"request_id": request_id})
            where = {"request_id": request_id, "name": {"$in": [name for name in names if allowed(name)]}}
            found.update(await self.ids(where, limit=limit, journal=journal))
        return sorted(found)[:limit]

    async def results(
        self, where: Mapping[str, Any], *, page: int, per_page: int, fields: Sequence[str]
    ) -> Page:
        """One page of ended jobs whose result nobody has pulled; those in the queue come first.

        `where` is a trusted filter.
        """
        ended = {"state": {"$in": sorted(FINAL)}, "consumed": None, **where}
        queued = await self.queue.count_documents(ended)
        total = queued + await self.journal.count_documents(ended)
        pages = -(-total // per_page)
        first = (pages + page if page < 0 else page) * per_page
        if not 0 <= first < total:
            return Page([], total, page, per_page)
        names = [*fields, "settle"]
        found = self.queue.find(ended, names).sort("_id", 1).skip(first).limit(per_page)
        rows = await self._not_journaled(await found.to_list(None))
        if len(rows) < per_page:
            here = {row["_id"] for row in rows}  # one of these may be moved in just this moment
            found = self.journal.find(ended, names).sort("_id", 1).skip(max(first - queued, 0))
            moved = await found.limit(per_page - len(rows)).to_list(None)
            rows += [row for row in moved if row["_id"] not in here]
        return Page(rows, total, page, per_page)

    async def _not_journaled(self, rows: Sequence[Document]) -> list[Document]:
        """Documents of the queue without what is in the journal already, where it is right."""
        done = await self.in_journal([row["_id"] for row in rows if row.get("settle")])
        return [row for row in rows if row["_id"] not in done]

    async def counts(self, where: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Number of jobs in the queue by state."""
        pipeline: list[Mapping[str, Any]] = [{"$match": dict(where)}] if where else []
        pipeline.append({"$group": {"_id": "$state", "n": {"$sum": 1}}})
        return {row["_id"]: row["n"] for row in await self.database.aggregate(QUEUE, pipeline)}

    async def census(self) -> list[Document]:
        """Jobs in the queue by `namespace`, `name` and `state`: how many, and `since` when."""
        by = {"namespace": "$namespace", "name": "$name", "state": "$state"}
        each = {"$group": {"_id": by, "n": {"$sum": 1}, "since": {"$min": "$enqueued.at"}}}
        rows = await self.database.aggregate(QUEUE, [each])
        return [{**row["_id"], "n": row["n"], "since": row["since"]} for row in rows]

    async def journaled(self, where: Mapping[str, Any] | None = None) -> int:
        """Number of jobs in the journal."""
        if where:
            return await self.journal.count_documents(dict(where))
        return await self._journaled.get(None)

    async def _count_journal(self) -> int:
        began = time.monotonic()
        found = await self.journal.estimated_document_count()
        took = time.monotonic() - began
        self._count_life = took / COUNT_SHARE if took > SLOW_COUNT else 0.0
        self._last_count = found
        return found

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
        rows = await self.database.aggregate(QUEUE, pipeline)
        return [{"worker": None, **row["_id"], "n": row["n"]} for row in rows]

    async def running(self, owner_id: str) -> list[Job]:
        """All jobs held by this owner."""
        where = {"state": State.RUNNING.value, "lease.owner": exactly(owner_id)}
        documents = await self.queue.find(where).to_list(None)
        return list(readable(documents))

    async def held_by(self, owners: Collection[str]) -> dict[str, list[Document]]:
        """The jobs (`_id`, `name`) that each of these owners holds; those with none are left out."""
        where = {"state": State.RUNNING.value, "lease.owner": {"$in": list(owners), "$exists": True}}
        found: dict[str, list[Document]] = {}
        for row in await self.queue.find(where, {"name": 1, "lease.owner": 1}).to_list(None):
            found.setdefault(row["lease"]["owner"], []).append({"_id": row["_id"], "name": row["name"]})
        return found

    async def unsettled(self, ids: Collection[ObjectId]) -> set[ObjectId]:
        """Those of the jobs whose outbox may still be worked off."""
        where = {"_id": {"$in": list(ids)}, "settle": True}
        rows = [await table.find(where, {"_id": 1}).to_list(None) for table in (self.queue, self.journal)]
        return {row["_id"] for some in rows for row in some}

    async def opened(self, ids: Collection[ObjectId]) -> set[ObjectId]:
        """Those of the jobs that are in the queue and not over."""
        found = self.queue.find({"_id": {"$in": list(ids)}}, {"state": 1})
        return {row["_id"] for row in await found.to_list(None) if row["state"] not in FINAL}

    # ------------------------------------------------------------------ writing

    async def insert(self, document: Document) -> Job:
        """A new job; or what is there under its id.

        Its line in the audit comes beside: the document says the same, and whoever acts on the job next, or
        moves it, completes it.

        Raises: JobExists, Unavailable.
        """
        for _ in range(3):
            try:
                await self.queue.insert_one(document)
                self.events.add_soon(audit_of(document))
                return Job.from_document(document)
            except DuplicateKeyError as error:
                # Its own id first: a job that is there may have lost its place, or violate both indexes.
                found = await self.document(document["_id"])
                if found is not None:
                    return Job.from_document(found[0], journal=found[1])
                where = {"unique_key": document.get("unique_key", "")}
                holder = await self.queue.find_one(where, {"_id": 1})
                if holder is not None:
                    raise JobExists(holder["_id"], document["name"]) from error
                # The holder left in this moment: the place is free.
            except ConnectionFailure as error:
                return await self._inserted(document["_id"], error)
        raise Unavailable("the queue is busy with this job, try again")

    async def add_many(self, documents: Sequence[Document]) -> list[Job | Exception]:
        """`insert` for several in one round trip; what stood in the way of a job stands in its place."""
        alone: set[ObjectId] = set()
        try:
            await self.queue.insert_many(documents, ordered=False)
        except ConnectionFailure as error:
            return await _each(self._inserted(document["_id"], error) for document in documents)
        except REFUSED as error:
            # Which of them are there is not always known: who inserts one again finds that.
            alone = _refused(error, documents)
        there = [document for document in documents if document["_id"] not in alone]
        self.events.add_soon([line for document in there for line in audit_of(document)])
        found: dict[ObjectId, Job | Exception] = {row["_id"]: Job.from_document(row) for row in there}
        again = [document for document in documents if document["_id"] in alone]
        rows = await _each(map(self.insert, again))
        found |= {document["_id"]: row for document, row in zip(again, rows, strict=True)}
        return [found[document["_id"]] for document in documents]

    async def _inserted(self, job_id: ObjectId, cause: Exception) -> Job:
        """The job, if an insert whose reply was lost has arrived."""
        try:
            return await self.get(job_id)
        except (PyMongoError, JobNotFound):
            raise Unavailable(
                f"the database did not answer: job [{job_id}] may or may not be stored", job_id=str(job_id)
            ) from cause

    async def cas(self, seen: Job, change: Change) -> Job | None:
        """Write `change` if the document is still the one that was `seen`; the job after it, or None."""
        change = _checked(seen, change)
        where, update, rev = _guarded(seen, change)
        table = self.journal if seen.journal else self.queue
        result = await table.update_one(where, update)
        if not result.matched_count:
            return None
        if _frees(seen, change):
            await self._try_wake_slot(seen.document["slot_key"])
        after = Job.from_document(transitions.applied(seen.document, change, rev), journal=seen.journal)
        return await self.try_tell(after) if change.set.get("audit") else after

    async def cas_many(self, wishes: Sequence[tuple[Job, Change]]) -> dict[ObjectId, Job]:
        """`cas` for several jobs in one round trip, each as guarded as alone; those that were written.

        Left out are those that were not, or of which that is not known, or for whose slot others wait: who
        asks for them alone then finds out.
        """
        checked = [(seen, _checked(seen, change)) for seen, change in wishes]
        simple = [
            (seen, change, *_guarded(seen, change)) for seen, change in checked if not _frees(seen, change)
        ]
        if not simple:
            return {}
        updates = [UpdateOne(where, update) for _, _, where, update, _ in simple]
        try:
            result = await self.queue.bulk_write(updates, ordered=False)
        except REFUSED as error:
            if isinstance(error, BulkWriteError) and not _refuses_content(error):
                raise
            return {}
        after = {
            seen.id: transitions.applied(seen.document, change, rev) for seen, change, _, _, rev in simple
        }
        if result.matched_count < len(updates):
            rows = await self.queue.find({"_id": {"$in": list(after)}}).to_list(None)
            there = {row["_id"]: row for row in rows}
            written = {
                seen.id: after[seen.id]
                for seen, change, _, _, rev in simple
                if _is_written(there.get(seen.id, {}), change, rev)
            }
            # A claim that somebody has told to end since is a claim: the lease is nobody else's.
            told = {
                seen.id: there[seen.id]
                for seen, change, *_ in simple
                if seen.id not in written and _is_leased(there.get(seen.id, {}), change)
            }
            after = written | told
        return {job.id: job for job in await self._try_tell_many(map(Job.from_document, after.values()))}

    async def held(self, job: Job, lease: Lease, plan: Callable[[Job], Change | None]) -> Job:
        """The same for the holder of a lease, starting from the document it has at hand."""
        seen = job
        for _ in range(RETRIES):
            change = plan(seen)
            if change is None:
                return seen
            after = await self.cas(seen, change)
            if after is not None:
                return after
            try:
                seen = await self.get(job.id)
            except JobNotFound:
                raise LeaseLost(job.id, lease.id) from None
        raise Unavailable(f"job [{job.id}] is busy, try again")

    async def held_many(
        self, jobs: Sequence[Job], plan: Callable[[Job], Change | None]
    ) -> dict[ObjectId, Job | Core4Error]:
        """`held` for several jobs, each under its own lease; the error of a job stands in its place."""
        wishes: list[tuple[Job, Change]] = []
        for job in jobs:
            with suppress(LeaseLost):
                change = plan(job)
                wishes += [(job, change)] if change is not None else []
        found: dict[ObjectId, Job | Core4Error] = {}
        if len(wishes) > 1:
            found |= await self.cas_many(wishes)
        for job in jobs:
            if job.id not in found:
                # Should it be written after all, the plan finds that.
                found[job.id] = await self._held_or_error(job, plan)
        return found

    async def _held_or_error(self, job: Job, plan: Callable[[Job], Change | None]) -> Job | Core4Error:
        try:
            return await self.held(job, transitions.lease_of(job), plan)
        except (LeaseLost, Unavailable) as error:
            return error

    async def try_tell(self, job: Job) -> Job:
        """Tell the audit what was done to a job; if it cannot be done now, a sweep or the move will."""
        try:
            await self.events.complete(audit_of(job.document))
            table = self.journal if job.journal else self.queue
            # Not a revision of its own: nothing that anybody decides on has changed.
            await table.update_one({"_id": job.id, "rev": exactly(job.rev)}, {"$unset": {"audit": 1}})
        except PyMongoError as error:
            log.warning("job.untold", extra={"job_id": str(job.id), "error": str(error)[:200]})
            return job
        return _told(job)

    async def _try_tell_many(self, written: Iterable[Job]) -> list[Job]:
        """`try_tell` for those of the jobs of which there is something to tell, in a few round trips."""
        jobs = list(written)
        untold = [job for job in jobs if job.document.get("audit")]
        if not untold:
            return jobs
        try:
            await self.events.complete([line for job in untold for line in audit_of(job.document)])
            told = {"$unset": {"audit": 1}}
            await self.queue.bulk_write(
                [UpdateOne({"_id": job.id, "rev": exactly(job.rev)}, told) for job in untold], ordered=False
            )
        except PyMongoError as error:
            log.warning("job.untold", extra={"jobs": len(untold), "error": str(error)[:200]})
            return jobs
        return [_told(job) for job in jobs]

    # ------------------------------------------------------------------ slots

    async def free_slots(self, slots: Sequence[str]) -> list[str]:
        if not slots:
            return []
        rows = await self.queue.find({"slot": {"$in": list(slots), "$exists": True}}, {"slot": 1}).to_list(
            None
        )
        free = sorted(set(slots) - {row["slot"] for row in rows})
        random.shuffle(free)
        return free

    async def wake_slot(self, key: str) -> bool:
        """Put the first that waits for a slot of this key back in line, if there is a free one."""
        where = {"held": "max_running", "slot_key": key}
        for _ in range(RETRIES):
            first = await self.first(where)
            if first is None or not await self.free_slots(first.slots()):
                return False
            if await self.cas(first, transitions.wake(first, "a slot is free")) is not None:
                return True
        return False

    async def _try_wake_slot(self, key: str) -> None:
        """After a slot became free; if it cannot be done now, `wake_held` will."""
        try:
            await self.wake_slot(key)
        except PyMongoError as error:
            log.warning("job.unwoken", extra={"slot_key": key, "error": str(error)[:200]})


async def _each(moves: Iterable[Coroutine[Any, Any, Job]]) -> list[Job | Exception]:
    """The job after each move, or what stood in its way."""
    found: list[Job | Exception] = []
    for each in await asyncio.gather(*moves, return_exceptions=True):
        if not isinstance(each, Job | Exception):
            raise each
        found.append(each)
    return found


def _refused(error: Exception, documents: Sequence[Document]) -> set[ObjectId]:
    """The ids of those of the documents of which it is not known that they were inserted."""
    if not isinstance(error, BulkWriteError) or error.details.get("writeConcernErrors"):
        return {document["_id"] for document in documents}
    return {documents[each["index"]]["_id"] for each in error.details["writeErrors"]}


def _told(job: Job) -> Job:
    """The job without the mark that there is something to tell."""
    document = {name: value for name, value in job.document.items() if name != "audit"}
    return Job.from_document(document, journal=job.journal)


def _checked(seen: Job, change: Change) -> Change:
    """The change as it is written, of a move that there is."""
    change = transitions.signed(change, identifiers.request_id())
    move = states.MOVES[change.move]
    target = State(change.set.get("state", seen.state))
    if seen.state not in move.sources or target not in move.targets:
        raise AssertionError(f"illegal move {change.move}: {seen.state} -> {target}")
    return change


def _guarded(seen: Job, change: Change) -> tuple[Document, Document, int]:
    """The filter that says what was seen, the update, and the revision afterwards."""
    where: Document = {"_id": seen.id, "state": exactly(seen.state.value), "rev": exactly(seen.rev)}
    if states.MOVES[change.move].held:
        where["lease.id"] = exactly(transitions.lease_of(seen).id)
    rev = change.rev or seen.rev + 1
    update: Document = {"$set": {**change.set, "rev": rev}}
    if change.unset:
        update["$unset"] = dict.fromkeys(change.unset, 1)
    if change.entry is not None:
        update["$push"] = {"history": {"$each": [change.entry], "$slice": -HISTORY_LIMIT}}
    return where, update, rev


def _frees(seen: Job, change: Change) -> bool:
    """True if others may wait for the slot that the change gives back."""
    return "slot" in change.unset and bool(seen.document.get("slot"))


def _is_written(document: Mapping[str, Any], change: Change, rev: int) -> bool:
    """True if it was this change that made the document what it is; False if it has changed since."""
    fields = {name: value for name, value in change.set.items() if "." not in name}
    told = change.entry is None or document.get("history", [])[-1:] == [change.entry]
    same = all(document.get(name) == value for name, value in fields.items())
    return document.get("rev") == rev and told and same


def _is_leased(document: Mapping[str, Any], change: Change) -> bool:
    """True if the document has the lease that this change has given it."""
    given = change.set.get("lease")
    return given is not None and (document.get("lease") or {}).get("id") == given["id"]


def _refuses_content(error: BulkWriteError) -> bool:
    """True if what one of the updates wrote is to blame, and not the state of the server."""
    refused = [WriteError(each.get("errmsg", ""), each.get("code")) for each in error.details["writeErrors"]]
    return all(map(refuses_content, refused)) and not error.details.get("writeConcernErrors")


def readable(documents: Iterable[Document], *, journal: bool = False) -> Iterator[Job]:
    """The jobs that these documents describe. One that somebody broke by hand must hold up no other: it is
    left out and logged, once per process as upkeep meets it again and again, and the doctor tells of it.
    """
    for document in documents:
        try:
            yield Job.from_document(document, journal=journal)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            job_id = str(document["_id"])
            if job_id not in _UNREADABLE:
                _UNREADABLE.add(job_id)
                log.error("job.unreadable", extra={"job_id": job_id, "error": repr(error)[:200]})
