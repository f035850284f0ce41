"""Fixtures of all tests: one real database server per session, a fresh database per test.

``CORE4_TEST_MONGO_URL`` names another server than the embedded one. Nothing is replaced by a double, and
nothing is skipped for want of a service.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from core4.catalogue import Catalogue
from core4.config import PREFIX, Settings
from core4.database import Database
from core4.embedded import EmbeddedServer
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from tests.database import SmallDatabase
from tests.helpers import FAST, Stack, quick_folder, running_stack

if TYPE_CHECKING:
    from tests.rabbit import Rabbit

# Ctrl-C is tested: where it is ignored (nohup, a job in the background), so would whatever is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests start hundreds of processes: without this each of them compiles every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if folder := quick_folder():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))
# No test asserts a duration, and what is slow here is the machine.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of whoever runs it."""
    for name in os.environ:
        if name.startswith(PREFIX) and not name.startswith("CORE4_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def mongo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the server of this session."""
    if url := os.environ.get("CORE4_TEST_MONGO_URL"):
        yield url
        return
    with EmbeddedServer(tmp_path_factory.mktemp("embedded")) as server:
        yield server.url


@pytest.fixture
def database_name() -> str:
    """A name that no other test uses."""
    return f"test_{uuid.uuid4().hex[:16]}"


@pytest.fixture
async def database(mongo_url: str, database_name: str) -> AsyncIterator[SmallDatabase]:
    """An empty database that holds no more than a few documents; it is dropped after the test."""
    database = await SmallDatabase.connect(mongo_url, database_name, app_name="tests")
    yield database
    await database.drop()
    await database.close()


@pytest.fixture
def settings(mongo_url: str, database_name: str, tmp_path: Path) -> Settings:
    """Settings with timings that show failures within seconds."""
    return Settings.load(
        environ=FAST, mongo_url=mongo_url, mongo_database=database_name, home=tmp_path / "home", slots=2
    )


@pytest.fixture
async def queue(database: Database, settings: Settings) -> JobQueue:
    """The queue of the test's database, with its indexes."""
    queue = JobQueue(database, settings)
    await queue.store.prepare()
    return queue


@pytest.fixture
async def logs(database: Database) -> LogStore:
    """The log lines of the test's database, with their indexes."""
    logs = LogStore(database)
    await logs.prepare()
    return logs


@pytest.fixture
async def registry(database: Database) -> WorkerRegistry:
    """The workers of the test's database, with their indexes."""
    registry = WorkerRegistry(database)
    await registry.prepare()
    return registry


@pytest.fixture
def catalogue(database: Database) -> Catalogue:
    """The catalogue of the test's database."""
    return Catalogue(database)


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    """A RabbitMQ of this session's own."""
    from tests.rabbit import Rabbit  # only where it is used: its client takes a moment to load

    rabbit = Rabbit(tmp_path_factory.mktemp("rabbit"))
    try:
        rabbit.start()
        yield rabbit
    finally:
        rabbit.stop()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """The installed `core4 up` with the example jobs, as real processes on a free port."""
    with running_stack(tmp_path) as stack:
        yield stack
