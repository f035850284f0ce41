"""The Idempotency-Key header: the same request sent again makes no second job."""

from __future__ import annotations

import asyncio

import pytest
from bson import ObjectId

from core4.retries import Outcome
from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner

BODY = {"qual_name": "tests.Job", "args": {"n": 1}, "follow": False}


async def test_the_first_answer_again(api: Api) -> None:
    """Same key and body: the same job, marked as a replay; without the key it is a conflict."""
    first = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k 1"})
    again = await api.call("POST", "/job", json={**BODY}, headers={"Idempotency-Key": "k 1"})
    bare = await api.call("POST", "/job", json=BODY)

    assert (first.status, again.status, bare.status) == (200, 200, 409)
    assert again.data == first.data
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_it_outlives_the_job(api: Api, runner: Runner) -> None:
    """A client that hears nothing for long gets the job that has ended meanwhile."""
    first = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k"})
    await (await runner.start()).finish(Outcome.complete(1))
    again = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k"})

    assert again.data == first.data
    assert (await runner.queue.store.get(ObjectId(first.data))).journal


async def test_another_body(api: Api, runner: Runner) -> None:
    """Refused with the job the key belongs to, and nothing queued."""
    first = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k"})
    other = {**BODY, "args": {"n": 2}}
    answer = await api.call("POST", "/job", json=other, headers={"Idempotency-Key": "k"})

    assert (answer.status, answer.body["type"]) == (422, "urn:core4:problem:idempotency_key_reused")
    assert first.data in answer.body["detail"]
    assert await runner.queue.store.counts() == {"pending": 1}


async def test_ten_at_once(api: Api, runner: Runner) -> None:
    """One job, however many arrive in the same moment."""
    calls = (api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k"}) for _ in range(10))
    answers = await asyncio.gather(*calls)

    assert {answer.status for answer in answers} == {200}
    assert len({answer.data for answer in answers}) == 1
    assert await runner.queue.store.counts() == {"pending": 1}


async def test_a_key_belongs_to_its_user(api: Api, users: UserStore) -> None:
    """Another user's request under the same key is another request."""
    await users.add("bob", "secret", allow=["cop"])
    mine = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": "k"})
    other = {**BODY, "args": {"n": 2}}
    his = await api.call("POST", "/job", json=other, headers={"Idempotency-Key": "k"}, auth=("bob", "secret"))

    assert ADMIN[0] != "bob"
    assert his.status == 200
    assert his.data != mine.data


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
async def test_bad_keys(api: Api, runner: Runner, key: str) -> None:
    """Refused before anything is queued."""
    answer = await api.call("POST", "/job", json=BODY, headers={"Idempotency-Key": key})

    assert answer.status == 400
    assert await runner.queue.store.counts() == {}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
async def test_what_is_no_number(api: Api, number: str) -> None:
    """Refused by its name, in a body and in a query."""
    key = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    text = f'{{"qual_name": "tests.Job", "follow": false, "args": {{"n": {number}}}}}'
    answer = await api.call("POST", "/job", data=text, headers=key)
    query = {"qual_name": "tests.Job", "follow": "false", "args": f'{{"n": {number}}}'}
    asked = await api.call("POST", "/job", params=query, headers={"Idempotency-Key": "k"})

    assert (answer.status, asked.status) == (400, 400)
    assert answer.body["detail"] == f"the body has {number}, which is no finite number"


async def test_a_body_of_many_levels(api: Api) -> None:
    args = "[" * 960 + "]" * 960
    text = f'{{"qual_name": "tests.Job", "follow": false, "args": {{"n": {args}}}}}'
    key = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    answer = await api.call("POST", "/job", data=text, headers=key)

    assert (answer.status, answer.body["detail"]) == (400, "the body is nested deeper than 100 levels")
