"""What holds jobs back: pauses, the end of workers (one, or all from before a moment), rate limits.

A pause keeps jobs from being started and stops none that runs. Nothing is asked for in the name of a
worker or a namespace that is paused; jobs of a paused name or project leave the line when they are met
(`Claims.park`), so that they are in nobody's way.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from core4.database import Database, Document
from core4.errors import Unavailable
from core4.jobs import utcnow
from core4.options import Rate

CONTROL = "sys.control"
INDEXES = {CONTROL: (IndexModel([("kind", 1)], name="kind"),)}

_HALT = "halt"
RETRIES = 100  # of one start, if others keep starting jobs of the same name


@dataclass(frozen=True)
class Pause:
    """One pause. `scope` is everything, namespace, job, project or worker; `target` is which one.

    A project is the first dotted part of the jobs' names.
    """

    scope: str
    target: str
    by: str
    at: datetime
    reason: str | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Pause:
        return cls(
            scope=document["scope"],
            target=document["target"],
            by=document["by"],
            at=document["at"],
            reason=document["reason"],
        )

    def covers(self, name: str, namespace: str | None = None, worker: str | None = None) -> bool:
        """True if it keeps jobs of this name, in this namespace, on this worker from being started."""
        match self.scope:
            case "everything":
                return True
            case "namespace":
                return namespace == self.target
            case "worker":
                return worker == self.target
            case "project":
                return name.partition(".")[0] == self.target
        return name == self.target


@dataclass(frozen=True)
class Halt:
    """All workers that were started before `at`, by the database's clock, have to end."""

    by: str
    at: datetime
    reason: str | None = None


@dataclass(frozen=True)
class Stop:
    """One worker has to end: when what it runs has ended, or (`hard`) at once."""

    owner: str
    by: str
    at: datetime
    hard: bool = False
    reason: str | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Stop:
        return cls(
            owner=document["owner"],
            by=document["by"],
            at=document["at"],
            hard=document["hard"],
            reason=document["reason"],
        )


@dataclass(frozen=True)
class Controls:
    """All that is in force at one moment."""

    pauses: tuple[Pause, ...] = ()
    halt: Halt | None = None
    stops: tuple[Stop, ...] = ()

    @property
    def everything(self) -> Pause | None:
        """The pause of everything, if there is one."""
        return next((pause for pause in self.pauses if pause.scope == "everything"), None)

    @property
    def closed(self) -> list[str]:
        """The namespaces that are paused."""
        return [pause.target for pause in self.pauses if pause.scope == "namespace"]

    def opened(self, namespaces: Iterable[str]) -> list[str]:
        """Those of `namespaces` that are not paused."""
        closed = self.closed
        return [namespace for namespace in namespaces if namespace not in closed]

    def of_worker(self, worker: str) -> Pause | None:
        """What keeps a worker (`name@host`) from claiming anything."""
        named = (each for each in self.pauses if each.scope == "worker" and each.target == worker)
        return self.everything or next(named, None)

    def of_name(self, name: str) -> Pause | None:
        """The pause of a job's name or project."""
        own = (each for each in self.pauses if each.scope in ("job", "project"))
        return next((each for each in own if each.covers(name)), None)

    def of_job(self, name: str, namespace: str, worker: str | None) -> Pause | None:
        """What keeps a waiting job from being started; `worker` is the one it is pinned to."""
        return next((each for each in self.pauses if each.covers(name, namespace, worker)), None)

    def halts(self, started_at: datetime) -> bool:
        """True for a worker that was started at this time of the database's clock."""
        return self.halt is not None and self.halt.at > started_at

    def stop_of(self, owners: Container[str]) -> Stop | None:
        """What tells a worker to end; a hard stop before a gentle one."""
        meant = [stop for stop in self.stops if stop.owner in owners]
        return max(meant, key=lambda stop: stop.hard, default=None)


class ControlStore:
    """Pauses and halts in `sys.control`. All methods may be repeated after an error."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._controls = database.collection(CONTROL)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def read(self) -> Controls:
        """What is in force now."""
        pauses = await self._controls.find({"kind": "pause"}).to_list(None)
        halt = await self._controls.find_one({"_id": _HALT})
        stops = await self._controls.find({"kind": "stop"}).to_list(None)
        return Controls(
            tuple(sorted(map(Pause.from_document, pauses), key=lambda each: each.at)),
            Halt(halt["by"], halt["at"], halt["reason"]) if halt else None,
            tuple(map(Stop.from_document, stops)),
        )

    async def pause(self, scope: str, target: str = "", *, by: str, reason: str | None = None) -> Pause:
        """Pause; what is paused already stays as it is. Returns the pause that is in force."""
        key = _key(scope, target)
        document = {
            "kind": "pause",
            "scope": scope,
            "target": target,
            "by": by,
            "at": await self._database.server_time(),
            "reason": reason,
        }
        with suppress(DuplicateKeyError):  # somebody else paused it in this moment
            await self._controls.update_one({"_id": key}, {"$setOnInsert": document}, upsert=True)
        stored = await self._controls.find_one({"_id": key})
        return Pause.from_document(stored or document)

    async def resume(self, scope: str, target: str = "") -> bool:
        """End a pause; False if there is none. `Claims.unpark` puts its jobs back in line."""
        result = await self._controls.delete_one({"_id": _key(scope, target)})
        return bool(result.deleted_count)

    async def halt(self, *, by: str, reason: str | None = None) -> Halt:
        """Tell all workers that are up to end. Those that are started from now on are not meant."""
        with suppress(DuplicateKeyError):  # somebody else halts them in this moment
            await self._controls.update_one(
                {"_id": _HALT},
                {"$set": {"kind": "halt", "by": by, "reason": reason}, "$currentDate": {"at": True}},
                upsert=True,
            )
        stored = await self._controls.find_one({"_id": _HALT})
        assert stored is not None  # it is never deleted
        return Halt(stored["by"], stored["at"], stored["reason"])

    async def stop(self, owner: str, *, by: str, hard: bool = False, reason: str | None = None) -> Stop:
        """Tell one worker to end when its jobs have ended; or, `hard`, at once. Hard overrules the other."""
        key = f"stop:{owner}:{'hard' if hard else 'soft'}"
        document = {
            "kind": "stop",
            "owner": owner,
            "hard": hard,
            "by": by,
            "reason": reason,
            "at": await self._database.server_time(),
        }
        with suppress(DuplicateKeyError):  # somebody else stops it in this moment
            await self._controls.update_one({"_id": key}, {"$setOnInsert": document}, upsert=True)
        stored = await self._controls.find_one({"_id": key})
        return Stop.from_document(stored or document)

    async def forget_stops(self, before: datetime) -> int:
        """Delete what workers were told before that time, which have ended long since; how many."""
        return (await self._controls.delete_many({"kind": "stop", "at": {"$lt": before}})).deleted_count


@dataclass(frozen=True)
class Starts:
    """When jobs of a name were started lately, by the database's clock, and when to look after held ones."""

    name: str
    times: Sequence[datetime]
    rev: int
    wake_at: datetime | None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Starts:
        return cls(document["name"], document.get("times") or (), document["rev"], document.get("wake_at"))


class RateStore:
    """The starts of jobs with a `rate_limit`, one document per name in `sys.control`.

    It holds the times of the last starts themselves: so no window holds more of them than it may, wherever it
    begins. All methods may be repeated after an error.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._controls = database.collection(CONTROL)

    async def take(self, name: str, rate: Rate) -> datetime | None:
        """Note one more start; or note nothing and say when it may be tried again.

        Raises: Unavailable if too many others start jobs of this name.
        """
        for _ in range(RETRIES):
            seen = await self._read(name)
            now = await self._database.server_time()  # behind the reading: the times are in order
            free_at = rate.free_at(seen.times, now)
            if free_at > now:
                return free_at
            kept = max(rate.count, len(seen.times))
            if await self._cas(seen, {"$set": {"times": [*seen.times, now][-kept:]}}):
                return None
        raise Unavailable(f"too many start [{name}] at the same time, try again")

    async def expect(self, name: str, at: datetime | None = None) -> None:
        """Held jobs of this name have to be looked after at this time (now), or before."""
        at = at or await self._database.server_time()
        # A new revision also if somebody will look after them already: who has just seen none, and is about
        # to say that none has to be looked after, is to find out.
        change = {"$set": {"kind": "rate", "name": name}, "$min": {"wake_at": at}, "$inc": {"rev": 1}}
        for _ in range(RETRIES):
            with suppress(DuplicateKeyError):  # somebody else made it in this moment
                await self._controls.update_one({"_id": _rate_key(name)}, change, upsert=True)
                return

    async def expected(self) -> tuple[list[Starts], datetime]:
        """The names whose held jobs have to be looked after, and the database's time."""
        rows = await self._controls.find({"kind": "rate", "wake_at": {"$ne": None}}).to_list(None)
        if not rows:
            return [], utcnow()
        now = await self._database.server_time()
        return [Starts.from_document(row) for row in rows if row["wake_at"] <= now], now

    async def due_in(self) -> float | None:
        """Seconds until held jobs of some name have to be looked after; None if there are none."""
        wakes = [at for at in (await self.wakes()).values() if at is not None]
        if not wakes:
            return None
        return (min(wakes) - await self._database.server_time()).total_seconds()

    async def wakes(self) -> dict[str, datetime | None]:
        """When the held jobs of each name are looked after next; None if nobody will."""
        rows = await self._controls.find({"kind": "rate"}, {"name": 1, "wake_at": 1}).to_list(None)
        return {row["name"]: row.get("wake_at") for row in rows}

    async def look_again(self, seen: Starts, at: datetime | None) -> bool:
        """Say when held jobs are to be looked after next (None: there are none); False if another did."""
        # Without it rather than None: that would be less than any time, and stay.
        return await self._cas(
            seen, {"$set": {"wake_at": at}} if at else {"$set": {}, "$unset": {"wake_at": 1}}
        )

    async def _read(self, name: str) -> Starts:
        found = await self._controls.find_one({"_id": _rate_key(name)})
        return Starts.from_document(found or {"name": name, "rev": 0})

    async def _cas(self, seen: Starts, update: Document) -> bool:
        where = {"_id": _rate_key(seen.name), "rev": seen.rev}
        update["$set"] |= {"kind": "rate", "name": seen.name, "rev": seen.rev + 1}
        try:
            result = await self._controls.update_one(where, update, upsert=seen.rev == 0)
        except DuplicateKeyError:
            return False  # somebody else was the first to start one
        return bool(result.matched_count or result.upserted_id)


def _rate_key(name: str) -> str:
    return f"rate:{name}"


def _key(scope: str, target: str) -> str:
    return f"pause:{scope}:{target}"


def view(controls: Controls, running: Sequence[Document], waiting: Sequence[Document]) -> dict[str, Any]:
    """What is in force, as readers get it: each pause with how many of its jobs still run and are held.

    `running` and `waiting` are rows of `JobStore.load`.
    """

    def count(pause: Pause, rows: Sequence[Document]) -> int:
        return sum(row["n"] for row in rows if pause.covers(row["name"], row["namespace"], row["worker"]))

    pauses = [
        {**vars(pause), "running": count(pause, running), "held": count(pause, waiting)}
        for pause in controls.pauses
    ]
    return {"pauses": pauses, "halt": vars(controls.halt) if controls.halt else None}
