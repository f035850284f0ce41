"""Return queues: lists with names, into which the ends of jobs are put, for whoever takes them out.

A record comes from the outbox of its job and has an id derived from the job's: however often it is put, it
is there once. What was taken stays for a while, marked as such, for the same reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import bson
from bson import ObjectId
from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from core4.database import Database, Document
from core4.jobs import utcnow
from core4.results import result_of

RETURN = "sys.return"
WINDOW = 100  # records looked at once
RESEND = timedelta(seconds=60)  # after which a record is sent again if nobody has said that it was
_TOLD = ("job_id", "request_id", "name", "namespace", "status", "finished_at", "result", "error")
_OWN = ("_id", "queue", "at", *_TOLD)

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    RETURN: (
        # Only what waits is in it: what was taken lies beside. `due` first: the embedded server finds nothing
        # by a partial index in which its field stands behind another, if the query has more conditions.
        IndexModel(
            [("due", 1), ("queue", 1), ("at", 1), ("_id", 1)],
            name="due",
            partialFilterExpression={"due": True},
        ),
        IndexModel([("taken.id", 1)], name="taken", sparse=True),
        IndexModel([("forward", 1)], name="forward", sparse=True),
        IndexModel([("at", 1)], name="at"),
    ),
}


def record_of(job: Mapping[str, Any], note: Mapping[str, Any]) -> Document:
    """What is put into a queue when a job has ended: the note of its outbox says where."""
    told = result_of(job)
    return {"_id": note["target"], "queue": note["queue"], **{name: told[name] for name in _TOLD}}


def body_of(record: Mapping[str, Any]) -> bytes:
    """A record as the body of a message."""
    return json.dumps(_told(record), default=_plain, separators=(",", ":")).encode()


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


class Returns:
    """The only writer of `sys.return`. All methods raise PyMongoError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._records = database.collection(RETURN)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def put(self, record: Document) -> None:
        """Put a record into its queue; nothing if it is there, or was."""
        now = utcnow()
        try:
            await self._records.insert_one({**record, "at": now, "due": True, "forward": now})
        except DuplicateKeyError:
            return

    async def waiting(self, queue: str, limit: int, where: Mapping[str, Any] | None = None) -> int:
        """How many records a queue holds; no more than `limit` are counted."""
        rows = self._records.find({**(where or {}), "queue": queue, "due": True}, {"_id": 1}).limit(limit)
        return len(await rows.to_list(None))

    async def peek(self, queue: str, limit: int, where: Mapping[str, Any] | None = None) -> list[Document]:
        """The first records that a queue holds, oldest first; nothing is taken."""
        return [_told(row) for row in await self._window(queue, limit, where)]

    async def _window(self, queue: str, limit: int, where: Mapping[str, Any] | None) -> list[Document]:
        query = {**(where or {}), "queue": queue, "due": True}
        rows = self._records.find(query).sort([("at", 1), ("_id", 1)]).limit(limit)
        return await rows.to_list(None)

    async def take(
        self,
        queue: str,
        size: int,
        *,
        by: str,
        token: str,
        where: Mapping[str, Any] | None = None,
        room: float = math.inf,
    ) -> list[Document]:
        """Take up to `size` records out, oldest first; each is handed to one caller only.

        Args:
            token: of this call, see `taken`.
            where: more conditions on the records.
            room: bytes of results after which no more are taken.
        """
        taken: list[Document] = []
        mark = {"$set": {"taken": {"at": utcnow(), "by": by, "id": token}}, "$unset": {"due": 1}}
        while len(taken) < size and room > 0:
            window = await self._window(queue, min(WINDOW, size - len(taken)), where)
            for row in window:
                if room > 0 and await self._mark(row, mark):
                    taken.append(_told(row))
                    room -= len(bson.encode({"result": row["result"]}))
            if not window:
                break
        return taken

    async def taken(self, queue: str, *, by: str, token: str) -> list[Document]:
        """What the call of this token has taken, for whoever has not got the answer."""
        where = {"taken.id": token, "taken.by": by, "queue": queue}
        rows = await self._records.find(where).sort([("at", 1), ("_id", 1)]).to_list(None)
        return [_told(row) for row in rows]

    async def _mark(self, row: Document, mark: Mapping[str, Any]) -> bool:
        return bool((await self._records.update_one({"_id": row["_id"], "due": True}, mark)).modified_count)

    async def reset(self, queue: str, *, by: str, where: Mapping[str, Any] | None = None) -> int:
        """Empty a queue; how many records were in it."""
        mark = {"$set": {"taken": {"at": utcnow(), "by": by, "id": None}}, "$unset": {"due": 1}}
        query = {**(where or {}), "queue": queue, "due": True}
        return (await self._records.update_many(query, mark)).modified_count

    # ------------------------------------------------------------------ to a message broker

    async def unsent(self, limit: int) -> list[Document]:
        """Records that are to be sent to a message broker, oldest first."""
        found = self._records.find({"forward": {"$lte": utcnow()}}).sort("forward", 1).limit(limit)
        return await found.to_list(None)

    async def reserve(self, record: Mapping[str, Any]) -> bool:
        """Take on to send a record, which nobody else does meanwhile; False if somebody else is at it."""
        where = {"_id": record["_id"], "forward": record["forward"]}
        later = {"$set": {"forward": utcnow() + RESEND}}
        return bool((await self._records.update_one(where, later)).modified_count)

    async def sent(self, record_id: ObjectId) -> None:
        """The broker has a record."""
        await self._records.update_one({"_id": record_id}, {"$unset": {"forward": 1}})

    # ------------------------------------------------------------------ retention

    async def older(self, before: datetime, limit: int) -> list[Document]:
        """The first `limit` records that were put before that time: id and job."""
        found = self._records.find({"at": {"$lt": before}}, {"job_id": 1}).sort("at", 1).limit(limit)
        return await found.to_list(None)

    async def forget(self, ids: Sequence[ObjectId]) -> int:
        """Delete records, taken or not."""
        if not ids:
            return 0
        return (await self._records.delete_many({"_id": {"$in": list(ids)}})).deleted_count


def _told(row: Mapping[str, Any]) -> Document:
    return {name: row.get(name) for name in _OWN}
