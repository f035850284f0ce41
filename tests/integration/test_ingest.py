"""Messages become jobs: the same from the inbox and from RabbitMQ, on a real database and a real broker.

``CORE4_TEST_FUZZ`` says how many random messages RabbitMQ gets; the full load is 10,000.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from core4.config import Settings
from core4.database import Database
from core4.inbox import INBOX, Inbox
from core4.jobs import Job
from core4.producers import Producer
from core4.queues import JobQueue
from core4.store import QUEUE
from core4.users import UserStore
from core4.worker.ingest import Ingest
from tests.helpers import eventually_async
from tests.integration.driver import Runner
from tests.rabbit import make_queue, put, size, taken

FUZZ = int(os.environ.get("CORE4_TEST_FUZZ", "2000"))
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "text": {"type": "string"}},
    "required": ["n"],
    "additionalProperties": False,
}


@dataclass
class Post:
    """One queue of a broker, seen from outside."""

    url: str
    queue: str
    database: Database

    @property
    def is_inbox(self) -> bool:
        return self.url.startswith("mongodb")

    def producer(self) -> Producer:
        return Producer(self.url, self.queue, database=self.database.name)

    async def put(self, *bodies: bytes, message_id: str | None = None) -> None:
        """Bytes as anybody can send them."""
        if not self.is_inbox:
            await make_queue(self.url, self.queue)
            await put(self.url, self.queue, *bodies, ids=[message_id] * len(bodies) if message_id else [])
            return
        for body in bodies:
            await Inbox(self.database).send(self.queue, body, message_id=message_id or uuid.uuid4().hex)

    async def dead(self) -> list[tuple[str, str, bytes]]:
        """Reason, detail and body of the dead letters; out of their place, if that is a queue."""
        if self.is_inbox:
            rows = await Inbox(self.database).dead(self.queue, limit=1000)
            return [(row["dead"]["reason"], row["dead"]["detail"], row["body"]) for row in rows]
        letters = await taken(self.url, f"{self.queue}.dead")
        return [
            (str(each.headers["x-core4-reason"]), str(each.headers["x-core4-detail"]), each.body)
            for each in letters
        ]

    async def waiting(self) -> int:
        if self.is_inbox:
            return await self.database.collection(INBOX).count_documents({"due": True})
        return await size(self.url, self.queue)


@pytest.fixture(params=["inbox", "rabbitmq"])
def post(request: pytest.FixtureRequest, mongo_url: str, database: Database) -> Post:
    """A queue that no other test uses."""
    url = mongo_url if request.param == "inbox" else request.getfixturevalue("rabbit").url
    return Post(url, f"Q{uuid.uuid4().hex[:12]}", database)


@pytest.fixture
async def published(runner: Runner) -> Runner:
    """The job that messages ask for; two of the same may be open."""
    await runner.publish("tests.Counted", schema=SCHEMA, unique=False)
    return runner


@asynccontextmanager
async def ingesting(database: Database, settings: Settings, post: Post, **more: Any) -> AsyncIterator[None]:
    """An ingest of this queue; for RabbitMQ with its URL."""
    url = None if post.is_inbox else more.pop("broker_url", post.url)
    own = replace(settings, namespaces=(post.queue,), **{"broker_url": url, **more})
    ingest = Ingest(database, own, JobQueue(database, own))
    await ingest.prepare()
    stop = asyncio.Event()
    task = asyncio.create_task(ingest.run(stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await task


async def jobs(database: Database) -> list[Job]:
    found = await database.collection(QUEUE).find({}).to_list(None)
    return sorted(map(Job.from_document, found), key=lambda job: job.rank)


async def reach(database: Database, count: int, timeout: float = 60, every: float = 0.05) -> list[Job]:
    async def look() -> list[Job]:
        found = await jobs(database)
        assert len(found) >= count, f"{len(found)} jobs"
        return found

    return await eventually_async(look, timeout, every=every)


async def buried(post: Post, count: int = 1, timeout: float = 60) -> list[tuple[str, str, bytes]]:
    found: list[tuple[str, str, bytes]] = []

    async def look() -> bool:
        letters = await post.dead()
        found[:] = letters if post.is_inbox else found + letters
        return len(found) >= count

    await eventually_async(look, timeout, what=f"{count} dead letters, {found}")
    return found


@pytest.mark.row("F7")
async def test_one_job_and_many(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    """Sent before anybody listens, one and ten; each becomes a job, in order, under the id that was given."""
    async with post.producer() as producer:
        first = await producer.send_job({"name": "tests.Counted", "args": [0]})
        ids = [
            first,
            *await producer.send_jobs([{"name": "tests.Counted", "args": [n]} for n in range(1, 11)]),
        ]

    async with ingesting(database, settings, post):
        found = await reach(database, 11)
        await eventually_async(lambda: _none_waits(post))

    assert [job.args for job in found] == [{"n": n} for n in range(11)]
    assert [job.document["request_id"] for job in found] == ids
    assert {job.namespace for job in found} == {post.queue}
    assert {job.username for job in found} == {"broker"}
    assert await post.dead() == []


async def _none_waits(post: Post) -> bool:
    return await post.waiting() == 0


@pytest.mark.row("F9")
async def test_both_envelopes_and_what_may_be_left_out(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    await published.publish("tests.Bare", schema={"type": "object", "properties": {}}, unique=False)
    flat = {"namespace": post.queue, "name": "tests.Counted", "args": [1], "kwargs": {"text": "ä"}}
    async with post.producer() as producer:
        await producer.send_job(flat)
        await producer.send_job({"job": flat})
        await producer.send_job({"name": "tests.Bare", "priority": 7, "request_id": "my-own"})

    async with ingesting(database, settings, post):
        found = {json.dumps(job.args): job for job in await reach(database, 3)}
        every = await jobs(database)

    assert [job.args for job in every].count({"n": 1, "text": "ä"}) == 2
    assert found["{}"].priority == 7
    assert found["{}"].document["request_id"] == "my-own"


MALFORMED = {
    "no JSON": (b"{", "invalid_json", "character 1"),
    "not UTF-8": (b'{"name": "\xff"}', "invalid_json", "not UTF-8"),
    "no object": (b"[1]", "bad_message", "no object"),
    "no name": (b'{"args": []}', "bad_message", "[name] is missing"),
    "unknown key": (b'{"name": "tests.Counted", "arg": [1]}', "bad_message", "[arg] is not known"),
    "args no list": (b'{"name": "tests.Counted", "args": {"n": 1}}', "bad_message", "list"),
    "bad option": (b'{"name": "tests.Counted", "args": [1], "attempts": 0}', "bad_message", "attempts"),
    "wrong namespace": (b'{"name": "tests.Counted", "namespace": "OTHER"}', "bad_message", "OTHER"),
    "wrong type": (b'{"name": "tests.Counted", "args": ["one"]}', "bad_arguments", "/n"),
    "argument missing": (b'{"name": "tests.Counted"}', "bad_arguments", "/n"),
    "too many": (b'{"name": "tests.Counted", "args": [1, "a", 3]}', "bad_arguments", "2 positional"),
    "given twice": (b'{"name": "tests.Counted", "args": [1], "kwargs": {"n": 2}}', "bad_arguments", "twice"),
    "unknown argument": (b'{"name": "tests.Counted", "kwargs": {"n": 2, "m": 1}}', "bad_arguments", "/m"),
    "half a surrogate": (
        b'{"name": "tests.Counted", "kwargs": {"text": "\\ud800"}}',
        "bad_message",
        "surrogate",
    ),
    "no number": (b'{"name": "tests.Counted", "args": [NaN]}', "bad_message", "finite"),
    "too deep": (b'{"name": "tests.Counted", "args": ' + b"[" * 5000 + b"]" * 5000 + b"}", "", ""),
    "too large": (b'{"name": "' + b"x" * 70_000 + b'"}', "too_large", "65536"),
    "unknown": (b'{"name": "tests.NoSuchJob"}', "unknown_job", "tests.NoSuchJob"),
}


async def test_what_cannot_become_a_job_is_a_dead_letter_with_the_reason(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    """... and keeps no other message from becoming one."""
    await post.put(*(body for body, _, _ in MALFORMED.values()))
    await post.put(b'{"name": "tests.Counted", "args": [1]}')

    async with ingesting(database, settings, post, broker_patience=0.5, max_body=65536):
        letters = await buried(post, len(MALFORMED))
        found = await reach(database, 1)
        await eventually_async(lambda: _none_waits(post))

    assert len(letters) == len(MALFORMED)
    assert len(found) == 1
    told = {body: (reason, detail) for reason, detail, body in letters}
    for name, (body, reason, detail) in MALFORMED.items():
        assert reason in told[body][0], name
        assert detail in told[body][1], name


async def test_an_unknown_name_waits_for_its_worker(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    async with post.producer() as producer:
        await producer.send_job({"name": "tests.Late"})
        await producer.send_job({"name": "tests.Counted", "args": [1]})

    async with ingesting(database, settings, post, broker_patience=60.0):
        (first,) = await reach(database, 1)  # the other one does not wait behind it
        await published.publish("tests.Late")
        await reach(database, 2)

    assert first.name == "tests.Counted"
    assert await post.dead() == []


async def test_the_same_message_again_makes_no_second_job(
    post: Post, published: Runner, database: Database, settings: Settings, queue: JobQueue
) -> None:
    """Not while its job waits, nor when it has been journaled; another message under its id is refused."""
    body = b'{"name": "tests.Counted", "args": [1]}'
    await post.put(body, message_id="id-1")
    await post.put(body, message_id="id-1")
    async with ingesting(database, settings, post):
        (job,) = await reach(database, 1)
        await eventually_async(lambda: _none_waits(post))
        await queue.kill(job.id, by="ann")
        await queue.remove(job.id, by="ann")
        await post.put(body, message_id="id-1")
        await post.put(b'{"name": "tests.Counted", "args": [2]}', message_id="id-1")
        (letter,) = await buried(post)

    assert letter[0] == "idempotency_key_reused"
    assert await jobs(database) == []
    assert (await queue.store.get(job.id)).journal


async def test_rights_come_from_the_settings_not_from_the_message(
    post: Post, published: Runner, database: Database, settings: Settings, users: UserStore
) -> None:
    await users.add("feeder", "x" * 12, allow=["job://tests\\.Other/x"])
    await published.publish("tests.Other")
    await post.put(b'{"name": "tests.Counted", "args": [1]}')
    await post.put(b'{"name": "tests.Other"}')
    await post.put(b'{"name": "tests.Other", "username": "admin"}')

    async with ingesting(database, settings, post, broker_user="feeder"):
        (job,) = await reach(database, 1)
        letters = await buried(post, 2)

    assert (job.name, job.username) == ("tests.Other", "feeder")
    assert sorted(reason for reason, _, _ in letters) == ["bad_message", "forbidden"]


async def test_another_namespace_only_where_that_is_allowed(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    await post.put(b'{"name": "tests.Counted", "args": [1], "namespace": "OTHER"}')

    async with ingesting(database, settings, post, broker_any_namespace=True):
        (job,) = await reach(database, 1)

    assert job.namespace == "OTHER"


@pytest.mark.timeout(900)
async def test_random_messages_end_nothing(
    post: Post, published: Runner, database: Database, settings: Settings
) -> None:
    """Every one of them becomes a dead letter with a reason; what comes afterwards becomes a job."""
    dice = random.Random(7)
    count = FUZZ // 10 if post.is_inbox else FUZZ
    await post.put(*(_malformed(dice) for _ in range(count)))
    await post.put(b'{"name": "tests.Counted", "args": [1]}')

    async with ingesting(database, settings, post, broker_patience=0.1):
        await reach(database, 1, timeout=400)
        letters = await buried(post, count, timeout=400)

    assert len(letters) == count
    assert all(reason and detail for reason, detail, _ in letters)
    assert {reason for reason, _, _ in letters} >= {"bad_message", "invalid_json", "bad_arguments"}
    assert len(await jobs(database)) == 1


def _malformed(dice: random.Random) -> bytes:
    """Noise, a right message with a byte too few or a foreign one, or JSON that says something else."""
    right = json.dumps({"name": "tests.Counted", "args": [1], "kwargs": {"text": "x"}}).encode()
    values: list[Any] = [
        None,
        True,
        -1,
        1e300,
        "",
        "x" * 300,
        "$where",
        [],
        [[]],
        {},
        {"$ref": 1},
        "\x00",
        "\ud800",
    ]
    match dice.randrange(4):
        case 0:
            return dice.randbytes(dice.randrange(1, 200))
        case 1:
            return right[: dice.randrange(len(right))]
        case 2:
            at = dice.randrange(len(right))
            return right[:at] + bytes([dice.randrange(128, 256)]) + right[at + 1 :]
    names = ["name", "namespace", "args", "kwargs", "job", "priority", "attempts", "options", "request_id"]
    wish = {name: dice.choice(values) for name in dice.sample(names, dice.randrange(1, 5))}
    # A name that is published, with arguments that it does not take.
    return json.dumps({"name": "tests.Counted", "args": ["no"], **wish, "kwargs": {"other": 1}}).encode()
