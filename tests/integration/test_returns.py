"""Return queues on a real server: the end of a job is put into them once, and taken out once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from core4 import chains, cli, returns
from core4.client import Client, QueueTimeout
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job, derived_id, utcnow
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.returns import RETURN, Returns
from core4.worker.cleaner import Cleaner
from core4.worker.forward import Forward
from tests.helpers import ADMIN, eventually_async, unsettled
from tests.integration.driver import Answer, Api, Runner
from tests.integration.test_chains import order, ran, rest, spec
from tests.integration.test_queues import owner
from tests.memory_broker import MemoryBroker
from tests.rabbit import Rabbit, taken

TWO = {"return_queues": ["a", "b"]}


@pytest.fixture
def store(database: Database) -> Returns:
    """The records of the test's database."""
    return Returns(database)


async def held(store: Returns, queue: str) -> Sequence[Mapping[str, Any]]:
    return await store.peek(queue, 100)


async def half_done(queue: JobQueue, result: Any = None) -> Job:
    """A job that has ended in a process that died at once."""
    await queue.enqueue(order(options=TWO))
    (job,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    job = await queue.start(job)
    with unsettled(queue):
        return await queue.finish(job, Outcome.complete(result), log_seq=0)


# ---------------------------------------------------------------------- what is put


@pytest.mark.row("F59")
async def test_every_end_is_put_once(queue: JobQueue, store: Returns) -> None:
    """Complete, failed for good, killed, removed, and for want of a prerequisite; nothing before the end."""
    retried = {**TWO, "attempts": 2, "error_time": 0}
    complete = await queue.enqueue(order(options=TWO))
    await ran(queue, {"n": [1]})
    failed = await queue.enqueue(order(options=retried))
    await ran(queue, fails=True)
    assert len(await held(store, "a")) == 1, "an attempt is left"
    await ran(queue, fails=True)
    killed = await queue.enqueue(order(options=TWO))
    await queue.kill(killed.id, by="ann")
    removed = await queue.enqueue(order(options=TWO))
    await queue.remove(removed.id, by="ann")
    culprit = await queue.enqueue(order())
    waiting = await queue.enqueue(order(options=TWO, dependencies=[culprit.id]))
    await queue.kill(culprit.id, by="ann")

    for name in ("a", "b"):
        rows = await held(store, name)
        assert [row["job_id"] for row in rows] == [
            job.id for job in (complete, failed, killed, removed, waiting)
        ]
        assert [row["status"] for row in rows] == ["Completed", *["Failed"] * 4]
        assert (rows[0]["result"], rows[0]["error"]) == ({"n": [1]}, None)
        states = [row["error"]["state"] for row in rows[1:]]
        assert states == ["error", "killed", "pending", "error"]
        assert rows[1]["error"]["message"] == "RuntimeError('no')"
        assert rows[4]["error"]["category"] == "DEPENDENCY"


async def test_a_follower_puts_what_its_own_task_says(queue: JobQueue, store: Returns) -> None:
    """What was asked for one job is not for those that follow from it, but for one that takes its place."""
    hooks = (spec("t:next", options={"return_queues": ["next"]}), spec("t:odd", "x", "y"))
    await queue.enqueue(order(options=TWO, run_after=["t:next", "t:odd"], hooks=hooks))
    await ran(queue)
    await rest(queue)
    stays = await queue.enqueue(order(options={"return_queues": ["again"]}, keep_stopped=True))
    await ran(queue, fails=True)
    child = await queue.restart(stays.id, by="ann", hostname="here")
    await ran(queue, 7)

    assert [row["name"] for row in await held(store, "a")] == ["t:job"]
    assert [row["name"] for row in await held(store, "next")] == ["t:next"]
    again = await held(store, "again")
    assert [(row["job_id"], row["result"]) for row in again] == [(stays.id, None), (child, 7)]


async def test_a_note_that_is_delivered_again_puts_nothing(queue: JobQueue, store: Returns) -> None:
    """However many work it off at the same time, and after the record was taken."""
    done = await half_done(queue, 5)
    assert await held(store, "a") == []
    await asyncio.gather(*(queue.outbox.settle(done) for _ in range(3)))
    assert [row["result"] for row in await held(store, "a")] == [5]
    await store.take("a", 1, by="ann", token="t")
    for note in chains.followers(done.document):
        await queue.outbox.deliver(done, note)

    assert await held(store, "a") == []
    assert len(await held(store, "b")) == 1


async def test_a_sweep_puts_what_a_dead_process_left(queue: JobQueue, store: Returns) -> None:
    done = await half_done(queue)
    await queue.outbox.sweep()

    assert [row["job_id"] for row in await held(store, "b")] == [done.id]


async def test_records_go_with_their_age_but_not_before_their_job_is_done(
    queue: JobQueue, store: Returns, database: Database, settings: Settings
) -> None:
    """Else what was taken would be put once more."""
    done = await half_done(queue)
    for note in done.outbox:
        await queue.outbox.deliver(done, note)
    await store.take("a", 1, by="ann", token="t")
    await database.collection(RETURN).update_many({}, {"$set": {"at": utcnow() - timedelta(days=8)}})
    cleaner = Cleaner(database, settings, queue)
    assert (await cleaner.step())["return"] == 0
    await queue.outbox.sweep()

    assert await held(store, "a") == []
    assert (await cleaner.step())["return"] == 2
    assert await held(store, "b") == []
    assert (await Cleaner(database, replace(settings, keep_return_days=0), queue).step())["return"] == 0


# ---------------------------------------------------------------------- what is taken


async def fill(store: Returns, count: int, queue: str = "q") -> None:
    for n in range(count):
        job = {"_id": ObjectId(), "queue": queue, "job_id": ObjectId(), "name": "t:job", "result": n}
        await store.put(job)


async def test_each_record_is_taken_by_one(store: Returns) -> None:
    await fill(store, 40)
    taken = await asyncio.gather(*(store.take("q", 9, by="ann", token=f"t{n}") for n in range(6)))

    assert sorted(row["result"] for some in taken for row in some) == list(range(40))
    assert await store.waiting("q", 100) == 0


async def test_the_same_call_gets_the_same_records(store: Returns) -> None:
    await fill(store, 3)
    first = await store.take("q", 2, by="ann", token="t")

    assert [row["result"] for row in first] == [0, 1]
    assert await store.taken("q", by="ann", token="t") == first
    assert await store.taken("q", by="bob", token="t") == []
    assert await store.taken("other", by="ann", token="t") == []


async def test_room_is_for_one_record_at_least(store: Returns) -> None:
    await fill(store, 3)

    assert len(await store.take("q", 3, by="ann", token="t", room=1)) == 1
    assert len(await store.take("q", 3, by="ann", token="u")) == 2


async def test_a_reset_empties_one_queue(store: Returns) -> None:
    await fill(store, 3)
    await fill(store, 1, "other")

    assert await store.reset("q", by="ann") == 3
    assert (await store.waiting("q", 9), await store.waiting("other", 9)) == (0, 1)


# ---------------------------------------------------------------------- over HTTP


async def enqueue(api: Api, name: str = "tests.Job", **more: Any) -> Answer:
    return await api.call("POST", "/job", json={"qual_name": name, "follow": False, **more})


@pytest.mark.row("F59")
async def test_a_client_waits_for_a_queue(api: Api, runner: Runner) -> None:
    """It looks, waits, pulls once and finds nothing any more."""
    job_id = (await enqueue(api, return_queues="done")).data
    attempt = await runner.start()
    early = await api.call("POST", "/return/pull/done", json={"timeout": 0.1})
    pull = asyncio.create_task(api.call("POST", "/return/pull/done", json={"timeout": 50}))

    async def waits() -> bool:
        return api.waiting("done") > 0  # type: ignore[arg-type]

    await eventually_async(waits)
    await attempt.finish(Outcome.complete([1]))
    found = await pull

    assert (early.status, early.body["data"]) == (202, [])
    assert found.status == 200
    (record,) = found.data
    assert (record["job_id"], record["queue"], record["result"]) == (job_id, "done", [1])
    assert (await api.call("GET", "/return/done")).body["waiting"] == 0
    assert (await api.call("POST", "/return/pull/done", json={"timeout": 0})).status == 202


async def test_a_queue_is_looked_at_and_reset(api: Api, runner: Runner) -> None:
    for n in range(3):
        await enqueue(api, return_queues=["done"])
        await (await runner.start()).finish(Outcome.complete(n))
    look = await api.call("GET", "/return/done?limit=2")
    enough = await api.call("POST", "/return/pull/done", json={"size": 9, "least": 4, "timeout": 0})
    again = [
        await api.call("POST", "/return/pull/done", json={"size": 2, "timeout": 0, "token": "t"})
        for _ in "ab"
    ]

    assert ([row["result"] for row in look.data], look.body["waiting"]) == ([0, 1], 3)
    assert (enough.status, enough.body["data"]) == (202, [])
    assert [[row["result"] for row in each.data] for each in again] == [[0, 1], [0, 1]]
    assert (await api.call("PUT", "/return/reset/done")).data == 1
    assert (await api.call("GET", "/return/done")).data == []


@pytest.mark.parametrize("names", ["no good", [""], ["amq.x"], ["a"] * 11, {"a": 1}, 5])
async def test_names_of_queues_are_checked(api: Api, runner: Runner, names: Any) -> None:
    assert (await enqueue(api, return_queues=names)).status == 400
    assert await api.queue.store.counts() == {}


async def test_only_records_of_ones_own_jobs_are_seen(api: Api, runner: Runner) -> None:
    await runner.publish("tests.Other")
    await api.users.add("ann", "secret", allow=["job://tests.Job/x"])
    await api.users.add("eve", "secret", allow=["job://tests.Job/r", "job://tests.Other/x"])
    await enqueue(api, return_queues="done")
    await (await runner.start()).finish(Outcome.complete(1))

    for path in ("/return/done", "/return/pull/done?timeout=0", "/return/reset/done"):
        method = {"pull": "POST", "reset": "PUT"}.get(path.split("/")[2], "GET")
        answer = await api.call(method, path, auth=("eve", "secret"))
        assert answer.body["data"] in ([], 0)
    assert len((await api.call("POST", "/return/pull/done", auth=("ann", "secret"))).data) == 1


@pytest.mark.row("F59")
async def test_the_client_waits_for_queues(api: Api, runner: Runner) -> None:
    """Ten jobs that put their ends into two queues: ten records, and both are empty then."""

    def enqueue_all(client: Client) -> list[str]:
        return [client.enqueue("tests.Job", {"n": n}, return_queues=["one", "two"]) for n in range(10)]

    with Client(api.root, ADMIN) as client:
        ids = await asyncio.to_thread(enqueue_all, client)
        waiting = asyncio.create_task(asyncio.to_thread(client.wait_queues, ["one", "two"], 10, 60.0))
        for n in range(10):
            await (await runner.start()).finish(Outcome.complete(n))
        found = await waiting
        left = [await asyncio.to_thread(client.show_queue, name) for name in ("one", "two")]
        with pytest.raises(QueueTimeout, match="0 of 1 records"):
            await asyncio.to_thread(client.wait_queue, "one", timeout=0.1)

    assert [row["job_id"] for row in found] == ids
    assert [row["result"] for row in found] == list(range(10))
    assert left == [[], []]


async def test_the_command_line_pulls(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CORE4_URL", api.root)
    monkeypatch.setenv("CORE4_USER", ADMIN[0])
    monkeypatch.setenv("CORE4_PASSWORD", ADMIN[1])

    async def core4(*words: str) -> int:
        return await asyncio.to_thread(cli.main, words)

    assert await core4("return", "pull", "done") == 5
    for n in range(3):
        assert await core4("job", "enqueue", "tests.Job", f"n={n}", "--return-queue", "done") == 0
        await (await runner.start()).finish(Outcome.complete(n))
    capsys.readouterr()
    assert await core4("return", "show", "done", "-o", "json") == 0
    assert [row["result"] for row in json.loads(capsys.readouterr().out)] == [0, 1, 2]
    assert await core4("return", "pull", "done", "--size", "2", "--wait") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["result"] for line in lines] == [0, 1]
    assert await core4("return", "reset", "done") == 0
    assert capsys.readouterr().out == "1\n"


# ---------------------------------------------------------------------- to a broker


@pytest.mark.row("F59")
async def test_records_are_sent_on_to_rabbitmq(
    rabbit: Rabbit, queue: JobQueue, store: Returns, database: Database, settings: Settings
) -> None:
    """Each once, however many workers do so; the list in the database has them, too."""
    name = f"R{ObjectId()}"
    jobs = [await queue.enqueue(order(options={"return_queues": [name]})) for _ in range(5)]
    for n in range(5):
        await ran(queue, n)
    workers = [asyncio.create_task(Forward(database, settings, rabbit.url).run()) for _ in range(3)]

    async def all_sent() -> bool:
        return await database.collection(RETURN).count_documents({"forward": {"$exists": True}}) == 0

    await eventually_async(all_sent)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    letters = await taken(rabbit.url, name)

    assert sorted(json.loads(letter.body)["result"] for letter in letters) == list(range(5))
    assert {letter.message_id for letter in letters} == {str(derived_id(job.id, "return", 0)) for job in jobs}
    assert await store.waiting(name, 9) == 5


async def test_what_a_dead_sender_took_on_is_sent_later(
    queue: JobQueue, store: Returns, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.enqueue(order(options={"return_queues": ["q"]}))
    await ran(queue)
    (record,) = await store.unsent(9)
    assert await store.reserve(record)
    assert not await store.reserve(record), "somebody else read it at the same time"
    broker = MemoryBroker("memory://q")
    forward = Forward(database, settings, "amqp://nowhere")
    assert await forward.step(broker) == 0
    later = utcnow() + returns.RESEND
    monkeypatch.setattr(returns, "utcnow", lambda: later)

    assert await forward.step(broker) == 1
    assert await forward.step(broker) == 0
    assert [letter.message_id for letter in broker.letters["q"]] == [str(record["_id"])]
