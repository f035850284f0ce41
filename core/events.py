"""Who did what, and how many jobs were in which state: `sys.event`, to which lines are only added.

The audit of a job is derived from its document, where each action and its author are written in the same
update as what the action does: so there is no action without its line. A line's id is that of the job and
of the revision that the action made; whoever copies it here, and however often, it is one line.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId
from pymongo import IndexModel
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

from core4 import identifiers
from core4.database import Database, Document, Page, only_duplicates
from core4.errors import Core4Error
from core4.jobs import Owner, utcnow

log = logging.getLogger(__name__)

EVENT = "sys.event"
INDEXES = {
    EVENT: (
        IndexModel([("channel", 1), ("bucket", 1), ("created", 1)], name="created"),
        IndexModel([("job_id", 1)], name="job_id", sparse=True),
    )
}
AUDIT = "audit"
FIELDS = ("_id", "created", "name", "author", "request_id", "job_id", "qual_name", "data", "outcome")

COUNTS = "queue"
# The buckets of time in which counts are kept, and for how long: who looks back further sees coarser ones.
LIVES: Mapping[str, timedelta] = {
    "second": timedelta(days=7),
    "minute": timedelta(days=32),
    "hour": timedelta(days=400),
    "day": timedelta(days=36500),
}
_SPANS = (("second", timedelta(days=1)), ("minute", timedelta(days=30)), ("hour", timedelta(days=365)))
GAP = 0.2  # seconds for which lines are collected that nobody waits for
_ENQUEUE_REV = 1  # of the insert: who enqueued is said by the document, however long its history is


def audit_of(document: Mapping[str, Any]) -> list[Document]:
    """The lines of a job's actions, as its document tells them."""
    enqueued = document["enqueued"]
    force = {"force": True} if document.get("force") else {}
    first = {
        "at": enqueued["at"],
        "by": enqueued.get("username"),
        "request_id": document.get("request_id"),
        **force,
    }
    told = [_line(document, _ENQUEUE_REV, "enqueue", first)]
    taken = document.get("consumed") or {}
    if taken.get("action"):  # it has no line in the history, which ends with the job
        told.append(_line(document, taken["action"], taken["action"], taken))
    return told + [
        _line(document, entry["rev"], entry["action"], entry)
        for entry in document.get("history", ())
        if entry.get("action") and entry["rev"] != _ENQUEUE_REV
    ]


def _line(document: Mapping[str, Any], rev: int | str, action: str, entry: Mapping[str, Any]) -> Document:
    more = ("state", "reason", "attempt", "worker", "force")
    return {
        "_id": f"{document['_id']}.{rev}",
        "created": entry["at"],
        "channel": AUDIT,
        "bucket": None,
        "name": f"job.{action}",
        "author": entry.get("by") or entry.get("worker") or "",
        "request_id": entry.get("request_id"),
        "job_id": str(document["_id"]),
        "qual_name": document["name"],
        "data": {name: entry[name] for name in more if entry.get(name) is not None},
        "outcome": "done",
    }


class EventStore:
    """The only writer of `sys.event`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._events = database.fast(EVENT)
        self._durable = database.collection(EVENT)
        self._collected: list[Document] = []
        # Of each bucket of time the last one that counts were kept in, and the highest total of them.
        self._kept: dict[str, tuple[datetime, int]] = {}

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self.database.ensure_indexes(INDEXES)

    async def add(self, lines: Sequence[Document]) -> None:
        """Store lines; those that are there already stay as they are."""
        try:
            await self._events.insert_many(list(lines), ordered=False)
        except BulkWriteError as error:
            if not only_duplicates(error):
                raise

    def add_soon(self, lines: Sequence[Document]) -> None:
        """Store lines that are derived from what is stored already: beside what comes next, several together.

        Those of a process that dies before are made good by who completes them, see `complete`.
        """
        if not lines:
            return
        self._collected += lines
        if len(self._collected) == len(lines):  # the first ones
            self.database.beside(self._add_collected())

    async def _add_collected(self) -> None:
        await self.database.pause(GAP)
        lines, self._collected = self._collected, []
        try:
            await self.add(lines)
        except PyMongoError as error:
            log.warning("events.untold", extra={"lines": len(lines), "error": str(error)[:200]})

    async def complete(self, lines: Sequence[Document]) -> None:
        """Store those of the lines that are missing; a look is cheaper than a write."""
        ids = [line["_id"] for line in lines]
        known = {
            row["_id"] for row in await self._events.find({"_id": {"$in": ids}}, {"_id": 1}).to_list(None)
        }
        missing = [line for line in lines if line["_id"] not in known]
        if missing:
            await self.add(missing)

    async def tell(self, name: str, author: str, *, key: str | None = None, **data: Any) -> None:
        """Store what has happened; a database that does not answer is told to the log only.

        `key` makes one line of however many calls.
        """
        try:
            await self.add([_event(name, author, data, key=key, outcome="done")])
        except PyMongoError as error:
            log.warning("event.untold", extra={"name_": name, "error": str(error)[:200]})

    async def tell_of(self, owner: Owner, what: str, **data: Any) -> None:
        """Store what a worker does, once per owner."""
        key = f"{owner.id}.{what}"
        await self.tell(f"worker.{what}", owner.worker, key=key, owner=owner.id, pid=owner.pid, **data)

    @asynccontextmanager
    async def action(self, name: str, author: str, **data: Any) -> AsyncIterator[None]:
        """The line of what is done inside the block: stored before, its outcome after.

        So an action without its line cannot exist. A line without an outcome says that nobody knows it: the
        process died in between, or the database did not answer.

        Raises: PyMongoError if the line cannot be stored; then nothing has been done.
        """
        line = _event(name, author, data)
        await self._durable.insert_one(line)
        try:
            yield
        except Core4Error as refused:
            if refused.status < 500:
                await self._conclude(line, f"refused: {refused.detail}"[:500])
            raise
        await self._conclude(line, "done")

    async def _conclude(self, line: Document, outcome: str) -> None:
        try:
            await self._events.update_one(
                {"_id": line["_id"], "outcome": None}, {"$set": {"outcome": outcome}}
            )
        except PyMongoError as error:
            log.warning("event.unfinished", extra={"line": str(line["_id"]), "error": str(error)[:200]})

    async def forget(self, before: datetime, limit: int) -> int:
        """Delete up to `limit` lines of the audit from before that time; how many."""
        return await self._forget({"channel": AUDIT, "bucket": None, "created": {"$lt": before}}, limit)

    async def forget_counts(self, now: datetime, limit: int) -> int:
        """Delete counts that have lived long enough, up to `limit` of each bucket; how many."""
        done = 0
        for bucket, life in LIVES.items():
            old: Document = {"channel": COUNTS, "bucket": bucket, "created": {"$lt": now - life}}
            done += await self._forget(old, limit)
        return done

    async def _forget(self, where: Document, limit: int) -> int:
        rows = await self._events.find(where, {"_id": 1}).sort("created", 1).limit(limit).to_list(None)
        if not rows:
            return 0
        ids = [row["_id"] for row in rows]
        return (await self._events.delete_many({"_id": {"$in": ids}, **where})).deleted_count

    # ------------------------------------------------------------------ state counts

    async def counted(self, now: datetime, every: float) -> bool:
        """True if somebody has counted in this interval of `every` seconds."""
        key = _count_key("second", _start("second", now, every))
        return await self._events.find_one({"_id": key}, {"_id": 1}) is not None

    async def count(self, now: datetime, every: float, counts: Mapping[str, int]) -> None:
        """Keep how many jobs were in which state: in each bucket of time stays what had the highest total.

        Any number of counters may do it, and repeat it.
        """
        total = sum(counts.values())
        # The finest comes last: that is where others look whether it has been done.
        for bucket in reversed(tuple(LIVES)):
            start = _start(bucket, now, every)
            begun, highest = self._kept.get(bucket, (start, -1))
            if begun == start and highest >= total:
                continue  # an idle system counts the same again and again
            fields = {
                "channel": COUNTS,
                "bucket": bucket,
                "created": start,
                "total": total,
                "data": dict(counts),
            }
            try:
                await self._events.update_one(
                    {"_id": _count_key(bucket, start), "total": {"$lt": total}}, {"$set": fields}, upsert=True
                )
                self._kept[bucket] = start, total
            except DuplicateKeyError:
                pass  # as many or more have been counted in this bucket

    async def history(
        self, start: datetime, end: datetime, *, descending: bool = True, page: int = 0, per_page: int = 10
    ) -> Page:
        """One page of a span's counts: `created` (the bucket's begin), `total` and one field per state."""
        bucket = bucket_of(start, end, utcnow())
        span = {"$gte": _start(bucket, start, 1), "$lte": end}
        where: Document = {"channel": COUNTS, "bucket": bucket, "created": span}
        found = await self._page(where, ["created", "total", "data"], descending, page, per_page)
        rows = [{"created": row["created"], "total": row["total"], **row["data"]} for row in found.rows]
        return Page(rows, found.total, page, per_page)

    # ------------------------------------------------------------------ the audit

    async def page(
        self, where: Mapping[str, Any], *, descending: bool = True, page: int = 0, per_page: int = 10
    ) -> Page:
        """One page of the audit, by time; `where` is a trusted filter."""
        full = {"channel": AUDIT, "bucket": None, **where}
        return await self._page(full, FIELDS, descending, page, per_page)

    async def _page(
        self, full: Document, fields: Sequence[str], descending: bool, page: int, per_page: int
    ) -> Page:
        total = await self._events.count_documents(full)
        pages = -(-total // per_page)
        number = pages + page if page < 0 else page
        if number < 0 or number >= pages:
            return Page([], total, page, per_page)
        cursor = self._events.find(full, list(fields)).sort(
            [("created", -1 if descending else 1), ("_id", 1)]
        )
        return Page(await cursor.skip(number * per_page).limit(per_page).to_list(None), total, page, per_page)


def _event(
    name: str, author: str, data: Mapping[str, Any], *, key: str | None = None, outcome: str | None = None
) -> Document:
    return {
        "_id": key or str(ObjectId()),
        "created": utcnow(),
        "channel": AUDIT,
        "bucket": None,
        "name": name,
        "author": author,
        "request_id": identifiers.request_id(),
        "data": {field: value for field, value in data.items() if value is not None},
        "outcome": outcome,
    }


def bucket_of(start: datetime, end: datetime, now: datetime) -> str:
    """The buckets in which a span is told: the finest for hours, coarser for days, months and years.

    Never finer than what is still kept of the span's begin.
    """
    names = list(LIVES)
    wanted = next((bucket for bucket, span in _SPANS if end - start < span), "day")
    kept = next((bucket for bucket, life in LIVES.items() if now - start < life), "day")
    return max(wanted, kept, key=names.index)


def _start(bucket: str, at: datetime, every: float) -> datetime:
    """The begin of the bucket that `at` is in; the finest is `every` seconds wide."""
    match bucket:
        case "day":
            return at.replace(hour=0, minute=0, second=0, microsecond=0)
        case "hour":
            return at.replace(minute=0, second=0, microsecond=0)
        case "minute":
            return at.replace(second=0, microsecond=0)
    return datetime.fromtimestamp(at.timestamp() // every * every, UTC)


def _count_key(bucket: str, start: datetime) -> str:
    return f"{COUNTS}.{bucket}.{start.isoformat()}"
