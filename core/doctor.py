"""Looks for work that is stuck or inconsistent, says why, and repairs what is safe to repair.

What one document shows by itself is `core4.sanity`'s; here is what takes a second look: at other documents,
and at the same one a little later. Live workers are at work on all that is found here, so a finding counts
only if it stands for as long as they may need for it. Repairs are the guarded updates of the stores.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

from core4 import controls, events, inbox, logs, registry, store, users
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.controls import Controls, ControlStore, RateStore
from core4.database import Database, Document
from core4.errors import BadOption, Conflict, JobNotFound, Unavailable
from core4.events import EventStore
from core4.findings import KINDS, Finding, Report
from core4.jobs import Job
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.repairs import Repairs
from core4.results import has_ended
from core4.sanity import Flaw, flaws
from core4.schedules import ScheduleStore
from core4.states import WAITING, State
from core4.store import JOURNAL, QUEUE

log = logging.getLogger(__name__)

PATIENCE = 15.0  # seconds that something may stand half-way: a worker's sweep comes every 10
NEWEST = 10_000  # documents of the journal, newest first, that are looked at unless all are asked for
WINDOW = 500  # documents read and judged at once
MOST = 1000  # findings that are told
LATE = timedelta(seconds=60)  # that a time may be past, for clocks that differ
KILL_LATE = timedelta(seconds=60)  # beside the grace period
SCHEDULE_LATE = timedelta(seconds=120)
TOLD = 100  # repairs that one line of the audit names
ROUNDS = 5  # of looking and repairing: one repair may uncover the next
INDEXES = tuple(each.INDEXES for each in (store, logs, registry, controls, users, inbox, events))

Progress = Callable[[str, int], None]


def _silent(what: str, done: int) -> None:
    """Nobody watches."""


@dataclass
class Facts:
    """What the documents of one window are held against."""

    owners: Mapping[str, Document] = field(default_factory=dict)
    twins: Collection[ObjectId] = ()
    lost: Collection[ObjectId] = ()  # children that do not exist


class Doctor:
    """Examines one database; `repair` mends what it finds.

    Args:
        patience: seconds for which a finding must stand, because somebody may be at work on it.
        everything: look at all of the journal and the log, not only at the newest.
        progress: called with what is looked at and how many of it have been.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        patience: float = PATIENCE,
        everything: bool = False,
        progress: Progress = _silent,
    ) -> None:
        self._database, self._settings, self._patience = database, settings, patience
        self._newest = None if everything else NEWEST
        self._progress = progress
        self._queue, self._logs = JobQueue(database, settings), LogStore(database)
        self._repairs = Repairs(self._queue.store, self._queue.outbox)
        self._registry, self._catalogue = WorkerRegistry(database), Catalogue(database)
        self._rates, self._events = RateStore(database), EventStore(database)
        self._controls, self._schedules = ControlStore(database), ScheduleStore(database)
        self._tables = {False: database.collection(QUEUE), True: database.collection(JOURNAL)}
        self._looks: Mapping[str, Callable[[Collection[str] | None], AsyncIterator[Finding]]] = {
            "job": self._look_at_jobs,
            "jobs": self._look_at_lines,
            "worker": self._look_at_workers,
            "schedule": self._look_at_schedules,
            "log": self._look_at_logs,
            "index": self._look_at_indexes,
        }
        self._now = datetime.now(UTC)

    async def examine(self) -> Report:
        """All that stands wrong, and what waits and why."""
        found, more = await self._look(None)
        end = time.monotonic() + self._patience
        # What only waits for the end of a pause is nobody's to move.
        moving = {key for key, finding in found.items() if finding.kind != "paused"}
        while moving and (left := end - time.monotonic()) > 0:
            self._progress("looking again", len(moving))
            await asyncio.sleep(min(self._patience / 5, left))
            again, _ = await self._look([found[key] for key in moving])
            for key in moving - again.keys():
                del found[key]
            moving &= again.keys()
        order = {kind: number for number, kind in enumerate(KINDS)}
        return Report(tuple(sorted(found.values(), key=lambda each: (order[each.kind], each.id))), more=more)

    async def repair(self, *, by: str) -> Report:
        """Repair what is found and can be; what remains then, and what was repaired.

        Safe beside live workers, and to be repeated: each repair is what a worker would do, or a guarded
        update of one document.
        """
        done: dict[tuple[str, str, str], Finding] = {}
        for _ in range(ROUNDS):
            report = await self.examine()
            todo = [finding for finding in report.findings if finding.repair and finding.key not in done]
            if not todo:
                break
            told = [f"{finding.kind} {finding.id}" for finding in todo[:TOLD]]
            async with self._events.action("doctor.repair", by, findings=told, count=len(todo)):
                await self._repair(todo, by)
            done |= {finding.key: finding for finding in todo}
        left = {finding.key for finding in report.findings}
        repaired = tuple(finding for key, finding in done.items() if key not in left)
        for finding in repaired:
            log.info("doctor.repaired", extra={"kind": finding.kind, "id": finding.id, "by": by})
        return Report(report.findings, repaired, report.more)

    # ------------------------------------------------------------------ looking

    async def _look(self, again: Sequence[Finding] | None) -> tuple[dict[tuple[str, str, str], Finding], int]:
        """Everything, or once more at what was found; and how many findings are not among them."""
        self._now = await self._database.server_time()
        ids: dict[str, set[str]] = defaultdict(set)
        for finding in again or ():
            ids[finding.subject].add(finding.id)
        found: dict[tuple[str, str, str], Finding] = {}
        more = 0
        for subject, look in self._looks.items():
            if again is not None and subject not in ids:
                continue
            async for finding in look(None if again is None else ids[subject]):
                if len(found) < MOST:
                    found[finding.key] = finding
                else:
                    more += finding.wrong
        return found, more

    async def _look_at_jobs(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        for journal in (False, True):
            done = 0
            async for documents in self._windows(journal, ids):
                for finding in await self._judge(documents, journal):
                    yield finding
                done += len(documents)
                self._progress("journal" if journal else "queue", done)

    async def _windows(self, journal: bool, ids: Collection[str] | None) -> AsyncIterator[list[Document]]:
        table = self._tables[journal]
        if ids is not None:
            yield await table.find({"_id": {"$in": [ObjectId(each) for each in ids]}}).to_list(None)
            return
        # One pass that holds a window in memory; the results of old jobs are not needed.
        cursor = table.find({}, {"result": 0, "sources": 0})
        if journal and self._newest is not None:
            cursor = cursor.sort("_id", -1).limit(self._newest)
        window: list[Document] = []
        async for document in cursor.batch_size(WINDOW):
            window.append(document)
            if len(window) >= WINDOW:
                yield window
                window = []
        yield window

    async def _judge(self, documents: Sequence[Document], journal: bool) -> list[Finding]:
        found: list[Finding] = []
        readable: list[Job] = []
        for document in documents:
            try:
                job = Job.from_document(document, journal=journal)
                own = flaws(job)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"it cannot be read: {error!r:.200}"
                found.append(Finding("unreadable", "job", str(document["_id"]), reason, repairable=False))
                continue
            readable.append(job)
            found += [await self._of_flaw(job, flaw) for flaw in own]
        facts = await self._facts(readable, journal)
        for job in readable:
            if job.id in facts.twins:
                found = [each for each in found if each.id != str(job.id)]  # it is a leftover, and no more
            found += [await self._of_flaw(job, flaw, since) for flaw, since in self._beside(job, facts)]
        return found

    async def _facts(self, jobs: Sequence[Job], journal: bool) -> Facts:
        children = [
            child
            for job in jobs
            if (child := job.document["enqueued"].get("child_id")) and not job.document.get("outbox")
        ]
        lost = set(children)
        # The queue first: who moves meanwhile is never in neither.
        for table in self._tables.values():
            lost -= {row["_id"] for row in await table.find(_among(lost), {"_id": 1}).to_list(None)}
        if journal:
            return Facts(lost=lost)
        owners = await self._registry.named({job.lease.owner for job in jobs if job.lease})
        open_ids = [job.id for job in jobs if not job.document.get("settle")]
        copies = await self._tables[True].find(_among(open_ids), {"result": 0}).to_list(None)
        return Facts(owners, {copy["_id"] for copy in copies if has_ended(copy)}, lost)

    def _beside(self, job: Job, facts: Facts) -> Iterator[tuple[Flaw, datetime | None]]:
        """What is wrong with a job, seen beside others and the time."""
        if job.id in facts.twins:
            yield Flaw("twice", f"it is {job.state} in the queue and has ended in the journal"), None
            return
        child = job.document["enqueued"].get("child_id")
        rows = job.document["history"]
        if child in facts.lost and rows and not self._is_forgotten(rows[-1]["at"]):
            yield Flaw("child_missing", f"it was restarted as {child}, which does not exist"), None
        if job.journal:
            return
        if job.state is State.RUNNING and job.lease is not None:
            yield from self._of_holder(job, facts.owners.get(job.lease.owner))
        expires, later = job.document.get("expires"), job.document.get("query_at")
        if job.state is State.DEFERRED and expires is not None and expires < self._now - LATE:
            yield Flaw("expired", "its window for deferring is over"), expires
        elif job.state in WAITING and later is not None and later < self._now - LATE:
            yield Flaw("overdue", "the time it waits for has come, and no worker has noticed"), later

    def _of_holder(self, job: Job, owner: Document | None) -> Iterator[tuple[Flaw, datetime | None]]:
        assert job.lease is not None
        if owner is None or owner["state"] not in ("up", "drain"):
            since = (owner or {}).get("ended_at") or job.lease.at
            if since < self._now - self._mourning:
                name = owner["name"] if owner else f"owner {job.lease.owner}"
                yield Flaw("orphan", f"its worker {name} is {owner['state'] if owner else 'unknown'}"), since
        elif job.killed_at and job.killed_at < self._now - self._grace:
            yield Flaw("kill_overdue", f"{owner['name']} was to kill it and has not"), job.killed_at

    def _is_forgotten(self, since: datetime) -> bool:
        """True if a job that was made then may have ended, and been deleted from the journal by its age."""
        keep = self._settings.keep_journal_days
        return bool(keep) and since < self._now - timedelta(days=keep)

    @property
    def _mourning(self) -> timedelta:
        """How long a dead worker's jobs may be its own: a rescuer has to be sure of its own contact first."""
        return timedelta(seconds=2 * (self._settings.dead_after + self._settings.rescue_every))

    @property
    def _grace(self) -> timedelta:
        return timedelta(seconds=2 * self._settings.grace) + KILL_LATE

    async def _of_flaw(self, job: Job, flaw: Flaw, since: datetime | None = None) -> Finding:
        repairable = KINDS[flaw.kind].repair is not None and not (flaw.kind == "fence" and not flaw.mendable)
        reason = flaw.reason
        if flaw.kind == "unique_key" and (key := flaw.set.get("unique_key")):
            holder = await self._tables[False].find_one({"unique_key": key}, {"_id": 1})
            if holder is not None:
                reason, repairable = f"{reason}: job [{holder['_id']}] has its place", False
        rows = job.document["history"]
        return Finding(
            flaw.kind,
            "job",
            str(job.id),
            reason,
            name=job.name,
            since=since or (rows[-1]["at"] if rows else job.document["enqueued"]["at"]),
            repairable=repairable,
        )

    async def _look_at_lines(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        """Jobs that are held or wait, by what they have in common."""
        held = await self._controls.read()
        for name, count in await self._held("paused", "$name"):
            if not held.of_name(name):
                yield _group("pause_gone", name, f"held, and nothing is paused (jobs: {count})")
        for key, count in await self._held("max_running", "$slot_key"):
            free = await self._free_slots(key)
            if free > 0:
                yield _group("slot_free", str(key), f"held, and slots are free: {free} (jobs: {count})")
        wakes = await self._rates.wakes()
        for name, count in await self._held("rate_limit", "$name"):
            at = wakes.get(name)
            if at is None or at < self._now - LATE:
                yield _group(
                    "rate_free", name, f"held, and nobody looks after them (jobs: {count})", since=at
                )
        _, waiting = await self._queue.store.load()
        workers = [row for row in await self._registry.up() if not self._is_silent(row)]
        for row in waiting:
            if not {"name", "namespace"} <= row.keys():
                continue  # told as unreadable
            finding = await self._waits(row, held, workers)
            if finding is not None:
                yield finding

    async def _held(self, why: str, by: str) -> list[tuple[Any, int]]:
        pipeline: list[Mapping[str, Any]] = [
            {"$match": {"held": why}},
            {"$group": {"_id": by, "n": {"$sum": 1}}},
        ]
        return [(row["_id"], row["n"]) for row in await self._database.aggregate(QUEUE, pipeline)]

    async def _free_slots(self, key: Any) -> int:
        """Free slots of a limit that nobody is on the way to."""
        table = self._tables[False]
        first = await table.find_one({"held": "max_running", "slot_key": key})
        if first is None or not (slots := Job.from_document(first).slots()):
            return 0
        taken = await table.count_documents({"slot": {"$in": slots, "$exists": True}})
        called = 0
        for way in ({"due": True}, {"held": "worker"}, {"state": State.RUNNING.value, "slot": None}):
            called += await table.count_documents({**way, "slot_key": key})
        return len(slots) - taken - called

    async def _waits(self, row: Document, held: Controls, workers: Sequence[Document]) -> Finding | None:
        name, namespace, pinned, count = row["name"], row["namespace"], row["worker"], row["n"]
        key = f"{namespace}/{name}" + (f"/{pinned}" if pinned else "")
        if pause := held.of_job(name, namespace, pinned):
            what = f"{pause.scope} {pause.target}".rstrip()
            reason = f"{what} was paused by {pause.by} (jobs: {count})"
            advice = "core4 resume" + (f" --{pause.scope} {pause.target}" if pause.target else "")
            return _group("paused", key, reason, name=name, since=pause.at, advice=advice)
        able = [row for row in workers if name in row["jobs"] and pinned in (None, row["name"])]
        if any(namespace in row["namespaces"] for row in able):
            return None
        if able:
            why, advice = f"serves namespace {namespace}", f"core4 worker ... --namespace {namespace}"
        elif pinned:
            why, advice = f"is {pinned} and runs it", "start that worker"
        elif await self._catalogue.get(name) is None:
            why, advice = "has ever published it", "start a worker that has it, or remove them"
        else:
            why, advice = "that runs it is up", "start one"
        return _group("unserved", key, f"no worker {why} (jobs: {count})", name=name, advice=advice)

    def _is_silent(self, worker: Document) -> bool:
        beat = worker.get("beat")
        return beat is None or bool(beat < self._now - self._mourning)

    async def _look_at_workers(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        for worker in await self._registry.up():
            if self._is_silent(worker):
                reason = f"it is {worker['state']} and does not renew"
                beat = worker.get("beat")
                yield Finding("silent", "worker", worker["_id"], reason, name=worker["name"], since=beat)

    async def _look_at_schedules(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        held = await self._controls.read()
        for schedule in await self._schedules.all():
            paused = held.everything or held.of_name(schedule.qual_name)
            if not schedule.active or paused:
                continue
            try:
                due = schedule.due()
            except BadOption as error:
                yield Finding("schedule_broken", "schedule", schedule.name, error.detail)
                continue
            if due < self._now - SCHEDULE_LATE:
                reason = "its time has come, and no scheduler has fired or skipped it"
                yield Finding("schedule_late", "schedule", schedule.name, reason, schedule.qual_name, due)

    async def _look_at_logs(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        done = 0
        async for window in self._log_windows(ids):
            lost = set(window)
            for table in self._tables.values():
                lost -= {row["_id"] for row in await table.find(_among(lost), {"_id": 1}).to_list(None)}
            for job_id in lost:
                yield Finding("log_orphan", "log", str(job_id), "its lines are there, the job is not")
            done += len(window)
            self._progress("log", done)

    async def _log_windows(self, ids: Collection[str] | None) -> AsyncIterator[list[ObjectId]]:
        if ids is not None:
            yield [ObjectId(each) for each in ids]
            return
        async for window in self._logs.jobs(self._newest):
            yield window

    async def _look_at_indexes(self, ids: Collection[str] | None) -> AsyncIterator[Finding]:
        for indexes in INDEXES:
            for collection, name in await self._database.missing_indexes(indexes):
                reason = "without it the product is slow, or a limit does not hold"
                yield Finding("index", "index", f"{collection}.{name}", reason)

    # ------------------------------------------------------------------ repairing

    async def _repair(self, findings: Sequence[Finding], by: str) -> None:
        kinds = {finding.kind for finding in findings}
        common: Mapping[str, Callable[[], Awaitable[Any]]] = {
            "index": self._make_indexes,
            "silent": self._bury,
            "orphan": lambda: self._queue.rescue(self._registry.alive_ids),
            "no_lease": lambda: self._queue.rescue(self._registry.alive_ids),
            "overdue": self._queue.promote,
            "expired": self._expire,
            "pause_gone": self._unpark,
            "slot_free": self._queue.claims.wake_held,
            "rate_free": self._wake_rated,
        }
        for number, finding in enumerate(findings):
            if finding.kind not in common:
                self._progress("repairing", number)
                await self._repair_one(finding, by)
        for kind, act in {**common, "unsettled": self._queue.outbox.sweep}.items():
            if kind in kinds:
                self._progress(f"repairing: {kind}", 0)
                await act()

    async def _repair_one(self, finding: Finding, by: str) -> None:
        job_id = ObjectId(finding.id)
        try:
            match finding.kind:
                case "log_orphan":
                    await self._logs.forget([job_id])
                case "twice":
                    await self._repairs.drop_twin(job_id)
                case "journal_open":
                    await self._repairs.recall(job_id, by=by)
                case "killed":
                    await self._queue.kill(job_id, by=by)
                case "child_missing":
                    await self._repairs.restore_child(job_id, by=by)
                case _:
                    await self._repairs.mend(job_id, by=by)
        except (JobNotFound, Conflict, Unavailable) as error:
            # Somebody was faster, or it cannot be done now: the next look tells.
            log.info("doctor.refused", extra={"kind": finding.kind, "id": finding.id, "why": error.detail})

    async def _make_indexes(self) -> None:
        for indexes in INDEXES:
            await self._database.ensure_indexes(indexes)

    async def _unpark(self) -> None:
        await self._queue.claims.unpark(await self._controls.read())

    async def _wake_rated(self) -> None:
        await self._queue.claims.wake_held()
        await self._queue.claims.wake_rated()

    async def _expire(self) -> None:
        while await self._queue.expire():
            pass

    async def _bury(self) -> None:
        """Declare dead who is silent, after having been in contact for as long as that takes.

        After an outage of the database all workers are late: who looks just then must not bury them.
        """
        patience, step = self._settings.dead_after, self._settings.dead_after / 10
        since = last = time.monotonic()
        while (now := time.monotonic()) - since < patience:
            if now - last > patience / 2:
                since = now  # no contact in between
            self._progress("watching silent workers, seconds", int(now - since))
            last = now
            await self._database.ping()
            await asyncio.sleep(step)
        for owner in await self._registry.bury(patience):
            log.info("worker.declared_dead", extra={"dead": owner})
            await self._events.tell("worker.dead", "doctor", key=f"{owner}.dead", owner=owner)
        with suppress(Unavailable):
            await self._queue.rescue(self._registry.alive_ids)


def _among(ids: Collection[ObjectId]) -> Document:
    return {"_id": {"$in": list(ids)}}


def _group(kind: str, key: str, reason: str, **more: Any) -> Finding:
    return Finding(kind, "jobs", key, reason, **more)
