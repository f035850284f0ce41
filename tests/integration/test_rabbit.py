"""What only RabbitMQ does to us: it is restarted, its connections are cut, its queues are deleted."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from urllib.parse import urlsplit

import aio_pika
import pytest
from pamqp import decode

from core4.brokers import connector
from core4.config import Settings
from core4.database import Database
from core4.errors import BadMessage, BrokerLost, TooLarge
from core4.producers import Producer, get_producer_channel
from tests.helpers import eventually_async
from tests.integration.driver import Runner
from tests.integration.test_ingest import SCHEMA, Post, ingesting, jobs, reach
from tests.rabbit import Cutter, Rabbit, channel_of, numbers, put, size, taken


@pytest.fixture
def queue_name() -> str:
    """A queue that no other test uses."""
    return f"Q{uuid.uuid4().hex[:12]}"


@pytest.fixture
def cutter(rabbit: Rabbit) -> Iterator[Cutter]:
    """A way to RabbitMQ that can be cut."""
    cutter = Cutter(rabbit.port)
    yield cutter
    cutter.close()


@pytest.fixture
async def counted(runner: Runner) -> None:
    """The job that messages ask for."""
    await runner.publish("tests.Counted", schema=SCHEMA, unique=False)


def body(n: int) -> bytes:
    return b'{"name": "tests.Counted", "args": [%d]}' % n


async def insist(producer: Producer, wishes: list[dict[str, object]]) -> None:
    """Send until it has succeeded, as a program does that must not lose a job."""
    while True:
        try:
            await producer.send_jobs(wishes)
            return
        except BrokerLost:
            await asyncio.sleep(0.2)


async def insist_raw(url: str, queue: str, bodies: list[bytes], ids: list[str]) -> None:
    while True:
        try:
            return await put(url, queue, *bodies, ids=ids)
        except (OSError, aio_pika.exceptions.AMQPError):
            await asyncio.sleep(0.2)


@pytest.mark.timeout(900)
async def test_restarts_and_cuts_lose_and_double_nothing(
    rabbit: Rabbit, cutter: Cutter, counted: None, database: Database, settings: Settings, queue_name: str
) -> None:
    """1,000 messages, of them 50 malformed, and 100 that repeat others: 950 jobs, 50 dead letters."""
    url = f"amqp://guest:guest@127.0.0.1:{cutter.port}/"
    wishes: list[dict[str, object]] = [
        {"name": "tests.Counted", "args": [n], "request_id": f"m{n}"} for n in range(950)
    ]
    malformed = [f"bad{n}" for n in range(50)]
    post = Post(rabbit.url, queue_name, database)

    async def send() -> None:
        async with Producer(url, queue_name) as producer:
            for start in range(0, 950, 95):
                await insist(producer, wishes[start : start + 95])
                await insist(producer, wishes[start : start + 10])
                ids = malformed[start // 19 : start // 19 + 5]
                await insist_raw(url, queue_name, [b"{"] * 5, ids)

    cuts = 0
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(ingesting(database, settings, post, broker_url=url))
        sending = asyncio.create_task(send())
        for count in (100, 300, 500):
            await reach(database, count, timeout=200, every=0.2)
            cuts += cutter.cut()
        await asyncio.to_thread(rabbit.stop_app)
        await asyncio.to_thread(rabbit.start_app)
        await sending
        await reach(database, 950, timeout=200, every=0.2)

        async def all_settled() -> bool:
            return await asyncio.to_thread(rabbit.unsettled, queue_name) == 0

        await eventually_async(all_settled, 120)

    letters = await taken(rabbit.url, f"{queue_name}.dead")
    found = await jobs(database)
    assert cuts > 0
    assert sorted(job.args["n"] for job in found) == list(range(950))
    assert {letter.message_id for letter in letters} == set(malformed)
    assert await size(rabbit.url, queue_name) == 0


async def test_without_the_database_messages_stay_at_the_broker(
    rabbit: Rabbit, counted: None, settings: Settings, mongo_url: str, database: Database, queue_name: str
) -> None:
    """The consumer goes, so that nothing is held; when the database is back, everything becomes a job."""
    way = Cutter(urlsplit(mongo_url).port or 0)
    url = mongo_url.replace(f":{urlsplit(mongo_url).port}", f":{way.port}")
    own = await Database.connect(url, database.name, timeout=0.5)
    post = Post(rabbit.url, queue_name, database)
    try:
        async with ingesting(own, settings, post):
            await post.put(body(0))
            await reach(database, 1)
            way.refuse = True
            way.cut()
            await post.put(body(1), body(2))

            async def all_back() -> bool:
                return await numbers(rabbit.url, queue_name) == (2, 0)

            await eventually_async(all_back, 60, what="nobody holds a message")
            way.refuse = False
            found = await reach(database, 3, timeout=60)
    finally:
        await own.close()
        way.close()

    assert [job.args["n"] for job in found] == [0, 1, 2]
    assert await post.dead() == []


async def test_a_deleted_queue_is_made_again(
    rabbit: Rabbit, counted: None, settings: Settings, database: Database, queue_name: str
) -> None:
    post = Post(rabbit.url, queue_name, database)
    async with ingesting(database, settings, post):
        await post.put(body(0))
        await reach(database, 1)
        async with channel_of(rabbit.url) as channel:
            await channel.queue_delete(queue_name)

        async def served() -> bool:
            return (await numbers(rabbit.url, queue_name))[1] == 1

        await eventually_async(served, what="the queue is served again")
        async with post.producer() as producer:
            await producer.send_job({"name": "tests.Counted", "args": [1]})
        await reach(database, 2)


class Latin(str):
    """A text that goes over the wire as other bytes than UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return super().encode("latin-1")


async def test_broken_properties_block_no_queue(
    rabbit: Rabbit, counted: None, settings: Settings, database: Database, queue_name: str
) -> None:
    """What the client library cannot read must not be delivered for ever."""
    post = Post(rabbit.url, queue_name, database)
    await post.put(body(0), message_id="good")
    async with channel_of(rabbit.url, confirms=False) as channel:
        for n, text in enumerate(("\xe4", "\xe5"), 1):
            message = aio_pika.Message(body(n), headers={"x": 1}, timestamp=0)
            message.message_id = message.correlation_id = Latin(text)
            message.headers = {Latin(text): Latin(text)}
            await channel.default_exchange.publish(message, routing_key=queue_name, mandatory=False)

    async with ingesting(database, settings, post):
        found = await reach(database, 3)

    assert [job.args["n"] for job in found] == [0, 1, 2]
    assert [job.document["request_id"] for job in found] == ["good", "\\xe4", "\\xe5"]


def test_values_that_cannot_be_read_are_passed_over() -> None:
    """By their length, so that what follows them is read."""
    assert decode.by_type(b"\xff" * 8, "timestamp") == (8, None)
    assert decode.by_type(b"\0\0\0\x03\x01\xff\x00rest", "table") == (7, None)
    assert decode.by_type(b"\x02\xc3\xa4rest", "shortstr") == (3, "ä")


async def test_a_queue_of_another_kind_is_taken_as_it_is(
    rabbit: Rabbit, counted: None, settings: Settings, database: Database, queue_name: str
) -> None:
    """An operator has made it a quorum queue."""
    async with channel_of(rabbit.url) as channel:
        await channel.declare_queue(queue_name, durable=True, arguments={"x-queue-type": "quorum"})
    post = Post(rabbit.url, queue_name, database)

    async with ingesting(database, settings, post), post.producer() as producer:
        await producer.send_job({"name": "tests.Counted", "args": [1]})
        await reach(database, 1)


async def test_queue_and_messages_survive_a_restart(rabbit: Rabbit, queue_name: str) -> None:
    """What a producer was told to be sent is on the broker's disk, with nobody listening."""
    async with Producer(rabbit.url, queue_name) as producer:
        await producer.send_job({"name": "tests.Counted", "args": [1]})
    await asyncio.to_thread(rabbit.stop_app)
    await asyncio.to_thread(rabbit.start_app)

    (message,) = await taken(rabbit.url, queue_name)
    assert message.body == body(1).replace(b": ", b":").replace(b", ", b",")


async def test_neither_log_nor_error_tells_the_password(
    caplog: pytest.LogCaptureFixture, database: Database, settings: Settings, rabbit: Rabbit
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"amqp://guest:the-secret@127.0.0.1:{rabbit.port}/"
    with pytest.raises(BrokerLost) as refused:
        await connector(url)(url, 1)
    post = Post(url, "DEFAULT", database)
    async with ingesting(database, settings, post):

        async def told() -> bool:
            return any(
                getattr(each, "source", "") == "broker" and each.message == "ingest.interrupted"
                for each in caplog.records
            )

        await eventually_async(told)

    assert "the-secret" not in str(refused.value)
    texts = [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert not [text for text in texts if "the-secret" in text]
    assert "the-secret" not in repr(Producer(url, "DEFAULT"))
    assert "the-secret" not in repr(replace(settings, broker_url=url))


@pytest.mark.row("F7")
def test_a_script_sends_one_and_many_and_nothing_malformed(rabbit: Rabbit, queue_name: str) -> None:
    """Without asyncio; what is malformed is refused here, and nothing of its list is sent."""
    good = {"name": "tests.Counted", "args": [1]}
    with get_producer_channel(rabbit.url, queue_name) as channel:
        ids = [channel.send_job(good), *channel.send_jobs([{"job": good}] * 10)]
        with pytest.raises(BadMessage, match=r"\[name\] is missing"):
            channel.send_job({"args": [1]})
        with pytest.raises(BadMessage, match="not JSON"):
            channel.send_job({**good, "kwargs": {"at": object()}})
        with pytest.raises(BadMessage, match="list of jobs"):
            channel.send_jobs(good)  # type: ignore[arg-type]
        with pytest.raises(BadMessage):
            channel.send_jobs([good, {"name": 3}])
        with pytest.raises(TooLarge):
            channel.send_job({**good, "kwargs": {"text": "x" * 2**20}})

    sent = asyncio.run(taken(rabbit.url, queue_name))
    assert len(set(ids)) == 11
    assert {message.message_id for message in sent} == set(ids)
    assert all(message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT for message in sent)
