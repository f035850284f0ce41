"""`POST job/bulk`: one operation on all jobs behind a filter."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from bson import ObjectId

from core4 import bulk
from core4.config import Settings
from core4.database import Database
from core4.faults import Faults, armed
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.users import UserStore
from tests.integration.driver import Answer, Api, Runner, order


async def call(api: Api, action: str, auth: tuple[str, str] = ("admin", "hans"), **args: Any) -> Answer:
    return await api.call("POST", "/job/bulk", auth=auth, json={"action": action, **args})


async def put(runner: Runner, count: int, name: str = "tests.Job", **more: Any) -> list[str]:
    return [str((await runner.queue.enqueue(order(name, args={"n": n}, **more))).id) for n in range(count)]


async def fail(runner: Runner) -> str:
    """Run the first job in line to an error."""
    attempt = await runner.start()
    return str((await attempt.finish(Outcome.failed("boom", []))).id)


def outcomes(data: dict[str, Any]) -> Counter[str]:
    """The outcomes of the jobs, which the counts have to agree with."""
    told = Counter(job["outcome"] for job in data["jobs"])
    assert {name: data[name] for name in ("changed", "unchanged", "refused", "gone")} == {
        name: told[name] for name in ("changed", "unchanged", "refused", "gone")
    }
    return told


async def states(runner: Runner, ids: list[str]) -> list[State]:
    return [(await runner.queue.store.get(ObjectId(job_id))).state for job_id in ids]


async def test_kill_by_filter(api: Api, runner: Runner) -> None:
    """Those that match and no others; a dry run before it writes nothing and tells the same."""
    ids = await put(runner, 5)
    wanted = {"args.n": {"lt": 3}}
    revs = [(await runner.queue.store.get(ObjectId(job_id))).rev for job_id in ids]

    told = (await call(api, "kill", filter=wanted, dry_run=True)).data
    assert (told["matched"], outcomes(told)["changed"], told["more"]) == (3, 3, None)
    assert [job["_id"] for job in told["jobs"]] == ids[:3]
    assert [(await runner.queue.store.get(ObjectId(job_id))).rev for job_id in ids] == revs

    done = (await call(api, "kill", filter=wanted)).data
    assert (done["matched"], done["changed"]) == (3, 3)
    assert [job["_id"] for job in done["jobs"]] == ids[:3]
    assert await states(runner, ids) == [State.KILLED] * 3 + [State.PENDING] * 2
    assert (await runner.queue.store.get(ObjectId(ids[0]))).document["history"][-1]["by"] == "admin"

    again = (await call(api, "kill", filter=wanted)).data
    assert outcomes(again) == {"unchanged": 3}


async def test_what_cannot_be_done_is_told_per_job(api: Api, runner: Runner) -> None:
    """Refused with the reason of the single call; what is running is told to its worker."""
    ids = await put(runner, 3)
    attempt = await runner.start()
    assert await fail(runner) == ids[1]

    removed = (await call(api, "remove", all=True, dry_run=True)).data
    assert outcomes(removed) == {"changed": 2, "refused": 1}
    (refused,) = [job for job in removed["jobs"] if job["outcome"] == "refused"]
    assert refused["_id"] == ids[0]
    assert (refused["code"], "kill it first" in refused["detail"]) == ("conflict", True)

    killed = (await call(api, "kill", all=True)).data
    assert [(job["outcome"], job.get("state")) for job in killed["jobs"]] == [
        ("changed", "running"),
        ("refused", None),
        ("changed", "killed"),
    ]
    await attempt.finish(Outcome.killed("killed on request"))
    assert (await runner.queue.store.get(ObjectId(ids[0]))).state is State.KILLED


async def test_restart_makes_each_job_once(api: Api, runner: Runner) -> None:
    """The new jobs are not restarted in their turn, and asking again makes no more of them."""
    ids = await put(runner, 3)
    for _ in ids:
        await fail(runner)
    first = (await call(api, "restart", filter={"state": "error"}, limit=2)).data
    second = (await call(api, "restart", filter={"state": "error"}, limit=2, after=first["more"])).data
    children = [job["restarted_as"] for job in first["jobs"] + second["jobs"]]

    assert (first["matched"], second["matched"], second["more"]) == (3, None, None)
    assert [job["_id"] for job in first["jobs"] + second["jobs"]] == ids
    assert await states(runner, children) == [State.PENDING] * 3
    for _ in children:
        await fail(runner)  # back in the state that the filter names, before the run goes on
    rest = (await call(api, "restart", filter={"state": "error"}, after=first["more"])).data
    assert rest["jobs"] == []

    # In the journal, too: refused while their children stand in their place, then done.
    parents = {"_id": {"in": ids}}
    told = (await call(api, "restart", filter=parents, journal=True)).data
    assert (outcomes(told), told["jobs"][0]["code"]) == ({"refused": 3}, "job_exists")
    await call(api, "remove", filter={"state": "error"})
    assert outcomes((await call(api, "restart", filter=parents, journal=True)).data) == {"changed": 3}
    told = (await call(api, "restart", filter=parents, journal=True, dry_run=True)).data
    assert outcomes(told) == {"unchanged": 3}


async def test_remove(api: Api, runner: Runner) -> None:
    ids = await put(runner, 2)
    assert outcomes((await call(api, "remove", filter={"_id": {"in": ids}})).data) == {"changed": 2}
    assert (await api.call("GET", "/job/journal")).body["total_count"] == 2
    assert (await call(api, "remove", filter={"_id": {"in": ids}})).data["matched"] == 0


async def test_only_jobs_that_one_may_execute(api: Api, runner: Runner, users: UserStore) -> None:
    """Others are neither touched nor counted, also if they may be read."""
    await runner.publish("tests.Other")
    await users.add("doer", "secret", ["job://tests.Job/x", "job://.*/r"])
    await users.add("reader", "secret", ["job://.*/r"])
    mine, other = await put(runner, 2), await put(runner, 2, "tests.Other")
    for where in ({"state": "pending"}, {"qual_name": {"in": ["tests.Job", "tests.Other"]}}):
        told = (await call(api, "kill", auth=("doer", "secret"), filter=where, dry_run=True)).data
        assert [job["_id"] for job in told["jobs"]] == mine
        assert told["matched"] == 2
        assert (await call(api, "kill", auth=("reader", "secret"), filter=where)).data["matched"] == 0

    done = (await call(api, "kill", auth=("doer", "secret"), all=True)).data
    assert outcomes(done) == {"changed": 2}
    assert await states(runner, mine + other) == [State.KILLED] * 2 + [State.PENDING] * 2
    assert (await call(api, "kill", auth=("nobody", "secret"), all=True)).status == 401


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "Missing argument action"),
        ({"action": "pause", "all": True}, "kill, restart, remove"),
        ({"action": 1, "all": True}, "[action] expected as_type [str]"),
        ({"action": "kill"}, "all: true"),
        ({"action": "kill", "filter": {}}, "all: true"),
        ({"action": "kill", "search": "*"}, "of wildcards only"),
        ({"action": "kill", "search": "**?"}, "of wildcards only"),
        ({"action": "kill", "filter": {"state": "error"}, "all": True}, "one of the two"),
        ({"action": "kill", "filter": []}, "as_type [dict]"),
        ({"action": "kill", "filter": {"$where": "1"}}, "unknown field"),
        ({"action": "kill", "filter": {"state": {"$ne": "gone"}}}, "expected one of"),
        ({"action": "kill", "all": True, "limit": 0}, "from 1 to 500"),
        ({"action": "kill", "all": True, "limit": 501}, "from 1 to 500"),
        ({"action": "kill", "all": True, "after": "there"}, "[more]"),
        ({"action": "kill", "all": True, "after": "1.zz"}, "[more]"),
        ({"action": "kill", "all": True, "after": "99999999999999999.5f5f5f5f5f5f5f5f5f5f5f5f"}, "[more]"),
        ({"action": "kill", "all": True, "journal": True}, "journal"),
        ({"action": "kill", "all": True, "ids": []}, "unknown argument [ids]"),
    ],
)
async def test_what_is_not_understood(api: Api, runner: Runner, body: dict[str, Any], said: str) -> None:
    (job_id,) = await put(runner, 1)
    answer = await api.call("POST", "/job/bulk", json=body)
    assert (answer.status, said in answer.body["detail"]) == (400, True), answer.body["detail"]
    assert await states(runner, [job_id]) == [State.PENDING]


async def test_against_a_worker_that_runs_them(api: Api, runner: Runner, database: Database) -> None:
    """While others claim and finish: whatever is told, each job has one outcome and it is the one told."""
    ids = await put(runner, 60)
    first = await runner.start()
    begun = asyncio.Event()

    async def work() -> None:
        await begun.wait()
        await first.finish()
        while jobs := await runner.queue.claims.claim(runner.owner, namespaces=["DEFAULT"], limit=2):
            for job in jobs:
                job = await runner.queue.start(job, pid=1)
                await runner.queue.finish(job, Outcome.complete(None), log_seq=0)

    async def kill() -> list[dict[str, Any]]:
        found = (await call(api, "kill", filter={"state": "pending"}, limit=7)).data
        told: list[dict[str, Any]] = found["jobs"]
        begun.set()
        while found["more"]:
            outcomes(found)
            found = (await call(api, "kill", filter={"state": "pending"}, limit=7, after=found["more"])).data
            told += found["jobs"]
        return told

    _, one, two = await asyncio.gather(work(), kill(), kill())
    ended = dict(zip(ids, await states(runner, ids), strict=True))
    assert set(ended.values()) == {State.COMPLETE, State.KILLED}
    for job in one + two:
        if job["outcome"] == "refused":
            assert ended[job["_id"]] is State.COMPLETE
        elif job.get("state") == "killed":
            assert ended[job["_id"]] is State.KILLED
    changed = [job["_id"] for job in one + two if job["outcome"] == "changed"]
    assert len(changed) == len(set(changed))  # news for one of the two
    assert {job_id for job_id, state in ended.items() if state is State.KILLED} <= set(changed)


async def test_a_call_is_bounded_in_time(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where the next one goes on, having done one job at least."""
    ids = [(await queue.enqueue(order(args={"n": n}))).id for n in range(3)]
    monkeypatch.setattr(bulk, "BUDGET", 0.0)
    place = bulk.Place.parse("")
    for job_id in ids:
        report = await bulk.act_on_many(queue, "kill", {}, place, limit=100, by="ann")
        assert [job["_id"] for job in report.jobs] == [job_id]
        place = bulk.Place.parse(str(report.more)) if report.more else place
    assert report.more is None


async def test_a_database_that_stops_answering(
    queue: JobQueue, database: Database, settings: Settings
) -> None:
    """What was done is told, nothing of the job at which it stopped; the next call goes on there."""
    ids = [(await queue.enqueue(order(args={"n": n}))).id for n in range(3)]
    with armed(Faults.parse("lose store:cas:update_one 2")):
        faulty = JobQueue(database, settings)
        report = await bulk.act_on_many(faulty, "kill", {}, bulk.Place.parse(""), limit=100, by="ann")
    assert [(job["_id"], job["outcome"]) for job in report.jobs] == [(ids[0], "changed")]
    assert str(ids[1]) in str(report.stopped)

    place = bulk.Place.parse(str(report.more))
    report = await bulk.act_on_many(queue, "kill", {}, place, limit=100, by="ann")
    # The write whose reply was lost had been made.
    assert [(job["_id"], job["outcome"]) for job in report.jobs] == [
        (ids[1], "unchanged"),
        (ids[2], "changed"),
    ]
    assert (report.stopped, report.more) == (None, None)
