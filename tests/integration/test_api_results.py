"""Results over HTTP: look as often as you like, pull once; waiting is told, not asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bson import ObjectId

from core4.api.hub import REREAD
from core4.config import Settings
from core4.database import Database
from core4.retries import Outcome
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Answer, Api, Runner, basic, order, serving

VIEW, PULL = "/job/view/result", "/job/pull/result"
UNKNOWN = "5f6252b42e84fa29038a3e3f"


async def complete(api: Api, runner: Runner, result: Any, **args: Any) -> ObjectId:
    """A job that has ended with this result."""
    job_id = await api.enqueue(**args)
    await (await runner.start()).finish(Outcome.complete(result))
    return job_id


async def waited_for(api: Api, job_id: ObjectId, count: int = 1) -> None:
    """Until this many requests wait for the job."""

    async def look() -> bool:
        return api.waiting(job_id) >= count

    await eventually_async(look)


async def ask(api: Api, path: str, job_id: ObjectId, **query: Any) -> Answer:
    return await api.call("POST", path, json={"job_id": str(job_id), **query})


@pytest.mark.row("F30")
async def test_view_tells_all_four(api: Api, runner: Runner) -> None:
    """Queued, Running, Completed and Failed, as often as one asks; the request's id does as well."""
    answer = await api.call("POST", "/job", json={"qual_name": "tests.Job", "follow": False})
    job_id, request_id = ObjectId(answer.data), answer.body["_id"]
    told = [await ask(api, VIEW, job_id)]
    attempt = await runner.start()
    told += [await ask(api, VIEW, job_id)]
    await attempt.finish(Outcome.complete({"n": 1}))
    told += [await ask(api, VIEW, job_id), await api.call("GET", f"{VIEW}?request_id={request_id}")]
    failing = await api.enqueue(attempts=1)
    await (await runner.start()).finish(Outcome.failed("ValueError('no')", ["line\n"]))
    failed = await ask(api, VIEW, failing)

    assert [each.status for each in told] == [202, 202, 200, 200]
    assert [each.body["data"]["status"] for each in told] == ["Queued", "Running", "Completed", "Completed"]
    assert [each.body["data"]["result"] for each in told] == [None, None, {"n": 1}, {"n": 1}]
    assert {each.body["data"]["request_id"] for each in told} == {request_id}
    assert (failed.status, failed.data["status"], failed.data["result"]) == (200, "Failed", None)
    assert failed.data["error"] == {
        "message": "ValueError('no')",
        "state": "error",
        "category": "ERROR",
        "attempt": 1,
        "traceback": ["line\n"],
    }


@pytest.mark.row("F31")
async def test_pull_waits_and_removes(api: Api, runner: Runner) -> None:
    """It answers when the job ends, and then the result is gone for everybody; not ready is 202."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    not_ready = await ask(api, PULL, job_id, timeout=0.1)
    pull = asyncio.create_task(ask(api, PULL, job_id, timeout=50))
    await waited_for(api, job_id)
    await attempt.finish(Outcome.complete([1, 2]))
    first = await pull
    again = [await ask(api, path, job_id) for path in (PULL, VIEW, PULL)]

    assert (not_ready.status, not_ready.body["data"]["status"]) == (202, "Running")
    assert (first.data["status"], first.data["result"]) == ("Completed", [1, 2])
    assert [(each.status, each.body["type"]) for each in again] == [
        (410, "urn:core4:problem:result_gone")
    ] * 3
    assert "pulled by admin" in again[0].body["detail"]
    assert (await api.detail(job_id))["result"] is None


async def test_the_end_is_heard_not_looked_for(api: Api, runner: Runner) -> None:
    """Between its first look and the news that something happened a waiting request reads nothing."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    reads = []
    queue = api.queue
    document = queue.store.document

    async def counted(asked: ObjectId) -> Any:
        reads.append(asked)
        return await document(asked)

    queue.store.document = counted  # type: ignore[method-assign, assignment]
    waiting = [asyncio.create_task(ask(api, VIEW, job_id, timeout=REREAD * 0.8)) for _ in range(3)]
    await waited_for(api, job_id, 3)
    before = len(reads)
    await attempt.finish()
    answers = [each.data["status"] for each in await asyncio.gather(*waiting)]

    assert answers == ["Completed"] * 3
    # One look at the news, perhaps one more at the move to the journal.
    assert len(reads) - before <= 3 * 2


@pytest.mark.row("F32")
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("key", ["job_id", "request_id"])
async def test_pull_by_either_id(api: Api, runner: Runner, key: str, method: str) -> None:
    """The job's id or the request's, in the query or in a body."""
    job_id = await complete(api, runner, "x")
    ids = {"job_id": str(job_id), "request_id": (await api.detail(job_id))["request_id"]}
    given: dict[str, Any] = {"params" if method == "GET" else "json": {key: ids[key]}}

    assert (await api.call(method, PULL, **given)).data["result"] == "x"
    assert (await api.call(method, PULL, **given)).status == 410


@pytest.mark.row("F33")
async def test_results_survive_the_api(
    api: Api, runner: Runner, settings: Settings, database: Database
) -> None:
    """What one process knew another one hands out: results are in the database only."""
    job_id = await complete(api, runner, {"kept": True})
    async with serving(settings, database) as second:
        assert (await ask(second, PULL, job_id)).data["result"] == {"kept": True}

    assert (await ask(api, PULL, job_id)).status == 410


async def test_of_many_pullers_one_gets_it(
    api: Api, runner: Runner, settings: Settings, database: Database
) -> None:
    """At two APIs, waiting or not: exactly one is given the result, the others are told who has it."""
    async with serving(settings, database) as second:
        for result in range(10):
            job_id = await api.enqueue(n=result)
            attempt = await runner.start()
            pulls = [asyncio.create_task(ask(where, PULL, job_id, timeout=20)) for where in (api, second) * 3]
            await waited_for(api, job_id, 3)
            await attempt.finish(Outcome.complete(result))
            answers = await asyncio.gather(*pulls)

            assert sorted(each.status for each in answers) == [200, 410, 410, 410, 410, 410]
            assert [each.data["result"] for each in answers if each.status == 200] == [result]


async def test_pull_of_a_stopped_job(api: Api, runner: Runner) -> None:
    """It stays in the queue for operators, its failure is told once; it can still be restarted."""
    job_id = await api.enqueue(attempts=1)
    await (await runner.start()).finish(Outcome.failed("Boom()", []))
    first, second = await ask(api, PULL, job_id), await ask(api, PULL, job_id)
    child = await api.call("PUT", f"/job/restart/{job_id}", json={"follow": False})

    assert (first.data["status"], second.status) == ("Failed", 410)
    assert first.data["error"]["message"] == "Boom()"
    assert (await ask(api, VIEW, ObjectId(child.data))).body["data"]["status"] == "Queued"


async def test_ends_without_a_result(api: Api, runner: Runner) -> None:
    """Killed and removed jobs have failed: who waits for them is told at once."""
    killed, removed = await api.enqueue(n=1), await api.enqueue(n=2)
    waiting = [asyncio.create_task(ask(api, VIEW, each, timeout=50)) for each in (killed, removed)]
    for job_id in (killed, removed):
        await waited_for(api, job_id)
    await api.call("PUT", f"/job/kill/{killed}")
    await api.call("PUT", f"/job/remove/{removed}")
    told = [(await each).data for each in waiting]

    assert [each["status"] for each in told] == ["Failed", "Failed"]
    assert [each["error"]["message"] for each in told] == ["killed by admin", "removed while pending"]


@pytest.mark.row("F34")
async def test_the_three_lists(api: Api, runner: Runner) -> None:
    """Results that nobody has pulled, what waits, what runs; each by what a job really is."""
    await runner.publish("tests.Other")
    done = await complete(api, runner, 1, n=1)
    pulled = await complete(api, runner, 2, n=2)
    await ask(api, PULL, pulled)
    stopped = await api.enqueue(n=3, attempts=1)
    await (await runner.start()).finish(Outcome.failed("no", []))
    running = await api.enqueue("tests.Other", n=4)
    await runner.start()
    here, there = [
        (await runner.queue.enqueue(order(args={"in": name}, namespace=name))).id for name in ("a", "b")
    ]

    async def rows(path: str, **query: Any) -> list[str]:
        by_query = await api.call("GET", f"/job/view/{path}", params=query)
        by_body = await api.call("POST", f"/job/view/{path}", json=query)
        assert by_query.data == by_body.data
        return [row["job_id"] for row in by_query.data]

    def ids(*jobs: ObjectId) -> list[str]:
        return [str(job_id) for job_id in jobs]

    assert await rows("results") == ids(stopped, done)
    assert await rows("results", per_page=1, page=1) == ids(done)
    assert await rows("results", per_page=1, page=-1) == ids(done)
    assert await rows("results", page=7) == []
    assert await rows("results", name="tests.Other") == []
    assert await rows("queued") == ids(here, there)
    assert await rows("queued", namespace="b") == ids(there)
    assert await rows("queued", name="tests.Other") == []
    assert await rows("running") == ids(running)
    assert await rows("running", name="tests.Other", namespace="DEFAULT", status="Running") == ids(running)
    assert await rows("running", name="tests.Job") == []
    assert await rows("running", status="Queued") == ids(here, there)
    assert await rows("running", status="pending", namespace="a") == ids(here)
    assert (await api.call("GET", "/job/view/running?status=Odd")).status == 400


async def test_a_list_while_jobs_are_moved(api: Api, runner: Runner, database: Database) -> None:
    """What has ended is listed from that moment on, and once, wherever its document is just now."""
    ends, copied, pulled = [await complete(api, runner, n, n=n) for n in range(3)]
    queue, journal = database.collection("sys.queue"), database.collection("sys.journal")
    for job_id in (ends, copied, pulled):  # as after a crash before, and in the middle of the move
        document = await journal.find_one({"_id": job_id})
        assert document is not None
        await queue.insert_one({**document, "settle": True})
    await journal.delete_one({"_id": ends})
    await ask(api, PULL, pulled)
    rows = (await api.call("GET", "/job/view/results")).data

    assert [row["job_id"] for row in rows] == [str(ends), str(copied)]


async def test_rights(api: Api, runner: Runner, users: UserStore) -> None:
    """To look needs the right to read, to pull that to execute; lists hold what may be read."""
    await users.add("reader", "secret", [r"job://tests\.Job/r"])
    await users.add("doer", "secret", [r"job://tests\.Job/x"])
    await users.add("other", "secret", [r"job://tests\.Else/x"])
    job_id = await complete(api, runner, 1)
    found = {}
    for who in ("other", "reader", "doer"):
        rows = (await api.call("GET", "/job/view/results", auth=(who, "secret"))).data
        told = [
            (await api.call("POST", path, json={"job_id": str(job_id)}, auth=(who, "secret"))).status
            for path in (VIEW, PULL)
        ]
        found[who] = (len(rows), *told)

    assert found == {"other": (0, 403, 403), "reader": (1, 200, 403), "doer": (1, 200, 200)}


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("", 400, "one of the parameters [job_id] and [request_id] is needed"),
        (f"job_id={UNKNOWN}&request_id={UNKNOWN}", 400, "one of the parameters"),
        (f"job_id={UNKNOWN}", 404, f"job [{UNKNOWN}] not found"),
        ("job_id=nope", 404, "job [nope] not found"),
        ("job_id=", 404, "job [] not found"),
        ("request_id=", 404, "request [] has made no job"),
        (f"request_id={UNKNOWN}", 404, "has made no job"),
        (f"job_id={UNKNOWN}&timeout=51", 400, "parameter [timeout] expected a number from 0 to 50"),
        (f"job_id={UNKNOWN}&timeout=nan", 400, "parameter [timeout] expected as_type [float]"),
        (f"job_id={UNKNOWN}&wait=1", 400, "unknown argument [wait]"),
    ],
)
@pytest.mark.parametrize("path", [VIEW, PULL])
async def test_what_is_refused(api: Api, path: str, query: str, status: int, detail: str) -> None:
    """A precise answer for each mistake."""
    answer = await api.call("GET", f"{path}?{query}")

    assert answer.status == status
    assert detail in answer.body["detail"]


async def test_several_jobs_of_a_request(api: Api, runner: Runner) -> None:
    """Which one is meant cannot be known."""
    for n in range(2):
        await runner.queue.enqueue(order(args={"n": n}, request_id=UNKNOWN))
    answer = await api.call("GET", f"{VIEW}?request_id={UNKNOWN}")

    assert answer.status == 409
    assert "has made several jobs: ask for each by its job_id" in answer.body["detail"]


async def test_nothing_pulls_by_itself(api: Api, runner: Runner) -> None:
    """A pull by GET changes something: neither HEAD, nor a cookie, nor a page elsewhere does it."""
    job_id = await complete(api, runner, 1)
    token = (await api.call("POST", "/login")).data["token"]
    path = f"{PULL}?job_id={job_id}"
    head = await api.call("HEAD", path)
    cookie = await api.call("GET", path, auth=None, headers={"Cookie": f"token={token}"})
    image = await api.call("GET", path, headers={"Sec-Fetch-Site": "cross-site"})
    page = await api.call("GET", path, headers={"Origin": "http://elsewhere.example"})

    assert head.status in (400, 405)
    assert (cookie.status, image.status, page.status) == (401, 403, 403)
    assert (await ask(api, PULL, job_id)).data["result"] == 1


async def test_a_client_that_hangs_up_takes_nothing(api: Api, runner: Runner) -> None:
    """While it waits nothing has been removed."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    pull = asyncio.create_task(
        api.session.post(api.url(PULL), json={"job_id": str(job_id)}, headers=basic("admin", "hans"))
    )
    await waited_for(api, job_id)
    pull.cancel()

    async def nobody_waits() -> bool:
        return not api.waiting(job_id)

    await eventually_async(nobody_waits)
    await attempt.finish(Outcome.complete(7))
    assert (await ask(api, PULL, job_id)).data["result"] == 7
