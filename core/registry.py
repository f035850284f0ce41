"""The workers: who is up, what they serve, and who has to be declared dead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import count
from typing import Any

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from core4 import handshake
from core4.database import Database, Document, ScaleIndex, exactly
from core4.errors import Unavailable
from core4.jobs import Owner, utcnow

WORKER = "sys.worker"
INDEXES = {
    WORKER: (
        IndexModel([("state", 1), ("beat", 1)], name="state"),
        ScaleIndex([("jobs", 1), ("state", 1)], name="jobs"),
        # Only those that live have a number.
        IndexModel([("nr", 1)], name="nr", unique=True, partialFilterExpression={"nr": {"$exists": True}}),
        ScaleIndex([("launch", 1)], name="launch", sparse=True),
    )
}

_UNSAID: Mapping[str, Any] = {
    "label": "-",
    "type": "inprocess",
    "debug": False,
    "timeout": None,
    "broken": [],
}
LIVING = ["new", "up", "drain"]
LOADING = 60.0  # seconds that a worker may need to load its jobs before it counts as dead
RETRIES = 100  # of one announcement, if others take the same number


class WorkerRegistry:
    """The only writer of `sys.worker`; one document per process start, `_id` is the owner's id.

    States: `new` (loads its jobs), `up`, `drain` (finishes what it has), `down` (left by itself), `dead`
    (declared so; for good).
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._workers = database.collection(WORKER)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def enlist(self, owner: Owner, **more: Any) -> None:
        """Announce a worker that loads its jobs; it gets the number that it wants, or the lowest free one.

        `more` are further fields of its document.

        Raises: Unavailable if too many others are announced at the same time.
        """
        document = {
            "_id": owner.id,
            "name": owner.worker,
            "kind": "worker",
            "hostname": owner.hostname,
            "pid": owner.pid,
            "state": "new",
            "slots": 0,
            "running": 0,
            "namespaces": [],
            "jobs": [],
            "started_at": utcnow(),
            **{name: value for name, value in vars(owner.kind).items() if value is not None},
            **more,
        }
        for _ in range(RETRIES):
            nr = await self._free_nr(owner.kind.nr)
            try:
                # Two writes would leave a document without a beat: the server's clock is set with the rest.
                await self._workers.update_one(
                    {"_id": owner.id},
                    {
                        "$setOnInsert": {**document, "nr": nr, "label": f"w{nr}"},
                        "$currentDate": {"beat": True},
                    },
                    upsert=True,
                )
                return
            except DuplicateKeyError:
                continue  # somebody else took the number
        raise Unavailable("too many workers start at the same time, try again")

    async def _free_nr(self, wanted: int | None) -> int:
        rows = await self._workers.find({"nr": {"$exists": True}}, {"nr": 1}).to_list(None)
        taken = {row["nr"] for row in rows}
        if wanted is not None and wanted not in taken:
            return wanted
        return next(nr for nr in count(1) if nr not in taken)

    async def register(
        self, owner: Owner, *, slots: int, namespaces: Sequence[str], jobs: Sequence[str], version: str
    ) -> None:
        """It is ready. Comes before its first claim, so that a claim always has a living owner."""
        await self.enlist(owner)
        fields = {
            "state": "up",
            "slots": slots,
            "namespaces": list(namespaces),
            "jobs": list(jobs),
            "version": version,
        }
        await self._workers.update_one(
            {"_id": owner.id, "state": "new"}, {"$set": fields, "$currentDate": {"beat": True}}
        )

    async def admit(self, owner: Owner, *, namespaces: Sequence[str], token: str) -> bool:
        """Let a worker in that comes over HTTP; `token` is the fingerprint of its own.

        Returns False if another has its id; may be repeated.
        """
        await self.enlist(owner, namespaces=list(namespaces), token=token)
        return await self._workers.find_one({"_id": owner.id, "token": token}, {"_id": 1}) is not None

    async def by_token(self, token: str) -> Document | None:
        """The document of the worker with this token, whatever became of it."""
        found = await self._workers.find_one({"_id": handshake.token_owner(token)})
        if found is None or not handshake.same(found.get("token", ""), handshake.fingerprint(token)):
            return None
        return found

    async def beat(
        self,
        owner: Owner,
        *,
        running: int,
        draining: bool = False,
        gate: str | None = None,
        paused: bool = False,
    ) -> bool:
        """Renew; False if the worker has been declared dead and must give up what it holds.

        `gate` is why it starts only forced jobs just now, `paused` that it starts none by its own decision.
        """
        result = await self._workers.update_one(
            {"_id": owner.id, "state": {"$in": ["up", "drain"], "$exists": True}},  # see `exactly`
            {
                "$currentDate": {"beat": True},
                "$set": {
                    "running": running,
                    "state": "drain" if draining else "up",
                    "gate": gate,
                    "paused_here": paused,
                },
            },
        )
        return bool(result.matched_count)

    async def serve(
        self,
        owner: Owner,
        jobs: Sequence[str],
        namespaces: Sequence[str] | None = None,
        broken: Sequence[str] = (),
    ) -> None:
        """Say anew which jobs this worker runs, and in which namespaces if those may have changed.

        `broken` says of each file that cannot be used why.
        """
        fields = {"jobs": list(jobs), "broken": list(broken)}
        fields |= {"namespaces": list(namespaces)} if namespaces else {}
        await self._workers.update_one({"_id": owner.id}, {"$set": fields})

    async def leave(self, owner: Owner) -> None:
        """The worker ends by itself and holds nothing any more."""
        await self._end({"_id": owner.id, "state": {"$in": LIVING}}, "down")

    async def bury(self, dead_after: float) -> list[str]:
        """Declare dead whoever has not renewed for `dead_after` seconds of the server's clock; their ids.

        Whoever loads its jobs holds none yet, and does not renew: it gets longer.
        """
        now = await self._database.server_time()
        first = now - timedelta(seconds=min(dead_after, LOADING))
        # One without a beat never registered as a worker does: somebody wrote it by hand.
        where = {"state": {"$in": LIVING}, "beat": {"$not": {"$gte": first}}}
        buried: list[str] = []
        for worker in await self._workers.find(where, {"state": 1, "beat": 1}).to_list(None):
            beat, after = worker.get("beat"), dead_after
            if worker["state"] == "new":
                after = max(dead_after, LOADING)
            if not isinstance(beat, datetime) or beat < now - timedelta(seconds=after):
                seen = {"_id": worker["_id"], "state": exactly(worker["state"]), "beat": beat}
                why = f"no sign of life for more than {after:g} s"
                buried += [worker["_id"]] if await self._end(seen, "dead", why) else []
        return buried

    async def living(self) -> list[Document]:
        """Those that have not ended: when each has renewed last (`beat`), and the `namespaces` it serves."""
        seen = {"beat": 1, "namespaces": 1}
        return await self._workers.find({"state": {"$in": LIVING}}, seen).to_list(None)

    async def condemn(self, owner_id: str, why: str) -> bool:
        """Declare one dead that is known to be gone; False if it has ended already."""
        return await self._end({"_id": owner_id, "state": {"$in": LIVING}}, "dead", why)

    async def _end(self, where: Document, state: str, error: str | None = None) -> bool:
        fields = {"state": state, "running": 0, "ended_at": utcnow()}
        if error:
            fields["error"] = error
        result = await self._workers.update_one(where, {"$set": fields, "$unset": {"nr": ""}})
        return bool(result.modified_count)

    async def forget(self, before: datetime) -> int:
        """Delete workers that ended before that time; how many."""
        ended = {"state": {"$in": ["down", "dead"]}, "ended_at": {"$lt": before}}
        return (await self._workers.delete_many(ended)).deleted_count

    async def alive_ids(self) -> set[str]:
        """The ids of all that have not been declared dead and have not left."""
        rows = await self._workers.find({"state": {"$in": ["up", "drain"]}}, {"_id": 1}).to_list(None)
        return {row["_id"] for row in rows}

    async def up(self) -> list[Document]:
        """The documents of all living workers."""
        return await self._workers.find({"state": {"$in": ["up", "drain"]}}).to_list(None)

    async def named(self, ids: Collection[str]) -> dict[str, Document]:
        """The documents of these owners that there are, whatever became of them."""
        rows = await self._workers.find({"_id": {"$in": list(ids)}}).to_list(None)
        return {row["_id"]: row for row in rows}

    async def serves(self, name: str, namespace: str | None = None) -> bool:
        """True if a living worker runs jobs of this name (in this namespace)."""
        where: dict[str, Any] = {"state": "up", "jobs": exactly(name)}
        if namespace is not None:
            where["namespaces"] = exactly(namespace)
        return await self._workers.find_one(where, {"_id": 1}) is not None

    async def list(self, limit: int = 200, where: Document | None = None) -> list[Document]:
        """The last `limit` worker documents, newest first; `beat_age` is in seconds of the server's clock."""
        now = await self._database.server_time()
        rows = await self._workers.find(where or {}).sort("started_at", -1).limit(limit).to_list(None)
        for row in rows:
            row.pop("token", None)
            row["beat_age"] = max((now - row["beat"]).total_seconds(), 0.0)
        return rows


def described(row: Mapping[str, Any], current: Sequence[Any], dead_after: float) -> Document:
    """A row of `WorkerRegistry.list` as readers get it.

    `status` is in myjobs' words: NEW loads its jobs, WAITING has none to run, BUSY runs some, HALTED has
    ended as it should, ERROR has not, or is silent for more than `dead_after` seconds; then `error` says so.
    `current` are the jobs that it runs.
    """
    error, state = row.get("error"), row["state"]
    if state in LIVING and row["beat_age"] > (max(dead_after, LOADING) if state == "new" else dead_after):
        error = f"no sign of life for {row['beat_age']:.0f} s"
    if error or state == "dead":
        status = "ERROR"
    elif state in ("new", "down"):
        status = "NEW" if state == "new" else "HALTED"
    else:
        status = "BUSY" if current else "WAITING"
    return {**_UNSAID, **row, "status": status, "error": error, "current": list(current)}
