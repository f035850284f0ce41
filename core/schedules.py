"""The schedules: which job is due at which instants, and up to where that has been decided.

A schedule has what the code says (`code`) and what an operator says (`override`), field by field; the
operator wins and both are kept. Its `cursor` is the last instant that was decided: fired or skipped.
Whoever fires makes the job first, under an id derived from schedule and instant, and then moves the
cursor if it is still where it was read. So any number of schedulers, in any order, dying anywhere, make
one job per instant; and once the cursor has passed an instant, nobody needs to remember its job.

While a schedule is paused, disabled or withdrawn from the code it has no instants: nothing is made up
for afterwards. The same goes for the time before its expression or zone was what it is now.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from core4 import cron, jobs, signatures
from core4.catalogue import Catalogue
from core4.controls import Pause
from core4.database import Database, Document
from core4.errors import BadArguments, BadOption, Conflict, JobInvalid, NotFound, Unavailable, UnknownJob
from core4.jobs import Job, JobOrder
from core4.orders import chained, own_slots
from core4.queues import JobQueue
from core4.timetable import DEFAULTS, FIELDS, LIMIT, check_name, checked

log = logging.getLogger(__name__)

SCHEDULE = "sys.schedule"
GRACE = timedelta(seconds=60)  # an instant that is later than this has been missed
WINDOW = 2 * LIMIT  # instants looked at for one decision
PORTION = 20  # jobs at most that are made on one decision
RETRIES = 100  # of one change, if others keep writing the same schedule
USERNAME = "scheduler"  # who enqueues what is due

Clock = Callable[[], Awaitable[datetime]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule as it is in force; `document` is all that is stored.

    ``missed`` says what becomes of instants that nobody was there for: ``skip`` all, ``one`` job for all
    of them, or ``all``, the newest ``limit``. None is older than ``max_age`` seconds.
    """

    name: str
    qual_name: str
    expression: str
    zone: str
    args: Mapping[str, Any]
    options: Mapping[str, Any]
    namespace: str | None
    missed: str
    limit: int
    max_age: float | None
    enabled: bool
    paused: bool
    withdrawn: bool
    source: str
    cursor: datetime
    rev: int
    document: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Schedule:
        """The schedule a stored document describes."""
        spec = effective(document)
        return cls(
            **spec,
            name=document["_id"],
            paused=document.get("paused") is not None,
            withdrawn=document.get("withdrawn", False),
            source="operator" if document.get("code") is None else "code",
            cursor=document["cursor"],
            rev=document["rev"],
            document=document,
        )

    @property
    def active(self) -> bool:
        """True if it fires."""
        return self.enabled and not self.paused and not self.withdrawn

    def due(self) -> datetime:
        """The first instant that has not been decided.

        Raises: BadOption if the stored expression or zone is not accepted (any more).
        """
        return _due(self.expression, self.cursor, self.zone)

    def next_fires(self, count: int, now: datetime) -> list[datetime]:
        """The next `count` instants after `now` at which it will fire; none while it does not.

        Raises: BadOption, see `due`.
        """
        if not self.active:
            return []
        return list(islice(cron.fires(self.expression, max(now, self.cursor), self.zone), count))


@lru_cache(maxsize=4096)
def _due(expression: str, cursor: datetime, zone: str) -> datetime:
    return cron.next_after(expression, cursor, zone)


@dataclass(frozen=True)
class Decision:
    """What becomes of the instants up to and including `cursor`."""

    fire: tuple[datetime, ...]
    skip: tuple[datetime, ...]
    cursor: datetime


def effective(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in force: the operator's, else the code's, else the defaults."""
    said = {**DEFAULTS, **(document.get("code") or {}), **(document.get("override") or {})}
    return {name: said[name] for name in FIELDS}


def decide(schedule: Schedule, now: datetime) -> Decision | None:
    """What is to be done at `now`; None if nothing is due.

    Raises: BadOption if the stored expression or zone is not accepted (any more).
    """
    due = cron.fires_between(schedule.expression, schedule.cursor, now, schedule.zone, WINDOW + 1)
    if not due:
        return None
    if len(due) > WINDOW:
        # A long way behind: these are followed by more instants than any schedule makes up for.
        surplus = due[:-LIMIT]
        return Decision((), tuple(surplus), surplus[-1])
    fire = _kept(schedule, due, now)
    if len(fire) > PORTION:
        # What is left is decided anew: by then an operator may have changed, paused or deleted the schedule.
        fire = fire[:PORTION]
        due = [instant for instant in due if instant <= fire[-1]]
    return Decision(tuple(fire), tuple(sorted(set(due) - set(fire))), due[-1])


def _kept(schedule: Schedule, due: Sequence[datetime], now: datetime) -> list[datetime]:
    missed = [instant for instant in due if now - instant > GRACE]
    young = [instant for instant in due if schedule.max_age is None or _age(instant, now) <= schedule.max_age]
    if schedule.missed == "one" and missed:
        return young[-1:]
    on_time = [instant for instant in young if now - instant <= GRACE]
    if schedule.missed == "all":
        return young[: len(young) - len(on_time)][-schedule.limit :] + on_time
    return on_time


def _age(instant: datetime, now: datetime) -> float:
    return (now - instant).total_seconds()


def fire_id(name: str, instant: datetime) -> ObjectId:
    """The id of the job that the schedule `name` makes for `instant`; it has that instant's time."""
    return jobs.derived_id(
        ObjectId.from_datetime(instant), "schedule", name, instant.astimezone(UTC).isoformat()
    )


def order(
    schedule: Schedule,
    entry: Mapping[str, Any],
    *,
    username: str,
    request_id: str,
    schedule_id: str | None = None,
) -> JobOrder:
    """What the schedule enqueues; `entry` is the catalogue's.

    Not unique by its arguments: a fire is a job of its own, also while the last one runs. Its id is what
    makes it one.
    """
    code = (schedule.document.get("code") or {}).get("options")
    return JobOrder(
        name=schedule.qual_name,
        args=schedule.args,
        namespace=schedule.namespace or entry.get("namespace") or "DEFAULT",
        options={**(entry.get("options") or {}), **own_slots(entry, schedule.options, code)},
        unique=False,
        keep_stopped=entry.get("kind", "class") == "class",
        username=username,
        hostname=socket.gethostname(),
        request_id=request_id,
        schedule_id=schedule_id,
        **chained(entry),
    )


def misfit(schedule: Schedule, entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """What of the schedule's arguments does not fit the job, as pointers and messages.

    What its author gives it by `default_args` is bound when it is declared, whatever its type.
    """
    if schedule.args == entry.get("default_args"):
        return []
    return signatures.check(entry.get("schema") or {}, dict(schedule.args))


async def fire(queue: JobQueue, entry: Mapping[str, Any], schedule: Schedule, instant: datetime) -> Job:
    """The job of this instant, made now or before.

    Raises: Unavailable if that is not known: try again.
    """
    request_id = f"{schedule.name}@{instant.isoformat()}"
    wanted = order(schedule, entry, username=USERNAME, request_id=request_id, schedule_id=schedule.name)
    return await queue.enqueue(wanted, job_id=fire_id(schedule.name, instant), once=True)


async def trigger(
    schedule: Schedule,
    queue: JobQueue,
    catalogue: Catalogue,
    *,
    token: str,
    by: str,
    request_id: str | None = None,
) -> Job:
    """One job now, whatever the schedule's state; the same `token` again gives the same job.

    If the token is an ObjectId in text, the job's id has its time and stands in listings where it belongs.

    Raises: UnknownJob if no worker has published the job; BadArguments if it has another signature now;
    Unavailable: try again with the same token.
    """
    entry = await catalogue.get(schedule.qual_name)
    if entry is None:
        raise UnknownJob(schedule.qual_name)
    if errors := misfit(schedule, entry):
        raise BadArguments(errors)
    wanted = order(schedule, entry, username=by, request_id=request_id or token)
    scope = ObjectId(token) if ObjectId.is_valid(token) else token
    return await queue.enqueue(wanted, job_id=jobs.derived_id(scope, "trigger", schedule.name), once=True)


def declared(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to publish for a catalogue entry: its ``schedule`` is an expression, a mapping of `FIELDS`
    (and ``name``, if it is not to be the job's) or None."""
    schedule = entry.get("schedule")
    if schedule is None:
        return []
    fields = {"expression": schedule} if isinstance(schedule, str) else dict(schedule)
    return [{"name": entry["_id"], **fields, "qual_name": entry["_id"]}]


def view(schedule: Schedule, now: datetime, *, count: int = 5, held: Pause | None = None) -> dict[str, Any]:
    """A schedule as readers get it: in force, as the code and the operator have it, and what is next.

    `held` is what keeps its job's name, or everything, from being started: it fires nothing meanwhile.
    """
    document = schedule.document
    state = _state(schedule)
    try:
        following, reason = schedule.next_fires(count, now), None
    except BadOption as error:
        following, state, reason = [], "broken", error.detail
    if state == "active" and held is not None:
        what = f"{held.scope} {held.target}".strip()
        following, state, reason = [], "held", f"{what} is paused by {held.by}"
    return {
        "_id": schedule.name,
        **effective(document),
        "source": schedule.source,
        "state": state,
        "reason": reason,
        "paused": document.get("paused"),
        "next": following,
        **{name: document.get(name) for name in _SHOWN},
    }


_SHOWN = (
    *("code", "override", "cursor", "since", "fired", "skipped", "last_fired", "last_skipped"),
    *("created_at", "updated_at", "updated_by", "rev"),
)


def _state(schedule: Schedule) -> str:
    if schedule.withdrawn:
        return "withdrawn"
    if not schedule.enabled:
        return "disabled"
    return "paused" if schedule.paused else "active"


# ---------------------------------------------------------------------- changes, pure


def created(name: str, now: datetime, **fields: Any) -> Document:
    """The document of a new schedule: it begins now."""
    check_name(name)
    document = {
        "_id": name,
        "code": None,
        "override": {},
        "paused": None,
        "withdrawn": False,
        "cursor": now,
        "since": now,
        "fired": 0,
        "skipped": 0,
        "last_fired": None,
        "last_skipped": None,
        "rev": 1,
        "created_at": now,
        "updated_at": now,
        "updated_by": None,
        **fields,
    }
    _require(document)
    return document


def changed(document: Mapping[str, Any], now: datetime, **fields: Any) -> Document | None:
    """The document with these fields; None if they say nothing new.

    If it fires at other instants then, it does so from now on: what the old expression left open is not
    looked up in the new one.
    """
    after = {**document, **fields}
    if after == document:
        return None
    _require(after)
    after |= {"rev": document["rev"] + 1, "updated_at": now}
    if _timing(after) != _timing(document):
        after |= {"cursor": max(document["cursor"], now), "since": now}
    return after


def _require(document: Mapping[str, Any]) -> None:
    spec = effective(document)
    for name in ("qual_name", "expression"):
        if spec[name] is None:
            raise BadOption(f"a schedule needs its {name}: {FIELDS[name].accepts}")


def _timing(document: Mapping[str, Any]) -> tuple[Any, ...]:
    spec = effective(document)
    fires = spec["enabled"] and document.get("paused") is None and not document.get("withdrawn")
    return spec["expression"], spec["zone"], fires


# ---------------------------------------------------------------------- the store


class ScheduleStore:
    """The only writer of `sys.schedule`; `_id` is the schedule's name. Every change may be repeated.

    `clock` gives the time at which changes begin to count; the server's if not given.
    """

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._schedules = database.collection(SCHEDULE)
        self.clock: Clock = clock or database.server_time

    async def publish(self, entries: Sequence[Mapping[str, Any]], *, of: Collection[str] = ()) -> None:
        """Store what the code says; what an operator said and what was decided stays as it is.

        Args:
            entries: `FIELDS` and ``name`` of each schedule, see `declared`.
            of: qual_names of the jobs that this code has: of these, schedules that are not among the
                entries are withdrawn. They stay to be seen, and come back when they are published again.

        Raises: UnknownOption, BadOption; then nothing is stored.
        """
        specs = {entry.get("name") or entry["qual_name"]: _spec(entry) for entry in entries}
        for name, spec in specs.items():
            await self._change(name, partial(_published, name, spec))
        for document in await self._schedules.find({"withdrawn": False}).to_list(None):
            code = document.get("code")
            if code and code["qual_name"] in of and document["_id"] not in specs:
                await self._withdraw(document["_id"])

    async def _withdraw(self, name: str) -> None:
        with suppress(NotFound):  # deleted meanwhile
            await self._change(name, _withdrawn)
            log.info("schedule.withdrawn", extra={"schedule": name})

    async def set(self, name: str, fields: Mapping[str, Any], *, by: str) -> Schedule:
        """An operator's word on some `FIELDS`; it stands over the code's. A new name is a new schedule.

        Raises: UnknownOption, BadOption; Conflict if it is to run another job than before.
        """
        good = checked(fields)

        def plan(now: datetime, seen: Document | None) -> Document | None:
            if seen is None:
                return created(name, now, override=good, updated_by=by)
            wanted = good.get("qual_name")
            if wanted not in (None, effective(seen)["qual_name"]):
                raise Conflict(f"schedule [{name}] is for another job: make one with another name")
            return changed(seen, now, override={**(seen["override"] or {}), **good}, updated_by=by)

        return await self._change(name, plan)

    async def reset(self, name: str, fields: Collection[str] = (), *, by: str) -> Schedule:
        """Take an operator's word back, on these fields or on all: the code's stands again.

        Raises: NotFound; BadOption if the code says nothing on what is needed.
        """

        def plan(now: datetime, seen: Document | None) -> Document | None:
            document = _known(name, seen)
            kept = {key: value for key, value in document["override"].items() if fields and key not in fields}
            return changed(document, now, override=kept, updated_by=by)

        return await self._change(name, plan)

    async def pause(self, name: str, *, by: str) -> Schedule:
        """Do not fire until resumed.

        Raises: NotFound.
        """

        def plan(now: datetime, seen: Document | None) -> Document | None:
            document = _known(name, seen)
            if document["paused"] is not None:
                return None
            return changed(document, now, paused={"at": now, "by": by}, updated_by=by)

        return await self._change(name, plan)

    async def resume(self, name: str, *, by: str) -> Schedule:
        """Fire again, from now on.

        Raises: NotFound.
        """

        def plan(now: datetime, seen: Document | None) -> Document | None:
            document = _known(name, seen)
            if document["paused"] is None:
                return None
            return changed(document, now, paused=None, updated_by=by)

        return await self._change(name, plan)

    async def delete(self, name: str) -> None:
        """Forget a schedule that an operator made, or one that the code has withdrawn.

        Raises: NotFound; Conflict if the code has it: it would come back.
        """
        for _ in range(RETRIES):
            seen = await self.get(name)
            if seen.source == "code" and not seen.withdrawn:
                raise Conflict(
                    f"schedule [{name}] comes from the code: disable it instead, or reset what was changed"
                )
            if (await self._schedules.delete_one({"_id": name, "rev": seen.rev})).deleted_count:
                return
        raise Unavailable(f"schedule [{name}] is busy, try again")

    async def get(self, name: str) -> Schedule:
        """The schedule of this name.

        Raises: NotFound.
        """
        return Schedule.from_document(_known(name, await self._schedules.find_one({"_id": name})))

    async def all(self) -> list[Schedule]:
        """Every schedule, by name."""
        documents = await self._schedules.find({}).to_list(None)
        return sorted(map(Schedule.from_document, documents), key=lambda schedule: schedule.name)

    async def rows(self, *, count: int = 5) -> list[dict[str, Any]]:
        """Every schedule as readers get it, each with its next `count` instants."""
        now = await self.clock()
        return [view(schedule, now, count=count) for schedule in await self.all()]

    async def advance(
        self,
        seen: Schedule,
        to: datetime,
        *,
        fired: Sequence[datetime],
        skipped: Sequence[datetime],
        reason: str,
    ) -> bool:
        """Move the cursor on; False if it is no longer where it was `seen`: somebody else has decided.

        Comes after the jobs of `fired` have been made.
        """
        if to <= seen.cursor:
            raise AssertionError(f"the cursor of {seen.name} must not go back from {seen.cursor} to {to}")
        fields: Document = {"cursor": to}
        if fired:
            fields["last_fired"] = {"at": fired[-1], "job_id": fire_id(seen.name, fired[-1])}
        if skipped:
            fields["last_skipped"] = {"at": skipped[-1], "count": len(skipped), "reason": reason}
        result = await self._schedules.update_one(
            {"_id": seen.name, "cursor": seen.cursor},
            {"$set": fields, "$inc": {"rev": 1, "fired": len(fired), "skipped": len(skipped)}},
        )
        return bool(result.modified_count)

    async def _change(
        self, name: str, plan: Callable[[datetime, Document | None], Document | None]
    ) -> Schedule:
        """Read, let `plan` decide and write that, until nobody wrote in between."""
        for _ in range(RETRIES):
            seen = await self._schedules.find_one({"_id": name})
            after = plan(await self.clock(), seen)
            if after is None:
                return Schedule.from_document(_known(name, seen))
            if await self._write(seen, after):
                return Schedule.from_document(after)
        raise Unavailable(f"schedule [{name}] is busy, try again")

    async def _write(self, seen: Document | None, after: Document) -> bool:
        if seen is None:
            try:
                await self._schedules.insert_one(after)
            except DuplicateKeyError:
                return False
            return True
        result = await self._schedules.replace_one({"_id": seen["_id"], "rev": seen["rev"]}, after)
        return bool(result.modified_count)


def _spec(entry: Mapping[str, Any]) -> dict[str, Any]:
    return checked({key: value for key, value in entry.items() if key != "name"})


def _published(name: str, spec: Document, now: datetime, seen: Document | None) -> Document | None:
    if seen is None:
        return created(name, now, code=spec)
    return changed(seen, now, code=spec, withdrawn=False)


def _withdrawn(now: datetime, seen: Document | None) -> Document | None:
    return changed(seen, now, withdrawn=True) if seen else None


def _known(name: str, document: Document | None) -> Document:
    if document is None:
        raise NotFound(f"there is no schedule [{name:.200}]")
    return document


async def publish_declared(
    schedules: ScheduleStore,
    catalogue: Catalogue,
    entries: Sequence[Mapping[str, Any]],
    *,
    namespaces: Collection[str] | None = None,
) -> None:
    """Store the schedules of all that a worker has loaded: catalogue entries.

    With `namespaces` they are all that the worker has loaded of those, and no others are touched.

    Raises: PyMongoError, Unavailable: to be repeated.
    """
    names = {entry["_id"] for entry in entries}
    files = {entry["file"] for entry in entries if entry.get("file")}
    # A class that was deleted or renamed is published by nobody, and its schedule would go on for ever.
    gone = {
        row["_id"]
        for row in await catalogue.all()
        if row.get("file") in files
        and (namespaces is None or (row.get("namespace") or "DEFAULT") in namespaces)
    } - names
    try:
        await schedules.publish([one for entry in entries for one in declared(entry)], of=names | gone)
    except JobInvalid as error:
        # It was checked where it was declared; whatever is new about it must not stop the jobs.
        log.error("schedules.refused", extra={"error": error.detail})
