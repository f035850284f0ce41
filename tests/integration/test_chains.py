"""Jobs that hang together, on a real server: prerequisites, followers, and processes that die in between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from bson import ObjectId

from core4 import chains
from core4.catalogue import Catalogue
from core4.children import call_child
from core4.database import Database
from core4.errors import BadArguments
from core4.jobs import Job, JobOrder, derived_id, utcnow
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.states import State
from core4.store import JOURNAL, QUEUE
from tests.helpers import unsettled
from tests.integration.test_queues import owner, stored

pytestmark = pytest.mark.asyncio


def spec(name: str, *parameters: str, required: int | None = None, **more: Any) -> dict[str, Any]:
    """What a job knows of a task that may follow from it."""
    needed = parameters if required is None else parameters[:required]
    takes = {"parameters": list(parameters), "required": list(needed), "more": False}
    return {"name": name, "namespace": "DEFAULT", "options": {}, **takes, "keep_stopped": False, **more}


def order(name: str = "t:job", **more: Any) -> JobOrder:
    fields = {"name": name, "username": "ann", "unique": False, "keep_stopped": False}
    return JobOrder(**{**fields, **more})


async def ran(queue: JobQueue, result: Any = None, *, fails: bool = False) -> Job:
    """The first job in line, claimed, started and ended."""
    (job,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    job = await queue.start(job)
    outcome = Outcome.failed("RuntimeError('no')", []) if fails else Outcome.complete(result)
    return await queue.finish(job, outcome, log_seq=0)


async def rest(queue: JobQueue) -> list[str]:
    """The names of all that is left, in the order in which it runs."""
    names = []
    while found := await queue.claims.claim(owner(), namespaces=["DEFAULT"]):
        names.append(found[0].name)
        await queue.finish(await queue.start(found[0]), Outcome.complete(None), log_seq=0)
    return names


async def state_of(queue: JobQueue, job_id: ObjectId) -> State:
    return (await queue.store.get(job_id)).state


async def all_of(database: Database, **where: Any) -> list[Mapping[str, Any]]:
    return [
        row for name in (QUEUE, JOURNAL) for row in await database.collection(name).find(where).to_list(None)
    ]


# ---------------------------------------------------------------------- existing jobs


async def test_a_job_waits_until_all_its_dependencies_have_completed(queue: JobQueue) -> None:
    first = await queue.enqueue(order("t:first"))
    second = await queue.enqueue(order("t:second"))
    last = await queue.enqueue(order("t:last", dependencies=[second.id, first.id]))

    assert last.state is State.BLOCKED
    await ran(queue)
    assert (await queue.store.get(last.id)).document["open_deps"] == [second.id]
    assert await state_of(queue, last.id) is State.BLOCKED
    await ran(queue)
    assert await state_of(queue, last.id) is State.PENDING
    assert await rest(queue) == ["t:last"]


async def test_what_has_completed_is_not_waited_for(queue: JobQueue) -> None:
    first = await queue.enqueue(order())
    await ran(queue)

    assert (await queue.enqueue(order("t:last", dependencies=[first.id]))).state is State.PENDING


async def test_a_dependency_that_is_no_job_is_refused(queue: JobQueue, database: Database) -> None:
    with pytest.raises(BadArguments, match="/dependencies/0: no job has the id"):
        await queue.enqueue(order(dependencies=[ObjectId()]))
    assert await all_of(database) == []


@pytest.mark.parametrize("how", ["fails", "kill", "remove", "before"])
async def test_a_failure_ends_all_that_wait_and_names_the_culprit(queue: JobQueue, how: str) -> None:
    """A chain of three: whoever waits for the first is not tried, nor is whoever waits for that one."""
    first = await queue.enqueue(order("t:first"))
    if how == "before":
        await ran(queue, fails=True)
    second = await queue.enqueue(order("t:second", dependencies=[first.id]))
    third = await queue.enqueue(order("t:third", dependencies=[second.id]))
    if how == "fails":
        await ran(queue, fails=True)
    elif how != "before":
        await getattr(queue, how)(first.id, by="bob")

    for waiting, culprit in ((second, first), (third, second)):
        document, journaled = await stored(queue, waiting.id)
        assert (document["state"], document["error_cat"], journaled) == ("error", "DEPENDENCY", True)
        assert document["last_error"]["dependency_failure"] == culprit.id
        assert f"{culprit.name} [{culprit.id}]" in document["last_error"]["exception"]
        assert document["trial"] == 0
    assert await rest(queue) == []


async def test_a_long_line_of_dependents_fails_at_once(queue: JobQueue) -> None:
    """However many wait for each other, one process takes them all along."""
    job = first = await queue.enqueue(order())
    for _ in range(60):
        job = await queue.enqueue(order("t:next", dependencies=[job.id]))
    await queue.kill(first.id, by="bob")

    assert await state_of(queue, job.id) is State.ERROR


async def test_a_dependency_that_ends_while_the_insert_is_under_way(queue: JobQueue) -> None:
    """It has ended between the look at it and the insert: the look afterwards finds that."""
    first = await queue.enqueue(order())
    insert = queue.store.insert

    async def late(document: dict[str, Any]) -> Job:
        await ran(queue)
        return await insert(document)

    queue.store.insert = late  # type: ignore[method-assign]
    last = await queue.enqueue(order("t:last", dependencies=[first.id]))

    assert last.state is State.BLOCKED
    assert await state_of(queue, last.id) is State.PENDING


async def test_what_a_dead_client_left_blocked_is_found_by_a_sweep(queue: JobQueue) -> None:
    first = await queue.enqueue(order())
    insert, half = queue.store.insert, ExitStack()

    async def late(document: dict[str, Any]) -> Job:
        await ran(queue)
        half.enter_context(unsettled(queue))
        return await insert(document)

    queue.store.insert = late  # type: ignore[method-assign]
    last = await queue.enqueue(order("t:last", dependencies=[first.id]))
    queue.store.insert = insert  # type: ignore[method-assign]
    half.close()
    assert await state_of(queue, last.id) is State.BLOCKED
    await queue.outbox.sweep()

    assert await state_of(queue, last.id) is State.PENDING


async def test_many_dependencies_that_end_at_once(queue: JobQueue) -> None:
    """Ten end in the same moment: the one that waits for all is let go once, by the last."""
    first = [await queue.enqueue(order(args={"n": n})) for n in range(10)]
    last = await queue.enqueue(order("t:last", dependencies=[job.id for job in first]))
    jobs = await queue.claims.claim(owner(), namespaces=["DEFAULT"], limit=10)
    started = await asyncio.gather(*(queue.start(job) for job in jobs))
    await asyncio.gather(*(queue.finish(job, Outcome.complete(None), log_seq=0) for job in started))

    document, _ = await stored(queue, last.id)
    assert document["state"] == "pending"
    assert [entry["state"] for entry in document["history"]] == ["blocked", "pending"]


async def test_a_restart_waits_for_what_was_restarted(queue: JobQueue) -> None:
    first = await queue.enqueue(order(keep_stopped=True))
    last = await queue.enqueue(order("t:last", dependencies=[first.id]))
    await ran(queue, fails=True)
    again = await queue.restart(first.id, by="bob")
    child = await queue.restart(last.id, by="bob")

    assert (await queue.store.get(child)).document["open_deps"] == [again]
    assert await rest(queue) == ["t:job", "t:last"]


async def promised(queue: JobQueue) -> tuple[Job, ObjectId, ObjectId]:
    """A running job that is told to end and then to restart; the id of its child; one killed that waited."""
    first = await queue.enqueue(order(keep_stopped=True))
    last = await queue.enqueue(order("t:last", keep_stopped=True, dependencies=[first.id]))
    (job,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    job = await queue.start(job)
    for each in (last.id, first.id):
        await queue.kill(each, by="bob")
    return job, await queue.restart(first.id, by="bob"), last.id


@pytest.mark.parametrize("fails", [False, True])
async def test_a_restart_waits_for_a_child_that_is_promised(queue: JobQueue, fails: bool) -> None:
    """The child of what is being killed is not made yet: it is waited for, and tells how it ended."""
    job, again, last = await promised(queue)
    child = await queue.restart(last, by="bob")
    assert (await queue.store.get(child)).document["open_deps"] == [again]
    await queue.finish(job, Outcome.killed("killed"), log_seq=0)
    assert await state_of(queue, child) is State.BLOCKED
    if fails:
        await queue.kill(again, by="bob")
    else:
        assert (await ran(queue)).id == again

    assert await state_of(queue, child) is (State.ERROR if fails else State.PENDING)


async def test_a_promised_child_that_has_ended_before_anybody_told_of_it(queue: JobQueue) -> None:
    """Whoever made it died right then; the next one who settles its parent finds who waits."""
    job, again, last = await promised(queue)
    child = await queue.restart(last, by="bob")
    with unsettled(queue):
        after = await queue.finish(job, Outcome.killed("killed"), log_seq=0)
    await queue.store.insert(chains.document(chains.again(after, after.outbox[0], []), again, utcnow()))
    assert (await ran(queue)).id == again
    assert await state_of(queue, child) is State.BLOCKED
    await queue.outbox.sweep()

    assert await state_of(queue, child) is State.PENDING


async def test_a_promised_child_that_is_made_while_the_insert_is_under_way(queue: JobQueue) -> None:
    """It was not there when its end was asked for: that is made up for."""
    job, again, last = await promised(queue)
    insert = queue.store.insert

    async def late(document: dict[str, Any]) -> Job:
        queue.store.insert = insert  # type: ignore[method-assign]
        await queue.finish(job, Outcome.killed("killed"), log_seq=0)
        return await insert(document)

    queue.store.insert = late  # type: ignore[method-assign]
    child = await queue.restart(last, by="bob")
    assert await state_of(queue, child) is State.BLOCKED
    assert (await ran(queue)).id == again

    assert await state_of(queue, child) is State.PENDING


async def test_a_promise_that_is_withdrawn_ends_who_waits_for_it(queue: JobQueue) -> None:
    """A restart that was noted, and refused when its child was to be made: another has its place."""
    first = await queue.enqueue(order(unique=True, keep_stopped=True))
    last = await queue.enqueue(order("t:last", keep_stopped=True, dependencies=[first.id]))
    await ran(queue, fails=True)
    with unsettled(queue):
        again = await queue.restart(first.id, by="bob")
    child = await queue.restart(last.id, by="bob")
    assert await state_of(queue, child) is State.BLOCKED
    await queue.enqueue(order(unique=True))
    await queue.outbox.sweep()

    job = await queue.store.get(child)
    assert (job.state, job.document["error_cat"]) == (State.ERROR, "DEPENDENCY")
    assert job.document["last_error"]["dependency_failure"] == again
    assert "settle" not in (await queue.store.get(first.id)).document


# ---------------------------------------------------------------------- calls of a lost attempt


async def nobody() -> set[str]:
    return set()


async def called(queue: JobQueue, catalogue: Catalogue, caller: Job, number: int) -> ObjectId:
    """The job that the present attempt of `caller` calls."""
    more: dict[str, Any] = {"args_cap": 1000, "hostname": "here"}
    return ObjectId((await call_child(queue, catalogue, caller, "t:called", {}, number, **more))["called"])


async def test_what_a_lost_attempt_has_called_ends_and_no_other(
    queue: JobQueue, catalogue: Catalogue
) -> None:
    """The worker of a caller died: what it waited for ends, and the calls of the next attempt go on."""
    await catalogue.publish([{"_id": "t:called", "namespace": "CALLED", "unique": False}])
    caller = await queue.enqueue(order())
    (held,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    held = await queue.start(held)
    running, waiting = [await called(queue, catalogue, held, n) for n in (1, 2)]
    submitted = await queue.enqueue(order("t:other", parent_id=caller.id, chain_id=caller.id))
    lives = owner()
    (child,) = await queue.claims.claim(lives, namespaces=["CALLED"])
    await queue.start(child)

    async def all_but_its_worker() -> set[str]:
        return {lives.id}

    assert await queue.rescue(all_but_its_worker) == 1
    lost = await queue.store.get(caller.id)
    assert (lost.state, lost.outbox, "settle" in lost.document) == (State.PENDING, (), False)
    assert (await queue.store.get(running)).killed_at is not None
    assert await state_of(queue, waiting) is State.KILLED
    assert await state_of(queue, submitted.id) is State.PENDING

    await queue.store.queue.update_one({"_id": caller.id}, {"$set": {"due": True}})
    (held,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    again = await called(queue, catalogue, await queue.start(held), 1)
    await queue.outbox.deliver(lost, chains.hush(lost))  # once more, and late
    assert await state_of(queue, again) is State.PENDING


async def test_a_caller_that_is_rescued_by_halves(queue: JobQueue, catalogue: Catalogue) -> None:
    """The rescuer died before it told what was called: the next sweep does."""
    await catalogue.publish([{"_id": "t:called", "namespace": "CALLED", "unique": False}])
    await queue.enqueue(order())
    (held,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    waiting = await called(queue, catalogue, await queue.start(held), 1)
    with unsettled(queue):
        await queue.rescue(nobody)
    assert await state_of(queue, waiting) is State.PENDING
    await queue.outbox.sweep()

    assert await state_of(queue, waiting) is State.KILLED


# ---------------------------------------------------------------------- prerequisites


NESTED = (spec("t:configure", run_before=["t:deploy", "t:prepare"]), spec("t:deploy"), spec("t:prepare"))


async def test_prerequisites_run_first_and_nest(queue: JobQueue, database: Database) -> None:
    job = await queue.enqueue(order(run_before=["t:configure"], hooks=NESTED))

    assert sorted((await rest(queue))[:2]) == ["t:deploy", "t:prepare"]
    rows = await all_of(database)
    assert len(rows) == 4
    assert {row["chain_id"] for row in rows} == {job.id}
    assert all(row["state"] == "complete" for row in rows)
    assert {row["name"] for row in rows if row.get("consumed")} == {"t:configure", "t:deploy", "t:prepare"}


async def test_a_prerequisite_that_fails_takes_all_above_it_along(queue: JobQueue) -> None:
    job = await queue.enqueue(order(run_before=["t:configure"], hooks=NESTED))
    await ran(queue, fails=True)

    document, _ = await stored(queue, job.id)
    assert (document["state"], document["error_cat"]) == ("error", "DEPENDENCY")
    assert "t:configure" in document["last_error"]["exception"]
    assert "t:deploy" in document["last_error"]["exception"]


async def test_an_outbox_that_is_delivered_twice_makes_one_of_each(
    queue: JobQueue, database: Database
) -> None:
    job = await queue.enqueue(order(run_before=["t:deploy"], run_after=["t:prepare"], hooks=NESTED))
    await ran(queue)
    (found,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    with unsettled(queue):
        done = await queue.finish(await queue.start(found), Outcome.complete(None), log_seq=0)
    await asyncio.gather(*(queue.outbox.settle(done) for _ in range(3)))
    assert await rest(queue) == ["t:prepare"]
    for note in done.outbox:  # and once more, when all is in the journal
        await queue.outbox.deliver(done, note)

    assert await rest(queue) == []
    assert sorted(row["name"] for row in await all_of(database)) == ["t:deploy", "t:job", "t:prepare"]
    assert await state_of(queue, job.id) is State.COMPLETE


# ---------------------------------------------------------------------- followers


async def test_followers_come_after_success_with_its_result(queue: JobQueue, database: Database) -> None:
    hooks = (spec("t:spread", "a", "b"), spec("t:whole", "result"), spec("t:odd", "x", "y"))
    names = ["t:spread", "t:whole", "t:odd"]
    job = await queue.enqueue(order(run_after=names, hooks=hooks))
    assert len(await all_of(database)) == 1
    await ran(queue, {"a": 1, "b": [2]})

    found = [(await queue.store.get(derived_id(job.id, "after", n))).document for n in range(3)]
    assert [row["name"] for row in found] == names
    assert found[0]["args"] == {"a": 1, "b": [2]}
    assert found[1]["args"] == {"result": {"a": 1, "b": [2]}}
    assert (found[2]["state"], found[2]["error_cat"]) == ("error", "ERROR")
    assert "does not fit [t:odd], which takes x, y" in found[2]["last_error"]["exception"]
    assert {row["enqueued"]["parent_id"] for row in found} == {job.id}


async def test_nothing_follows_a_failure_but_its_handler(queue: JobQueue, database: Database) -> None:
    hooks = (spec("t:next"), spec("t:handler", "reason", on_failure="t:handler"))
    job = await queue.enqueue(
        order(
            run_after=["t:next"],
            on_failure="t:handler",
            hooks=hooks,
            options={"attempts": 2, "error_time": 0},
        )
    )
    await ran(queue, fails=True)
    assert len(await all_of(database)) == 1, "an attempt is left"
    await ran(queue, fails=True)

    (handler,) = await all_of(database, name="t:handler")
    assert handler["args"]["reason"] == {
        "message": "task job failed",
        "job_id": str(job.id),
        "name": "job",
        "error": "RuntimeError('no')",
        "attempts": 2,
    }
    assert "on_failure" not in handler, "a handler that fails is not handed to itself"
    assert await rest(queue) == ["t:handler"]


async def test_a_task_that_is_always_retried_is_handled_once_per_round(
    queue: JobQueue, database: Database
) -> None:
    options = {"attempts": 10_000, "error_time": 0}
    await queue.enqueue(
        order(on_failure="t:handler", hooks=[spec("t:handler")], retry_policy="retry_always", options=options)
    )
    for attempt in range(1, 6):
        await ran(queue, fails=True)
        assert len(await all_of(database, name="t:handler")) == attempt // 2
        while len(await queue.store.queue.find({"name": "t:handler", "due": True}).to_list(None)):
            (found,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"], rooms={"t:job": 0})
            await queue.finish(await queue.start(found), Outcome.complete(None), log_seq=0)
    await ran(queue, {"at": "last"})

    assert await rest(queue) == []


async def test_at_most_once_means_that(queue: JobQueue) -> None:
    """A job of which nobody knows how far it came is not begun again, whoever gave it up."""
    options = {"max_crashes": 1}
    lost = await queue.enqueue(order(options=options))
    (claimed,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    back = await queue.release(claimed, reason="before it began")
    assert back.state is State.PENDING
    (claimed,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    await queue.release(await queue.start(claimed), reason="the worker stops")

    document, _ = await stored(queue, lost.id)
    assert (document["state"], document["error_cat"]) == ("error", "HALTED")


# ---------------------------------------------------------------------- a chain as a whole


async def test_a_chain_is_killed_as_a_whole(queue: JobQueue, database: Database) -> None:
    """Blocked, waiting and running ones; and nothing follows from the one that was faster than its kill."""
    hooks = (*NESTED, spec("t:next"))
    job = await queue.enqueue(order(run_before=["t:configure"], run_after=["t:next"], hooks=hooks))
    (running,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    running = await queue.start(running)
    told = await queue.kill_chain(running.id, by="bob")

    assert {found.name for found, _ in told} == {"t:job", "t:configure", "t:deploy", "t:prepare"}
    assert all(changed for _, changed in told)
    await queue.finish(running, Outcome.complete(None), log_seq=0)
    states = {row["name"]: row["state"] for row in await all_of(database)}
    assert states == {
        "t:job": "killed",
        "t:configure": "killed",
        "t:deploy": "complete",
        "t:prepare": "killed",
    }
    assert await rest(queue) == []
    assert await queue.kill_chain(job.id, by="bob") == []


async def test_a_chain_that_was_killed_has_no_followers(queue: JobQueue, database: Database) -> None:
    job = await queue.enqueue(order(run_after=["t:next"], hooks=[spec("t:next")]))
    (running,) = await queue.claims.claim(owner(), namespaces=["DEFAULT"])
    running = await queue.start(running)
    await queue.kill_chain(job.id, by="bob")
    await queue.finish(running, Outcome.complete(None), log_seq=0)

    assert [row["name"] for row in await all_of(database)] == ["t:job"]


async def test_a_result_binds_as_a_call_does() -> None:
    bind = chains.bind_result

    assert bind(spec("t", "a", "b", required=1), {"a": 1}) == {"a": 1}
    assert bind(spec("t", "a"), [1, 2]) == {"a": [1, 2]}
    assert bind(spec("t", "a"), {"b": 1}) == {"a": {"b": 1}}
    assert bind(spec("t", "a", "b", required=1), "text") == {"a": "text"}
    assert bind(spec("t"), None) == {}
    assert bind(spec("t"), 1) is None
    assert bind(spec("t", "a", "b"), {"a": 1}) is None
    assert bind({**spec("t", "a"), "more": True}, {"a": 1, "z": 2}) == {"a": 1, "z": 2}
