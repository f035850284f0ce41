"""`/metrics`: read as Prometheus reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner, basic, order

READER = ("reader", "secret")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(api: Api, user: tuple[str, str] = ADMIN) -> Samples:
    """Each sample by its name and labels; the text is parsed by the library that Prometheus' clients use."""
    async with api.session.get(api.url("metrics"), headers=basic(*user)) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        families = text_string_to_metric_families(await answer.text())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def of(samples: Samples, metric: str, /, **labels: str) -> float | None:
    return samples.get((metric, frozenset(labels.items())))


@pytest.fixture
async def reader(users: UserStore) -> None:
    await users.add(*READER, [r"job://tests\.Job/r"])


async def test_jobs_by_state(api: Api, runner: Runner, reader: None) -> None:
    """Counts by namespace, name and state; the age of the oldest that waits; of others' jobs nothing."""
    await runner.up("tests.Job", "tests.Secret")
    for word in "ab":
        await runner.queue.enqueue(order("tests.Job", args={"word": word}))
    await runner.queue.enqueue(order("tests.Secret"))
    await (await runner.start()).finish()
    job = {"namespace": "DEFAULT", "name": "tests.Job", "state": "pending"}
    samples = await scrape(api, READER)
    assert of(samples, "core4_jobs", **job) == 1
    age = of(samples, "core4_oldest_job_seconds", **job)
    assert age is not None
    assert age >= 0
    assert of(samples, "core4_journal_jobs") == 1
    assert of(samples, "core4_unsettled_jobs") == 0
    assert of(samples, "core4_workers", state="up") == 1
    assert not any("tests.Secret" in value for _, labels in samples for _, value in labels)
    assert of(await scrape(api), "core4_jobs", **{**job, "name": "tests.Secret"}) == 1


async def test_what_this_process_has_answered(api: Api, reader: None) -> None:
    """Answers by method, route and status; what strangers make up is no label."""
    for path in ("/job/0123456789abcdef01234567", "/job/0123456789abcdef01234568", "/job/nope"):
        await api.call("GET", path)
    await api.call("PURGE", "/job")
    await api.call("GET", "no/such/address")
    samples = await scrape(api)
    one = "/core4/api/v1/job/{_id}"
    assert of(samples, "core4_http_requests_total", method="GET", route=one, status="404") == 3
    assert of(samples, "core4_http_requests_total", method="GET", route="none", status="404") == 1
    assert of(samples, "core4_http_request_seconds_count", method="GET", route=one) == 3
    labels = {value for _, pairs in samples for _, value in pairs}
    assert "other" in labels
    assert not labels & {"PURGE", "no/such/address"}


async def test_streams_are_counted_and_not_timed(api: Api, runner: Runner, reader: None) -> None:
    """A stream that is open is told; how long it was says nothing of how quick we are."""
    job = await runner.queue.enqueue(order("tests.Job"))
    follow = "/core4/api/v1/job/follow/{_id}"
    async with api.stream(f"/job/follow/{job.id}"):
        assert of(await scrape(api), "core4_streams") == 1
    await runner.queue.kill(job.id, by="test")
    await api.events(f"/job/follow/{job.id}")
    samples = await scrape(api)
    assert of(samples, "core4_http_requests_total", method="GET", route=follow, status="200")
    assert of(samples, "core4_http_request_seconds_count", method="GET", route=follow) is None


async def test_who_is_not_signed_in(api: Api) -> None:
    """Nothing without a user."""
    assert (await api.call("GET", "metrics", auth=None)).status == 401
