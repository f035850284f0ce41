"""What leaves the queue and the journal because it is old."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from bson import ObjectId

from core4 import transitions
from core4.database import Document
from core4.jobs import utcnow
from core4.outbox import Outbox
from core4.states import STOPPED
from core4.store import JobStore, readable

KEYED = timedelta(hours=24)  # that an Idempotency-Key holds at least


class Retention:
    """Bounded portions, by any worker; all may be repeated after an error."""

    def __init__(self, store: JobStore, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox

    async def retire(self, before: datetime, limit: int) -> int:
        """Let stopped jobs go that ended before that time, up to `limit`; how many have."""
        found = self._store.queue.find({"stopped_at": {"$lt": before}}).sort("stopped_at", 1).limit(limit)
        done = 0
        for seen in readable(await found.to_list(None)):
            if seen.state in STOPPED:
                done += await self._outbox.cas_and_settle(seen, transitions.retire(seen))
        return done

    async def expire_results(
        self, since: datetime | None, before: datetime, limit: int
    ) -> tuple[int, datetime | None]:
        """Drop the results of up to `limit` jobs journaled in that time; how many, and where to go on."""
        span = {"$lt": before, **({"$gte": since} if since else {})}
        # One that has still to be put into a return queue needs its result.
        where = {"journaled_at": span, "consumed": None, "result": {"$ne": None}, "settle": None}
        found = self._store.journal.find(where).sort("journaled_at", 1).limit(limit)
        done = 0
        rows = await found.to_list(None)
        for seen in readable(rows, journal=True):
            change = transitions.expire_result(seen)
            done += change is not None and await self._store.cas(seen, change) is not None
        return done, rows[-1]["journaled_at"] if rows else since

    async def forgettable(self, before: datetime, limit: int) -> list[ObjectId]:
        """Up to `limit` jobs that are in the journal since before that time, and that nothing needs any more.

        Needed are a job whose move or restart is not done; one whose `Idempotency-Key` may still be sent
        again; and one whose parent goes on, which must find its child should it ask for it once more.
        """
        low: datetime | None = None
        names = ("journaled_at", "settle", "audit", "outbox", "request_hash", "enqueued")
        while True:
            span = {"$lt": before, **({"$gte": low} if low else {})}
            found = self._store.journal.find({"journaled_at": span}, list(names))
            rows = await found.sort("journaled_at", 1).limit(limit).to_list(None)
            parents = await self._store.opened({row["enqueued"]["parent_id"] for row in rows} - {None})
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
        return (await self._store.journal.delete_many(where)).deleted_count


def _needed(row: Document, parents: Collection[ObjectId], young: datetime) -> bool:
    if row.get("settle") or row.get("audit") or row.get("outbox") or row["enqueued"]["parent_id"] in parents:
        return True
    return bool(row.get("request_hash")) and row["enqueued"]["at"] > young
