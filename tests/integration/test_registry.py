"""Workers come, renew, leave and are declared dead; what they can run is published."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import pytest

from core4.catalogue import Catalogue, matches
from core4.changes import Change, ChangeFeed
from core4.database import Database
from core4.jobs import Kind, Owner
from core4.registry import WORKER, WorkerRegistry, described

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def registry(database: Database) -> WorkerRegistry:
    store = WorkerRegistry(database)
    await store.prepare()
    return store


async def make_worker(registry: WorkerRegistry, *names: str) -> Owner:
    owner = Owner(uuid.uuid4().hex, "worker@here", "here", 1)
    await registry.register(owner, slots=2, namespaces=["DEFAULT"], jobs=names, version="0")
    return owner


async def test_a_worker_lives_until_it_leaves(registry: WorkerRegistry) -> None:
    """Up, draining, down; a worker that left cannot renew."""
    owner = await make_worker(registry, "a.Job")
    assert await registry.serves("a.Job", "DEFAULT")
    assert not await registry.serves("a.Job", "other")
    assert not await registry.serves("b.Job")
    await registry.serve(owner, ["b.Job"])
    assert await registry.serves("b.Job")
    assert await registry.beat(owner, running=1, draining=True)
    assert (await registry.list())[0]["state"] == "drain"
    assert await registry.beat(owner, running=1, draining=True, gate="cpu: 100 %")
    assert (await registry.list())[0]["gate"] == "cpu: 100 %"
    assert not await registry.serves("b.Job")
    assert await registry.alive_ids() == {owner.id}
    await registry.leave(owner)
    assert await registry.alive_ids() == set()
    assert not await registry.beat(owner, running=0)


async def test_only_the_silent_are_buried_and_for_good(registry: WorkerRegistry, database: Database) -> None:
    """By the server's clock; who was declared dead is told so at its next beat."""
    silent, living = await make_worker(registry), await make_worker(registry)
    late = await database.server_time() - timedelta(seconds=60)
    await database.collection(WORKER).update_one({"_id": silent.id}, {"$set": {"beat": late}})
    assert await registry.bury(30) == [silent.id]
    assert await registry.bury(30) == []
    assert await registry.alive_ids() == {living.id}
    assert not await registry.beat(silent, running=0)
    assert await registry.beat(living, running=0)
    await registry.leave(silent)
    assert {row["_id"]: row["state"] for row in await registry.list()} == {silent.id: "dead", living.id: "up"}


async def test_the_newest_publication_stands(database: Database) -> None:
    """Publishing the same again changes nothing, something new changes the entry."""
    catalogue = Catalogue(database)
    entry = {"_id": "a.Job", "doc": "one", "tag": None}
    await asyncio.gather(*(catalogue.publish([entry, {"_id": "b.Dummy", "doc": ""}]) for _ in range(4)))
    first = await catalogue.get("a.Job")
    await catalogue.publish([entry])
    assert await catalogue.get("a.Job") == first
    await catalogue.publish([{**entry, "doc": "two"}])
    second = await catalogue.get("a.Job")
    assert first is not None
    assert second is not None
    assert (second["doc"], second["created_at"]) == ("two", first["created_at"])
    page = await catalogue.page(allowed=lambda name: True, sort=[("_id", -1)], per_page=1)
    assert (page.total, [row["_id"] for row in page.rows]) == (2, ["b.Dummy"])
    assert (await catalogue.page(allowed=lambda name: name == "a.Job")).total == 1
    assert [row["_id"] for row in (await catalogue.page(allowed=lambda name: True, search="dum")).rows] == [
        "b.Dummy"
    ]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("dummy", True),
        ("DUMMY", True),
        ("e.D", True),
        ("eXD", False),
        ("e?D", True),
        ("c*y", True),
        ("[e]", False),
    ],
)
async def test_search(search: str, found: bool) -> None:
    """A substring without case; only `?` and `*` are special."""
    assert matches(search, "core4.example.DummyJob") is found


async def test_changes_come_together(database: Database) -> None:
    """Each once and in order, however many one answer has."""
    feed = ChangeFeed(database, ["a"])
    seen: list[Any] = []
    ready, done = asyncio.Event(), asyncio.Event()

    def note(change: Change) -> None:
        seen.append(change.id)
        ready.set()
        if len(seen) == 302:  # the resync at the start among them
            done.set()

    feed.listen(note)
    async with asyncio.timeout(40):
        task = asyncio.create_task(feed.run())
        await ready.wait()
        await database.collection("a").insert_many([{"_id": n} for n in range(300)])
        await database.collection("a").insert_one({"_id": 300})
        await done.wait()
    task.cancel()
    assert seen == [None, *range(301)]


async def test_changes_reach_every_listener(database: Database) -> None:
    """Inserts, updates and deletes of the watched collections, to all in this process."""
    feed = ChangeFeed(database, ["a", "b"])
    seen: list[Change] = []
    ready, done = asyncio.Event(), asyncio.Event()

    def note(change: Change) -> None:
        seen.append(change)
        ready.set()
        if change.kind == "delete":
            done.set()

    def fail(_change: Change) -> None:
        raise ZeroDivisionError

    feed.listen(fail)  # one that fails disturbs nobody
    stop = feed.listen(note)
    async with asyncio.timeout(20):
        task = asyncio.create_task(feed.run())
        await ready.wait()
        await database.collection("a").insert_one({"_id": 1, "x": 1})
        await database.collection("other").insert_one({"_id": 1})
        await database.collection("b").insert_one({"_id": 2})
        await database.collection("a").update_one({"_id": 1}, {"$set": {"x": 2}})
        await database.collection("a").delete_one({"_id": 1})
        await done.wait()
    stop()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(c.kind, c.collection, c.id) for c in seen if c.kind != "resync"] == [
        ("insert", "a", 1),
        ("insert", "b", 2),
        ("update", "a", 1),
        ("delete", "a", 1),
    ]
    assert next(c.fields for c in seen if c.kind == "update") == {"x": 2}


async def test_each_that_lives_has_a_number_of_its_own(registry: WorkerRegistry) -> None:
    """Thirty at once have the first thirty; one that ends gives its number to another that wants it."""
    owners = await asyncio.gather(*(make_worker(registry) for _ in range(30)))
    rows = await registry.list()
    assert sorted(row["nr"] for row in rows) == list(range(1, 31))
    by_id = {row["_id"]: row for row in rows}

    await registry.leave(owners[4])
    await registry.condemn(owners[9].id, "its process is gone")
    free = {by_id[owners[4].id]["nr"], by_id[owners[9].id]["nr"]}
    wanting = Owner("wanting", "worker@here", "here", 1, Kind(nr=max(free)))
    also = Owner("also", "worker@here", "here", 1, Kind(nr=max(free)))
    await registry.enlist(wanting)
    await registry.enlist(also)
    await registry.enlist(also)

    after = {row["_id"]: row for row in await registry.list()}
    assert after["wanting"]["label"] == f"w{max(free)}"
    assert after["also"]["nr"] == min(free)
    assert "nr" not in after[owners[4].id]
    assert after[owners[9].id]["error"] == "its process is gone"
    assert not await registry.condemn(owners[9].id, "twice")


@pytest.mark.row("M35")
async def test_a_worker_is_described_in_the_words_of_myjobs(
    registry: WorkerRegistry, database: Database
) -> None:
    owner = Owner("one", "worker@here", "here", 7, Kind(type="tmux", timeout=3600, debug=True))

    async def seen(*current: str) -> dict[str, Any]:
        (row,) = await registry.list()
        return described(row, current, 30)

    await registry.enlist(owner)
    new = await seen()
    await registry.register(owner, slots=1, namespaces=["DEFAULT"], jobs=["a.Job"], version="0")
    waiting, busy = await seen(), await seen("a job")
    late = await database.server_time() - timedelta(seconds=45)
    await database.collection(WORKER).update_one({"_id": owner.id}, {"$set": {"beat": late}})
    silent = await seen()
    await registry.bury(30)
    dead = await seen()

    assert [each["status"] for each in (new, waiting, busy, silent, dead)] == [
        *("NEW", "WAITING", "BUSY", "ERROR", "ERROR")
    ]
    assert (waiting["current"], busy["current"], busy["error"]) == ([], ["a job"], None)
    assert (busy["label"], busy["type"], busy["timeout"], busy["debug"], busy["pid"]) == (
        *("w1", "tmux", 3600, True, 7),
    )
    assert silent["error"].startswith("no sign of life for 4")
    assert dead["error"] == "no sign of life for more than 30 s"
    assert dead["ended_at"] >= dead["started_at"]
