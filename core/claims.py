"""The line of due jobs: who is taken out of it by a worker, who is put aside, and who is put back.

A job that may not be started now leaves the line when it is met, so that it is in nobody's way: its name
is paused, the slots of its `max_running` are taken, or the starts of its `rate_limit` are used up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from core4 import transitions
from core4.changes import Change, Lookout, turn
from core4.controls import Controls, RateStore, Starts
from core4.database import Document, exactly
from core4.errors import LeaseLost
from core4.jobs import FORCED_BELOW, Job, Owner
from core4.outbox import Outbox
from core4.states import WAITING
from core4.store import QUEUE, JobStore, readable

_NO_CONTROLS = Controls()
_ANY: Mapping[str, int] = {}
PEEK = 64  # candidates read at once where the server cannot limit a scan
WOKEN = 64  # jobs of a name read and woken at once
END = 2**63 - 1  # no rank is above it
_MANY = 2**31

Begins = Callable[[Job], int | None]


def _begins_later(job: Job) -> int | None:
    return None


class Claimed(list[Job]):
    """The jobs that one look has taken.

    `more` is False if no other look will find any before something changes; `pinned` the same for those
    that are for this worker alone. `begun` are those of which nothing is left to be asked or written
    before their bodies begin. `barren` if it has seen the end of the line, and nothing that it may take.
    """

    def __init__(
        self,
        jobs: Iterable[Job] = (),
        *,
        more: bool = True,
        pinned: bool = True,
        begun: Collection[ObjectId] = (),
    ) -> None:
        super().__init__(jobs)
        self.more, self.pinned, self.begun = more, pinned, begun
        self.barren = False


def stir(
    lookout: Lookout,
    change: Change,
    owner: Owner,
    namespaces: Collection[str],
    crowd: Callable[[str | None], int],
) -> bool:
    """Have a worker look at the line, in its turn, if a change of the queue says that there may be something.

    Returns whether that may be something for this worker alone.

    Args:
        namespaces: those that the worker serves.
        crowd: how many live that look at the line of a namespace, or of any; 0 if that is not known.
    """
    fields, resync = change.fields, change.kind == "resync"
    namespace = fields.get("namespace")  # only an insert tells
    if namespace is not None and namespace not in namespaces:
        return False
    # What is for one worker only stands in no line: it is told of by what holds it, or held it until now.
    freed = fields.get("query_at", change) is None and not (fields.get("due") or fields.get("lease"))
    pinned = freed or (fields.get("held") == "worker" and fields.get("worker") in (None, owner.worker))
    if resync or pinned:
        lookout.hint()
    elif fields.get("due"):
        lookout.hint_of(change.id, turn(change.id, owner.id, crowd(namespace)))
    elif "due" in fields or change.kind == "delete":
        lookout.gone(change.id)
    return resync or pinned


class Claims:
    """What stands between a due job and the worker that starts it."""

    def __init__(self, store: JobStore, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox
        self._rates = RateStore(store.database)
        self._horizon: dict[str, int] = {}
        self._raced = False  # somebody was faster the last time: who takes several at once loses several

    async def claim(
        self,
        owner: Owner,
        *,
        namespaces: Sequence[str],
        limit: int = 1,
        rooms: Mapping[str, int] = _ANY,
        forced: bool = False,
        awaited: bool = False,
        pinned: bool = True,
        arrived: Sequence[Document] | None = None,
        controls: Controls = _NO_CONTROLS,
        begins: Begins = _begins_later,
    ) -> Claimed:
        """Up to `limit` due jobs of `namespaces`, now held by `owner`, first in line first.

        `rooms` says of how many jobs of a name this worker has room for, `controls` is what operators hold
        back. With `forced` only jobs with force are taken: they are the first in rank, so the same index
        gives them. With `awaited` only jobs that somebody waits for. Without `pinned` those that are for
        this worker alone, which stand in no line, are not looked for. `arrived` is all that can be in
        line, if that is known: then it is not read. `begins` says in which process a job begins as soon
        as it is claimed; what has to be admitted first does not.
        """
        full = [name for name, room in rooms.items() if room <= 0]
        where: Document = {"name": {"$nin": full}} if full else {}
        if awaited:
            where["awaited"] = True
        if forced:
            where["rank"] = {"$lt": FORCED_BELOW}
        if forced or awaited:
            arrived = None  # it may be of any kind
        namespaces = controls.opened(namespaces)
        while True:
            claimed, paused, again = await self._claim_some(
                owner, namespaces, where, limit, controls, arrived, rooms=rooms, pinned=pinned, begins=begins
            )
            for name in paused:
                await self.park(name)
            # Who was too late for what it was told of, or passed some of it over, has not seen the line.
            if claimed or not (again or (arrived and self._raced)):
                break
            arrived = None
        claimed.barren = not (claimed or claimed.more)
        if where or controls.closed:
            claimed.more = claimed.pinned = True
        return claimed

    async def _claim_some(
        self,
        owner: Owner,
        namespaces: Sequence[str],
        where: Document,
        limit: int,
        controls: Controls,
        arrived: Sequence[Document] | None,
        *,
        rooms: Mapping[str, int],
        pinned: bool,
        begins: Begins,
    ) -> tuple[Claimed, set[str], bool]:
        """Some due jobs, the paused names that were met, and whether others left the line."""
        closed: Document = {"namespace": {"$nin": controls.closed}} if controls.closed else {}
        peek = arrived is not None or limit > 1 or not self._store.database.find_and_modify
        look = self._pinned(owner, {**where, **closed}, limit if pinned else 0)
        if arrived is not None:
            own, more = await look, False
            waiting = [job for job in arrived if job.get("namespace") in namespaces]
        else:
            own, (waiting, more) = await asyncio.gather(
                look, self._peek(namespaces if peek else (), where, limit + 8)
            )
        if own and not peek:
            peek, (waiting, more) = True, await self._peek(namespaces, where, limit + 8)
        if peek:
            found, paused, gone = await self._claim_of(
                [*own, *waiting], owner, limit, controls, rooms, begins
            )
            found.more = found.more or more
            found.pinned = found.more and bool(own)
            return found, paused, gone
        found = Claimed(pinned=False)
        while len(found) < limit:
            job = await self._find_and_claim(owner, namespaces, where)
            if job is None:
                found.more = False
                break
            if controls.of_name(job.name):
                await self._put_aside(job, "paused")
                return found, {job.name}, True
            admitted = await self.admitted(job)
            found += [admitted] if admitted else []
        return found, set(), False

    async def _claim_of(
        self,
        candidates: Sequence[Document],
        owner: Owner,
        limit: int,
        controls: Controls,
        rooms: Mapping[str, int],
        begins: Begins,
    ) -> tuple[Claimed, set[str], bool]:
        """The same of what has been read of the line."""
        # What is in another state only a hand puts in line; see core4.doctor.
        waiting = [job for job in readable(candidates) if job.state in WAITING]
        waiting.sort(key=lambda job: job.rank)
        paused = {job.name for job in waiting if controls.of_name(job.name)}
        free = [job for job in waiting if job.name not in paused]
        line = _fitting(free, rooms)
        begin = _beginning(line[:limit], begins)
        # What is in the journal although it came into the line was there before it came.
        held, done = await asyncio.gather(
            self._take(owner, line, limit, begin),
            self._store.in_journal(list(begin)),
            return_exceptions=True,  # a claim must not go on when nobody waits for it any more
        )
        if isinstance(held, BaseException):
            raise held
        if isinstance(done, BaseException):
            done = set(begin)  # that is not known: the start asks again
        taken = [await self.admitted(job) for job in held]
        more = self._raced or len(held) >= limit or len(line) < len(free)
        jobs = [job for job in taken if job is not None]
        return Claimed(jobs, more=more, begun=begin.keys() - done), paused, bool(paused) or None in taken

    async def admitted(self, job: Job) -> Job | None:
        """The claimed job within its limits across all workers; None if it has left the line for them."""
        slots = job.slots()
        free = await self._store.free_slots(slots)
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
                return await self._store.held(
                    job, lease, partial(transitions.take_slot, lease=lease, slot=slot)
                )
            except DuplicateKeyError:
                continue  # somebody else was faster
            except LeaseLost:
                return None
        await self._put_aside(job, "max_running")
        key = job.document["slot_key"]
        await self._park_all(job, "max_running", slot_key=key)
        if await self._store.free_slots(
            job.slots()
        ):  # since then: whoever freed it may have found nobody to wake
            await self._store.wake_slot(key)
        return None

    async def _park_all(self, job: Job, held: str, **same: Any) -> None:
        """Take all out of the line that stand in it for the same: each would be claimed to be put aside."""
        pinned: Document = {"held": "worker", "worker": job.worker, "query_at": None}
        line: Document = pinned if job.worker else {"due": True}
        await self._store.queue.update_many(
            {**line, **same}, {"$set": {"held": held}, "$unset": {"due": 1}, "$inc": {"rev": 1}}
        )

    async def _put_aside(self, job: Job, held: str) -> None:
        lease = transitions.lease_of(job)
        with suppress(LeaseLost):  # then somebody else has it
            after = await self._store.held(job, lease, lambda seen: transitions.put_aside(seen, lease, held))
            await self._outbox.try_settle(after)

    # ------------------------------------------------------------------ the line

    async def _pinned(self, owner: Owner, some: Document, limit: int) -> list[Document]:
        if not limit:
            return []
        where: Document = {"held": "worker", "worker": exactly(owner.worker), "query_at": None, **some}
        return await self._store.queue.find(where).sort("rank", 1).limit(limit).to_list(None)

    async def _peek(
        self, namespaces: Sequence[str], some: Document, count: int
    ) -> tuple[list[Document], bool]:
        """The first in each line, and whether one of them is longer."""
        found: list[Document] = []
        longer = False
        for namespace in namespaces:
            first, more = await self._peek_namespace(namespace, some, count)
            found, longer = found + first, longer or more
        return found, longer

    async def _peek_namespace(
        self, namespace: str, some: Document, count: int
    ) -> tuple[list[Document], bool]:
        """The first in line. Where the server reads all that match, a bound on the rank keeps that few.

        There is always one: without, the embedded server finds no index for the line of one namespace.
        """
        where: Document = {"due": True, "namespace": namespace, **some}
        if "rank" in some:  # bound already, and what it finds says nothing of the rest of the line
            return await self._first(where, count), True
        horizon = self._horizon.get(namespace)
        if horizon is not None and (found := await self._first({**where, "rank": {"$lt": horizon}}, count)):
            return found, True
        found = await self._first({**where, "rank": {"$lte": END}}, max(PEEK, count))
        longer = len(found) >= max(PEEK, count)
        if longer:
            self._horizon[namespace] = found[-1]["rank"] + 1
        else:
            self._horizon.pop(namespace, None)
        return found, longer

    async def _first(self, where: Document, count: int) -> list[Document]:
        return await self._store.queue.find(where).sort("rank", 1).limit(count).to_list(None)

    async def _take(
        self, owner: Owner, line: Sequence[Job], limit: int, begin: Mapping[ObjectId, int]
    ) -> list[Job]:
        if self._raced or min(limit, len(line)) <= 1:
            return await self._take_one_by_one(owner, line, limit, begin)
        wishes = [(seen, transitions.claim(seen, owner, begin.get(seen.id))) for seen in line[:limit]]
        taken = await self._store.cas_many(wishes)
        jobs = [taken[seen.id] for seen, _ in wishes if seen.id in taken]
        more = await self._take_one_by_one(owner, line[limit:], limit - len(jobs), {})
        if len(jobs) < len(wishes):
            self._raced = True
        return jobs + more

    async def _take_one_by_one(
        self, owner: Owner, line: Sequence[Job], limit: int, begin: Mapping[ObjectId, int]
    ) -> list[Job]:
        taken: list[Job] = []
        self._raced = False
        index = 0
        while index < len(line) and len(taken) < limit:
            seen = line[index]
            index += 1
            job = await self._store.cas(seen, transitions.claim(seen, owner, begin.get(seen.id)))
            if job is None:
                self._raced = True
                index += random.randrange(3)  # others read the same line: do not race for each place in it
            else:
                taken.append(job)
        return taken

    async def _find_and_claim(self, owner: Owner, namespaces: Sequence[str], some: Document) -> Job | None:
        where: Document = {"due": True, "namespace": {"$in": list(namespaces)}, **some}
        where["state"] = {"$in": sorted(WAITING)}
        while True:
            document = await self._store.queue.find_one_and_update(
                where, transitions.claim_pipeline(owner), sort=[("rank", 1)], return_document=True
            )
            if not document:
                return None
            for job in readable([document]):
                return job

    # ------------------------------------------------------------------ pauses

    async def park(self, name: str) -> int:
        """Take the jobs of a paused name out of the line, so that they are in nobody's way."""
        update: Document = {"$set": {"held": "paused"}, "$unset": {"due": 1}, "$inc": {"rev": 1}}
        free = await self._store.queue.update_many({"due": True, "name": name}, update)
        pinned = await self._store.queue.update_many(
            {"held": "worker", "query_at": None, "name": name}, update
        )
        return free.modified_count + pinned.modified_count

    async def unpark(self, controls: Controls) -> int:
        """Put back in line what was parked and is not paused any more; any worker may repeat it."""
        parked = [{"$match": {"held": "paused"}}, {"$group": {"_id": "$name"}}]
        names = [row["_id"] for row in await self._store.database.aggregate(QUEUE, parked)]
        done = 0
        for name in names:
            if controls.of_name(name):
                continue
            where: Document = {"held": "paused", "name": name}
            free = await self._store.queue.update_many(
                {**where, "worker": None}, {"$set": {"due": True}, "$unset": {"held": 1}, "$inc": {"rev": 1}}
            )
            pinned = await self._store.queue.update_many(
                {**where, "worker": {"$ne": None}}, {"$set": {"held": "worker"}, "$inc": {"rev": 1}}
            )
            done += free.modified_count + pinned.modified_count
        return done

    # ------------------------------------------------------------------ limits

    async def wake_held(self) -> int:
        """Wake whom a dead process did not: as many per key as there are free slots."""
        rated = [{"$match": {"held": "rate_limit"}}, {"$group": {"_id": "$name"}}]
        for row in await self._store.database.aggregate(QUEUE, rated):
            await self._rates.expect(row["_id"])
        keys: list[Mapping[str, Any]] = [
            {"$match": {"held": "max_running"}},
            {"$group": {"_id": "$slot_key", "n": {"$sum": 1}}},
        ]
        woken = 0
        for row in await self._store.database.aggregate(QUEUE, keys):
            first = await self._store.first({"held": "max_running", "slot_key": row["_id"]})
            free = await self._store.free_slots(first.slots()) if first else []
            for _ in range(min(len(free), row["n"])):
                woken += await self._store.wake_slot(row["_id"])
        return woken

    async def rated_in(self) -> float | None:
        """Seconds until some that a rate limit holds may be started; None if it holds none."""
        return await self._rates.due_in()

    async def wake_rated(self) -> int:
        """Put back in line what was held by a rate limit: as many per name as may be started now."""
        expected, now = await self._rates.expected()
        return sum([await self._wake_name(starts, now) for starts in expected])

    async def _wake_name(self, starts: Starts, now: datetime) -> int:
        where = {"held": "rate_limit", "name": starts.name}
        first = await self._store.first(where)
        if first is None or first.rate_limit is None:
            await self._rates.look_again(starts, None)
            return 0
        rate = first.rate_limit
        count = min(rate.left(starts.times, now), WOKEN)
        found = (
            await self._store.queue.find(where).sort("rank", 1).limit(count).to_list(None) if count else []
        )
        window = timedelta(seconds=rate.seconds)
        ends = [start + window for start in starts.times if start + window > now]
        later = now if count == WOKEN else min(ends, default=now + window)
        if not await self._rates.look_again(starts, later):
            return 0  # somebody else does it
        woken = 0
        for job in readable(found):
            woken += await self._store.cas(job, transitions.wake(job, "may be started again")) is not None
        return woken


def _beginning(line: Sequence[Job], begins: Begins) -> dict[ObjectId, int]:
    """Those of the line that begin with their claim, and in which process."""
    # What may be put aside after its claim must not have begun.
    free = [seen for seen in line if not seen.slots() and seen.rate_limit is None]
    return {seen.id: pid for seen in free if (pid := begins(seen)) is not None}


def _fitting(line: Sequence[Job], rooms: Mapping[str, int]) -> list[Job]:
    """Those of the line for which a worker has room if it takes all of them.

    A job may allow less beside itself than others of its name do: what is claimed in vain is given back.
    """
    left = dict(rooms)
    fitting = []
    for seen in line:
        most = _MANY if seen.max_parallel is None else seen.max_parallel
        room = min(left.get(seen.name, _MANY), most)
        if room > 0:
            fitting.append(seen)
        left[seen.name] = room - 1
    return fitting
