"""The workers: who is up, what they serve, and who has to be declared dead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from itertools import product
from typing import Any

from pymongo import IndexModel

from core4.database import Database, Document
from core4.jobs import Owner, utcnow

WORKER = "sys.worker"
INDEXES = {
    WORKER: (
        IndexModel([("state", 1), ("beat", 1)], name="state"),
        IndexModel([("jobs", 1), ("state", 1)], name="jobs"),
    )
}


class WorkerRegistry:
    """The only writer of `sys.worker`; one document per process start, `_id` is the owner's id.

    States: `up`, `drain` (finishes what it has), `down` (left by itself), `dead` (declared so; for good).
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._workers = database.collection(WORKER)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def register(
        self, owner: Owner, *, slots: int, namespaces: Sequence[str], jobs: Sequence[str], version: str
    ) -> None:
        """Announce a worker. Comes before its first claim, so that a claim always has a living owner."""
        now = utcnow()
        document = {
            "_id": owner.id,
            "name": owner.worker,
            "kind": "worker",
            "hostname": owner.hostname,
            "pid": owner.pid,
            "state": "up",
            "slots": slots,
            "running": 0,
            "namespaces": list(namespaces),
            "jobs": list(jobs),
            "version": version,
            "started_at": now,
        }
        # Two writes would leave a document without a beat: the server's clock is set with the rest.
        await self._workers.update_one(
            {"_id": owner.id}, {"$setOnInsert": document, "$currentDate": {"beat": True}}, upsert=True
        )

    async def beat(
        self, owner: Owner, *, running: int, draining: bool = False, gate: str | None = None
    ) -> bool:
        """Renew; False if the worker has been declared dead and must give up what it holds.

        `gate` is why it starts only forced jobs just now.
        """
        result = await self._workers.update_one(
            {"_id": owner.id, "state": {"$in": ["up", "drain"]}},
            {
                "$currentDate": {"beat": True},
                "$set": {"running": running, "state": "drain" if draining else "up", "gate": gate},
            },
        )
        return bool(result.matched_count)

    async def serve(self, owner: Owner, jobs: Sequence[str]) -> None:
        """Say anew which jobs this worker runs."""
        await self._workers.update_one({"_id": owner.id}, {"$set": {"jobs": list(jobs)}})

    async def leave(self, owner: Owner) -> None:
        """The worker ends by itself and holds nothing any more."""
        await self._workers.update_one(
            {"_id": owner.id, "state": {"$in": ["up", "drain"]}},
            {"$set": {"state": "down", "running": 0, "ended_at": utcnow()}},
        )

    async def bury(self, dead_after: float) -> list[str]:
        """Declare dead whoever has not renewed for `dead_after` seconds of the server's clock; their ids."""
        limit = await self._database.server_time() - timedelta(seconds=dead_after)
        buried: list[str] = []
        # One without a beat never registered as a worker does: somebody wrote it by hand.
        for state, beat in product(("up", "drain"), ({"$lt": limit}, None)):
            late = await self._workers.find({"state": state, "beat": beat}, {"_id": 1}).to_list(None)
            for worker in late:
                result = await self._workers.update_one(
                    {"_id": worker["_id"], "state": state, "beat": beat},
                    {"$set": {"state": "dead", "running": 0, "ended_at": utcnow()}},
                )
                buried += [worker["_id"]] if result.modified_count else []
        return buried

    async def forget(self, before: datetime) -> int:
        """Delete workers that ended before that time; how many."""
        ended = {"state": {"$in": ["down", "dead"]}, "ended_at": {"$lt": before}}
        return (await self._workers.delete_many(ended)).deleted_count

    async def alive_ids(self) -> set[str]:
        """The ids of all that have not been declared dead and have not left."""
        return {worker["_id"] for worker in await self.up()}

    async def up(self) -> list[Document]:
        """The documents of all living workers."""
        return await self._workers.find({"state": {"$in": ["up", "drain"]}}).to_list(None)

    async def named(self, ids: Collection[str]) -> dict[str, Document]:
        """The documents of these owners that there are, whatever became of them."""
        rows = await self._workers.find({"_id": {"$in": list(ids)}}).to_list(None)
        return {row["_id"]: row for row in rows}

    async def serves(self, name: str, namespace: str | None = None) -> bool:
        """True if a living worker runs jobs of this name (in this namespace)."""
        where: dict[str, Any] = {"jobs": name, "state": "up"}
        if namespace is not None:
            where["namespaces"] = namespace
        return await self._workers.find_one(where, {"_id": 1}) is not None

    async def list(self, limit: int = 200) -> list[Document]:
        """The last `limit` worker documents, newest first; `beat_age` is in seconds of the server's clock."""
        now = await self._database.server_time()
        rows = await self._workers.find({}).sort("started_at", -1).limit(limit).to_list(None)
        for row in rows:
            row["beat_age"] = max((now - row["beat"]).total_seconds(), 0.0)
        return rows
