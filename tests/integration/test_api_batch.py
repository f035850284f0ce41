"""`POST job/batch`: many jobs from one request, each with its own outcome."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bson import ObjectId

from core4.client import Client
from core4.config import Settings
from core4.database import Database
from core4.errors import JobExists
from core4.faults import Faults, armed
from core4.jobs import Job
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.store import QUEUE
from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner, order

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
CAROL = ("carol", "secret-carol")


@pytest.fixture
async def counted(runner: Runner) -> Runner:
    await runner.publish("tests.Counted", schema=SCHEMA)
    await runner.up("tests.Job", "tests.Counted")
    return runner


def wish(n: Any, **more: Any) -> dict[str, Any]:
    return {"qual_name": "tests.Counted", "args": {"n": n}, **more}


async def test_each_has_its_outcome(api: Api, counted: Runner, users: UserStore, database: Database) -> None:
    """What is wrong with one does not keep the others from being made."""
    await counted.publish("tests.Secret")
    await users.add(*CAROL, allow=["job://tests\\.(Counted|NoSuchJob)/x"])
    wishes: list[Any] = [
        wish(1, priority=7, namespace="ETL"),
        wish("one"),
        {"qual_name": "tests.NoSuchJob"},
        {"qual_name": "tests.Secret"},
        wish(2),
        wish(2),
        "tests.Counted",
        {"args": {}},
        wish(3, attempts=0),
        wish(3, follow=True),
        wish(3, key=""),
    ]
    answer = await api.call("POST", "/job/batch", auth=CAROL, json={"jobs": wishes})
    told = [(each["outcome"], each.get("status"), each.get("code")) for each in answer.data]

    assert told[0] == ("enqueued", None, None)
    assert told[1:4] == [
        ("refused", 422, "bad_arguments"),
        ("refused", 404, "unknown_job"),
        ("refused", 403, "forbidden"),
    ]
    assert sorted(told[4:6]) == [("enqueued", None, None), ("refused", 409, "job_exists")]
    assert told[6:] == [("refused", 400, "bad_request")] * 5
    assert answer.data[1]["errors"] == [{"pointer": "/n", "message": "'one' is not of type 'integer'"}]
    assert "qual_name" in answer.data[7]["detail"]
    assert "attempts" in answer.data[8]["detail"]
    stored = await database.collection(QUEUE).find({}).to_list(None)
    assert sorted((row["args"]["n"], row["priority"], row["namespace"]) for row in stored) == [
        (1, 7, "ETL"),
        (2, 0, "DEFAULT"),
    ]
    assert {row["enqueued"]["username"] for row in stored} == {"carol"}


async def test_a_thousand_and_once_more(api: Api, counted: Runner) -> None:
    """With keys the same request again makes nothing; not even when the jobs have ended."""
    jobs = [wish(n, key=f"key-{n}") for n in range(1000)]
    first = (await api.call("POST", "/job/batch", json={"jobs": jobs})).data
    await (await counted.start()).finish(Outcome.complete(1))
    again = (await api.call("POST", "/job/batch", json={"jobs": jobs[:50]})).data

    assert {each["outcome"] for each in first} == {"enqueued"}
    assert {each["outcome"] for each in again} == {"replayed"}
    assert [each["_id"] for each in again] == [each["_id"] for each in first[:50]]
    assert len({each["_id"] for each in first}) == 1000
    assert await counted.queue.store.counts() == {"pending": 999}


async def test_a_key_is_that_of_a_single_request(api: Api, counted: Runner) -> None:
    single = {**wish(1), "follow": False}
    first = await api.call("POST", "/job", json=single, headers={"Idempotency-Key": "k"})
    same, other = (
        await api.call("POST", "/job/batch", json={"jobs": [wish(1, key="k"), wish(2, key="k")]})
    ).data

    assert same == {"outcome": "replayed", "_id": first.data}
    assert (other["outcome"], other["code"]) == ("refused", "idempotency_key_reused")


async def test_a_job_that_nobody_foresaw_costs_the_others_nothing(api: Api, counted: Runner) -> None:
    """A catalogue that another version has written."""
    await counted.publish("tests.Broken", schema={"type": "nonsense"})
    jobs = [*(wish(n, key=f"key-{n}") for n in range(44)), {"qual_name": "tests.Broken", "key": "k"}]
    answer = await api.call("POST", "/job/batch", json={"jobs": jobs})

    assert [each["outcome"] for each in answer.data] == ["enqueued"] * 44 + ["refused"]
    assert (answer.data[-1]["status"], answer.data[-1]["code"]) == (500, "internal")
    assert await counted.queue.store.counts() == {"pending": 44}


@pytest.mark.parametrize("verb", ["lose", "late 0"])
async def test_a_lost_reply_for_many_loses_and_doubles_none(
    database: Database, settings: Settings, verb: str
) -> None:
    """What has arrived is found under its own id; what may still come is no job that was answered for."""
    with armed(Faults.parse(f"{verb} store:insert_many:insert_many")) as faults:
        queue = JobQueue(database, settings)
        await queue.store.prepare()
        jobs = await queue.enqueue_many([order(args={"n": n}) for n in range(5)])
        await faults.landed()

    told = {job.id for job in jobs if isinstance(job, Job)}
    stored = {row["_id"] for row in await database.collection(QUEUE).find({}).to_list(None)}
    assert told <= stored
    assert len(stored) == 5
    assert verb != "lose" or told == stored


async def test_many_in_one_call_each_with_its_own_end(queue: JobQueue) -> None:
    """Equal ones, one that cannot be stored and one that waits for a job: none stops the others."""
    first = await queue.enqueue(order(args={"n": 0}))
    orders = [
        order(args={"n": 1}),
        order(args={"n": 0}),
        order(args={"n": 1 << 70}),
        order(args={"n": 2}, dependencies=[first.id]),
        order(args={"n": 3}),
    ]
    one, equal, huge, waiting, last = await queue.enqueue_many(orders)

    assert isinstance(equal, JobExists)
    assert equal.job_id == first.id
    assert isinstance(huge, OverflowError)
    assert [job.state for job in (one, waiting, last) if isinstance(job, Job)] == [
        State.PENDING,
        State.BLOCKED,
        State.PENDING,
    ]
    assert await queue.store.counts() == {"pending": 3, "blocked": 1}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Missing argument jobs"),
        ({"jobs": []}, "expected 1 to 1000 jobs, not 0"),
        ({"jobs": [{}] * 1001}, "expected 1 to 1000 jobs, not 1001"),
        ({"jobs": {"qual_name": "tests.Job"}}, "list"),
        ({"jobs": [{}], "follow": False}, "follow"),
    ],
)
async def test_what_is_no_batch(api: Api, body: dict[str, Any], text: str) -> None:
    answer = await api.call("POST", "/job/batch", json=body)

    assert answer.status == 400
    assert text in answer.body["detail"]


@pytest.mark.row("F8")
async def test_the_client_sends_one_and_many(api: Api, counted: Runner) -> None:
    """The HTTP producer: a job by one call, many by another; the result of one of them."""

    def talk() -> tuple[str, list[dict[str, Any]]]:
        with Client(api.url("").removesuffix("/core4/api/v1"), auth=ADMIN) as client:
            return client.enqueue("tests.Counted", {"n": 0}), client.enqueue_many([wish(1), wish("x")])

    job_id, outcomes = await asyncio.to_thread(talk)
    assert [each["outcome"] for each in outcomes] == ["enqueued", "refused"]
    done = await (await counted.start()).finish(Outcome.complete({"n": 0}))
    assert str(done.id) == job_id
    assert (await counted.queue.store.get(ObjectId(job_id))).document["result"] == {"n": 0}


@pytest.mark.row("F11")
async def test_the_id_is_there_before_any_worker(api: Api, runner: Runner, database: Database) -> None:
    """The answer is the id of a record that is stored, and says that nobody runs such a job yet."""
    await runner.publish("tests.Unserved")
    headers = {"X-Request-Id": "my-own-id"}
    answer = await api.call(
        "POST", "/job", json={"qual_name": "tests.Unserved", "follow": False}, headers=headers
    )

    stored = await database.collection(QUEUE).find_one({"_id": ObjectId(answer.data)})
    assert stored is not None
    assert (stored["state"], stored["request_id"]) == ("pending", "my-own-id")
    assert "no worker is up" in answer.body["flash"][0]["message"]
