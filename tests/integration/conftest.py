"""Fixtures of the API's tests: a running API with an administrator, and whoever runs its jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner, serving


@pytest.fixture
async def users(database: Database, settings: Settings) -> AsyncIterator[UserStore]:
    """The users of the test's database, with the administrator in it."""
    users = UserStore(database, settings)
    await users.prepare()
    await users.add(*ADMIN, allow=["cop"])
    yield users
    users.close()


@pytest.fixture
async def runner(queue: JobQueue, logs: LogStore, registry: WorkerRegistry, catalogue: Catalogue) -> Runner:
    """A worker that is up and runs `tests.Job`."""
    runner = Runner(queue, logs, registry, catalogue)
    await runner.publish("tests.Job")
    await runner.up("tests.Job")
    return runner


@pytest.fixture
async def api(users: UserStore, runner: Runner, settings: Settings, database: Database) -> AsyncIterator[Api]:
    """A running API."""
    async with serving(settings, database) as api:
        yield api
