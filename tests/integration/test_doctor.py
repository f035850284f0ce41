"""The doctor on a real database: inconsistencies planted by hand, healthy work beside them, live workers."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4 import transitions
from core4.config import Settings
from core4.database import Database
from core4.doctor import Doctor
from core4.events import EventStore
from core4.findings import KINDS, Finding
from core4.jobs import Job, JobOrder, utcnow
from core4.logs import Line
from core4.queues import JobQueue
from core4.repairs import Repairs
from core4.sanity import flaws
from core4.states import FINAL, WAITING, State
from core4.store import JOURNAL, QUEUE
from core4.users import UserStore
from tests.chaos.checker import check
from tests.chaos.client import NAME, Actor, new_owner
from tests.chaos.evidence import opened
from tests.chaos.recovery import gathered, recover
from tests.database import SmallDatabase
from tests.helpers import clean_environ, program, unsettled
from tests.integration.driver import Api, Runner
from tests.integration.test_worker import House, house
from tests.integration.test_worker_faults import Bench, bench, worker

__all__ = ["bench", "house"]  # fixtures

HOUR = timedelta(hours=1)


@dataclass
class Ward:
    """A database with healthy work of each state in it, and the means to break it."""

    database: Database
    settings: Settings
    actor: Actor
    key: str = ""  # of the job that is to be broken

    def __post_init__(self) -> None:
        self.queue, self.journal = self.database.collection(QUEUE), self.database.collection(JOURNAL)

    def doctor(self, patience: float = 0.1) -> Doctor:
        return Doctor(self.database, self.settings, patience=patience)

    async def furnish(self) -> None:
        """One healthy job of each state, held by a worker that is up."""
        actor = self.actor
        await actor.prepare()
        await actor.register()
        await self.set("worker", actor.owner.id, beat=utcnow() + HOUR)  # it need not renew
        await actor.catalogue.publish([{"_id": NAME, "namespace": "DEFAULT"}])
        for kind in ("complete", "failed", "deferred", "killed"):
            await self.finished(f"healthy {kind}", kind, error_time=3600, defer_time=3600)
        await self.finished("healthy error", "failed", attempts=1)
        await self.started("healthy running")
        await actor.enqueue("healthy pending")
        await actor.enqueue("healthy pinned", worker="worker@here")
        removed = await actor.enqueue("healthy removed")
        await actor.remove(removed.id)
        restarted = await self.finished("healthy restarted", "failed", attempts=1)
        await actor.restart(restarted)
        for number in range(2):
            await actor.enqueue(f"healthy limited {number}", max_running=1, max_running_key="healthy")
        await self.run(await self.claimed_of("healthy limited 0"), "started")
        assert await self.claim("healthy limited 1") is None

    async def claim(self, key: str) -> Job | None:
        """Claim the job of this key and no other; None if it is put aside."""
        document = await self.queue.find_one({"args.key": key, "state": {"$in": sorted(WAITING)}})
        assert document is not None
        seen = Job.from_document(document)
        taken = await self.actor.queue.store.cas(seen, transitions.claim(seen, self.actor.owner))
        assert taken is not None
        return await self.actor.queue.claims.admitted(taken)

    async def claimed_of(self, key: str) -> Job:
        job = await self.claim(key)
        assert job is not None
        return job

    async def run(self, job: Job, kind: str) -> ObjectId:
        started = await self.actor.start(job)
        assert started is not None
        if kind != "started":
            await self.actor.finish(started, kind)
        return job.id

    async def pending(self, key: str = "", **options: Any) -> ObjectId:
        if "max_running" in options:
            options["max_running_key"] = key or self.key
        return (await self.actor.enqueue(key or self.key, **options)).id

    async def claimed(self, key: str = "", **options: Any) -> ObjectId:
        await self.pending(key, **options)
        return (await self.claimed_of(key or self.key)).id

    async def started(self, key: str = "", **options: Any) -> ObjectId:
        await self.pending(key, **options)
        return await self.run(await self.claimed_of(key or self.key), "started")

    async def finished(self, key: str = "", kind: str = "failed", **options: Any) -> ObjectId:
        await self.pending(key, **options)
        return await self.run(await self.claimed_of(key or self.key), kind)

    async def set(self, table: str, _id: Any, *, unset: str = "", **fields: Any) -> None:
        """A hand in the database."""
        update: dict[str, Any] = {"$set": fields} if fields else {}
        if unset:
            update["$unset"] = dict.fromkeys(unset.split(), 1)
        result = await self.database.collection(f"sys.{table}").update_one({"_id": _id}, update)
        assert result.modified_count == 1

    async def sound(self) -> None:
        """Every document is right, everything can be brought to its end, and the checker agrees."""
        for table, journal in ((self.queue, False), (self.journal, True)):
            for document in await table.find({}).to_list(None):
                assert not flaws(Job.from_document(document, journal=journal))
        running = await self.actor.queue.store.running(self.actor.owner.id)
        for job in running:  # what the healthy worker runs ends as well
            await self.actor.finish(job) if job.claims == 0 else await self.actor.run(job)
        await recover(self.actor)
        home = self.actor.ledger.parent
        verdict = check(await gathered(self.database, home / "history", home / "ledger"))
        assert verdict.ok, str(verdict)


@pytest.fixture(autouse=True)
def all_is_there(database: SmallDatabase) -> None:
    """The doctor tells of an index that is missing."""
    database.every_index = True


@pytest.fixture
def ward(database: Database, settings: Settings, tmp_path: Path) -> Iterator[Ward]:
    quick = replace(settings, dead_after=1.0, heartbeat=0.2, rescue_every=0.1)
    with opened(tmp_path / "history") as history:
        yield Ward(database, quick, Actor(database, quick, history, tmp_path / "ledger"))


Plant = Callable[["Ward"], Awaitable[Any]]
PLANTS: dict[str, tuple[str, Plant]] = {}


def plant(kind: str, name: str = "") -> Callable[[Plant], Plant]:
    """Registers what breaks something in this way; it returns the id of what has to be found."""

    def add(function: Plant) -> Plant:
        PLANTS[name or function.__name__] = kind, function
        return function

    return add


def broken(kind: str, name: str, at: str = "pending", *, unset: str = "", **fields: Any) -> None:
    """Registers a job that stands `at` this state, with these options, and gets and loses fields by hand."""
    options = {key: fields.pop(key) for key in ("worker", "max_running", "attempts") if key in fields}

    async def act(ward: Ward) -> ObjectId:
        make = {"pending": ward.pending, "running": ward.started, "claimed": ward.claimed}
        if at in make:
            job_id = await make[at](**options)
        else:
            job_id = await ward.finished(kind=at, error_time=3600, defer_time=3600, **options)
        given = {key: value() if callable(value) else value for key, value in fields.items()}
        await ward.set("queue", job_id, unset=unset, **given)
        return job_id

    PLANTS[name] = kind, act


def ago(**since: float) -> Callable[[], Any]:
    return lambda: utcnow() - timedelta(**since)


broken("line", "a waiting job without due", unset="due")
broken("line", "held for a worker, pinned to none", unset="due", held="worker")
broken("line", "held for an unknown reason", unset="due", held="moon")
broken("line", "held for a limit it has not", unset="due", held="max_running")
broken("line", "held for a rate it has not", unset="due", held="rate_limit")
broken("line", "due and waiting for a time", query_at=lambda: utcnow() + HOUR)
broken("line", "due and held", max_running=1, held="max_running")
broken("line", "pinned and due", worker="worker@here", due=True)
broken("line", "pinned and not held", worker="worker@here", unset="held")
broken("line", "running and due", "running", due=True)
broken("line", "ended and due", "failed", attempts=1, due=True)
broken("line", "ended and waiting for a time", "failed", attempts=1, query_at=ago(hours=1))
broken("line", "failed without a time", "failed", unset="query_at")
broken("line", "deferred without an end", "deferred", unset="expires")
broken("rank", "a rank that fits nothing", rank=0)
broken("rank", "a priority changed by hand", priority=7)
broken("unique_key", "without its place", unset="unique_key")
broken("unique_key", "with another's place", unique_key="somebody")
broken("unique_key", "not unique with a place", unique=False)
broken("lease", "a lease while it waits", lease={"id": "x", "owner": "y", "at": utcnow()})
broken("slot", "a slot while it waits", max_running=1, slot="another#0")
broken("no_slot", "running without its slot", "running", max_running=1, unset="slot")
broken("no_lease", "running without a lease", "running", unset="lease")
broken("no_lease", "claimed without a lease", "claimed", unset="lease")
broken("unsettled", "waiting and marked as ended", settle=True)
broken("unsettled", "running and marked as ended", "running", settle=True)
broken("unsettled", "ended, to leave, not marked", "failed", attempts=1, keep_stopped=False)
broken("overdue", "failed, its time long past", "failed", query_at=ago(hours=1))
broken("overdue", "pinned, its time long past", "failed", worker="worker@here", query_at=ago(hours=1))
broken("expired", "deferred past its window", "deferred", expires=ago(hours=1))
broken("killed", "killed and waiting", killed_at=ago(hours=1))
broken("kill_overdue", "a kill nobody obeys", "running", killed_at=ago(hours=1))
broken("fence", "a fence set back", "failed", fence=0)
broken("rev", "a revision set back", "failed", rev=1)
broken("history", "a state changed by hand", unset="due", state="error")
broken("history", "a history out of order", history=[])


@plant("history")
async def a_state_changed_and_what_showed_it_mended(ward: Ward) -> ObjectId:
    """A repair of something else does not make a history that cannot be."""
    job_id = await ward.pending()
    await ward.set("queue", job_id, state="error")
    await Repairs(ward.actor.queue.store, ward.actor.queue.outbox).mend(
        job_id, by="ann"
    )  # it is not in line any more
    return job_id


async def _dead_owner(ward: Ward, how: str) -> None:
    """What becomes of the worker that holds the job."""
    owner = ward.actor.kept["ghost"].id
    workers = ward.database.collection("sys.worker")
    if how == "deleted":
        await workers.delete_one({"_id": owner})
    else:
        await ward.set("worker", owner, state=how, ended_at=utcnow() - HOUR)


async def _of_a_ghost(ward: Ward, *, start: bool = True, **options: Any) -> ObjectId:
    """A job that another worker holds."""
    ghost = ward.actor.kept["ghost"] = new_owner("ghost@here")
    await ward.actor.registry.register(ghost, slots=1, namespaces=["DEFAULT"], jobs=[NAME], version="1")
    own, ward.actor.owner = ward.actor.owner, ghost
    job_id = await (ward.started(**options) if start else ward.claimed(**options))
    ward.actor.owner = own
    await ward.queue.update_one({"_id": job_id}, {"$set": {"lease.at": utcnow() - HOUR}})
    return job_id


for state in ("dead", "down", "deleted"):
    for start in (True, False):

        @plant("orphan", f"{'running' if start else 'claimed'}, its worker {state}")
        async def _(ward: Ward, state: str = state, start: bool = start) -> ObjectId:
            job_id = await _of_a_ghost(ward, start=start)
            await _dead_owner(ward, state)
            return job_id


@plant("orphan")
async def to_be_killed_by_a_dead_worker(ward: Ward) -> ObjectId:
    job_id = await _of_a_ghost(ward)
    await ward.actor.kill(job_id)
    await _dead_owner(ward, "dead")
    return job_id


@plant("silent")
async def a_worker_that_does_not_renew(ward: Ward) -> str:
    await _of_a_ghost(ward)
    ghost: str = ward.actor.kept["ghost"].id
    await ward.set("worker", ghost, beat=utcnow() - HOUR)
    return ghost


@plant("silent")
async def a_worker_that_never_renewed(ward: Ward) -> str:
    await _of_a_ghost(ward)
    ghost: str = ward.actor.kept["ghost"].id
    await ward.set("worker", ghost, unset="beat")
    return ghost


@plant("unique_key")
async def its_place_is_taken(ward: Ward) -> ObjectId:
    """Two of the same: which is to go is not the doctor's to say."""
    first = await ward.pending()
    await ward.set("queue", first, unset="unique_key")
    await ward.pending()
    return first


async def _half(ward: Ward, step: Callable[[], Awaitable[Any]]) -> None:
    """The first half of an operation whose process died in the middle."""
    with unsettled(ward.actor.queue):
        await step()


@plant("unsettled")
async def complete_and_not_moved(ward: Ward) -> ObjectId:
    await ward.pending()
    job = await ward.claimed_of(ward.key)
    started = await ward.actor.start(job)
    assert started is not None
    await _half(ward, lambda: ward.actor.finish(started))
    return job.id


@plant("unsettled")
async def moved_and_not_deleted(ward: Ward) -> ObjectId:
    job_id: ObjectId = await complete_and_not_moved(ward)
    document = await ward.queue.find_one({"_id": job_id})
    assert document is not None
    del document["settle"]
    await ward.journal.insert_one(document)
    return job_id


@plant("unsettled")
async def restarted_and_the_child_not_made(ward: Ward) -> ObjectId:
    job_id = await ward.finished(attempts=1)
    await _half(ward, lambda: ward.actor.restart(job_id))
    return job_id


@plant("unsettled")
async def restarted_from_the_journal_and_the_child_forgotten(ward: Ward) -> ObjectId:
    job_id = await ward.finished(kind="complete")
    await _half(ward, lambda: ward.actor.restart(job_id))
    await ward.set("journal", job_id, unset="settle")
    return job_id


@plant("unsettled")
async def an_outbox_nobody_looks_at(ward: Ward) -> ObjectId:
    job_id: ObjectId = await restarted_and_the_child_not_made(ward)
    await ward.set("queue", job_id, unset="settle")
    return job_id


@plant("unsettled")
async def removed_and_not_moved(ward: Ward) -> ObjectId:
    job_id = await ward.pending()
    await _half(ward, lambda: ward.actor.remove(job_id))
    await ward.set("queue", job_id, unset="settle")
    return job_id


@plant("twice")
async def an_insert_that_came_after_the_end(ward: Ward) -> ObjectId:
    job_id = await ward.pending()
    late = await ward.queue.find_one({"_id": job_id})
    assert late is not None
    await ward.run(await ward.claimed_of(ward.key), "complete")
    await ward.queue.insert_one(late)
    return job_id


@plant("twice")
async def a_job_that_runs_and_has_ended(ward: Ward) -> ObjectId:
    job_id: ObjectId = await an_insert_that_came_after_the_end(ward)
    lease = {"id": "x", "owner": ward.actor.owner.id, "at": utcnow()}
    await ward.set("queue", job_id, unset="due", state="running", lease=lease)
    return job_id


async def _misplaced(ward: Ward, job_id: ObjectId, *, keep: bool = False) -> ObjectId:
    """A job that is not done, in the journal."""
    document = await ward.queue.find_one({"_id": job_id})
    assert document is not None
    await ward.journal.insert_one(document)
    if not keep:
        await ward.queue.delete_one({"_id": job_id})
    return job_id


@plant("journal_open")
async def pending_in_the_journal(ward: Ward) -> ObjectId:
    return await _misplaced(ward, await ward.pending())


@plant("journal_open")
async def deferred_in_the_journal(ward: Ward) -> ObjectId:
    return await _misplaced(ward, await ward.finished(kind="deferred"))


@plant("journal_open")
async def running_in_the_journal(ward: Ward) -> ObjectId:
    return await _misplaced(ward, await ward.started())


@plant("journal_open")
async def pending_in_both(ward: Ward) -> ObjectId:
    return await _misplaced(ward, await ward.pending(), keep=True)


@plant("child_missing")
async def a_child_that_is_not_there(ward: Ward) -> ObjectId:
    job_id = await ward.finished(attempts=1)
    child = await ward.actor.restart(job_id)
    await ward.queue.delete_one({"_id": child})
    return job_id


@plant("pause_gone")
async def held_for_a_pause_that_ended(ward: Ward) -> str:
    await ward.set("queue", await ward.pending(), unset="due", held="paused")
    return NAME


@plant("slot_free")
async def held_for_a_free_limit(ward: Ward) -> str:
    job_id = await ward.pending(max_running=2)
    await ward.set("queue", job_id, unset="due", held="max_running")
    return ward.key


@plant("rate_free")
async def held_for_a_rate_nobody_minds(ward: Ward) -> str:
    await ward.set("queue", await ward.pending(rate_limit="5/m"), unset="due", held="rate_limit")
    return NAME


@plant("log_orphan")
async def lines_of_nobody(ward: Ward) -> ObjectId:
    job = await ward.actor.enqueue(ward.key)
    ghost = replace(job, id=ObjectId())
    await ward.actor.logs.append(ghost, "here", [Line(1, 0.0, "INFO", "boo")])
    await ward.actor.logs.append(job, "here", [Line(1, 0.0, "INFO", "mine")])
    return ghost.id


@plant("index")
async def an_index_dropped(ward: Ward) -> str:
    await ward.queue.drop_index("held")
    return f"{QUEUE}.held"


@plant("unreadable")
async def a_document_of_something_else(ward: Ward) -> ObjectId:
    stranger = ObjectId()
    await ward.queue.insert_one({"_id": stranger, "state": "pending", "n": 1})
    return stranger


async def _schedule(ward: Ward) -> None:
    await ward.actor.schedules.set(ward.key, {"qual_name": NAME, "expression": "0 * * * *"}, by="ann")


@plant("schedule_late")
async def a_schedule_nobody_attends(ward: Ward) -> str:
    await _schedule(ward)
    await ward.set("schedule", ward.key, cursor=utcnow() - 3 * HOUR)
    return ward.key


@plant("schedule_broken")
async def a_schedule_nobody_can_read(ward: Ward) -> str:
    await _schedule(ward)
    await ward.set("schedule", ward.key, **{"override.expression": "once in a while"})
    return ward.key


async def _alien(ward: Ward, name: str, **more: Any) -> None:
    await ward.actor.queue.enqueue(JobOrder(name=name, unique=False, **more))


@plant("unserved")
async def a_name_nobody_has(ward: Ward) -> str:
    await _alien(ward, "no.such.Job")
    return "DEFAULT/no.such.Job"


@plant("unserved")
async def a_name_nobody_serves_now(ward: Ward) -> str:
    await ward.actor.catalogue.publish([{"_id": "other.Job", "namespace": "DEFAULT"}])
    await _alien(ward, "other.Job")
    return "DEFAULT/other.Job"


@plant("unserved")
async def a_namespace_nobody_serves(ward: Ward) -> str:
    await _alien(ward, NAME, namespace="elsewhere")
    return f"elsewhere/{NAME}"


@plant("unserved")
async def a_worker_that_is_not_there(ward: Ward) -> str:
    await _alien(ward, NAME, options={"worker": "other@here"})
    return f"DEFAULT/{NAME}/other@here"


@plant("paused")
async def a_namespace_is_paused(ward: Ward) -> str:
    await ward.actor.controls.pause("namespace", "closed", by="ann")
    await _alien(ward, NAME, namespace="closed")
    return f"closed/{NAME}"


def told(findings: tuple[Finding, ...]) -> set[tuple[str, str]]:
    return {(finding.kind, finding.id) for finding in findings}


def is_repaired(name: str) -> bool:
    return KINDS[PLANTS[name][0]].repair is not None and name != "its_place_is_taken"


async def test_a_child_that_may_have_been_deleted_long_ago_is_not_run_again(ward: Ward) -> None:
    """It may have ended since; a repair must not make a second outcome."""
    await ward.furnish()
    ward.key = "old"
    parent = await a_child_that_is_not_there(ward)
    rows = (await ward.actor.queue.store.get(parent)).document["history"]
    old = [{**row, "at": row["at"] - 31 * 24 * HOUR} for row in rows]
    await ward.set("journal", parent, history=old)

    assert (await ward.doctor().repair(by="ann")).repaired == ()


@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "told"])
async def test_each_is_named_and_nothing_else(ward: Ward, repaired: bool) -> None:
    """All that is planted, beside healthy work; afterwards all is sound, and there is nothing left to do."""
    await ward.furnish()
    assert (await ward.doctor().examine()).findings == ()
    planted = {}
    for ward.key in filter(lambda name: is_repaired(name) is repaired, PLANTS):
        kind, act = PLANTS[ward.key]
        planted[kind, str(await act(ward))] = ward.key
    report = await ward.doctor().examine()

    found = told(report.findings)
    assert [name for key, name in planted.items() if key not in found] == []
    assert [each for each in report.findings if (each.kind, each.id) not in planted] == []
    assert all(each.reason for each in report.findings)
    if not repaired:
        assert all(each.view()["advice"] and not each.repair for each in report.findings)
        again = await ward.doctor().repair(by="ann")
        assert (told(again.findings), again.repaired) == (found, ())
        return
    after = await ward.doctor().repair(by="ann")
    assert after.findings == ()
    assert told(after.repaired) >= found
    again = await ward.doctor().repair(by="ann")
    assert (again.findings, again.repaired) == ((), ())
    await ward.sound()


def test_every_kind_is_planted() -> None:
    """What the doctor can say is seen in a test."""
    assert {kind for kind, _ in PLANTS.values()} == set(KINDS)


# ---------------------------------------------------------------------- beside live workers


async def test_healthy_work_yields_nothing(house: House) -> None:
    """Jobs of every state under a live worker, more held than may run, others coming and going."""
    doctor = Doctor(house.database, house.settings, patience=5.0)
    limited = {"max_running": 1, "max_running_key": "one"}
    async with house.worker(slots=3):
        long = await house.enqueue("sleep", value=60)
        for number in range(3):
            await house.enqueue("sleep", value=0.5, options=limited)
            await house.enqueue("raises", options={"attempts": 5, "error_time": 0.3})
            await house.enqueue("defers", options={"defer_time": 0.2, "defer_max": 3})
            await house.enqueue("raises", value=number)
        await house.enqueue("raises", options={"attempts": 2, "error_time": 3600})
        for _ in range(5):
            looking = asyncio.create_task(doctor.examine())
            while not looking.done():
                await house.reach(await house.enqueue("answer"))
            assert looking.result().findings == ()
        await house.queue.kill(long, by="me")
        await house.reach(long, State.KILLED)
        assert (await doctor.repair(by="me")).repaired == ()


SABOTAGE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"state": "pending"}, {"$unset": {"due": 1}}),
    ({"state": "pending"}, {"$set": {"settle": True}}),
    ({"state": "pending"}, {"$set": {"rank": 0}}),
    ({"state": "pending"}, {"$unset": {"unique_key": 1}}),
    ({"state": "running"}, {"$set": {"due": True}}),
    ({"state": "running"}, {"$set": {"settle": True}}),
    ({"state": "running"}, {"$unset": {"lease": 1}}),
]


async def test_repairs_beside_live_workers_lose_nothing(settings: Settings, bench: Bench) -> None:
    """Two doctors without any patience, two workers, and a hand that breaks whatever it meets."""
    queue = bench.database.collection(QUEUE)
    with worker(settings, "first") as first, worker(settings, "second") as second:
        for command in (first, second):
            command.wait_for("ready")
        jobs = [await bench.enqueue(f"k{n}", seconds=0.2, options={"attempts": 3}) for n in range(30)]
        done = asyncio.Event()

        async def heal() -> int:
            repaired = 0
            while not done.is_set():
                doctor = Doctor(bench.database, settings, patience=0.0)
                repaired += len((await doctor.repair(by="ann")).repaired)
            return repaired

        healers = [asyncio.create_task(heal()) for _ in range(2)]
        for where, update in SABOTAGE * 2:
            await queue.update_one(where, update)
            await asyncio.sleep(0.1)  # so that they do not all hit the same moment
        for job_id in jobs:
            await bench.wait_for(job_id, *FINAL)
        done.set()
        assert sum(await asyncio.gather(*healers)) > 0
        assert all(command.process.poll() is None for command in (first, second))
    # A job whose lease was taken may have been run again before its worker knew.
    await bench.judge(pauses=True)


# ---------------------------------------------------------------------- the doors


async def test_on_the_command_line(
    database: Database, queue: JobQueue, settings: Settings, tmp_path: Path
) -> None:
    """Exit codes say whether something is wrong; what is told can be read by people and by scripts."""
    environ = clean_environ(CORE4_MONGO_URL=str(settings.mongo_url), CORE4_MONGO_DATABASE=database.name)

    async def run(*words: str, code: int, **more: str) -> str:
        command = [program("core4"), "doctor", "--patience", "0", *words]
        done = await asyncio.to_thread(
            subprocess.run, command, env={**environ, **more}, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code < 2 else done.stderr

    job = await queue.enqueue(JobOrder(name=NAME, username="ann"))
    assert "0 wrong, 1 waiting, 0 repaired" in await run(code=0)
    await database.collection(QUEUE).update_one({"_id": job.id}, {"$unset": {"due": 1}})
    text = await run(code=1)
    assert str(job.id) in text
    assert "core4 doctor --repair" in text
    found = json.loads(await run("--repair", "-o", "json", code=0))
    assert [(row["kind"], row["_id"]) for row in found["repaired"]] == [("line", str(job.id))]
    assert [(row["kind"], row["wrong"]) for row in found["findings"]] == [("unserved", False)]
    assert (await queue.store.get(job.id)).document["history"][-1]["by"].startswith("doctor (")
    none, silent = await asyncio.gather(
        run(code=2, CORE4_MONGO_URL="", CORE4_HOME=str(tmp_path)),
        run(code=2, CORE4_MONGO_URL="mongodb://127.0.0.1:9/"),
    )
    assert "no database" in none
    assert "does not answer" in silent


async def test_over_the_api(api: Api, users: UserStore, runner: Runner, database: Database) -> None:
    """For administrators only; the repair is in the job's history under the name of who asked for it."""
    await users.add("carol", "secret", ["job://.*/x"])
    job_id = await api.enqueue()
    await database.collection(QUEUE).update_one({"_id": job_id}, {"$unset": {"due": 1}})

    for method in ("GET", "POST"):
        assert (await api.call(method, "/doctor", auth=("carol", "secret"))).status == 403
    assert (await api.call("GET", "/doctor?patience=soon")).status == 400
    assert (await api.call("GET", "/doctor?patience=61")).status == 400
    found = (await api.call("GET", "/doctor?patience=0")).data
    assert [(row["kind"], row["_id"]) for row in found["findings"]] == [("line", str(job_id))]
    assert (found["wrong"], found["repaired"]) == (1, [])
    after = (await api.call("POST", "/doctor", json={"patience": 0})).data
    assert (after["wrong"], after["findings"]) == (0, [])
    assert [row["_id"] for row in after["repaired"]] == [str(job_id)]
    last = (await api.detail(job_id))["history"][-1]
    assert (last["by"], last["reason"]) == ("admin", "repaired: it waits, and no worker will ever see it")
    (line,) = (await EventStore(database).page({"name": "doctor.repair"})).rows
    assert (line["author"], line["outcome"]) == ("admin", "done")
    assert line["data"] == {"findings": [f"line {job_id}"], "count": 1}
