"""Workers without a database: a real worker over HTTP, and what the manager refuses."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bson
import pytest
from bson import ObjectId

from core4 import handshake, transitions
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.controls import ControlStore
from core4.database import Database
from core4.errors import Unauthenticated
from core4.jobs import JobOrder, Owner, first_seq
from core4.logs import Line, LogStore
from core4.orders import make_order
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.schedules import ScheduleStore, declared
from core4.signatures import schema
from core4.states import State
from core4.users import UserStore
from core4.worker.daemon import Worker
from core4.worker.handle import Launcher
from core4.worker.remote import Remote
from tests.helpers import FAST, clean_environ, eventually_async, program, unsettled
from tests.integration.driver import Answer, Api, Runner, bearer, order, serving
from tests.integration.test_calls import CALLING
from tests.integration.test_task_runs import Floor
from tests.integration.test_worker import NAME as UNRULY_JOB
from tests.integration.test_worker import UNRULY, House, Running

SECRET = "abcd1234"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, worker_secret=SECRET)


@pytest.fixture
def house(
    database: Database, settings: Settings, queue: JobQueue, logs: LogStore, registry: WorkerRegistry
) -> House:
    return House(database, settings, queue, logs, registry)


@pytest.fixture
async def manager(settings: Settings, database: Database, queue: JobQueue) -> AsyncIterator[Api]:
    """An API that lets workers in."""
    async with serving(settings, database) as api:
        yield api


@asynccontextmanager
async def remote_worker(settings: Settings, url: str, *targets: str) -> AsyncIterator[Running]:
    """A worker over HTTP in this process, which is given no database."""
    own = replace(settings, mongo_url=None, manager=url, jobs=targets or (UNRULY,))
    async with Remote(own) as remote:
        own = await remote.terms(own)
        worker = Worker(remote, own, Launcher.spawn(own))
        stop, halt = asyncio.Event(), asyncio.Event()
        running = Running(worker, stop, halt, asyncio.create_task(worker.run(stop, halt)))
        try:
            yield running
        finally:
            stop.set()
            halt.set()
            async with asyncio.timeout(40):
                await asyncio.gather(running.task, return_exceptions=not running.must_succeed)


async def is_up(house: House, running: Running) -> bool:
    if running.task.done():
        running.task.result()
    rows = await house.registry.up()
    return any(row["_id"] == running.worker.owner.id and row["jobs"] for row in rows)


@pytest.mark.row("F18")
async def test_a_worker_over_http_runs_jobs_like_any_other(house: House, manager: Api) -> None:
    """Result, failure with its retry, progress, log, kill: all as with a database."""
    async with remote_worker(house.settings, manager.root) as running:
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        good = await house.enqueue("answer", value={"date$": "kept", "n": [1, None]})
        bad = await house.enqueue("raises", options={"attempts": 1})
        long = await house.enqueue("sleep", value=60)

        done = await house.reach(good)
        assert (done.state, done.document["result"]) == (State.COMPLETE, {"date$": "kept", "n": [1, None]})
        failed = await house.reach(bad)
        assert failed.state is State.ERROR
        assert "start execution" in await house.messages(bad)
        assert failed.document["last_error"]["traceback"]

        await house.reach(long, State.RUNNING)
        await house.queue.kill(long, by="ann")
        assert (await house.reach(long)).state is State.KILLED
        assert (await Catalogue(house.database).get(UNRULY_JOB) or {})["namespace"] == "DEFAULT"
    rows = await house.registry.list()
    assert [row["state"] for row in rows if row["_id"] == running.worker.owner.id] == ["down"]
    assert all("token" not in row for row in rows)


@pytest.mark.row("F18")
async def test_a_wrong_secret_is_refused_and_registers_nothing(house: House, manager: Api) -> None:
    wrong = replace(house.settings, worker_secret="abcd12345")
    with pytest.raises(Unauthenticated, match="does not know the secret"):
        async with remote_worker(wrong, manager.root) as running:
            await running.task

    assert await house.registry.list() == []


async def test_a_worker_does_not_work_for_who_does_not_know_the_secret(house: House, manager: Api) -> None:
    """What stands in the manager's place may accept any proof; it cannot answer with its own."""
    said = {"owner": "0" * 32}
    word = handshake.make_challenge(SECRET)

    assert handshake.manager_proof("other secret", word, said) != handshake.manager_proof(SECRET, word, said)
    assert handshake.manager_proof(SECRET, word, said) != handshake.worker_proof(SECRET, word, said)


@dataclass
class Caller:
    """A worker of the test's own: it speaks the protocol by hand."""

    api: Api
    owner: str
    token: str = ""

    async def login(
        self, secret: str = SECRET, *, challenge: str | None = None, source: str = "", **more: Any
    ) -> Answer:
        word = challenge or (await self.api.call("POST", "/worker/challenge", auth=None)).data["challenge"]
        self.token = self.token or handshake.make_token(self.owner)
        said = {
            "owner": self.owner,
            "name": f"{self.owner[:8]}@here",
            "hostname": "here",
            "pid": 1,
            "kind": {"type": "inprocess"},
            "namespaces": ["DEFAULT"],
            "token": handshake.fingerprint(self.token),
            **more,
        }
        proof = handshake.worker_proof(secret, word, said)
        body = {**said, "challenge": word, "proof": proof}
        headers = {"X-Forwarded-For": source} if source else {}
        return await self.api.call("POST", "/worker/login", auth=None, json=body, headers=headers)

    async def call(self, what: str, /, **words: Any) -> Any:
        answer = self.api.session.post(
            self.api.url(f"/worker/{what}"), json=words, headers=bearer(self.token)
        )
        async with answer as response:
            if response.status != 200:
                return (await response.json())["type"].rpartition(":")[2]
            return bson.decode(await response.read())["data"]


def caller(api: Api, name: str) -> Caller:
    return Caller(api, hashlib.md5(name.encode(), usedforsecurity=False).hexdigest())


@pytest.mark.row("F18")
async def test_a_challenge_is_good_once_and_only_for_what_was_proved(house: House, manager: Api) -> None:
    one, other = caller(manager, "one"), caller(manager, "other")
    word = (await manager.call("POST", "/worker/challenge", auth=None)).data["challenge"]
    assert (await one.login(challenge=word)).status == 200

    replayed = await other.login(challenge=word)
    assert (replayed.status, "used before" in replayed.body["detail"]) == (401, True)
    forged = await other.login(challenge=word[:-1] + ("0" if word[-1] != "0" else "1"))
    assert (forged.status, "not ours" in forged.body["detail"]) == (401, True)
    expired = "1000.abc." + handshake._keyed(SECRET, "challenge", "1000.abc")
    assert (await other.login(challenge=expired)).status == 401

    # What a proof covers cannot be changed on the way: here the worker's namespaces.
    word = (await manager.call("POST", "/worker/challenge", auth=None)).data["challenge"]
    other.token = handshake.make_token(other.owner)
    said: dict[str, Any] = {
        "owner": other.owner,
        "name": "hand@here",
        "hostname": "here",
        "pid": 1,
        "namespaces": ["A"],
    }
    said["kind"] = {"type": "inprocess"}
    said["token"] = handshake.fingerprint(other.token)
    body = {**said, "challenge": word, "proof": handshake.worker_proof(SECRET, word, said)}
    changed = {**body, "namespaces": ["B"]}
    assert (await manager.call("POST", "/worker/login", auth=None, json=changed)).status == 401
    assert [row["_id"] for row in await house.registry.list()] == [one.owner]
    assert (await manager.call("POST", "/worker/login", auth=None, json=body)).status == 200


async def test_nobody_takes_the_id_of_another_worker(house: House, manager: Api) -> None:
    """Whoever knows the secret, too; the same worker may sign in again with its own token."""
    one = caller(manager, "one")
    assert (await one.login()).status == 200
    assert (await one.login()).status == 200
    thief = Caller(manager, one.owner)

    assert (await thief.login()).status == 401
    assert await thief.call("running") == "unauthenticated"
    assert await one.call("running") == []


async def test_a_worker_writes_its_own_jobs_and_no_others(house: House, manager: Api) -> None:
    """Foreign jobs and leases are refused, and so is a job of a namespace that it does not serve."""
    one, other = caller(manager, "one"), caller(manager, "other")
    for each in (one, other):
        await each.login()
        await each.call("register", slots=1, jobs=["tests.Job"], version="1")
    mine, foreign = await house.enqueue("x", name="tests.Job"), await house.enqueue("x", name="tests.Job")
    elsewhere = await house.queue.enqueue(
        make_order({"_id": "tests.Job", "namespace": "other", "unique": False}, {}, args_cap=1000)
    )
    words = {"limit": 1, "rooms": {}, "forced": False, "awaited": False}
    (held,), (theirs,) = await one.call("claim", **words), await other.call("claim", **words)
    assert {held["_id"], theirs["_id"]} == {mine, foreign}
    assert await one.call("claim", **words) == []

    outcome = {"kind": "complete", "result": 1, "log_seq": 0}
    lease, stolen = held["lease"]["id"], theirs["lease"]["id"]
    for job_id, lease_id in (
        (theirs["_id"], stolen),  # held by another worker, its lease known
        (theirs["_id"], lease),
        (held["_id"], stolen),
        (held["_id"], "made up"),
        (elsewhere.id, lease),
        (ObjectId(), lease),
    ):
        ids = {"job_id": str(job_id), "lease_id": lease_id}
        for what, more in (
            ("start", {"pid": 1}),
            ("progress", {"value": 0.5, "message": "x"}),
            ("flag", {"what": "wall", "reason": "x"}),
            ("release", {"reason": "x", "delay": 0, "evicted": 0}),
            ("finish", outcome),
            ("log", {"hostname": "h", "lines": [[1, 0.0, "INFO", "x", "log", None]]}),
            ("enqueue", {"name": "tests.Job", "args": {}, "number": 0, "hostname": "h"}),
            ("call", {"name": "tests.Job", "args": {}, "number": 0, "hostname": "h"}),
            ("kill", {"called": str(foreign)}),
        ):
            assert await one.call(what, **ids, **more) == "lease_lost", (what, ids)

    ids = {"job_id": str(held["_id"]), "lease_id": lease}
    assert (await one.call("start", **ids, pid=7))["started_at"]
    assert await one.call("kill", **ids, called=str(theirs["_id"])) == "lease_lost"
    assert await one.call("ended", ids=[str(theirs["_id"]), str(held["_id"]), "x"]) == {}
    assert (await one.call("finish", **ids, **outcome))["state"] == "complete"
    again = await one.call("finish", **ids, kind="failed", exception="late", traceback=[], log_seq=0)
    assert (again["state"], again["result"]) == ("complete", 1)  # an answer that was lost: nothing is written
    assert await other.call("finish", **ids, **outcome) == "lease_lost"


async def test_a_worker_publishes_in_its_own_namespaces_only(house: House, manager: Api) -> None:
    one = caller(manager, "one")
    await one.login()

    assert await one.call("publish", entries=[{"_id": "A:f", "namespace": "A"}]) == "bad_request"
    assert await one.call("publish", entries=[{"_id": "DEFAULT:f", "namespace": "DEFAULT"}]) is None
    assert [entry["_id"] for entry in await Catalogue(house.database).all()] == ["DEFAULT:f"]


async def test_without_a_secret_no_worker_is_let_in(settings: Settings, database: Database) -> None:
    async with serving(replace(settings, worker_secret=None), database) as api:
        answer = await api.call("POST", "/worker/challenge", auth=None)

    assert (answer.status, "CORE4_WORKER_SECRET" in answer.body["detail"]) == (403, True)


async def test_a_dead_worker_is_told_and_comes_back_as_another(house: House, manager: Api) -> None:
    """As with a database: its jobs are taken from it, and nothing that it does late is written."""
    async with remote_worker(house.settings, manager.root) as running:
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        job_id = await house.enqueue("sleep", value=60)
        await house.reach(job_id, State.RUNNING)
        before = running.worker.owner
        workers = house.database.collection("sys." + "worker")
        await workers.update_one({"_id": before.id}, {"$set": {"state": "dead"}})

        async def again() -> bool:
            return running.worker.owner.id != before.id and await is_up(house, running)

        await eventually_async(again, what="it has signed in as another owner")
        assert await house.registry.beat(Owner(before.id, "x", "x", 1), running=0) is False


@pytest.mark.row("F19", "F47")
async def test_a_task_awaits_another_over_http_with_one_slot(house: House, manager: Api) -> None:
    """A pipeline with prerequisites of prerequisites; jobs of other namespaces are left alone."""
    own = replace(house.settings, namespaces=("CALL",), slots=1)
    async with remote_worker(own, manager.root, CALLING) as running:
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        floor = Floor(house, Path())
        elsewhere = await house.enqueue("answer")
        job = await floor.ended(await floor.submit("CALL:pipeline"))

        assert job.document["result"] == [{"computed": 0}, {"computed": 1}]
        assert (await house.queue.store.get(elsewhere)).state is State.PENDING


async def test_it_works_through_a_restart_of_the_manager(
    house: House, settings: Settings, database: Database, queue: JobQueue
) -> None:
    """What was claimed before goes on and is finished after; the task is there without a restart."""
    async with serving(settings, database) as first:
        running_worker = remote_worker(settings, first.root)
        running = await running_worker.__aenter__()
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        owner = running.worker.owner
        job_id = await house.enqueue("sleep", value=1.5)
        await house.reach(job_id, State.RUNNING)
    try:
        async with serving(settings, database, port=first.port):
            assert (await house.reach(job_id)).state is State.COMPLETE
            other = await house.enqueue("answer", value=2)
            assert (await house.reach(other)).document["result"] == 2
            assert running.worker.owner == owner
            running.stop.set()
            running.halt.set()
            await running.task
    finally:
        await running_worker.__aexit__(None, None, None)


# ---------------------------------------------------------------------- strangers, and workers that lie


async def test_wrong_proofs_lock_out_their_address_and_nobody_else(
    settings: Settings, database: Database
) -> None:
    """Whatever a stranger guesses, also at names that look like those of workers."""
    async with serving(replace(settings, trusted_proxies=("127.0.0.1/32",)), database) as api:
        stranger, worker = "192.0.2.1", "198.51.100.7"
        answers = [await caller(api, f"s{n}").login("wrong secret", source=stranger) for n in range(11)]
        for name in ("", f"worker {worker}", f"WORKER {worker}"):
            for n in range(11):
                headers = {"X-Forwarded-For": f"192.0.2.{n + 2}"}
                await api.call("GET", "/profile", auth=(name, "wrong"), headers=headers)

        assert [answer.status for answer in answers] == [401] * 10 + [429]
        assert (await caller(api, "one").login(source=worker)).status == 200


def entry_of(name: str, **more: Any) -> dict[str, Any]:
    """What a worker may publish."""

    def execute(value: int, rows: list[str] | None = None) -> None: ...

    return {"_id": name, "namespace": "NSA", "schema": schema(execute), "options": {}, **more}


async def test_a_worker_changes_no_job_of_another_namespace(house: House, manager: Api) -> None:
    """Not by leaving the namespace out, nor by a name, a hook, a schedule or a file of others."""
    catalogue, schedules = Catalogue(house.database), ScheduleStore(house.database)
    theirs = entry_of("hostile.Secret", namespace="DEFAULT", file="theirs.py", schedule="@daily")
    await catalogue.publish([theirs, entry_of("CIA:plot", namespace="CIA")])
    await schedules.publish(declared(theirs))
    before = await catalogue.all(), (await schedules.get("hostile.Secret")).document
    one = caller(manager, "one")
    await one.login(namespaces=["NSA"])

    unnamed = {"_id": "hostile.Secret", "options": {"priority": 1000}, "run_after": ["NSA:spy"]}
    for bad in (
        unnamed,
        {"_id": "hostile.New"},
        entry_of("hostile.Secret"),
        entry_of("CIA:new"),
        entry_of("NSA:x", namespace="CIA"),
        entry_of("NSA:x", run_after=["CIA:plot"]),
        entry_of("NSA:x", on_failure="CIA:plot"),
        entry_of("NSA:x", schedule={"expression": "@daily", "name": "hostile.Secret"}),
        entry_of("NSA:x", schedule={"expression": "@daily", "namespace": "CIA"}),
    ):
        assert await one.call("publish", entries=[entry_of("NSA:good"), bad]) == "bad_request", bad
    assert (await catalogue.all(), (await schedules.get("hostile.Secret")).document) == before

    assert await one.call("publish", entries=[entry_of("NSA:good", file="theirs.py")]) is None
    assert (await schedules.get("hostile.Secret")).document == before[1]
    assert [row["_id"] for row in await catalogue.all()] == ["CIA:plot", "NSA:good", "hostile.Secret"]


async def test_what_is_published_replaces_what_was(house: House) -> None:
    """A field that its author has dropped is gone; when it was first seen stays."""
    catalogue = Catalogue(house.database)
    await catalogue.publish([entry_of("NSA:x", run_after=["NSA:y"])])
    first = await catalogue.get("NSA:x") or {}
    await catalogue.publish([entry_of("NSA:x")])
    second = await catalogue.get("NSA:x") or {}

    assert "run_after" in first
    assert set(first) - set(second) == {"run_after", "hooked"} & set(first)
    assert second["created_at"] == first["created_at"]
    assert second["updated_at"] >= first["updated_at"]


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [], "additionalProperties": False}


@pytest.mark.parametrize(
    "more",
    [
        {"schema": {"$ref": "http://127.0.0.1:9/schema"}},
        {"schema": object_of(value={"$ref": "http://127.0.0.1:9/schema"})},
        {"schema": object_of(value={"anyOf": [{"$dynamicRef": "#x"}]})},
        {"schema": object_of(value={"pattern": "(a+)+$"})},
        {"schema": object_of(value={"type": "array", "items": {"pattern": "(a+)+$"}})},
        {"schema": {**object_of(), "additionalProperties": {"patternProperties": {"(a+)+$": {}}}}},
        {"schema": object_of(value={"type": "nonsense"})},
        {"schema": object_of(value=1)},
        {"schema": {"properties": []}},
        {"schema": [1]},
        {"schema": {"type": "object", "required": [[]]}},
        {"options": {"priority": "high"}},
        {"options": {"made_up": 1}},
        {"options": [1]},
        {"run_before": "NSA:y"},
        {"run_before": [1]},
        {"on_failure": 1},
        {"default_args": [1]},
        {"default_args": {"value": 2**64}},
        {"schedule": [1]},
        {"schedule": {"expression": 1}},
        {"schedule": "not at all"},
        {"unique": "perhaps"},
        {"doc": "\ud800"},
        {"tag": [1]},
        {"kind": "other"},
        {"made_up": 1},
        {"": 1},
        {"$set": {"x": 1}},
        {"created_at": 1},
    ],
    ids=str,
)
async def test_an_entry_that_would_break_the_catalogue_is_refused(
    house: House, manager: Api, more: dict[str, Any]
) -> None:
    one = caller(manager, "one")
    await one.login(namespaces=["NSA"])

    assert await one.call("publish", entries=[entry_of("NSA:x", **more)]) == "bad_request"
    assert await Catalogue(house.database).all() == []


async def test_no_schema_makes_the_manager_fetch_an_address(
    house: House, users: UserStore, manager: Api
) -> None:
    """One that is stored already, too: what it names is refused, nobody is asked for it."""
    asked: list[str] = []

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append("a connection")
        writer.close()

    server = await asyncio.start_server(heard, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/schema"
    await Catalogue(house.database).publish([entry_of("NSA:x", schema={"$ref": url})])
    async with server:
        answer = await manager.call("POST", "/job", json={"qual_name": "NSA:x", "args": {}, "follow": False})

    assert (answer.status, asked) == (422, [])


async def held_by(one: Caller, house: House) -> tuple[ObjectId, dict[str, str], int]:
    """A job that it has started: its id, the words that name it, and its fence."""
    job_id = await house.enqueue("x", name="tests.Job")
    (held,) = await one.call("claim", limit=1, rooms={}, forced=False, awaited=False)
    ids = {"job_id": str(job_id), "lease_id": held["lease"]["id"]}
    started = await one.call("start", **ids, pid=7)
    return job_id, ids, started["fence"]


@pytest.mark.parametrize("end", ["down", "dead"])
async def test_a_token_ends_with_its_worker(house: House, manager: Api, end: str) -> None:
    """What is left to it: to give back, or to end, what it held."""
    one = caller(manager, "one")
    await one.login()
    await one.call("register", slots=3, jobs=["tests.Job"], version="1")
    job_id, ids, fence = await held_by(one, house)
    _, second, _ = await held_by(one, house)
    if end == "down":
        assert await one.call("leave") is None
    else:
        assert await house.registry.condemn(one.owner, "gone")

    child = {"name": "tests.Job", "args": {}, "number": 0, "hostname": "h"}
    refused: dict[str, dict[str, Any]] = {
        "register": {"slots": 1, "jobs": [], "version": "1"},
        "publish": {"entries": []},
        "serve": {"jobs": ["tests.Other"]},
        "controls": {},
        "wait": {"seconds": 0},
        "claim": {"limit": 1, "rooms": {}, "forced": False, "awaited": False},
        "start": {**ids, "pid": 1},
        "progress": {**ids, "value": 0.5, "message": "x"},
        "flag": {**ids, "what": "wall", "reason": "x"},
        "enqueue": {**ids, **child},
        "call": {**ids, **child},
        "ended": {"ids": []},
        "kill": {**ids, "called": str(job_id)},
    }
    for what, words in refused.items():
        assert await one.call(what, **words) == "unauthenticated", what

    assert await one.call("beat", running=0, draining=False, paused=False) is False
    assert len(await one.call("running")) == 2
    line = [first_seq(fence), 1.0, "INFO", "the last", "log", None]
    assert await one.call("log", **ids, hostname="h", lines=[line]) is None
    done = await one.call("finish", **ids, kind="complete", result=1, log_seq=first_seq(fence))
    assert done["state"] == "complete"
    assert (await one.call("release", **second, reason="x", delay=0, evicted=0))["state"] == "pending"
    assert await one.call("leave") is None
    assert [row["message"] for row in await house.lines(job_id)] == ["the last"]


async def test_a_worker_that_is_buried_while_it_loads_comes_back_as_another(
    house: House, manager: Api, tmp_path: Path
) -> None:
    """It has not even announced itself, so there is no beat yet that would tell it."""
    gate, jobs = tmp_path / "gate", tmp_path / "late.py"
    wait = f"while not os.path.exists({str(gate)!r}):\n    time.sleep(0.02)\n"
    job = "class Late(CoreJob):\n    author = 'me'\n\n    def execute(self) -> int:\n        return 3\n"
    jobs.write_text(f"import os\nimport time\n\nfrom core4 import CoreJob\n\n{wait}\n\n{job}")
    async with remote_worker(house.settings, manager.root, str(jobs)) as running:
        before = running.worker.owner.id
        await eventually_async(lambda: house.registry.condemn(before, "silent"), what="it has signed in")
        gate.touch()
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        assert running.worker.owner.id != before
        job_id = await house.queue.enqueue(JobOrder(name="late.Late", args={}, username="me"))
        assert (await house.reach(job_id.id)).document["result"] == 3


@pytest.mark.parametrize(
    "line",
    [
        [1, "late", "INFO", "x", "log", None],
        [1, 1e300, "INFO", "x", "log", None],
        [1, -1, "INFO", "x", "log", None],
        [1, True, "INFO", "x", "log", None],
        [2**40, 1.0, "INFO", "x", "log", None],
        [-(2**33), 1.0, "INFO", "x", "log", None],
        ["1", 1.0, "INFO", "x", "log", None],
        [1, 1.0, "LOUD", "x", "log", None],
        [1, 1.0, ["INFO"], "x", "log", None],
        [1, 1.0, "INFO", 5, "log", None],
        [1, 1.0, "INFO", "x", "elsewhere", None],
        [1, 1.0, "INFO", "x", "log", 7],
        [1, 1.0, "INFO", "x", "log", {"info": 1, "text": []}],
        [1, 1.0, "INFO", "x", "log", {"info": "x", "text": 1}],
        [1, 1.0, "INFO", "x", "log", {"info": "x", "text": [None]}],
        [1, 1.0],
        "line",
        {"seq": 1},
        None,
    ],
    ids=str,
)
async def test_a_line_that_nobody_could_read_is_refused(house: House, manager: Api, line: Any) -> None:
    """Numbers in the row count from the first that the attempt may write."""
    one = caller(manager, "one")
    await one.login()
    await one.call("register", slots=1, jobs=["tests.Job"], version="1")
    job_id, ids, fence = await held_by(one, house)
    base = first_seq(fence)
    if isinstance(line, list) and isinstance(line[0], int):
        line = [base + line[0], *line[1:]]
    good = [base, 1.0, "INFO", "good", "stdout", {"info": "x", "text": ["y"]}]

    assert await one.call("log", **ids, hostname="h", lines=[good, line]) == "bad_request"
    assert await one.call("log", **ids, hostname="h", lines=[good, good]) == "bad_request"
    assert await one.call("log", **ids, hostname="h", lines=[good]) is None
    assert await house.messages(job_id, "stdout") == ["good"]


async def test_a_log_with_an_odd_line_can_be_read(house: House) -> None:
    """One that is stored already must not hide all others."""
    job = await house.queue.store.get(await house.enqueue("x"))
    base = first_seq(job.fence)
    odd: list[Any] = ["late", 1e300, -1e300, None]
    lines = [Line(base + n, epoch, "INFO", f"m{n}") for n, epoch in enumerate([1.0, *odd, 2.0])]
    await house.logs.append(job, "here", lines)

    page = await house.logs.page(job.id)
    assert [row["message"] for row in page.rows] == [f"m{n}" for n in range(6)]
    assert [row["epoch"] for row in await house.lines(job.id)] == [1.0, 0.0, 0.0, 0.0, 0.0, 2.0]


async def test_the_end_of_an_attempt_is_checked(house: House) -> None:
    """The cap on results and the numbers of lines are the manager's to keep, whatever a worker says."""
    cap = 1000
    async with serving(replace(house.settings, result_cap=cap), house.database) as api:
        one = caller(api, "one")
        await one.login()
        await one.call("register", slots=1, jobs=["tests.Job"], version="1")
        _, ids, fence = await held_by(one, house)
        good = {**ids, "kind": "complete", "result": 1, "log_seq": first_seq(fence)}

        assert await one.call("finish", **{**good, "result": "x" * (cap - 1)}) == "too_large"
        for bad in ({"log_seq": 2**60}, {"log_seq": 2**70}, {"log_seq": -1}, {"traceback": [1, None]}):
            assert await one.call("finish", **{**good, **bad}) == "bad_request", bad
        # As the worker itself counts: two bytes each, and the quotes.
        most = {**good, "result": "\u00e9" * ((cap - 2) // 2)}
        assert (await one.call("finish", **most))["state"] == "complete"


async def test_values_that_no_database_takes_are_a_bad_request(house: House, manager: Api) -> None:
    """Numbers of more than 64 bits, half characters, times beyond all years."""
    one = caller(manager, "one")
    assert (await one.login(pid=2**70)).status == 400
    assert (await one.login(pid=-1)).status == 400
    await one.login()
    await one.call("register", slots=1, jobs=["tests.Job"], version="1")
    claim = {"limit": 1, "rooms": {}, "forced": False, "awaited": False}
    beat = {"running": 0, "draining": False, "paused": False, "gate": None}
    for what, words in (
        ("claim", {**claim, "rooms": {"\ud800": 0}}),
        ("claim", {**claim, "rooms": {"tests.Job": -1}}),
        ("beat", {**beat, "running": 2**70}),
        ("beat", {**beat, "gate": "\ud800"}),
        ("serve", {"jobs": ["\ud800"]}),
        ("register", {"slots": 1, "jobs": ["\ud800"], "version": "1"}),
    ):
        assert await one.call(what, **words) == "bad_request", (what, words)
    _, ids, _ = await held_by(one, house)
    child = {**ids, "name": "tests.Job", "args": {}, "number": 0, "hostname": "h"}
    for what, words in (
        ("start", {**ids, "pid": 2**70}),
        ("enqueue", {**child, "number": 2**70}),
        ("enqueue", {**child, "name": "\ud800"}),
        ("call", {**child, "number": 2**70}),
        ("call", {**child, "name": "\ud800"}),
        ("release", {**ids, "reason": "x", "delay": 1e18, "evicted": 0}),
        ("release", {**ids, "reason": "x", "delay": -1, "evicted": 0}),
        ("release", {**ids, "reason": "x", "delay": 0, "evicted": 2**70}),
    ):
        assert await one.call(what, **words) == "bad_request", (what, words)


async def test_a_worker_of_another_namespace_than_its_jobs_runs_what_is_sent_there(
    house: House, manager: Api
) -> None:
    """As with a database it knows them; it only publishes none, which is others' to do."""
    own = replace(house.settings, namespaces=("REM",))
    async with remote_worker(own, manager.root) as running:
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        assert await Catalogue(house.database).all() == []
        order = JobOrder(name=UNRULY_JOB, args={"what": "answer", "value": 4}, namespace="REM", username="me")
        job = await house.queue.enqueue(order)
        assert (await house.reach(job.id)).document["result"] == 4


async def test_a_worker_whose_jobs_are_refused_says_why_and_ends(house: House, manager: Api) -> None:
    """The reason is one line, and no traceback of ours."""
    await Catalogue(house.database).publish([entry_of(UNRULY_JOB, namespace="CIA")])
    code, output = await ended_program(house, manager, CORE4_WORKER_SECRET=SECRET)

    assert code == 1
    assert f"[{UNRULY_JOB}] is a job of namespace CIA" in output
    assert "Traceback" not in output


@pytest.mark.row("F18")
@pytest.mark.parametrize(
    ("own", "status", "told"),
    [
        ({"CORE4_WORKER_SECRET": "abcd12345"}, 1, "does not know the secret of this manager"),
        ({}, 2, "--manager needs CORE4_WORKER_SECRET"),
    ],
    ids=["wrong", "none"],
)
async def test_a_program_without_the_secret_says_so_and_ends(
    house: House, manager: Api, own: dict[str, str], status: int, told: str
) -> None:
    code, output = await ended_program(house, manager, **own)

    assert code == status
    assert told in output
    assert "Traceback" not in output
    assert await house.registry.list() == []


async def ended_program(house: House, manager: Api, **own: str) -> tuple[int | None, str]:
    """Exit code and output of `core4 worker` for this manager, which ends by itself."""
    environ = {**clean_environ(), **FAST, "CORE4_HOME": str(house.settings.home), **own}
    process = await asyncio.create_subprocess_exec(
        *(program("core4"), "worker", UNRULY, "--manager", manager.root),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environ,
    )
    async with asyncio.timeout(100):
        output = (await process.communicate())[0].decode()
    return process.returncode, output


@pytest.mark.parametrize("how", ["stop", "hard", "halt"])
async def test_operators_end_a_worker_over_http(house: House, manager: Api, how: str) -> None:
    """As with a database: what runs may end, unless it is told to be hard; then it goes back in line."""
    controls = ControlStore(house.database)
    await controls.prepare()
    own = replace(house.settings, drain=60.0)
    async with remote_worker(own, manager.root) as running:
        await eventually_async(lambda: is_up(house, running), what="it is registered")
        job_id = await house.enqueue("sleep", value=60 if how == "hard" else 1.5)
        await house.reach(job_id, State.RUNNING)
        if how == "halt":
            await controls.halt(by="ann")
        else:
            await controls.stop(running.worker.owner.id, by="ann", hard=how == "hard")
        async with asyncio.timeout(40):
            await running.task

    rows = {row["_id"]: row["state"] for row in await house.registry.list()}
    assert rows[running.worker.owner.id] == "down"
    ended = State.PENDING if how == "hard" else State.COMPLETE
    assert (await house.queue.store.get(job_id)).state is ended


async def test_an_end_whose_answer_was_lost_is_told_again_and_settled(house: House, manager: Api) -> None:
    """A manager that died between the two writes has left the job in line, and there may be no sweeper."""
    one = caller(manager, "one")
    await one.login()
    await one.call("register", slots=1, jobs=["tests.Job"], version="1")
    job_id, ids, fence = await held_by(one, house)
    job = await house.queue.store.get(job_id)
    lease = transitions.lease_of(job)
    outcome = Outcome.complete(1)
    await house.queue.store.held(
        job, lease, lambda seen: transitions.finish(seen, lease, outcome, first_seq(fence))
    )
    assert await house.queue.store.journaled({"state": State.COMPLETE.value}) == 0

    again = await one.call("finish", **ids, kind="complete", result=1, log_seq=first_seq(fence))
    assert again["state"] == "complete"
    assert await house.queue.store.journaled({"state": State.COMPLETE.value}) == 1


async def test_an_api_that_lets_workers_in_looks_after_the_queue(
    manager: Api, runner: Runner, queue: JobQueue
) -> None:
    """Nobody else has a database: what was left half way is done, a dead worker's job goes back."""
    await runner.up("tests.Job")
    moving = await queue.enqueue(order(args={"word": "moving"}))
    orphan = await queue.enqueue(order(args={"word": "orphan"}))
    attempt = await runner.start()
    assert attempt.job.id == moving.id
    with unsettled(queue):
        await attempt.finish()
    await runner.start()  # and dies

    async def looked_after() -> bool:
        moved, back = await queue.store.get(moving.id), await queue.store.get(orphan.id)
        return moved.journal and back.state is State.PENDING and back.lease is None

    await eventually_async(looked_after, 60)
