"""What one client may ask of an API process: guesses, streams, requests, and the size of a listing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from core4.api import throttle
from core4.api.keys import SEATS
from core4.config import Settings
from core4.database import Database
from core4.retries import Outcome
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Answer, Api, Runner, basic, order, serving

LIMITS = {
    "streams": 3,
    "streams_per_user": 2,
    "requests_per_user": None,
    "page_args": 4096,
    "trusted_proxies": ("127.0.0.1/32", "10.0.0.0/8"),
}


@contextlib.asynccontextmanager
async def limited(settings: Settings, database: Database, **limits: Any) -> AsyncIterator[Api]:
    async with serving(replace(settings, **{**LIMITS, **limits}), database) as api:
        yield api


@pytest.fixture(autouse=True)
def long_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is forgiven while a busy machine makes the next: that takes minutes and not seconds."""
    monkeypatch.setattr(throttle, "PERIOD", 100 * throttle.PERIOD)


@pytest.fixture
async def api(users: UserStore, runner: Runner, settings: Settings, database: Database) -> AsyncIterator[Api]:
    """An API with narrow limits behind a proxy on this machine."""
    for name in ("ann", "bob", "eve"):
        await users.add(name, "secret", ["cop"])
    async with limited(settings, database) as api:
        yield api


async def guess(api: Api, name: str, source: str | None, password: str = "wrong") -> Answer:
    headers = {"X-Forwarded-For": source} if source else {}
    return await api.call("GET", "/profile", auth=(name, password), headers=headers)


async def test_guesses_at_one_user_from_everywhere(api: Api) -> None:
    """Ten, wherever they come from; others are not harmed, nor is who has signed in from his own address."""
    assert (await guess(api, "ann", "198.51.100.1", "secret")).status == 200
    answers = [await guess(api, "ann", f"192.0.2.{n}") for n in range(11)]

    assert [answer.status for answer in answers] == [401] * 10 + [429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= throttle.PERIOD / throttle.PER_USER
    assert (await guess(api, "ann", "198.51.100.1")).status == 401
    assert (await guess(api, "ann", "198.51.100.1", "secret")).status == 200
    assert (await guess(api, "bob", "192.0.2.1", "secret")).status == 200


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param(["192.0.2.1"], id="one"),
        pytest.param(["192.0.2.1, 10.1.2.3", "192.0.2.1,10.4.5.6", "192.0.2.1"], id="behind-proxies"),
        pytest.param(["203.0.113.1, 192.0.2.1", "203.0.113.2, 192.0.2.1"], id="a-word-before-it"),
        pytest.param(["2001:db8::1", "2001:db8::ffff:2"], id="one-network"),
    ],
)
async def test_guesses_from_one_address(api: Api, sources: list[str]) -> None:
    """A hundred, at whatever users; what a client writes before the proxy's word changes nothing."""
    statuses = [(await guess(api, f"user{n}", sources[n % len(sources)])).status for n in range(101)]
    assert statuses == [401] * 100 + [429]
    assert (await guess(api, "bob", sources[0], "secret")).status == 429
    assert (await guess(api, "bob", "198.51.100.7", "secret")).status == 200


async def test_the_word_of_a_stranger(
    users: UserStore, runner: Runner, settings: Settings, database: Database
) -> None:
    """Without a trusted proxy the header is nothing but a header."""
    async with limited(settings, database, trusted_proxies=()) as api:
        statuses = [(await guess(api, f"user{n}", f"192.0.2.{n}")).status for n in range(101)]
        assert statuses == [401] * 100 + [429]


async def test_streams_of_a_user_and_of_the_process(api: Api, runner: Runner) -> None:
    """Refused before the first event, and before a job is made for it; free again when one has ended."""
    job_id = await api.enqueue()
    path = f"/job/follow/{job_id}"
    ann, bob, eve = (("ann", "secret"), ("bob", "secret"), ("eve", "secret"))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(api.stream(path, auth=ann))
        refused = await api.call("GET", path, auth=ann)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "5")
        order_of_two = {"qual_name": "tests.Job", "args": {"n": 2}}
        assert (await api.call("POST", "/job", auth=ann, json=order_of_two)).status == 429
        assert (await api.call("GET", "/job", auth=ann)).body["total_count"] == 1
        async with api.stream(path, auth=bob):
            full = await api.call("GET", path, auth=eve)
            assert (full.status, full.headers["Retry-After"]) == (503, "5")
            assert (await api.call("GET", f"/job/{job_id}", auth=eve)).status == 200

    async def again() -> bool:
        async with api.session.get(api.url(path), headers=basic(*ann)) as answer:
            return answer.status == 200

    await eventually_async(again, what="a stream of ann's")


async def test_a_request_that_waits_has_a_seat(api: Api, runner: Runner) -> None:
    """Wherever it waits, it counts like a stream, as long as it waits; to look without waiting is free."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    ann = ("ann", "secret")
    wait = {"job_id": str(job_id), "timeout": 50}
    first = asyncio.create_task(api.call("POST", "/job/view/result", auth=ann, json=wait))
    fills = asyncio.create_task(api.call("POST", "/return/pull/done", auth=ann, json={"timeout": 50}))

    async def both_wait() -> bool:
        return api.waiting(job_id) + api.waiting("done") == 2  # type: ignore[arg-type]

    await eventually_async(both_wait)
    for path, body in (
        ("/job/view/result", wait),
        ("/job/pull/result", wait),
        ("/return/pull/done", {"timeout": 50}),
    ):
        refused = await api.call("POST", path, auth=ann, json=body)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "5"), path
    looked = await api.call("POST", "/job/view/result", auth=ann, json={**wait, "timeout": 0})
    assert looked.status == 202

    await attempt.finish(Outcome.complete(1))
    assert (await first).status == 200
    fills.cancel()

    async def free() -> bool:
        return api.app[SEATS].open == 0

    await eventually_async(free)


async def test_requests_per_second(
    users: UserStore, runner: Runner, settings: Settings, database: Database
) -> None:
    """Of one user; others are not harmed."""
    await users.add("ann", "secret", ["cop"])
    async with limited(settings, database, requests_per_user=1) as api:
        while (answer := await api.call("GET", "/profile")).status == 200:
            pass  # two that come within a second are soon found
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        assert (await api.call("GET", "/profile", auth=("ann", "secret"))).status == 200


@pytest.mark.parametrize("path", ["/job", "/job/journal"])
async def test_a_listing_of_large_arguments(api: Api, runner: Runner, path: str) -> None:
    """All rows are there; what is too much is left out, and said so."""
    sizes = [1500, 1500, 200_000, 500, 1500]
    for n, size in enumerate(sizes):
        job = await runner.queue.enqueue(order(args={"n": n, "text": "x" * size}))
        if path == "/job/journal":
            await runner.queue.remove(job.id, by="test")
    answer = await api.call("GET", path + "?per_page=500")

    assert [row["args"] and row["args"]["n"] for row in answer.data] == [0, 1, None, 3, None]
    assert [row.get("omitted") for row in answer.data] == [None, None, ["args"], None, ["args"]]
    assert (answer.body["count"], answer.body["total_count"]) == (5, 5)
    assert "arguments of 2 jobs are left out" in answer.body["flash"][0]["message"]
    assert "flash" not in (await api.call("GET", path + "?per_page=2")).body
