"""Schedules on a real server: what fires, who wins, and what is left when a scheduler dies anywhere.

The time is the test's: it is handed in, and moves when the test says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import pytest
from bson import ObjectId
from pymongo.errors import ConnectionFailure

from core4 import cron
from core4.catalogue import Catalogue
from core4.changes import Change
from core4.config import Settings
from core4.database import Database
from core4.errors import BadArguments, BadOption, Conflict, NotFound, Unavailable, UnknownJob, UnknownOption
from core4.faults import Faults, armed
from core4.jobs import Owner
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.schedules import (
    PORTION,
    SCHEDULE,
    Schedule,
    ScheduleStore,
    declared,
    fire_id,
    publish_declared,
    trigger,
)
from core4.store import JOURNAL, QUEUE
from core4.worker.scheduler import Scheduler, ServerClock
from tests.helpers import eventually_async

pytestmark = pytest.mark.asyncio

START = datetime(2025, 5, 1, 12, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


class HandClock:
    """A clock that is set by hand."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    async def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def schedules(database: Database, clock: HandClock) -> ScheduleStore:
    return ScheduleStore(database, clock)


@pytest.fixture
async def scheduler(
    schedules: ScheduleStore, queue: JobQueue, catalogue: Catalogue, clock: HandClock
) -> Scheduler:
    await catalogue.publish([entry("a.Job"), entry("b.Job")])
    return Scheduler(schedules, queue, catalogue, clock)


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {
        "_id": name,
        "namespace": "night",
        "kind": "class",
        "options": {"attempts": 3},
        "schema": {},
        **more,
    }


def spec(name: str, expression: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "qual_name": "a.Job", "expression": expression, **more}


async def made(database: Database) -> list[ObjectId]:
    """The ids of all jobs there are, in the queue or the journal."""
    found: list[ObjectId] = []
    for table in (QUEUE, JOURNAL):
        found += [job["_id"] for job in await database.collection(table).find({}, {"_id": 1}).to_list(None)]
    return found


def ids(name: str, instants: Sequence[datetime]) -> set[ObjectId]:
    return {fire_id(name, instant) for instant in instants}


async def walk(scheduler: Scheduler, clock: HandClock, step: timedelta, until: datetime) -> None:
    """Let the time go on step by step."""
    while clock.now < until:
        clock.now += step
        await scheduler.step()


# ---------------------------------------------------------------------- at the right instants


@pytest.mark.parametrize("way", ["delete", "pause"])
async def test_who_catches_up_hears_of_an_operator(
    way: str, scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """A long backlog is made up for in portions: what is deleted or paused meanwhile makes no more."""
    await schedules.set("a", {"qual_name": "a.Job", "expression": "* * * * * *", "missed": "all"}, by="ann")
    clock.now += 2 * HOUR
    step = asyncio.create_task(scheduler.step())
    await eventually_async(lambda: made(database), what="it makes the first")
    await (schedules.delete("a") if way == "delete" else schedules.pause("a", by="ann"))
    before = len(await made(database))
    await step

    assert before <= len(await made(database)) <= before + PORTION < 100


@pytest.mark.row("S49")
@pytest.mark.timeout(300)
async def test_a_simulated_day_minute_by_minute(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """Each schedule makes a job exactly at its times, and the answer of a step names the next one."""
    midnight = clock.now = datetime(2025, 5, 1, tzinfo=UTC)
    end = midnight + timedelta(days=1)
    wanted = {
        "quarters": ("*/15 * * * *", [midnight + n * 15 * MINUTE for n in range(1, 97)]),
        "hourly": ("@hourly", [midnight + n * HOUR for n in range(1, 25)]),
        "office": ("30 9-11 * * THU", [midnight + n * HOUR + 30 * MINUTE for n in (9, 10, 11)]),
        "berlin": ("0 5 * * *", [midnight + 3 * HOUR]),
        "friday": ("0 12 * * FRI", []),
    }
    await schedules.publish(
        [
            spec(name, expression, zone="Europe/Berlin" if name == "berlin" else "UTC")
            for name, (expression, _) in wanted.items()
        ]
    )
    times = Counter(instant for _, instants in wanted.values() for instant in instants)
    total = 0
    while clock.now < end:
        clock.now += MINUTE
        due = await scheduler.step()
        assert due is not None
        assert due > clock.now
        total += times[clock.now]
        assert sum(row.document["fired"] for row in await schedules.all()) == total, f"at {clock.now}"

    expected = {id for name, (_, instants) in wanted.items() for id in ids(name, instants)}
    found = await made(database)
    assert len(found) == len(expected) == 124
    assert set(found) == expected


@pytest.mark.row("S49")
@pytest.mark.timeout(300)
async def test_a_simulated_hour_second_by_second(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """Looked at every second, each fires at its second and never again in the same minute."""
    wanted = {
        "minutely": ("* * * * *", [START + n * MINUTE for n in range(1, 61)]),
        "twenty": ("0 * * * * */20", [START + HOUR]),
        "ends": ("59 12 * * * 57-59", [START + timedelta(seconds=3540 + n) for n in (57, 58, 59)]),
        "thirds": ("*/20 * * * *", [START + n * 20 * MINUTE for n in (1, 2, 3)]),
    }
    await schedules.publish([spec(name, expression) for name, (expression, _) in wanted.items()])
    # 12:00:20 and 12:00:40 belong to "twenty", too: it began at 12:00:00.
    wanted["twenty"][1].extend([START + timedelta(seconds=20), START + timedelta(seconds=40)])
    times = Counter(instant for _, instants in wanted.values() for instant in instants)
    total = 0
    while clock.now < START + HOUR:
        clock.now += timedelta(seconds=1)
        await scheduler.step()
        total += times[clock.now]
        assert sum(row.document["fired"] for row in await schedules.all()) == total, f"at {clock.now}"

    expected = {id for name, (_, instants) in wanted.items() for id in ids(name, instants)}
    found = await made(database)
    assert len(found) == len(expected)
    assert set(found) == expected


async def test_the_job_is_what_the_catalogue_and_the_schedule_say(
    scheduler: Scheduler, schedules: ScheduleStore, queue: JobQueue, clock: HandClock
) -> None:
    """Newest options below the schedule's own, its arguments; and no uniqueness beside the id."""
    await schedules.publish([spec("a", "0 * * * *", args={"n": 1}, options={"priority": 9})])
    clock.now += 2 * HOUR
    await scheduler.step()
    clock.now += HOUR
    await scheduler.step()

    first, _ = await queue.store.document(fire_id("a", START + 2 * HOUR)) or ({}, False)
    assert (first["name"], first["args"], first["namespace"]) == ("a.Job", {"n": 1}, "night")
    assert (first["attempts"], first["priority"], first["due"]) == (3, 9, True)
    assert first["enqueued"]["username"] == "scheduler"
    assert first["request_id"] == "a@2025-05-01T14:00:00+00:00"
    assert first["schedule_id"] == "a"
    assert "unique_key" not in first
    assert await queue.store.document(fire_id("a", START + 3 * HOUR)) is not None


@pytest.mark.parametrize(
    ("zone", "midnight", "fixed"),
    [
        pytest.param("Europe/Berlin", datetime(2025, 3, 30), "02:30", id="berlin-spring"),
        pytest.param("Europe/Berlin", datetime(2025, 10, 26), "02:30", id="berlin-autumn"),
        pytest.param("America/New_York", datetime(2025, 3, 9), "02:30", id="new-york-spring"),
        pytest.param("America/New_York", datetime(2025, 11, 2), "01:30", id="new-york-autumn"),
    ],
)
async def test_the_days_on_which_the_clocks_change(
    scheduler: Scheduler,
    schedules: ScheduleStore,
    database: Database,
    clock: HandClock,
    zone: str,
    midnight: datetime,
    fixed: str,
) -> None:
    """A fixed time fires once, in the gap at its end; hours and quarters go on in real time."""
    place = ZoneInfo(zone)
    start = clock.now = midnight.replace(tzinfo=place).astimezone(UTC)
    end = (midnight + timedelta(days=1)).replace(tzinfo=place).astimezone(UTC)
    hour, minute = fixed.split(":")
    await schedules.publish(
        [
            spec("fixed", f"{int(minute)} {int(hour)} * * *", zone=zone),
            spec("hours", "0 * * * *", zone=zone),
            spec("quarters", "*/15 * * * *", zone=zone),
        ]
    )
    await walk(scheduler, clock, 5 * MINUTE, end)

    length = int((end - start) / HOUR)
    assert length in (23, 25)
    # By reading off the clock: 02:30 does not exist in spring, and in autumn the first of two counts.
    wall = datetime.combine(midnight.date(), datetime.strptime(fixed, "%H:%M").time(), tzinfo=place)  # noqa: DTZ007
    once = (
        wall.astimezone(UTC)
        if length == 25
        else datetime.combine(midnight.date(), datetime.min.time().replace(hour=3), tzinfo=place).astimezone(
            UTC
        )
    )
    expected = (
        ids("fixed", [once])
        | ids("hours", [start + n * HOUR for n in range(1, length + 1)])
        | ids("quarters", [start + n * 15 * MINUTE for n in range(1, 4 * length + 1)])
    )
    found = await made(database)
    assert len(found) == len(expected)
    assert set(found) == expected


# ---------------------------------------------------------------------- after a downtime


@pytest.mark.row("S50")
async def test_after_many_hours_each_due_job_is_made_once(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """However many runs were missed; what is not due is not made; and a second look adds nothing."""
    await schedules.publish(
        [
            spec("hourly", "0 * * * *"),
            spec("minutely", "* * * * *"),
            spec("daily", "0 0 * * *"),
            spec("sunday", "0 0 * * SUN"),
        ]
    )
    clock.now = START + 20 * HOUR + 30 * MINUTE
    for _ in range(3):
        await scheduler.step()

    expected = (
        ids("hourly", [START + 20 * HOUR]) | ids("minutely", [clock.now]) | ids("daily", [START + 12 * HOUR])
    )
    assert sorted(await made(database)) == sorted(expected)
    hourly = (await schedules.get("hourly")).document
    assert (hourly["fired"], hourly["skipped"]) == (1, 19)
    assert hourly["last_skipped"] == {"at": START + 19 * HOUR, "count": 19, "reason": "missed (one)"}
    assert hourly["last_fired"]["job_id"] == fire_id("hourly", START + 20 * HOUR)


@pytest.mark.row("S50")
async def test_a_first_start_makes_nothing_old(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """Whatever the policy: a schedule begins when it is first published."""
    clock.now = START + 30 * MINUTE
    await schedules.publish([spec(policy, "0 * * * *", missed=policy) for policy in ("skip", "one", "all")])
    assert await scheduler.step() == START + HOUR
    assert await made(database) == []


@pytest.mark.parametrize(
    ("fields", "fired"),
    [
        ({"missed": "skip"}, []),
        ({"missed": "one"}, [5]),
        ({"missed": "all"}, [1, 2, 3, 4, 5]),
        ({"missed": "all", "limit": 2}, [4, 5]),
        ({"missed": "all", "max_age": 2 * 3600}, [4, 5]),
    ],
)
async def test_policies(
    scheduler: Scheduler,
    schedules: ScheduleStore,
    database: Database,
    clock: HandClock,
    fields: dict[str, Any],
    fired: list[int],
) -> None:
    """Every skipped instant is counted, and named in the log."""
    await schedules.publish([spec("a", "0 * * * *", **fields)])
    clock.now = START + 5 * HOUR + 30 * MINUTE
    await scheduler.step()

    assert sorted(await made(database)) == sorted(ids("a", [START + n * HOUR for n in fired]))
    document = (await schedules.get("a")).document
    assert (document["fired"], document["skipped"]) == (len(fired), 5 - len(fired))


async def test_skipped_instants_are_told(
    scheduler: Scheduler, schedules: ScheduleStore, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    await schedules.publish([spec("a", "0 * * * *", missed="skip")])
    clock.now = START + 5 * HOUR + 30 * MINUTE
    await scheduler.step()

    (record,) = [record for record in caplog.records if record.message == "schedule.skipped"]
    assert (record.__dict__["schedule"], record.__dict__["count"]) == ("a", 5)
    assert record.__dict__["first"] == (START + HOUR).isoformat()
    assert record.__dict__["last"] == (START + 5 * HOUR).isoformat()


async def test_a_clock_that_jumps_back_fires_nothing_twice(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    await schedules.publish([spec("a", "*/10 * * * *")])
    await walk(scheduler, clock, 10 * MINUTE, START + 2 * HOUR)
    before = await made(database)
    clock.now = START - 3 * HOUR
    await walk(scheduler, clock, 10 * MINUTE, START + 2 * HOUR)
    assert sorted(await made(database)) == sorted(before)

    await walk(scheduler, clock, 10 * MINUTE, START + 3 * HOUR)
    assert len(await made(database)) == len(before) + 6


async def test_what_retention_has_deleted_is_not_made_again(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """The cursor remembers, not the jobs."""
    await schedules.publish([spec("a", "0 * * * *", missed="all")])
    clock.now = START + 5 * HOUR
    await scheduler.step()
    await database.collection(QUEUE).delete_many({})
    for _ in range(2):
        clock.now += MINUTE
        await scheduler.step()

    assert await made(database) == []


async def test_while_paused_nothing_happens_and_then_it_is_made_up_for(
    schedules: ScheduleStore, queue: JobQueue, catalogue: Catalogue, database: Database, clock: HandClock
) -> None:
    """A pause of everything is like a downtime."""
    paused = asyncio.Event()

    async def is_paused() -> bool:
        return paused.is_set()

    await catalogue.publish([entry("a.Job")])
    scheduler = Scheduler(schedules, queue, catalogue, clock, paused=is_paused)
    await schedules.publish([spec("a", "0 * * * *", missed="all")])
    paused.set()
    clock.now = START + 3 * HOUR
    assert await scheduler.step() is None
    assert await made(database) == []

    paused.clear()
    await scheduler.step()
    assert len(await made(database)) == 3


# ---------------------------------------------------------------------- many, and dying ones


@pytest.fixture
async def five(
    mongo_url: str, database: Database, settings: Settings, clock: HandClock, scheduler: Scheduler
) -> AsyncIterator[list[Scheduler]]:
    """Five schedulers, each with connections of its own."""
    databases = [await Database.connect(mongo_url, database.name, app_name=f"s{n}") for n in range(5)]
    yield [
        Scheduler(ScheduleStore(each, clock), JobQueue(each, settings), Catalogue(each), clock)
        for each in databases
    ]
    for each in databases:
        await each.close()


async def test_five_schedulers_make_one_job_per_instant(
    five: list[Scheduler], schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """All at once over the same instants, some of them missed: none is double, none is missing."""
    names = ["a", "b", "c", "d"]
    await schedules.publish([spec(name, "* * * * *", missed="all") for name in names])
    for minutes in (1, 2, 3, 10, 11, 40, 41):
        clock.now = START + minutes * MINUTE
        await asyncio.gather(*(scheduler.step() for scheduler in five))

    instants = [START + n * MINUTE for n in range(1, 42)]
    found = await made(database)
    assert len(found) == len(set(found)) == 4 * 41
    assert set(found) == {id for name in names for id in ids(name, instants)}
    for name in names:
        document = (await schedules.get(name)).document
        assert (document["fired"], document["skipped"]) == (41, 0)


async def test_jobs_that_end_meanwhile_are_not_made_again(
    five: list[Scheduler], schedules: ScheduleStore, queue: JobQueue, database: Database, clock: HandClock
) -> None:
    """While five schedulers race, a worker runs what there is: each instant is run once."""
    await schedules.publish([spec("a", "* * * * *", missed="all")])
    owner = Owner("o" * 32, "worker@here", "here", 1)
    ran: list[ObjectId] = []

    async def work() -> None:
        for job in await queue.claims.claim(owner, namespaces=["night"], limit=3):
            running = await queue.start(job)
            ran.append(running.id)
            await queue.finish(running, Outcome.complete(None), log_seq=0)

    for minutes in range(1, 13):
        clock.now = START + minutes * MINUTE
        await asyncio.gather(*(scheduler.step() for scheduler in five), work(), work())
    while len(ran) < 12:
        before = len(ran)
        await work()
        assert len(ran) > before

    assert sorted(ran) == sorted(ids("a", [START + n * MINUTE for n in range(1, 13)]))
    assert sorted(await made(database)) == sorted(ran)


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


class DiesBefore(ScheduleStore):
    """Dies after the jobs are made and before the cursor is moved."""

    async def advance(
        self,
        seen: Schedule,
        to: datetime,
        *,
        fired: Sequence[datetime],
        skipped: Sequence[datetime],
        reason: str,
    ) -> bool:
        raise Died


class DiesAfter(ScheduleStore):
    """Dies when the cursor has been moved."""

    async def advance(
        self,
        seen: Schedule,
        to: datetime,
        *,
        fired: Sequence[datetime],
        skipped: Sequence[datetime],
        reason: str,
    ) -> bool:
        await super().advance(seen, to, fired=fired, skipped=skipped, reason=reason)
        raise Died


class DyingQueue(JobQueue):
    """Dies at the n-th job, before or after it is made."""

    left, after = 0, False

    async def enqueue(self, *args: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Died
        job = await super().enqueue(*args, **more)
        if self.left < 0:
            raise Died
        return job


@pytest.mark.parametrize("store", [DiesBefore, DiesAfter])
@pytest.mark.parametrize("ended", [False, True], ids=["waiting", "journaled"])
async def test_death_around_the_cursor(
    store: type[ScheduleStore],
    ended: bool,
    scheduler: Scheduler,
    schedules: ScheduleStore,
    queue: JobQueue,
    catalogue: Catalogue,
    database: Database,
    clock: HandClock,
) -> None:
    """Another scheduler goes on: no job twice, none missing, also if the jobs have long been run."""
    await schedules.publish([spec("a", "0 * * * *", missed="all")])
    clock.now = START + 3 * HOUR
    with pytest.raises(Died):
        await Scheduler(store(database, clock), queue, catalogue, clock).step()
    expected = ids("a", [START + n * HOUR for n in (1, 2, 3)])
    assert set(await made(database)) == expected
    if ended:
        owner = Owner("o" * 32, "worker@here", "here", 1)
        for job in await queue.claims.claim(owner, namespaces=["night"], limit=3):
            await queue.finish(await queue.start(job), Outcome.complete(None), log_seq=0)
        assert await queue.store.journaled() == 3

    await scheduler.step()
    assert sorted(await made(database)) == sorted(expected)
    document = (await schedules.get("a")).document
    assert (document["fired"], document["cursor"]) == (3, clock.now)


@pytest.mark.parametrize("after", [False, True], ids=["before-the-insert", "after-the-insert"])
@pytest.mark.parametrize("survived", [0, 1, 4])
async def test_death_among_the_jobs(
    after: bool,
    survived: int,
    scheduler: Scheduler,
    schedules: ScheduleStore,
    catalogue: Catalogue,
    settings: Settings,
    database: Database,
    clock: HandClock,
) -> None:
    """Some of the missed instants have their job, others not: the next scheduler makes the rest."""
    await schedules.publish([spec("a", "0 * * * *", missed="all")])
    clock.now = START + 5 * HOUR + 30 * MINUTE
    dying = DyingQueue(database, settings)
    dying.left, dying.after = survived, after
    with pytest.raises(Died):
        await Scheduler(schedules, dying, catalogue, clock).step()
    assert len(await made(database)) == survived + after
    assert (await schedules.get("a")).cursor == START

    await scheduler.step()
    assert sorted(await made(database)) == sorted(ids("a", [START + n * HOUR for n in range(1, 6)]))


@pytest.mark.parametrize(
    "fault",
    [
        "lose store:insert:insert_one 2",
        "late 0.2 store:insert:insert_one 2",
        "lose schedules:advance:update_one",
        "late 0.2 schedules:advance:update_one",
        "lose schedules:_write:insert_one",
        "late 0.2 schedules:_write:insert_one",
        "lose schedules:_write:replace_one",
        "late 0.2 schedules:_write:replace_one",
    ],
)
async def test_replies_that_are_lost_or_late(
    fault: str, database: Database, settings: Settings, catalogue: Catalogue, clock: HandClock
) -> None:
    """Whoever did not hear does it again; a write that lands in between or afterwards changes nothing."""
    await catalogue.publish([entry("a.Job")])
    with armed(Faults.parse(fault)) as faults:
        store, queue = ScheduleStore(database, clock), JobQueue(database, settings)
    scheduler = Scheduler(store, queue, catalogue, clock)

    async def insist(act: Callable[[], Awaitable[object]]) -> None:
        """A second time after the first was not heard."""
        try:
            await act()
        except (ConnectionFailure, Unavailable):
            await act()

    await insist(lambda: store.publish([spec("a", "0 * * * *", missed="all")]))
    await insist(lambda: store.set("a", {"limit": 50}, by="ann"))
    clock.now = START + 3 * HOUR + 30 * MINUTE
    await insist(scheduler.step)
    await faults.landed()
    await scheduler.step()

    assert any(rule.seen for rule in faults.rules)
    assert sorted(await made(database)) == sorted(ids("a", [START + n * HOUR for n in (1, 2, 3)]))
    schedule = await store.get("a")
    assert (schedule.limit, schedule.document["fired"], schedule.cursor) == (50, 3, START + 3 * HOUR)


async def test_one_bad_schedule_stops_no_other(
    scheduler: Scheduler,
    schedules: ScheduleStore,
    catalogue: Catalogue,
    database: Database,
    clock: HandClock,
) -> None:
    """A zone that is gone, a job nobody has, options that make no job: each is told, none is in the way."""
    await schedules.publish([spec("good", "0 * * * *"), spec("zone", "0 * * * *")])
    await schedules.set("stranger", {"qual_name": "no.Job", "expression": "0 * * * *"}, by="ann")
    await catalogue.publish([entry("c.Job", options={"priority": "high"})])
    await schedules.set("odd", {"qual_name": "c.Job", "expression": "0 * * * *"}, by="ann")
    await database.collection(SCHEDULE).update_one(
        {"_id": "zone"}, {"$set": {"override.zone": "Mars/Olympus"}}
    )
    clock.now = START + HOUR
    await scheduler.step()

    assert await made(database) == list(ids("good", [START + HOUR]))
    stranger = (await schedules.get("stranger")).document
    assert stranger["skipped"] == 1
    assert stranger["last_skipped"]["reason"] == "no worker has published [no.Job]"
    odd = (await schedules.get("odd")).document
    assert (odd["fired"], odd["skipped"]) == (0, 1)
    assert odd["last_skipped"]["reason"].startswith("refused: ")
    rows = {row["_id"]: row for row in await schedules.rows()}
    assert (rows["zone"]["state"], rows["good"]["state"]) == ("broken", "active")
    assert "not a time zone" in rows["zone"]["reason"]


# ---------------------------------------------------------------------- code and operators


async def test_publishing_again_changes_nothing(schedules: ScheduleStore, clock: HandClock) -> None:
    await schedules.publish([spec("a", "@daily")])
    before = (await schedules.get("a")).document
    clock.now += 9 * HOUR
    await asyncio.gather(*(schedules.publish([spec("a", "0 0 * * *")]) for _ in range(5)))
    assert (await schedules.get("a")).document == before


async def test_first_publications_race(
    five: list[Scheduler], database: Database, mongo_url: str, clock: HandClock
) -> None:
    stores = [ScheduleStore(database, clock) for _ in range(5)]
    await asyncio.gather(*(store.publish([spec("a", "@daily")]) for store in stores))
    assert (await stores[0].get("a")).rev == 1


async def test_an_operators_word_survives_the_next_deploy(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """It stands over the code's, both are shown, and taking it back gives the code's newest."""
    await schedules.publish([spec("a", "0 * * * *", limit=5)])
    await schedules.set("a", {"expression": "30 * * * *", "missed": "all"}, by="ann")
    await schedules.publish([spec("a", "15 * * * *", limit=7)])
    (row,) = await schedules.rows(count=1)
    assert (row["expression"], row["missed"], row["limit"]) == ("30 * * * *", "all", 7)
    assert row["code"] == {"qual_name": "a.Job", "expression": "15 * * * *", "limit": 7}
    assert row["override"] == {"expression": "30 * * * *", "missed": "all"}
    assert (row["source"], row["updated_by"], row["next"]) == ("code", "ann", [START + 30 * MINUTE])

    clock.now = START + 30 * MINUTE
    await scheduler.step()
    assert await made(database) == list(ids("a", [clock.now]))
    assert (await schedules.reset("a", ["expression"], by="ann")).expression == "15 * * * *"
    assert (await schedules.reset("a", by="ann")).missed == "one"


async def test_a_schedule_of_an_operator(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    schedule = await schedules.set("mine", {"qual_name": "a.Job", "expression": "*/30 * * * *"}, by="ann")
    assert (schedule.source, schedule.document["code"]) == ("operator", None)
    clock.now = START + 30 * MINUTE
    await scheduler.step()
    assert await made(database) == list(ids("mine", [clock.now]))

    await schedules.delete("mine")
    with pytest.raises(NotFound, match=r"no schedule \[mine\]"):
        await schedules.get("mine")
    clock.now += HOUR
    assert await scheduler.step() is None
    assert len(await made(database)) == 1


async def test_what_operators_may_not_do(schedules: ScheduleStore) -> None:
    await schedules.publish([spec("a", "@daily")])
    with pytest.raises(Conflict, match="comes from the code"):
        await schedules.delete("a")
    with pytest.raises(Conflict, match="for another job"):
        await schedules.set("a", {"qual_name": "b.Job"}, by="ann")
    with pytest.raises(BadOption, match="minute: 59/15 matches 59 only"):
        await schedules.set("a", {"expression": "59/15 * * * *"}, by="ann")
    with pytest.raises(UnknownOption):
        await schedules.set("a", {"cursor": START}, by="ann")
    with pytest.raises(BadOption, match="needs its expression"):
        await schedules.set("new", {"qual_name": "a.Job"}, by="ann")
    with pytest.raises(NotFound):
        await schedules.pause("new", by="ann")
    assert (await schedules.get("a")).rev == 1
    assert len(await schedules.all()) == 1


async def test_pause_and_resume(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """A paused schedule has no instants: none is made up for when it goes on. Both may be repeated."""
    await schedules.publish([spec("a", "0 * * * *", missed="all")])
    for _ in range(2):
        await schedules.pause("a", by="ann")
    (row,) = await schedules.rows()
    assert (row["state"], row["next"], row["paused"]) == ("paused", [], {"at": START, "by": "ann"})
    clock.now = START + 3 * HOUR + 30 * MINUTE
    await scheduler.step()
    for _ in range(2):
        await schedules.resume("a", by="bob")
    await scheduler.step()
    assert await made(database) == []

    clock.now = START + 4 * HOUR
    await scheduler.step()
    assert await made(database) == list(ids("a", [clock.now]))


async def test_withdrawn_from_the_code(
    scheduler: Scheduler, schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """Shown, not fired, whatever the operator said; another worker's jobs and operators' schedules stay."""
    await schedules.publish([spec("a", "0 * * * *"), {**spec("b", "0 * * * *"), "qual_name": "b.Job"}])
    await schedules.set("mine", {"qual_name": "a.Job", "expression": "0 * * * *"}, by="ann")
    await schedules.set("a", {"enabled": True}, by="ann")
    await schedules.publish(declared(entry("a.Job", schedule=None)), of=["a.Job"])
    states = {row["_id"]: row["state"] for row in await schedules.rows()}
    assert states == {"a": "withdrawn", "b": "active", "mine": "active"}
    clock.now = START + HOUR
    await scheduler.step()
    assert set(await made(database)) == ids("b", [clock.now]) | ids("mine", [clock.now])

    clock.now += 10 * MINUTE
    await schedules.publish([spec("a", "0 * * * *")], of=["a.Job"])
    assert (await schedules.get("a")).due() == START + 2 * HOUR
    await schedules.publish([], of=["a.Job"])
    await schedules.delete("a")
    assert [schedule.name for schedule in await schedules.all()] == ["b", "mine"]


async def test_changes_and_fires_at_the_same_time(
    five: list[Scheduler], schedules: ScheduleStore, database: Database, clock: HandClock
) -> None:
    """Operators write while five schedulers fire: no word is lost and no instant doubled."""
    await schedules.publish([spec("a", "* * * * *", missed="all")])
    for minutes in range(1, 21):
        clock.now = START + minutes * MINUTE
        await asyncio.gather(
            *(scheduler.step() for scheduler in five),
            schedules.set("a", {"limit": minutes}, by="ann"),
            schedules.set("a", {"max_age": 600.0 + minutes}, by="bob"),
        )
    schedule = await schedules.get("a")
    assert (schedule.limit, schedule.max_age) == (20, 620.0)
    assert sorted(await made(database)) == sorted(ids("a", [START + n * MINUTE for n in range(1, 21)]))
    assert schedule.document["fired"] == 20


# ---------------------------------------------------------------------- trigger


async def test_trigger_with_the_same_token_is_one_job(
    schedules: ScheduleStore, queue: JobQueue, catalogue: Catalogue, database: Database, scheduler: Scheduler
) -> None:
    """Also for a schedule that does not fire by itself, and also when the job is done."""
    await schedules.publish([spec("a", "@daily", args={"n": 1}, enabled=False)])
    schedule = await schedules.get("a")
    first = await trigger(schedule, queue, catalogue, token="t1", by="ann")
    second = await trigger(schedule, queue, catalogue, token="t1", by="ann")
    other = await trigger(schedule, queue, catalogue, token="t2", by="ann")
    assert first.id == second.id != other.id
    assert (first.args, first.username, first.document["request_id"]) == ({"n": 1}, "ann", "t1")

    owner = Owner("o" * 32, "worker@here", "here", 1)
    (job,) = await queue.claims.claim(owner, namespaces=["night"], limit=1)
    await queue.finish(await queue.start(job), Outcome.complete(None), log_seq=0)
    assert (await trigger(schedule, queue, catalogue, token="t1", by="ann")).id == first.id
    assert sorted(await made(database)) == sorted([first.id, other.id])


async def test_trigger_of_what_nobody_has(
    schedules: ScheduleStore, queue: JobQueue, catalogue: Catalogue
) -> None:
    schedule = await schedules.set("x", {"qual_name": "no.Job", "expression": "@daily"}, by="ann")
    with pytest.raises(UnknownJob):
        await trigger(schedule, queue, catalogue, token="t", by="ann")


# ---------------------------------------------------------------------- running by itself


class Wire:
    """A connection to the database that can be cut and mended."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (target.hostname, target.port)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.snap()
        await self._server.wait_closed()

    async def snap(self) -> None:
        """Break off all connections; new ones can be made at once."""
        for end in tuple(self._ends):
            end.transport.abort()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._ends.add(writer)  # at once: it may be broken off before it leads anywhere
        there, back = await asyncio.open_connection(*self._target)
        self._ends.add(back)
        with suppress(ConnectionError):
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
        self._ends -= {writer, back}
        self._tasks.discard(task)

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()


async def test_it_outlives_an_outage_of_the_database(
    mongo_url: str, database: Database, queue: JobQueue, catalogue: Catalogue, settings: Settings
) -> None:
    """By the real clock: what fell into the outage is made up for by the policy, and nothing twice."""
    wire = Wire(mongo_url)
    await wire.mend()
    far = await Database.connect(
        f"mongodb://127.0.0.1:{wire.port}/?directConnection=true", database.name, timeout=0.5
    )
    await catalogue.publish([entry("a.Job")])
    schedules = ScheduleStore(database)
    scheduler = Scheduler(
        ScheduleStore(far), JobQueue(far, settings), Catalogue(far), ServerClock(far), poll=0.2
    )
    await schedules.publish([spec("a", "* * * * * *", missed="all")])
    stop = asyncio.Event()
    running = asyncio.create_task(scheduler.run(stop))

    async def made_at_least(count: int) -> bool:
        assert not running.done()
        return len(await made(database)) >= count

    await eventually_async(lambda: made_at_least(2))
    await wire.cut()
    before = len(await made(database))
    began = await database.server_time()
    await eventually_async(lambda: passed(database, began + timedelta(seconds=3)))
    assert len(await made(database)) <= before + 1  # one may have been on its way
    await wire.mend()
    scheduler.wake()
    await eventually_async(lambda: made_at_least(before + 4))
    stop.set()
    await running
    await wire.cut()
    await far.close()

    schedule = await schedules.get("a")
    since = schedule.document["since"]
    instants = cron.fires_between("* * * * * *", since, schedule.cursor)
    assert sorted(await made(database)) == sorted(ids("a", instants))


async def passed(database: Database, moment: datetime) -> bool:
    return await database.server_time() >= moment


async def test_it_wakes_for_a_change_and_stops_at_once(
    database: Database, queue: JobQueue, catalogue: Catalogue
) -> None:
    """Asleep for an hour, it sees a new schedule when it is woken, and sleeps until its instant."""
    await catalogue.publish([entry("a.Job")])
    schedules = ScheduleStore(database)
    scheduler = Scheduler(schedules, queue, catalogue, ServerClock(database), poll=3600)
    stop = asyncio.Event()
    running = asyncio.create_task(scheduler.run(stop))
    await schedules.publish([spec("a", "* * * * * *")])
    scheduler.hear(Change("insert", SCHEDULE, "a"))

    async def fired_twice() -> bool:
        return len(await made(database)) >= 2

    await eventually_async(fired_twice)
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_arguments_that_fit_no_more_are_skipped_and_told(
    scheduler: Scheduler,
    schedules: ScheduleStore,
    queue: JobQueue,
    catalogue: Catalogue,
    database: Database,
    clock: HandClock,
) -> None:
    """No job is queued that no worker would take; the operator sees why, and can mend it."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    await catalogue.publish([entry("a.Job", schema=schema)])
    await schedules.publish([spec("a", "0 * * * *")])
    clock.now = START + HOUR
    await scheduler.step()

    assert await made(database) == []
    skipped = (await schedules.get("a")).document["last_skipped"]
    assert skipped["reason"].startswith("the arguments do not fit: ")
    with pytest.raises(BadArguments):
        await trigger(await schedules.get("a"), queue, catalogue, token="t", by="ann")

    await schedules.set("a", {"args": {"n": 1}}, by="ann")
    clock.now += HOUR
    await scheduler.step()
    assert await made(database) == [fire_id("a", START + 2 * HOUR)]


async def test_a_class_that_is_gone_from_its_file_is_withdrawn(
    schedules: ScheduleStore, catalogue: Catalogue
) -> None:
    """Deleted, renamed or without a schedule; what other files define is left alone."""

    async def publish(*entries: dict[str, Any]) -> dict[str, str]:
        await catalogue.publish(entries)
        await publish_declared(schedules, catalogue, entries)
        return {row["_id"]: row["state"] for row in await schedules.rows()}

    hourly = {"schedule": "@hourly"}
    one, two = (entry(name, file="jobs.py", **hourly) for name in ("j.One", "j.Two"))
    await publish(entry("k.Other", file="others.py", **hourly))
    everything = await publish(one, two)
    assert everything == {"j.One": "active", "j.Two": "active", "k.Other": "active"}

    assert await publish(one) == {**everything, "j.Two": "withdrawn"}
    assert await publish({**one, "schedule": None}, two) == {**everything, "j.One": "withdrawn"}
    assert await publish(one, two) == everything


async def test_a_schedule_that_cannot_be_published_stops_no_worker(
    catalogue: Catalogue, schedules: ScheduleStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It was checked where it was declared; should that have been elsewhere, it is told."""
    odd = entry("a.Job", schedule={"expression": "@hourly", "zone": "Mars/Olympus"})
    await publish_declared(schedules, catalogue, [odd])

    assert await schedules.all() == []
    assert "schedules.refused" in caplog.messages


async def test_the_clock_is_the_servers_and_never_ahead(database: Database) -> None:
    """Measured once, then counted on; asked again after a while."""
    clock = ServerClock(database)
    for _ in range(5):
        before = await database.server_time()
        now = await clock()
        after = await database.server_time()
        assert before - timedelta(seconds=5) <= now <= after + timedelta(milliseconds=1)
