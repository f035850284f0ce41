"""From a producer through a broker to a finished job, with a real worker; brokers of others, too."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from core4.config import Settings
from core4.database import Database
from core4.errors import ConfigError
from core4.jobs import Job
from core4.producers import Producer
from core4.queues import JobQueue
from core4.store import JOURNAL
from core4.worker.ingest import Ingest
from tests import memory_broker
from tests.helpers import eventually_async
from tests.integration.driver import Runner
from tests.integration.test_ingest import SCHEMA, Post, ingesting, jobs
from tests.integration.test_worker import House, house  # noqa: F401 - a fixture

LEDGER = str(Path(__file__).parent.parent / "jobs" / "ledger.py")


@pytest.fixture
def memory_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A broker that comes with another package, which is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    memory_broker.install(folder)
    monkeypatch.syspath_prepend(folder)
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    memory_broker.BROKERS.pop(url, None)


async def finished(database: Database) -> Job:
    """The job once it is in the journal."""

    async def look() -> Job | None:
        document = await database.collection(JOURNAL).find_one({})
        return Job.from_document(document, journal=True) if document else None

    found = await eventually_async(look, 30, what="a finished job")
    assert found is not None
    return found


async def run_one(house: House, url: str, tmp_path: Path) -> Job:  # noqa: F811
    """Send a message and let a worker run what becomes of it."""
    queue, ledger = f"Q{uuid.uuid4().hex[:12]}", tmp_path / "ledger"
    wish = {
        "namespace": queue,
        "name": "tests.jobs.LedgerJob",
        "args": [str(ledger)],
        "kwargs": {"n": 3},
        "request_id": "req-1",
    }
    async with Producer(url, queue, database=house.database.name) as producer:
        assert await producer.send_job(wish) == "req-1"
    own = None if url.startswith("mongodb") else url
    async with house.worker(LEDGER, namespaces=(queue,), broker_url=own):
        job = await finished(house.database)
    assert job.document["result"] == {"n": 3}
    assert job.document["request_id"] == "req-1"
    assert len(ledger.read_text().splitlines()) == 2  # started once, ended once
    return job


@pytest.mark.row("F4")
async def test_a_message_at_rabbitmq_runs(
    house: House,  # noqa: F811
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    await run_one(house, request.getfixturevalue("rabbit").url, tmp_path)


@pytest.mark.row("F5")
async def test_a_message_in_the_inbox_runs(
    house: House,  # noqa: F811
    mongo_url: str,
    tmp_path: Path,
) -> None:
    """No setting is needed for it."""
    await run_one(house, mongo_url, tmp_path)


@pytest.mark.row("F6")
async def test_a_message_at_a_broker_of_others_runs(
    house: House,  # noqa: F811
    memory_url: str,
    tmp_path: Path,
) -> None:
    job = await run_one(house, memory_url, tmp_path)

    (letter,) = memory_broker.BROKERS[memory_url].letters[job.namespace]
    assert letter.state == "accepted"


async def test_a_broker_that_is_not_installed_is_named(database: Database, settings: Settings) -> None:
    own = Settings.load(environ={}, broker_url="sqs://somewhere", home=settings.home)
    with pytest.raises(ConfigError, match=r"'sqs'.*amqp, amqps"):
        Ingest(database, own, JobQueue(database, own))


async def test_without_an_id_a_message_counts_each_time_or_not_at_all(
    memory_url: str, runner: Runner, database: Database, settings: Settings
) -> None:
    """The message's own id, or the request id in it, is one."""
    await runner.publish("tests.Counted", schema=SCHEMA, unique=False)
    post = Post(memory_url, "ids", database)
    broker = await memory_broker.connect(memory_url, 1)

    def wish(n: int, **more: str) -> memory_broker.Letter:
        return memory_broker.Letter(
            "ids", json.dumps({"name": "tests.Counted", "args": [n], **more}).encode()
        )

    letters = broker.letters["ids"]
    letters += [wish(1), wish(1), wish(2, request_id="two"), wish(2, request_id="two")]
    async with ingesting(database, settings, post):
        await _settled(letters)
    assert [job.args["n"] for job in await jobs(database)] == [1, 1, 2]

    letters += [wish(3), wish(4, request_id="four")]
    async with ingesting(database, settings, post, broker_require_id=True):
        await _settled(letters)
    assert [job.args["n"] for job in await jobs(database)] == [1, 1, 2, 4]
    assert [(letter.state, letter.reason) for letter in letters[-2:]] == [
        ("dead", "bad_message"),
        ("accepted", ""),
    ]


async def _settled(letters: list[memory_broker.Letter]) -> None:
    async def look() -> bool:
        return all(letter.state in ("accepted", "dead") for letter in letters)

    await eventually_async(look)
