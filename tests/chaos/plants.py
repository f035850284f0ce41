"""Faults to plant in the engine, each one that a peer has had or that is easily made.

Each function patches the stores of this process when it is called. The checker has to find every one.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bson import ObjectId
from pymongo.errors import AutoReconnect, DuplicateKeyError

from core4 import jobs, schedules, transitions
from core4.errors import Core4Error, JobExists
from core4.jobs import Job, JobOrder, Lease, Owner
from core4.outbox import Outbox
from core4.queues import JobQueue, or_error
from core4.retries import Outcome
from core4.schedules import Decision, Schedule
from core4.states import State
from core4.store import JobStore
from core4.transitions import Change
from core4.worker.scheduler import Scheduler

PLANTS: dict[str, Callable[[], None]] = {}


def plant(function: Callable[[], None]) -> Callable[[], None]:
    PLANTS[function.__name__] = function
    return function


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _unguarded(move: str) -> None:
    """The update of this move repeats nothing of what it was decided on."""

    def make(cas: Any) -> Any:
        async def careless(self: JobStore, seen: Job, change: Change) -> Job | None:
            if change.move != move or seen.journal:
                return await cas(self, seen, change)  # type: ignore[no-any-return]
            update: dict[str, Any] = {"$set": dict(change.set), "$inc": {"rev": 1}}
            if change.unset:
                update["$unset"] = dict.fromkeys(change.unset, 1)
            if change.entry is not None:
                update["$push"] = {"history": dict(change.entry)}
            await self.queue.update_one({"_id": seen.id}, update)
            return Job.from_document(transitions.applied(seen.document, change, seen.rev + 1))

        return careless

    _patch(JobStore, "cas", make)
    _one_by_one()


def _one_by_one() -> None:
    """Writes of several jobs at once become those of one job after the other, so that a plant is in them."""

    async def cas_many(self: JobStore, wishes: Sequence[tuple[Job, Change]]) -> dict[ObjectId, Job]:
        written = [await self.cas(seen, change) for seen, change in wishes]
        return {job.id: job for job in written if job is not None}

    async def move_many(self: Outbox, jobs: Sequence[Job]) -> set[ObjectId]:
        for job in jobs:
            await self.move(job)
        return {job.id for job in jobs}

    async def start_many(self: JobQueue, orders: Sequence[tuple[Job, int]]) -> list[Job | Core4Error]:
        return [await or_error(self.start(job, pid=pid)) for job, pid in orders]

    JobStore.cas_many = cas_many  # type: ignore[method-assign]
    Outbox.move_many = move_many  # type: ignore[method-assign]
    JobQueue.start_many = start_many  # type: ignore[method-assign]


@plant
def finish_without_the_lease() -> None:
    """The result is written by id alone: a worker that was given up on overwrites its successor."""
    _unguarded("finish")


@plant
def fetch_then_write_reaper() -> None:
    """The rescuer writes what it decided on an old reading."""
    _unguarded("rescue")

    def make(rescue: Any) -> Any:
        async def slow(self: JobQueue, alive: Any) -> int:
            async def late() -> Any:
                owners = await alive()
                await asyncio.sleep(0.02)  # between its reading and its writing
                return owners

            return await rescue(self, late)  # type: ignore[no-any-return]

        return slow

    _patch(JobQueue, "rescue", make)


@plant
def claim_without_the_state() -> None:
    """Two workers that read the same line take the same job."""
    _unguarded("claim")


@plant
def unfenced_progress() -> None:
    """Anyone may report progress."""

    async def progress(self: JobQueue, job: Job, value: float | None, message: str | None) -> None:
        await self.store.queue.update_one(
            {"_id": job.id}, {"$set": {"prog.value": value, "prog.message": message}, "$inc": {"rev": 1}}
        )

    JobQueue.progress = progress  # type: ignore[method-assign]


@plant
def delete_before_journal() -> None:
    """A finished job is taken from the queue before it is in the journal."""

    async def move(self: Outbox, job: Job) -> None:
        copy = {key: value for key, value in job.document.items() if key not in ("settle", *transitions.LINE)}
        deleted = await self._store.queue.delete_one({"_id": job.id, "rev": job.rev})
        if deleted.deleted_count:
            await self._store.journal.replace_one({"_id": job.id}, copy, upsert=True)

    Outbox.move = move  # type: ignore[method-assign]
    _one_by_one()


@plant
def random_child_id() -> None:
    """Each try to make the child of a restart makes another one."""

    def make(spawn: Any) -> Any:
        async def fresh(self: Outbox, parent: Job, note: Mapping[str, Any]) -> Any:
            unkeyed = replace(parent, document={**parent.document, "unique": False})
            return await spawn(self, unkeyed, {**note, "target": ObjectId()})

        return fresh

    _patch(Outbox, "make_child", make)


@plant
def no_tombstone_check() -> None:
    """What is in the journal is run again if its insert comes late."""

    async def start(self: JobQueue, job: Job, *, pid: int | None = None) -> Job:
        lease = transitions.lease_of(job)
        return await self.store.held(job, lease, lambda seen: transitions.start(seen, lease, pid))

    JobQueue.start = start  # type: ignore[method-assign]
    _one_by_one()


@plant
def answer_before_insert() -> None:
    """An enqueue is acknowledged before it is stored."""

    def make(insert: Any) -> Any:
        async def eager(self: JobStore, document: dict[str, Any]) -> Job:
            async def quietly() -> None:
                await asyncio.sleep(0)
                await asyncio.gather(insert(self, document), return_exceptions=True)

            self.__dict__.setdefault("eager", set()).add(asyncio.ensure_future(_dying(quietly())))
            return Job.from_document(document)

        return eager

    _patch(JobStore, "insert", make)


async def _dying(work: Any) -> None:
    try:
        await work
    except BaseException:  # it dies with its process, and nobody hears of it
        return


@plant
def blind_retry_of_an_enqueue() -> None:
    """After a lost reply the same order is stored as another job."""

    async def insert(self: JobStore, document: dict[str, Any]) -> Job:
        for _ in range(5):
            try:
                await self.queue.insert_one(document)
                return Job.from_document(document)
            except AutoReconnect:
                document = {**document, "_id": ObjectId(), "unique_key": uuid.uuid4().hex}
            except DuplicateKeyError as error:
                holder = await self.queue.find_one({"unique_key": document.get("unique_key", "")}, {"_id": 1})
                if holder is not None and holder["_id"] != document["_id"]:
                    raise JobExists(holder["_id"], document["name"]) from error
                return Job.from_document(document)
        raise AutoReconnect("no luck")

    JobStore.insert = insert  # type: ignore[method-assign]


@plant
def rescue_forgets_the_kill() -> None:
    """A job that was to be killed is run again when its worker dies."""

    def make(rescue: Any) -> Any:
        def forgetful(seen: Job, max_crashes: int, max_claims: int) -> Change:
            return rescue(replace(seen, killed_at=None), max_crashes, max_claims)  # type: ignore[no-any-return]

        return forgetful

    _patch(transitions, "rescue", make)


@plant
def rescue_only_what_has_started() -> None:
    """A job that was claimed and never started stays with its dead worker for ever."""

    def make(cas: Any) -> Any:
        async def blind(self: JobStore, seen: Job, change: Change) -> Job | None:
            if change.move == "rescue" and seen.claims:
                return None
            return await cas(self, seen, change)  # type: ignore[no-any-return]

        return blind

    _patch(JobStore, "cas", make)
    _one_by_one()


@plant
def no_sweep() -> None:
    """What a dead process left half way stays so."""

    async def sweep(self: Outbox, limit: int = 500) -> int:
        return 0

    Outbox.sweep = sweep  # type: ignore[method-assign]


@plant
def failures_are_free() -> None:
    """An attempt that failed is not counted."""

    def make(finish: Any) -> Any:
        def generous(seen: Job, lease: Lease, outcome: Outcome, log_seq: int) -> Change | None:
            change: Change | None = finish(seen, lease, outcome, log_seq)
            if change is None or change.set["state"] != State.FAILED:
                return change
            return replace(change, set={**change.set, "attempts_left": seen.attempts_left})

        return generous

    _patch(transitions, "finish", make)


@plant
def the_fence_does_not_rise() -> None:
    """Two attempts of a job have the same number: the log lines of one hide those of the other."""

    def make(claim: Any) -> Any:
        def level(seen: Job, owner: Owner) -> Change:
            change: Change = claim(seen, owner)
            return replace(change, set={**change.set, "fence": 1})

        return level

    _patch(transitions, "claim", make)


@plant
def restart_deletes_the_parent_first() -> None:
    """A restart is a delete and an insert, as in core4: a crash in between loses both."""

    async def restart(self: JobQueue, job_id: ObjectId, *, by: str, hostname: str = "") -> ObjectId:
        parent = await self.store.get(job_id)
        transitions.require_ended(parent)
        child_id: ObjectId = jobs.derived_id(parent.id, "restart", parent.document.get("restarts", 0))
        await self.store.queue.delete_one({"_id": job_id})
        order = JobOrder(name=parent.name, args=parent.args, parent_id=parent.id)
        await self.store.insert(jobs.new_document(order, child_id, jobs.utcnow()))
        after = {**parent.document, "restarts": parent.document.get("restarts", 0) + 1}
        after["enqueued"] = {**after["enqueued"], "child_id": child_id}
        await self.store.journal.replace_one({"_id": job_id}, after, upsert=True)
        return child_id

    JobQueue.restart = restart  # type: ignore[method-assign]


@plant
def a_child_is_its_own_rival() -> None:
    """A child that is there already is taken for somebody else's job, and forgotten by its parent."""

    def make(insert: Any) -> Any:
        async def rival(self: JobStore, document: dict[str, Any]) -> Job:
            if await self.queue.find_one({"_id": document["_id"]}) is not None:
                raise JobExists(document["_id"], document["name"])
            return await insert(self, document)  # type: ignore[no-any-return]

        return rival

    _patch(JobStore, "insert", make)


@plant
def cursor_before_insert() -> None:
    """A scheduler moves on first and makes the job of the instant then."""

    async def carry_out(self: Scheduler, schedule: Schedule, decision: Decision) -> None:
        moved = await self._schedules.advance(
            schedule, decision.cursor, fired=decision.fire, skipped=decision.skip, reason="missed"
        )
        if moved:
            await self._fire(schedule, decision.fire)

    Scheduler._carry_out = carry_out  # type: ignore[method-assign]


@plant
def each_scheduler_its_own_fire() -> None:
    """The job of an instant gets an id of its own from whoever makes it."""
    schedules.fire_id = lambda name, instant: ObjectId()


@plant
def workers_known_by_their_host() -> None:
    """A dead worker counts as alive as long as one of the same name is: its jobs wait for ever."""

    def make(rescue: Any) -> Any:
        async def by_name(self: JobQueue, alive: Any) -> int:
            async def owners_of_the_living() -> set[str]:
                living = self.store.database.collection("sys.worker").find(
                    {"_id": {"$in": list(await alive())}}
                )
                names = {worker["name"] for worker in await living.to_list(None)}
                held = self.store.queue.find({"state": "running", "locked.worker": {"$in": list(names)}})
                return {job["lease"]["owner"] for job in await held.to_list(None)}

            return await rescue(self, owners_of_the_living)  # type: ignore[no-any-return]

        return by_name

    _patch(JobQueue, "rescue", make)
