"""Who may do what: every operation for users with no right, with r, with x, and with cop."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bson import ObjectId

from core4.retries import Outcome
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Api, Runner, order

PASSWORD = "secret"
SECRET = "swordfish"  # what nobody may learn who may not read the job
USERS = {
    "nobody": [],
    "reader": [r"job://tests\.Secret/r"],
    "doer": [r"job://tests\.Secret/x"],
    "boss": ["cop"],
    "stranger": ["job://tests.Job/x"],
}


@pytest.fixture(autouse=True)
async def people(users: UserStore, runner: Runner) -> None:
    """One user of each kind, and a job that only some may know."""
    await runner.publish("tests.Secret")
    for name, rights in USERS.items():
        await users.add(name, PASSWORD, rights)


async def secret_job(runner: Runner) -> ObjectId:
    return (await runner.queue.enqueue(order("tests.Secret", args={"word": SECRET}, request_id=SECRET))).id


READS = [
    ("GET", "/job/{id}"),
    ("GET", "/job/detail/{id}"),
    ("GET", "/job/log/{id}"),
    ("GET", "/job/log/{id}?follow=true"),
    ("GET", "/job/follow/{id}"),
]
WRITES = [
    ("PUT", "/job/remove/{id}"),
    ("PUT", "/job/kill/{id}"),
    ("PUT", "/job/restart/{id}?follow=false"),
]


@pytest.mark.row("S25")
@pytest.mark.parametrize(("method", "path"), READS)
@pytest.mark.parametrize("who", USERS)
async def test_reading(api: Api, runner: Runner, who: str, method: str, path: str) -> None:
    """Details, log and streams: r, x or cop. Refused before a stream begins."""
    job_id = await secret_job(runner)
    await runner.queue.kill(job_id, by="test")  # so that its streams end
    answer = await api.call(method, path.format(id=job_id), auth=(who, PASSWORD))

    assert answer.status == (200 if who in ("reader", "doer", "boss") else 403)
    assert SECRET not in json.dumps(answer.body) or answer.status == 200


@pytest.mark.row("S25")
@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("who", USERS)
async def test_writing(api: Api, runner: Runner, who: str, method: str, path: str) -> None:
    """Kill, restart and remove: x or cop; a refusal changes nothing."""
    job_id = await secret_job(runner)
    if "restart" in path:
        await runner.queue.kill(job_id, by="test")
    before = await runner.queue.store.get(job_id)
    answer = await api.call(method, path.format(id=job_id), auth=(who, PASSWORD))

    assert answer.status == (200 if who in ("doer", "boss") else 403)
    if answer.status == 403:
        assert (await runner.queue.store.get(job_id)).rev == before.rev


@pytest.mark.row("S25")
@pytest.mark.parametrize("who", USERS)
async def test_enqueuing(api: Api, runner: Runner, who: str) -> None:
    """Enqueue: x or cop; without it one does not learn whether the name exists."""
    answers = [
        await api.call(
            "POST", "/job", auth=(who, PASSWORD), json={"qual_name": name, "follow": False, "args": {"n": 1}}
        )
        for name in ("tests.Secret", "tests.Nonsense")
    ]

    expected = {"doer": [200, 403], "boss": [200, 404]}.get(who, [403, 403])
    assert [answer.status for answer in answers] == expected
    assert (await runner.queue.store.counts()).get("pending", 0) == expected.count(200)


@pytest.mark.row("S26")
@pytest.mark.parametrize("who", USERS)
async def test_listing(api: Api, runner: Runner, who: str) -> None:
    """Rows of foreign jobs are there and counted, but say nothing."""
    job_id = await secret_job(runner)
    attempt = await runner.start()
    await attempt.progress(0.5, SECRET)
    await runner.queue.enqueue(order("tests.Job", args={"n": 1}))
    answer = await api.call("GET", "/job", auth=(who, PASSWORD))
    row = next(row for row in answer.data if row["_id"] == str(job_id))

    assert answer.body["total_count"] == 2
    if who in ("reader", "doer", "boss"):
        assert (row["qual_name"], row["args"]) == ("tests.Secret", {"word": SECRET})
    else:
        assert (row["qual_name"], row["args"], row["state"]) == ("UnauthorizedJob", None, "running")
        assert SECRET not in json.dumps(answer.body)
        assert "Secret" not in json.dumps(answer.body)


@pytest.mark.row("S26")
async def test_masked_journal(api: Api, runner: Runner) -> None:
    """The journal hides what the queue hides."""
    await secret_job(runner)
    await (await runner.start()).finish(Outcome.complete({"word": SECRET}))
    answer = await api.call("GET", "/job/journal", auth=("stranger", PASSWORD))

    assert answer.body["total_count"] == 1
    assert answer.data[0]["qual_name"] == "UnauthorizedJob"
    assert answer.data[0]["request_id"] is None
    assert SECRET not in json.dumps(answer.body)


@pytest.mark.parametrize("path", ["/job/view/result", "/job/pull/result"])
async def test_a_request_has_made_what_one_may_read(api: Api, runner: Runner, path: str) -> None:
    """A stranger is told what he would be told of a request that never was, and his own job is found."""
    request_id = "11111111-1111-1111-1111-111111111111"
    hidden = await runner.queue.enqueue(order("tests.Secret", request_id=request_id))
    query = {"request_id": request_id, "timeout": "0"}
    alone = await api.call("GET", path, auth=("stranger", PASSWORD), params=query)
    own = await runner.queue.enqueue(order("tests.Job", request_id=request_id))
    answer = await api.call("GET", path, auth=("stranger", PASSWORD), params=query)
    theirs = await api.call("GET", path, auth=("doer", PASSWORD), params=query)

    assert (alone.status, alone.body["detail"]) == (404, f"request [{request_id}] has made no job")
    told = [each.body["data"]["job_id"] for each in (answer, theirs)]
    assert told == [str(own.id), str(hidden.id)]


@pytest.mark.row("S26")
@pytest.mark.parametrize(
    "query",
    [
        {"filter": {"args.word": SECRET}},
        {"filter": {"args.word": {"gte": "a"}}},
        {"filter": {"args.word": {"exists": True}}},
        {"filter": {"args.word": {"ne": "x"}}},
        {"filter": {"qual_name": "tests.Secret"}},
        {"filter": {"qual_name": {"ne": "tests.Job"}}},
        {"filter": {"name": {"in": ["tests.Secret"]}}},
        {"filter": {"prog.message": {"ne": "x"}}},
        {"filter": {"request_id": {"ne": "x"}}},
        {"search": "secret"},
        {"sort": [["name", 1]]},
    ],
)
async def test_hidden_content_cannot_be_probed(api: Api, runner: Runner, query: dict[str, Any]) -> None:
    """A question about names or arguments is answered from jobs that one may read, counts included."""
    await secret_job(runner)
    theirs = await api.call("POST", "/job/queue", auth=("stranger", PASSWORD), json=query)
    readers = await api.call("POST", "/job/queue", auth=("reader", PASSWORD), json=query)

    assert (theirs.data, theirs.body["total_count"]) == ([], 0)
    assert readers.body["total_count"] == 1


@pytest.mark.row("S15", "S26")
@pytest.mark.parametrize(
    ("who", "names"),
    [
        ("nobody", []),
        ("reader", []),
        ("doer", ["tests.Secret"]),
        ("stranger", ["tests.Job"]),
        ("boss", ["tests.Job", "tests.Secret"]),
    ],
)
async def test_catalogue(api: Api, who: str, names: list[str]) -> None:
    """What one may enqueue is listed and counted, nothing else."""
    answer = await api.call("GET", "/job/list", auth=(who, PASSWORD))

    assert [row["_id"] for row in answer.data] == names
    assert answer.body["total_count"] == len(names)


async def test_workers_do_not_tell_names(api: Api, runner: Runner) -> None:
    """Of what a worker runs one sees what one may read."""
    await runner.registry.serve(runner.owner, ["tests.Job", "tests.Secret"])

    (worker,) = (await api.call("GET", "/worker", auth=("stranger", PASSWORD))).data
    assert worker["jobs"] == ["tests.Job"]


@pytest.mark.row("S23")
async def test_withdrawn_rights(api: Api, runner: Runner, users: UserStore) -> None:
    """What is taken away is refused within seconds, although the password had just been right."""
    job_id = await secret_job(runner)
    path = f"/job/{job_id}"
    assert (await api.call("GET", path, auth=("reader", PASSWORD))).status == 200
    await users.set_rights("reader", [])

    async def refused() -> bool:
        return (await api.call("GET", path, auth=("reader", PASSWORD))).status == 403

    await eventually_async(refused, 5, what="403")


async def test_nobody_holds_the_slots_of_a_job_he_may_not_execute(api: Api, runner: Runner) -> None:
    """A key that the code declares is shared by names, one that a client sends is not."""
    limit = {"max_running": 1}
    await runner.publish("tests.Secret", options=limit)
    await runner.publish("tests.Shared", options={**limit, "max_running_key": "licence"})
    await runner.publish("tests.Job", options={"max_running_key": "licence"})
    for number, key in enumerate(("tests.Secret", "licence", "tests.Job:mine")):
        body = {"qual_name": "tests.Job", "args": {"n": number}, "follow": False, "max_running_key": key}
        answer = await api.call("POST", "/job", auth=("stranger", PASSWORD), json={**body, **limit})
        assert answer.status == 200
    for name, options in (("tests.Secret", limit), ("tests.Shared", {**limit, "max_running_key": "licence"})):
        await runner.queue.enqueue(order(name, options=options))

    claimed = await runner.queue.claims.claim(runner.owner, namespaces=["DEFAULT"], limit=9)
    assert sorted(job.document["slot"] for job in claimed) == [
        "licence#0",
        "tests.Job:mine#0",
        "tests.Job:tests.Secret#0",
        "tests.Secret#0",
    ]
