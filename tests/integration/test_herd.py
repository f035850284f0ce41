"""Many that hear of the same job: a few look at once, others if it is not taken; and no job is forgotten."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from bson import ObjectId

from core4 import changes
from core4.changes import Change, ChangeFeed, Lookout, turn
from core4.claims import stir
from core4.config import Settings
from core4.database import Database
from core4.jobs import JobOrder, Owner
from core4.queues import JobQueue
from core4.store import QUEUE
from tests.helpers import eventually_async

CROWD = 30
FAR = 3600.0
SPACES = ["DEFAULT"]


class Claimer:
    """A worker that does nothing but claim, one job with each look."""

    def __init__(self, database: Database, settings: Settings, feed: ChangeFeed) -> None:
        self.owner = Owner(uuid.uuid4().hex, "claimer@here", "here", 1)
        self.lookout = Lookout(lambda: feed.live, FAR)
        self.queue = JobQueue(database, settings)
        self.looks, self.found = 0, list[ObjectId]()

    def hear(self, change: Change) -> None:
        if change.collection in (QUEUE, ""):
            stir(self.lookout, change, self.owner, SPACES, lambda namespace: CROWD)

    async def run(self) -> None:
        while True:
            self.lookout.looking()
            claimed = await self.queue.claims.claim(self.owner, namespaces=SPACES)
            self.found += [job.id for job in claimed]
            self.looks += 1
            if claimed and claimed.more:
                self.lookout.hint()
            await self.lookout.wait()

    @property
    def rests(self) -> bool:
        """True if it has looked for all that it was told of, or others have taken that."""
        return self.looks > 0 and not self.lookout._hinted and not self.lookout._heard


@asynccontextmanager
async def claiming(database: Database, claimers: Sequence[Claimer], feed: ChangeFeed) -> AsyncIterator[None]:
    """They claim until the end of the block; at its begin each has had its first look."""
    for claimer in claimers:
        feed.listen(claimer.hear)
    told = asyncio.Event()
    feed.listen(lambda change: told.set())
    tasks = [asyncio.create_task(feed.run())]
    await told.wait()
    tasks += [asyncio.create_task(claimer.run()) for claimer in claimers]
    await resting(claimers)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def resting(claimers: Sequence[Claimer]) -> None:
    async def look() -> bool:
        return all(claimer.rests for claimer in claimers)

    await eventually_async(look, what="all have looked")


@pytest.fixture
def crew(database: Database, settings: Settings) -> tuple[list[Claimer], ChangeFeed]:
    feed = ChangeFeed(database, [QUEUE])
    return [Claimer(database, settings, feed) for _ in range(CROWD)], feed


def ids(claimers: Sequence[Claimer], *, first: bool) -> Iterator[ObjectId]:
    """Ids of jobs for which some of the claimers look at once, or none does."""
    for job_id in (ObjectId() for _ in itertools.count()):
        if any(turn(job_id, claimer.owner.id, CROWD) == 0 for claimer in claimers) is first:
            yield job_id


async def enqueue(queue: JobQueue, job_id: ObjectId) -> None:
    await queue.enqueue(JobOrder(name="a.Job", username="me", unique=False), job_id=job_id)


async def test_the_others_do_not_look_for_what_the_first_have_taken(
    database: Database,
    queue: JobQueue,
    crew: tuple[list[Claimer], ChangeFeed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody's later turn comes here: all that is claimed is by those that look at once."""
    monkeypatch.setattr(changes, "WAVE", FAR)
    monkeypatch.setattr(changes, "SLOWEST", FAR)
    claimers, feed = crew
    (job_id,) = itertools.islice(ids(claimers, first=True), 1)
    async with claiming(database, claimers, feed):
        others = [claimer for claimer in claimers if turn(job_id, claimer.owner.id, CROWD) > 0]
        before = [claimer.looks for claimer in others]
        await enqueue(queue, job_id)

        async def taken() -> bool:
            return any(claimer.found for claimer in claimers)

        await eventually_async(taken, what="it is claimed")
        await resting(claimers)
        assert [claimer.looks for claimer in others] == before
    assert [job for claimer in claimers for job in claimer.found] == [job_id]


async def test_a_job_is_found_when_none_of_the_first_looks(
    database: Database, queue: JobQueue, crew: tuple[list[Claimer], ChangeFeed]
) -> None:
    """All may be busy, or gone: the next do; and each job of a burst is taken once."""
    claimers, feed = crew
    some = list(itertools.islice(ids(claimers, first=False), 3))
    async with claiming(database, claimers, feed):
        for job_id in some:
            await enqueue(queue, job_id)

        async def all_taken() -> bool:
            return sum(len(claimer.found) for claimer in claimers) >= len(some)

        await eventually_async(all_taken, what="all are claimed")
        await resting(claimers)
    assert Counter(job for claimer in claimers for job in claimer.found) == Counter(some)
