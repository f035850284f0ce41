"""Pauses and halts: in the store, at the claim, through the API, and as a worker obeys them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from core4.config import Settings
from core4.controls import Controls, ControlStore, Pause
from core4.database import Database
from core4.jobs import Job, Kind, Owner
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.schedules import ScheduleStore
from core4.states import State
from core4.worker.scheduler import Scheduler
from tests.database import SmallDatabase
from tests.helpers import eventually_async
from tests.integration.driver import Api, Runner, order
from tests.integration.test_worker import NAME, House

OWNER = Owner("owner", "worker@here", "here", 1)


@pytest.fixture
async def controls(database: Database) -> ControlStore:
    controls = ControlStore(database)
    await controls.prepare()
    return controls


@pytest.fixture(params=[False, True], ids=["peek", "find-and-modify"])
async def queue(request: pytest.FixtureRequest, database: SmallDatabase, settings: Settings) -> JobQueue:
    """Both shapes of the claim pass the same tests; one of them with all indexes."""
    database.find_and_modify, database.every_index = request.param, not request.param
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    return queue


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> House:
    return House(database, settings, queue, logs, registry)


def paused(scope: str, target: str = "") -> Controls:
    return Controls((Pause(scope, target, "ann", datetime.now(UTC)),))


async def put(queue: JobQueue, name: str, count: int = 1, **more: object) -> list[Job]:
    return [await queue.enqueue(order(name, args={"n": n}, **more)) for n in range(count)]


async def claim(
    queue: JobQueue, controls: Controls, *, limit: int = 5, namespaces: Sequence[str] = ("DEFAULT", "B")
) -> list[str]:
    claimed = await queue.claims.claim(OWNER, namespaces=namespaces, limit=limit, controls=controls)
    return [job.name for job in claimed]


async def test_a_pause_says_who_when_and_why(controls: ControlStore) -> None:
    """The first one stays, resume ends it, a second resume finds nothing."""
    first = await controls.pause("job", "a.B", by="ann", reason="broken")
    again = await controls.pause("job", "a.B", by="bob")

    assert again == first
    assert (first.by, first.reason) == ("ann", "broken")
    assert (await controls.read()).pauses == (first,)
    assert await controls.resume("job", "a.B") is True
    assert await controls.resume("job", "a.B") is False
    assert (await controls.read()).pauses == ()


@pytest.mark.parametrize(
    ("scope", "target", "left"),
    [
        ("job", "pro.Job", ["pro.Other", "process.Job"]),
        ("project", "pro", ["process.Job"]),
        ("namespace", "B", ["pro.Job", "pro.Other"]),
    ],
)
@pytest.mark.row("S35")
async def test_what_is_paused_is_not_claimed(
    queue: JobQueue, scope: str, target: str, left: list[str]
) -> None:
    """Names, projects and namespaces; everybody else comes at once, and in order."""
    await put(queue, "pro.Job", 3)
    await put(queue, "pro.Other")
    await put(queue, "process.Job", namespace="B")

    claimed: list[str] = []
    while found := await claim(queue, paused(scope, target), limit=1):
        claimed += found
    assert sorted(set(claimed)) == left

    await queue.claims.unpark(Controls())
    while found := await claim(queue, Controls()):
        claimed += found
    assert sorted(claimed) == ["pro.Job"] * 3 + ["pro.Other", "process.Job"]


async def test_parked_jobs_are_uncharged_and_pinned_ones_stay_pinned(queue: JobQueue) -> None:
    (free,), (pinned,) = await put(queue, "a.B"), await put(queue, "a.C", options={"worker": OWNER.worker})

    assert await claim(queue, paused("project", "a")) == []
    for job in (free, pinned):
        found = await queue.store.get(job.id)
        assert (found.state, found.document["held"], found.claims, found.trial) == (
            State.PENDING,
            "paused",
            0,
            0,
        )
        assert "due" not in found.document

    assert await queue.claims.unpark(paused("project", "a")) == 0
    assert await queue.claims.unpark(Controls()) == 2
    assert (await queue.store.get(pinned.id)).document["held"] == "worker"
    assert "held" not in (await queue.store.get(free.id)).document
    assert await claim(queue, Controls()) == ["a.B", "a.C"]


async def test_a_thousand_paused_in_front_slow_nobody_behind(database: Database, queue: JobQueue) -> None:
    """They leave the index once: the claims after it look at none of them."""
    await asyncio.gather(*(queue.enqueue(order("a.B", args={"n": n})) for n in range(1000)))
    await put(queue, "c.D", 2)

    assert await claim(queue, paused("job", "a.B"), limit=1) == ["c.D"]
    due = await database.collection("sys.queue").find({"due": True}).to_list(None)
    assert [document["name"] for document in due] == ["c.D"]
    assert await claim(queue, paused("job", "a.B"), limit=1) == ["c.D"]


async def test_killed_and_removed_while_parked(queue: JobQueue) -> None:
    first, second = await put(queue, "a.B", 2)
    await claim(queue, paused("job", "a.B"))

    assert (await queue.kill(first.id, by="ann"))[0].state is State.KILLED
    await queue.remove(second.id, by="ann")
    assert await queue.claims.unpark(Controls()) == 0


@pytest.mark.row("S35")
async def test_the_api_pauses_shows_and_resumes(api: Api, runner: Runner) -> None:
    """Running jobs go on and are counted; a waiting one says why it waits."""
    running_id = await api.enqueue(n=1)
    attempt = await runner.start()
    body = {"scope": "project", "target": "tests", "reason": "upgrade"}
    made = (await api.call("PUT", "/control/pause", json=body)).data
    waiting_id = await api.enqueue(n=2)

    (shown,) = (await api.call("GET", "/control")).data["pauses"]
    assert shown == {**made, "running": 1, "held": 1}
    assert (made["by"], made["reason"]) == ("admin", "upgrade")
    assert (await api.detail(waiting_id))["paused"] == made
    assert "paused" not in await api.detail(running_id)

    await attempt.finish(Outcome.complete(None))
    assert (await api.call("GET", "/control")).data["pauses"][0]["running"] == 0
    assert (
        await api.call("PUT", "/control/resume", json={"scope": "project", "target": "tests"})
    ).data is True
    assert (
        await api.call("PUT", "/control/resume", json={"scope": "project", "target": "tests"})
    ).data is False
    assert (await api.detail(waiting_id))["paused"] is None


async def test_a_paused_worker_says_so(api: Api, runner: Runner) -> None:
    body = {"scope": "worker", "target": runner.owner.worker}
    made = (await api.call("PUT", "/control/pause", json=body)).data

    (row,) = (await api.call("GET", "/worker")).data
    assert row["paused"] == made


@pytest.mark.parametrize(
    ("scope", "there"), [("job", "tests.Job"), ("namespace", "DEFAULT"), ("worker", ""), ("everything", "")]
)
async def test_who_pauses_what_nobody_knows_is_warned(
    api: Api, runner: Runner, scope: str, there: str
) -> None:
    """It may be a slip of the pen, or for a worker that comes later: the pause is kept."""
    there = runner.owner.worker if scope == "worker" else there
    known = await api.call("PUT", "/control/pause", json={"scope": scope, "target": there})
    assert known.status == 200
    assert "flash" not in known.body
    if scope == "everything":
        return
    unknown = await api.call("PUT", "/control/pause", json={"scope": scope, "target": "nobody.There"})

    assert "[nobody.There]" in unknown.body["flash"][0]["message"]
    assert len((await api.call("GET", "/control")).data["pauses"]) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"scope": "planet", "target": "a"},
        {"scope": "job"},
        {"target": "a.B"},
        {"scope": "project", "target": "a.B"},
        {"scope": "job", "target": "x" * 201},
        {"reason": "x" * 501},
    ],
)
async def test_bad_pauses_are_refused(api: Api, body: dict[str, str]) -> None:
    answer = await api.call("PUT", "/control/pause", json=body)

    assert answer.status == 400, answer.body
    assert (await api.call("GET", "/control")).data["pauses"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("PUT", "/pause"), ("PUT", "/resume"), ("PUT", "/halt"), ("PUT", "/halt/one")],
)
async def test_only_administrators_control(api: Api, method: str, path: str) -> None:
    await api.users.add("ann", "secret", ["job://.*/x"])

    answer = await api.call(method, f"/control{path}", auth=("ann", "secret"))
    assert answer.status == 403


@pytest.mark.row("S35")
@pytest.mark.parametrize(
    ("scope", "target"),
    [
        ("everything", ""),
        ("namespace", "DEFAULT"),
        ("job", NAME),
        ("project", "tests"),
        ("worker", None),
    ],
)
async def test_a_worker_starts_nothing_that_is_paused(
    house: House, controls: ControlStore, scope: str, target: str | None
) -> None:
    """It runs what it had, and takes up the rest as soon as the pause has ended."""
    async with house.worker() as running:
        slow = await house.enqueue("sleep", value=1.5)
        await house.reach(slow, State.RUNNING)
        where = running.worker.owner.worker if target is None else target
        await controls.pause(scope, where, by="ann")
        await eventually_async(lambda: seen(running.worker._controls), what="the worker has read it")
        held = await house.enqueue("answer")

        assert (await house.reach(slow)).state is State.COMPLETE
        assert (await house.queue.store.get(held)).state is State.PENDING
        await controls.resume(scope, where)
        assert (await house.reach(held)).state is State.COMPLETE


async def seen(found: Controls) -> bool:
    return bool(found.pauses)


@pytest.mark.row("S48")
async def test_a_halt_ends_workers_that_are_up_and_none_that_start_later(
    house: House, controls: ControlStore
) -> None:
    async with house.worker() as first:
        await controls.halt(by="ann", reason="move")
        await asyncio.wait_for(first.task, 20)
    assert await house.registry.up() == []

    async with house.worker() as second:
        job_id = await house.enqueue("answer")
        assert (await house.reach(job_id)).state is State.COMPLETE
        assert not second.task.done()


@pytest.mark.row("S48")
@pytest.mark.parametrize(
    "held", [paused("everything"), paused("job", "tests.Job"), paused("project", "tests")]
)
async def test_no_schedule_fires_while_it_is_paused(
    database: Database, settings: Settings, runner: Runner, held: Controls
) -> None:
    """Global maintenance: the loop turns, nothing is made; afterwards it is made up for."""
    now, controls = [datetime(2026, 1, 1, tzinfo=UTC)], held

    async def clock() -> datetime:
        return now[0]

    schedules = ScheduleStore(database, clock)
    await schedules.set("often", {"qual_name": "tests.Job", "expression": "* * * * *"}, by="ann")
    scheduler = Scheduler.of_worker(database, settings, runner.queue, lambda: controls)
    scheduler._clock = clock
    now[0] += timedelta(minutes=1)
    assert await scheduler.step() is None
    assert await runner.queue.store.counts() == {}

    controls = Controls()
    await scheduler.step()
    assert await runner.queue.store.counts() == {"pending": 1}


@pytest.mark.row("M36", "M40")
async def test_workers_are_found_by_their_fields_and_told_to_end(
    api: Api, runner: Runner, registry: WorkerRegistry
) -> None:
    """What one runs is told to those who may read it; who has ended cannot be told to end."""
    other = Owner("other", "worker@there", "there", 7, Kind(type="tmux", nr=5))
    await registry.enlist(other)
    job_id = await api.enqueue()
    await runner.start()

    async def labels(query: str) -> list[str]:
        return [row["label"] for row in (await api.call("GET", f"/worker?{query}")).data]

    found = [await labels(query) for query in ("status=BUSY", "status=NEW", 'filter={"type": "tmux"}')]
    (busy,) = (await api.call("GET", "/worker?status=BUSY")).data
    told = (await api.call("PUT", "/control/halt/other", json={"hard": True, "reason": "move"})).data
    (row,) = (await api.call("GET", "/worker?status=NEW")).data
    await registry.leave(other)
    refused = await api.call("PUT", "/control/halt/other")

    assert found == [["w1"], ["w5"], ["w5"]]
    assert (busy["_id"], busy["current"]) == (runner.owner.id, [str(job_id)])
    assert (told["hard"], told["by"], told["reason"]) == (True, "admin", "move")
    assert row["halt"] == told
    assert (refused.status, await labels("status=HALTED")) == (409, ["w5"])
    assert (await api.call("PUT", "/control/halt/nobody")).status == 404
    assert (await api.call("GET", "/worker?status=ASLEEP")).status == 400
    assert (await api.call("GET", '/worker?filter={"slot": 1}')).status == 400
