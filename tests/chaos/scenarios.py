"""What the processes of the crash matrix do: each scenario prepares in peace, then acts under a fault.

Together they make every write there is; a store write that none of them makes fails the matrix.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4 import sources
from core4.actions import ActionStore
from core4.doctor import Doctor
from core4.errors import Conflict, NotFound, ResultGone
from core4.inbox import Inbox
from core4.jobs import Job, utcnow
from core4.logs import Line
from core4.retention import Retention
from core4.returns import RETURN, Returns
from core4.states import State
from core4.store import JOURNAL, QUEUE
from core4.worker.ingest import Ingest
from tests.chaos.client import NAME, Actor, new_owner
from tests.chaos.recovery import dumped, recover
from tests.helpers import unsettled

Step = Callable[[Actor], Awaitable[Any]]


async def _nothing(actor: Actor) -> None:
    """No preparation, or no proof beside the checker's."""


@dataclass(frozen=True)
class Scenario:
    """One operation: what comes before it, itself, and what must hold after another process recovered.

    With `repeat` the recovering process does it once more: for stores whose clients simply try again. With
    `overlaps` the job is taken over from a process that does not know: two executions are legal then.
    """

    act: Step
    prepare: Step = _nothing
    proof: Step = _nothing
    repeat: bool = False
    find_and_modify: bool | None = None
    register: bool = True
    overlaps: bool = False


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, act: Step, prepare: Step = _nothing, **more: Any) -> None:
    SCENARIOS[name] = Scenario(act, prepare, **more)


# ---------------------------------------------------------------------- preparations


def enqueued(**options: Any) -> Step:
    async def step(actor: Actor) -> None:
        actor.kept["id"] = (await actor.enqueue("k1", **options)).id

    return step


def claimed(**options: Any) -> Step:
    async def step(actor: Actor) -> None:
        await enqueued(**options)(actor)
        (actor.kept["job"],) = await actor.claim()

    return step


def started(**options: Any) -> Step:
    async def step(actor: Actor) -> None:
        await claimed(**options)(actor)
        actor.kept["job"] = await actor.start(actor.kept["job"])

    return step


async def several_claimed(actor: Actor) -> None:
    for key in ("k1", "k2", "k3"):
        await actor.enqueue(key)
    actor.kept["jobs"] = await actor.claim(3)


async def several_started(actor: Actor) -> None:
    await several_claimed(actor)
    actor.kept["jobs"] = await actor.start_several(actor.kept["jobs"])


async def one_of_several_lost(actor: Actor) -> None:
    """One of three jobs that were started together has gone to another worker."""
    await several_started(actor)
    await actor.queue.release(actor.kept["jobs"][1], reason="lost")
    stale, actor.owner = actor.owner, new_owner()
    execution = actor.executions.copy()
    await actor.register()
    await actor.start((await actor.claim())[0])
    actor.owner, actor.executions = stale, execution


def finished(kind: str, **options: Any) -> Step:
    async def step(actor: Actor) -> None:
        await started(**options)(actor)
        await actor.finish(actor.kept["job"], kind)

    return step


def _without_settling(step: Step) -> Step:
    """The first half of an operation, as a process that died in its middle leaves it."""

    async def halved(actor: Actor) -> None:
        with unsettled(actor.queue):
            await step(actor)

    return halved


def after(*steps: Step) -> Step:
    async def all_steps(actor: Actor) -> None:
        for step in steps:
            await step(actor)

    return all_steps


def job(actor: Actor) -> Job:
    found: Job = actor.kept["job"]
    return found


def job_id(actor: Actor) -> ObjectId:
    found: ObjectId = actor.kept["id"]
    return found


async def kill(actor: Actor) -> None:
    await actor.kill(job_id(actor))


async def restart(actor: Actor) -> None:
    await actor.restart(job_id(actor))


async def remove(actor: Actor) -> None:
    await actor.remove(job_id(actor))


async def _stored(actor: Actor) -> list[dict[str, Any]]:
    """Every job there is."""
    tables = [actor.database.collection(name) for name in (JOURNAL, QUEUE)]
    return [document for table in tables for document in await table.find({}).to_list(None)]


async def pull(actor: Actor) -> None:
    """Take the result of the only job there is: what is handed out is noted outside."""
    document = (await _stored(actor))[0]
    try:
        taken = await actor.queue.consume(document["_id"], by="chaos")
    except ResultGone:
        return
    assert taken.state is not State.COMPLETE or taken.document["result"]["token"]
    with _pulls(actor).open("a") as pulls:
        pulls.write(f"{taken.id}\n")


def _pulls(actor: Actor) -> Path:
    return actor.ledger.with_suffix(".pulls")


async def pulled_by_one(actor: Actor) -> None:
    """The result is gone, and one has it at most: he may have died with it."""
    (document,) = await _stored(actor)
    path = _pulls(actor)
    takers = path.read_text().split() if path.exists() else []
    assert document["result"] is None
    assert document["consumed"]["by"] == "chaos"
    assert len(takers) <= 1


async def start_several(actor: Actor) -> None:
    await actor.start_several(actor.kept["jobs"])


async def finish_several(actor: Actor) -> None:
    await actor.finish_several(actor.kept["jobs"])


async def finish(actor: Actor) -> None:
    await actor.finish(job(actor))


def ending(kind: str) -> Step:
    async def step(actor: Actor) -> None:
        await actor.finish(job(actor), kind)

    return step


async def copied_before(actor: Actor) -> None:
    """Two jobs have ended, and somebody has copied an older revision of each to the journal."""
    await several_started(actor)
    with unsettled(actor.queue):
        for each in actor.kept["jobs"][:2]:
            await actor.finish(each)
    for document in await actor.database.collection(QUEUE).find({"settle": True}).to_list(None):
        older = {**document, "rev": document["rev"] - 1}
        await actor.database.collection(JOURNAL).insert_one(older)


async def settle_copied(actor: Actor) -> None:
    rows = await actor.database.collection(QUEUE).find({"settle": True}).to_list(None)
    await actor.queue.outbox.settle_many([Job.from_document(row) for row in rows])


async def bury_self(actor: Actor) -> None:
    """The holder is dead for the others, though it is the one that acts."""
    await actor.registry.bury(-3600)


async def rescue(actor: Actor) -> None:
    await actor.queue.rescue(actor.registry.alive_ids)


async def journal_twin(actor: Actor) -> None:
    """An insert that arrives after its job has ended: the leftover is claimed."""
    queue = actor.database.collection(QUEUE)
    await enqueued()(actor)
    late = await queue.find_one({"_id": job_id(actor)})
    assert late is not None
    (first,) = await actor.claim()
    await actor.run(first)
    await queue.insert_one(late)
    (actor.kept["job"],) = await actor.claim()


async def late_twin(actor: Actor) -> None:
    """The same leftover, before anybody has claimed it."""
    queue = actor.database.collection(QUEUE)
    await enqueued()(actor)
    late = await queue.find_one({"_id": job_id(actor)})
    assert late is not None
    await actor.run_all()
    await queue.insert_one(late)


async def key_taken(actor: Actor) -> None:
    """The place of a complete job is taken by a third one."""
    await finished("complete")(actor)
    await actor.enqueue("k1")


async def taken_over(actor: Actor) -> None:
    """The holder was declared dead, another one has the job, and the holder does not know."""
    await started()(actor)
    stale, actor.owner = actor.owner, new_owner()
    handle, execution = job(actor), actor.executions.copy()
    await actor.registry.bury(-3600)
    await actor.register()
    await rescue(actor)
    await actor.force_due()
    await actor.queue.promote()
    await actor.start((await actor.claim())[0])
    actor.owner, actor.kept["job"], actor.executions = stale, handle, execution


def due_at_once(**fields: Any) -> Step:
    """A document as it is when time has passed."""

    async def step(actor: Actor) -> None:
        queue = actor.database.collection(QUEUE)
        await queue.update_one({"_id": job_id(actor)}, {"$set": fields})

    return step


# ---------------------------------------------------------------------- the queue


async def enqueue_many(actor: Actor) -> None:
    """Three together, of which one is there already."""
    await actor.enqueue_several(("k1", "k2", "k3"))


scenario("enqueue", enqueued())
scenario("enqueue-many", enqueue_many, enqueued())
scenario("claim", lambda actor: actor.claim(), enqueued(), find_and_modify=False)
scenario("claim-in-one", lambda actor: actor.claim(), enqueued(), find_and_modify=True)
scenario("claim-pinned", lambda actor: actor.claim(), enqueued(worker="worker@here"))
scenario(
    "claim-several",
    lambda actor: actor.claim(3),
    after(enqueued(), lambda actor: actor.enqueue("k2"), lambda actor: actor.enqueue("k3")),
    find_and_modify=False,
)
scenario("start", lambda actor: actor.start(job(actor)), claimed())
scenario("start-of-a-leftover", lambda actor: actor.start(job(actor)), journal_twin)
scenario("start-several", start_several, several_claimed)
scenario("finish-several", finish_several, several_started)
scenario("finish-several-one-stale", finish_several, one_of_several_lost, overlaps=True)
scenario("progress", lambda actor: actor.progress(job(actor)), started())
scenario("progress-stale", lambda actor: actor.progress(job(actor)), taken_over, overlaps=True)
scenario("flag", lambda actor: actor.queue.flag(job(actor), "wall", reason="too long"), started())
scenario("flag-zombie", lambda actor: actor.queue.flag(job(actor), "zombie", reason="silent"), started())
scenario("finish-complete", finish, started())
scenario("finish-stale", finish, taken_over, overlaps=True)
scenario("finish-failed", lambda actor: actor.finish(job(actor), "failed"), started())
scenario("finish-error", lambda actor: actor.finish(job(actor), "failed"), started(attempts=1))
scenario(
    "finish-error-leaves",
    lambda actor: actor.finish(job(actor), "failed"),
    started(attempts=1, keep_stopped=False),
)
scenario("finish-deferred", lambda actor: actor.finish(job(actor), "deferred"), started())
scenario("finish-odd-result", lambda actor: actor.finish(job(actor), "odd"), started())
scenario("finish-killed", lambda actor: actor.finish(job(actor), "killed"), after(started(), kill))
scenario(
    "finish-killed-restarted",
    lambda actor: actor.finish(job(actor), "killed"),
    after(started(), kill, restart),
)
scenario(
    "finish-killed-removed", lambda actor: actor.finish(job(actor), "killed"), after(started(), kill, remove)
)
scenario("finish-faster-than-kill", finish, after(started(), kill, restart))
scenario("release", lambda actor: actor.release(job(actor)), claimed())
scenario("release-started", lambda actor: actor.release(job(actor), 0.001), started())
scenario("release-killed", lambda actor: actor.release(job(actor)), after(claimed(), kill))
scenario("kill-waiting", kill, enqueued())
scenario("kill-waiting-leaves", kill, enqueued(keep_stopped=False))
scenario("kill-a-leftover", kill, late_twin)
scenario("kill-running", kill, started())
scenario("restart-failed", restart, finished("failed", error_time=3600))
scenario("restart-error", restart, finished("failed", attempts=1))
scenario("restart-journaled", restart, finished("complete"))
scenario("restart-killing", restart, after(started(), kill))
scenario("restart-place-taken", restart, key_taken)
scenario("restart-twice", after(restart, restart), finished("failed", attempts=1))
scenario("remove-waiting", remove, enqueued())
scenario("remove-error", remove, finished("failed", attempts=1))
scenario("remove-killing", remove, after(started(), kill))
scenario("pull-journaled", pull, finished("complete"), proof=pulled_by_one, repeat=True)
scenario("pull-stopped", pull, finished("failed", attempts=1), proof=pulled_by_one, repeat=True)
scenario(
    "pull-half-way",
    pull,
    after(started(), _without_settling(finish)),
    proof=pulled_by_one,
    repeat=True,
)
scenario(
    "promote",
    lambda actor: actor.queue.promote(),
    after(finished("failed", error_time=3600), due_at_once(query_at=utcnow() - timedelta(1))),
)
scenario(
    "promote-pinned",
    lambda actor: actor.queue.promote(),
    after(
        finished("failed", error_time=3600, worker="worker@here"),
        due_at_once(query_at=utcnow() - timedelta(1)),
    ),
)
scenario(
    "expire",
    lambda actor: actor.queue.expire(),
    after(finished("deferred", defer_time=3600), due_at_once(expires=utcnow() - timedelta(1))),
)
scenario("rescue-claimed", rescue, after(claimed(), bury_self))
scenario("rescue-started", rescue, after(started(), bury_self))
scenario("rescue-several", rescue, after(several_started, bury_self))
scenario("rescue-poison", rescue, after(started(), due_at_once(crashes=2), bury_self))
scenario("rescue-killing", rescue, after(started(), kill, restart, bury_self))
scenario(
    "sweep-finished", lambda actor: actor.queue.outbox.sweep(), after(started(), _without_settling(finish))
)
scenario("sweep-over-an-older-copy", lambda actor: actor.queue.outbox.sweep(), copied_before)
scenario("settle-several-over-older-copies", settle_copied, copied_before)
scenario(
    "sweep-restarted",
    lambda actor: actor.queue.outbox.sweep(),
    after(finished("failed", attempts=1), _without_settling(restart)),
)
scenario(
    "sweep-restarted-journal",
    lambda actor: actor.queue.outbox.sweep(),
    after(finished("complete"), _without_settling(restart)),
)

# ---------------------------------------------------------------------- jobs that hang together


def spec(name: str, **more: Any) -> dict[str, Any]:
    """What a job knows of a task that follows from it."""
    takes = {"parameters": ["value"], "required": [], "more": False}
    return {"name": name, "namespace": "DEFAULT", "options": {}, **takes, "keep_stopped": False, **more}


HOOKS = (
    spec("t:one", run_before=["t:two"]),
    spec("t:two"),
    spec("t:odd", parameters=["a", "b"], required=["a", "b"], on_failure="t:two"),
)
BEFORE: dict[str, Any] = {"run_before": ["t:one", "t:two"], "hooks": HOOKS}
AFTER: dict[str, Any] = {"run_after": ["t:one", "t:odd"], "hooks": HOOKS}
HANDLED: dict[str, Any] = {"on_failure": "t:one", "hooks": HOOKS}


def dependents(*keys: str) -> Step:
    """Jobs that wait for the first one, or each for the one before it."""

    async def step(actor: Actor) -> None:
        before = job_id(actor)
        for key in keys:
            before = (await actor.enqueue(key, chain={"dependencies": [before]})).id
            actor.kept["waiting"] = before

    return step


async def kill_chain(actor: Actor) -> None:
    """From its first job on, whoever made that."""
    for name in (QUEUE, JOURNAL):
        row = await actor.database.collection(name).find_one({"args.key": "k1"})
        if row is not None:
            await actor.kill_chain(row["_id"])


async def chain_is_dead(actor: Actor) -> None:
    for name in (QUEUE, JOURNAL):
        for row in await actor.database.collection(name).find({}).to_list(None):
            assert row["state"] == "killed", row["name"]


async def after_both(actor: Actor) -> None:
    """A job that waits for the first one and for another."""
    other = await actor.enqueue("k2")
    await actor.enqueue("k3", chain={"dependencies": [job_id(actor), other.id]})


async def dependent_of_a_race(actor: Actor) -> None:
    """Its prerequisite ends between the look at it and the insert; whoever inserted it looks no more."""
    insert = actor.queue.store.insert

    async def late(document: dict[str, Any]) -> Job:
        await finish(actor)
        return await insert(document)

    actor.queue.store.insert = late  # type: ignore[method-assign]
    await _without_settling(dependents("k2"))(actor)
    actor.queue.store.insert = insert  # type: ignore[method-assign]


async def restart_waiting(actor: Actor) -> None:
    await actor.restart(actor.kept["waiting"])


async def kill_waiting(actor: Actor) -> None:
    await actor.kill(actor.kept["waiting"])


async def doomed_promise(actor: Actor) -> None:
    """A job waits for the child of a restart that nobody was told of; a third one takes its place."""
    await started(attempts=1)(actor)
    await dependents("k2")(actor)
    await actor.finish(job(actor), "failed")
    with unsettled(actor.queue):
        await actor.queue.restart(job_id(actor), by="chaos")
    await restart_waiting(actor)
    await actor.enqueue("k1")


async def fails_for_want_of_it(actor: Actor) -> None:
    """Whoever waited for what is not to come has ended, and has waited before."""
    again = [
        row for row in await _stored(actor) if row["args"]["key"] == "k2" and row["enqueued"]["parent_id"]
    ]
    assert [(row["state"], row["error_cat"]) for row in again] == [("error", "DEPENDENCY")]
    assert [entry["state"] for entry in again[0]["history"]] == ["blocked", "error"]


async def calling(actor: Actor) -> None:
    """The attempt under way waits for a job that it has called."""
    caller = job(actor)
    who = {"parent_id": caller.id, "chain_id": caller.id, "consumed_by": caller.id, "fence": caller.fence}
    await actor.enqueue("called", chain=who)


async def unheard_ended(actor: Actor) -> None:
    """Nobody ran what the lost attempt had called."""
    found = {row["args"]["key"]: row["state"] for row in await _stored(actor)}
    assert found == {"k1": "complete", "called": "killed"}


async def run_first(actor: Actor) -> None:
    """The first job in line completes; what is let go by that waits."""
    (first,) = await actor.claim()
    await actor.run(first)


scenario("enqueue-dependent", dependents("k2", "k3"), enqueued())
scenario("enqueue-dependent-of-ended", dependents("k2"), finished("failed", attempts=1))
scenario("enqueue-with-prerequisites", enqueued(chain=BEFORE))
scenario("finish-lets-go", finish, after(started(), dependents("k2", "k3")))
scenario(
    "finish-fails-dependents",
    lambda actor: actor.finish(job(actor), "failed"),
    after(started(attempts=1), dependents("k2", "k3")),
)
scenario("finish-one-of-two", finish, after(started(), after_both))
for kind in ("complete", "failed"):
    half_told = after(started(attempts=1), dependents("k2"), _without_settling(ending(kind)))
    scenario(f"sweep-tells-dependents-{kind}", lambda actor: actor.queue.outbox.sweep(), half_told)
scenario(
    "sweep-lets-go-of-a-race", lambda actor: actor.queue.outbox.sweep(), after(started(), dependent_of_a_race)
)
scenario(
    "finish-keeps-a-promise",
    ending("killed"),
    after(started(), dependents("k2"), kill_waiting, kill, restart, restart_waiting),
)
scenario(
    "sweep-withdraws-a-promise",
    lambda actor: actor.queue.outbox.sweep(),
    doomed_promise,
    proof=fails_for_want_of_it,
)
scenario("finish-last-prerequisite", run_first, after(enqueued(chain=BEFORE), run_first, run_first))
scenario("finish-followed", finish, started(chain=AFTER))
scenario(
    "finish-handled", lambda actor: actor.finish(job(actor), "failed"), started(attempts=1, chain=HANDLED)
)
scenario(
    "finish-round-handled",
    lambda actor: actor.finish(job(actor), "failed"),
    started(attempts=5, chain={**HANDLED, "retry_policy": "retry_always"}),
)
scenario("kill-prerequisite", kill, after(enqueued(), dependents("k2", "k3")))
scenario("remove-prerequisite", remove, after(enqueued(), dependents("k2")))
scenario("kill-blocked", kill, enqueued(chain=BEFORE))
scenario(
    "restart-dependent",
    restart_waiting,
    after(enqueued(), dependents("k2"), kill, restart),
)
scenario("rescue-at-most-once", rescue, after(started(max_crashes=1), dependents("k2"), bury_self))
scenario("rescue-of-a-caller", rescue, after(started(), calling, bury_self), proof=unheard_ended)
scenario("release-at-most-once", lambda actor: actor.release(job(actor)), started(max_crashes=1))
scenario(
    "kill-chain",
    kill_chain,
    after(enqueued(chain=BEFORE | AFTER)),
    proof=chain_is_dead,
    repeat=True,
)

# ---------------------------------------------------------------------- the other stores


async def register(actor: Actor) -> None:
    await actor.register()


async def append(actor: Actor) -> None:
    running = job(actor)
    lines = [Line((running.fence << 32) + n, 0.0, "INFO", f"line {n}") for n in (1, 2)]
    try:
        await actor.logs.append(running, "here", lines)
    except PyMongoError:
        await actor.logs.append(running, "here", lines)


async def append_several(actor: Actor) -> None:
    """Lines of two jobs in one call."""
    batches = [
        (each, "here", [Line((each.fence << 32) + n, 0.0, "INFO", f"line {n}") for n in (1, 2)])
        for each in actor.kept["jobs"][:2]
    ]
    try:
        await actor.logs.append_many(batches)
    except PyMongoError:
        await actor.logs.append_many(batches)


async def several_lines_once(actor: Actor) -> None:
    for document in await actor.database.collection(JOURNAL).find({}).to_list(None):
        seqs = [line["seq"] for line in await actor.logs.tail(document["_id"], 0)]
        assert seqs in ([], [(1 << 32) + 1, (1 << 32) + 2])


async def lines_once(actor: Actor) -> None:
    (document,) = await actor.database.collection(JOURNAL).find({}).to_list(None)
    seqs = [line["seq"] for line in await actor.logs.tail(document["_id"], 0)]
    assert seqs in ([], [(1 << 32) + 1, (1 << 32) + 2])


async def publish(actor: Actor) -> None:
    await actor.catalogue.publish([{"_id": NAME, "namespace": "DEFAULT"}])


async def is_published(actor: Actor) -> None:
    assert await actor.catalogue.get(NAME) is not None


async def add_user(actor: Actor) -> None:
    try:
        await actor.users.add("ann", "secret", ["cop"])
    except Conflict:
        pass  # an earlier try did it


async def sign_in(actor: Actor) -> None:
    user = await actor.users.get("ann")
    assert user is not None
    actor.kept["token"], _ = await actor.users.issue(user)


async def token_works(actor: Actor) -> None:
    assert await actor.users.check(actor.kept["token"]) is not None


async def ticket(actor: Actor) -> None:
    user = await actor.users.get("ann")
    assert user is not None
    text, _ = await actor.users.ticket(user)
    assert await actor.users.redeem(text) is not None
    assert await actor.users.redeem(text) is None


async def use_a_word(actor: Actor) -> None:
    await actor.users.use_once("word", 60)
    assert not await actor.users.use_once("word", 60)


async def sign_out(actor: Actor) -> None:
    user = await actor.users.get("ann")
    assert user is not None
    text, _ = await actor.users.issue(user)
    await actor.users.revoke(text)
    assert await actor.users.check(text) is None


async def is_user(actor: Actor) -> None:
    user = await actor.users.get("ann")
    assert user is not None
    assert user.rights == ("cop",)


async def pause(actor: Actor) -> None:
    await actor.controls.pause("job", NAME, by="chaos")


async def is_paused(actor: Actor) -> None:
    assert (await actor.controls.read()).of_name(NAME) is not None


async def resume(actor: Actor) -> None:
    await actor.controls.resume("job", NAME)
    await actor.queue.claims.unpark(await actor.controls.read())


async def claim_paused(actor: Actor) -> None:
    held = await actor.controls.read()
    assert await actor.queue.claims.claim(actor.owner, namespaces=["DEFAULT"], controls=held) == []


async def halt(actor: Actor) -> None:
    await actor.controls.halt(by="chaos")


async def is_halted(actor: Actor) -> None:
    assert (await actor.controls.read()).halt is not None


LIMITED: dict[str, Any] = {"max_running": 1}


async def over_limit(actor: Actor) -> None:
    """Two run at most one at a time: the second is put aside."""
    await actor.enqueue("k2", **LIMITED)
    await actor.enqueue("k3", **LIMITED)
    await actor.claim()


for one_write in (False, True):
    scenario(
        f"claim-slot-{one_write}", lambda actor: actor.claim(), enqueued(**LIMITED), find_and_modify=one_write
    )
    scenario(f"claim-over-limit-{one_write}", over_limit, started(**LIMITED), find_and_modify=one_write)
scenario("finish-wakes", finish, after(started(**LIMITED), over_limit))
scenario("rescue-wakes", rescue, after(started(**LIMITED), over_limit, bury_self))
RATED: dict[str, Any] = {"rate_limit": "1/1h"}


async def over_rate(actor: Actor) -> None:
    """One may be started in an hour: those behind it are put aside."""
    for key in ("k2", "k3"):
        await actor.enqueue(key, **RATED)
    await actor.claim()


async def wake_rated(actor: Actor) -> None:
    await actor.forget_starts()
    await actor.queue.claims.wake_rated()


scenario("claim-rated", lambda actor: actor.claim(), enqueued(**RATED), find_and_modify=False)
scenario("claim-over-rate", over_rate, started(**RATED), find_and_modify=True)
scenario("wake-rated", wake_rated, after(started(**RATED), over_rate))
scenario("pause", pause, proof=is_paused, repeat=True)
scenario("stop", lambda actor: actor.controls.stop(actor.owner.id, by="ann"), repeat=True)
scenario("halt", halt, proof=is_halted, repeat=True)
scenario("claim-paused", claim_paused, after(enqueued(), pause), find_and_modify=False)
scenario("claim-paused-in-one", claim_paused, after(enqueued(), pause), find_and_modify=True)
scenario("claim-paused-pinned", claim_paused, after(enqueued(worker="worker@here"), pause))
scenario("resume", resume, after(enqueued(), pause, claim_paused), repeat=True)
scenario("resume-pinned", resume, after(enqueued(worker="worker@here"), pause, claim_paused), repeat=True)
scenario("register", register, register=False, repeat=True)
scenario("beat", lambda actor: actor.registry.beat(actor.owner, running=0), claimed())
scenario("serve", lambda actor: actor.registry.serve(actor.owner, ["other.Job"]), claimed())
scenario("leave", lambda actor: actor.registry.leave(actor.owner), claimed())
scenario("bury", bury_self, claimed())
scenario("append", append, started(), proof=lines_once)
scenario("append-several", append_several, several_started, proof=several_lines_once)
scenario("publish", publish, proof=is_published, repeat=True)
scenario("user-add", add_user, proof=is_user, repeat=True)
scenario(
    "user-change", lambda actor: actor.users.set_rights("ann", ["cop"]), add_user, proof=is_user, repeat=True
)
scenario("token", sign_in, add_user, proof=token_works, repeat=True)
scenario("ticket", ticket, add_user, repeat=True)
scenario("word", use_a_word, repeat=True)
scenario("revoke", sign_out, add_user, repeat=True)


# ---------------------------------------------------------------------- schedules

DAILY = {"qual_name": NAME, "expression": "0 0 * * *", "zone": "UTC", "args": {"key": "fire"}}


async def schedule(actor: Actor) -> None:
    await actor.schedules.set("daily", DAILY, by="ann")


async def is_scheduled(actor: Actor) -> None:
    found = await actor.schedules.get("daily")
    assert found.expression == DAILY["expression"]
    assert not found.paused


async def pause_and_resume(actor: Actor) -> None:
    await actor.schedules.pause("daily", by="ann")
    await actor.schedules.resume("daily", by="ann")


async def unschedule(actor: Actor) -> None:
    try:
        await actor.schedules.delete("daily")
    except NotFound:
        pass  # an earlier try did it


async def is_not_scheduled(actor: Actor) -> None:
    assert await actor.schedules.all() == []


async def advance(actor: Actor) -> None:
    """Decide the next instant, as any number of schedulers may: only the cursor says who did."""
    seen = await actor.schedules.get("daily")
    instant = seen.due()
    if seen.document["skipped"] == 0:
        await actor.schedules.advance(seen, instant, fired=[], skipped=[instant], reason="test")


async def has_advanced(actor: Actor) -> None:
    assert (await actor.schedules.get("daily")).document["skipped"] == 1


async def fire(actor: Actor) -> None:
    """What a scheduler does: the job first, then the cursor; twice is once."""
    seen = await actor.schedules.get("daily")
    if seen.document["fired"] == 0:
        instant = seen.due()
        await actor.fire(seen, instant)
        await actor.schedules.advance(seen, instant, fired=[instant], skipped=[], reason="")


async def has_fired_once(actor: Actor) -> None:
    assert (await actor.schedules.get("daily")).document["fired"] == 1
    found = [
        await actor.database.collection(name).count_documents({"schedule_id": "daily"})
        for name in (QUEUE, JOURNAL)
    ]
    assert sum(found) == 1, found


scenario("schedule-fire", fire, schedule, proof=has_fired_once, repeat=True)
scenario("schedule", schedule, proof=is_scheduled, repeat=True)
scenario("schedule-change", pause_and_resume, schedule, proof=is_scheduled, repeat=True)
scenario("schedule-delete", unschedule, schedule, proof=is_not_scheduled, repeat=True)
scenario("schedule-advance", advance, schedule, proof=has_advanced, repeat=True)


# ---------------------------------------------------------------------- return queues

RETURNED: dict[str, Any] = {"return_queues": ["q"], "attempts": 1}


async def records(actor: Actor, **where: Any) -> list[Any]:
    return await actor.database.collection(RETURN).find(where).to_list(None)


async def dumped_jobs(actor: Actor) -> list[Any]:
    dump = await dumped(actor.database)
    return [*dump["queue"], *dump["journal"]]


async def put_once(actor: Actor) -> None:
    """The end of each job is in the queue, once, and tells how it ended."""
    found = {row["job_id"]: row["status"] for row in await records(actor, due=True)}
    stored = {row["_id"]: row["state"] for row in await dumped_jobs(actor) if row.get("return_queues")}
    assert len(found) == len(await records(actor)) == len(stored)
    assert {each for each, how in found.items() if how == "Completed"} == {
        each for each, state in stored.items() if state == "complete"
    }


async def take_all(actor: Actor) -> None:
    """Take one, send one to a broker, empty the queue; a process that tries again says the same."""
    returns = Returns(actor.database)
    if not await returns.taken("q", by="ann", token="t"):
        await returns.take("q", 1, by="ann", token="t")
    for record in await returns.unsent(1):
        if await returns.reserve(record):
            await returns.sent(record["_id"])
    await returns.reset("q", by="ann")


async def all_taken(actor: Actor) -> None:
    assert await records(actor, due=True) == []
    assert len(await records(actor, **{"taken.id": "t"})) == 1


async def forget_records(actor: Actor) -> None:
    await Returns(actor.database).forget([row["_id"] for row in await records(actor)])


async def none_left(actor: Actor) -> None:
    assert await records(actor) == []


scenario("finish-returned", finish, started(**RETURNED), proof=put_once)
scenario("kill-returned", kill, enqueued(**RETURNED), proof=put_once)
scenario(
    "sweep-returned",
    lambda actor: actor.queue.outbox.sweep(),
    after(started(**RETURNED), _without_settling(finish)),
    proof=put_once,
)
two_returned = after(finished("complete", **RETURNED), finished("failed", unique=False, **RETURNED))
scenario("take-returned", take_all, two_returned, proof=all_taken, repeat=True)
scenario("forget-returned", forget_records, finished("complete", **RETURNED), proof=none_left, repeat=True)


# ---------------------------------------------------------------------- the doctor's repairs


async def heal(actor: Actor) -> None:
    await Doctor(actor.database, actor.settings, patience=0.0).repair(by="chaos")


async def is_sound(actor: Actor) -> None:
    assert (await Doctor(actor.database, actor.settings, patience=0.0).examine()).findings == ()


async def misplaced(actor: Actor) -> None:
    """A job in the journal that nobody has run, and another that has its place."""
    await enqueued()(actor)
    document = await actor.database.collection(QUEUE).find_one({"_id": job_id(actor)})
    assert document is not None
    await actor.database.collection(JOURNAL).insert_one(document)
    await actor.database.collection(QUEUE).delete_one({"_id": job_id(actor)})


async def without_child(actor: Actor) -> None:
    await finished("failed", attempts=1)(actor)
    child = await actor.restart(job_id(actor))
    await actor.database.collection(QUEUE).delete_one({"_id": child})


async def ghostly(actor: Actor) -> None:
    """Lines of a job that does not exist."""
    await started()(actor)
    await actor.logs.append(replace(job(actor), id=ObjectId()), "here", [Line(1, 0.0, "INFO", "boo")])


def spoilt(**fields: Any) -> Step:
    return after(enqueued(), due_at_once(**fields))


scenario("doctor-mends", heal, spoilt(rank=0), proof=is_sound, repeat=True)
scenario("doctor-kills", heal, spoilt(killed_at=utcnow()), proof=is_sound, repeat=True)
scenario("doctor-recalls", heal, misplaced, proof=is_sound, repeat=True)
scenario("doctor-makes-the-child", heal, without_child, proof=is_sound, repeat=True)
scenario("doctor-drops-a-leftover", heal, late_twin, proof=is_sound, repeat=True)
scenario("doctor-forgets-lines", heal, ghostly, proof=is_sound, repeat=True)
scenario("rescue-of-nobodys", rescue, after(started(), due_at_once(lease=None)))


# ---------------------------------------------------------------------- messages


async def send(actor: Actor) -> None:
    await actor.send("k1", "m1")


async def send_malformed(actor: Actor) -> None:
    await Inbox(actor.database).send("DEFAULT", b"{", message_id="m2")


async def ingest(actor: Actor) -> None:
    """Take messages until none waits, as any worker does."""
    inbox, stop = Inbox(actor.database), asyncio.Event()
    work = asyncio.create_task(Ingest(actor.database, actor.settings, actor.queue).run(stop))
    async with asyncio.timeout(30):
        while await inbox.waiting("DEFAULT"):
            await asyncio.sleep(0.01)
    stop.set()
    await work


async def one_job_of_it(actor: Actor) -> None:
    await ingest(actor)
    await recover(actor)
    found = await dumped(actor.database)
    rows = [*found["queue"], *found["journal"]]
    assert {row["request_id"] for row in rows} == {"m1"}
    assert len({row["_id"] for row in rows}) == 1


async def one_dead_letter(actor: Actor) -> None:
    await ingest(actor)
    assert [row["dead"]["reason"] for row in await Inbox(actor.database).dead("DEFAULT")] == ["invalid_json"]


scenario("message-send", send, publish, proof=one_job_of_it, repeat=True)
scenario("message-take", ingest, after(publish, send), proof=one_job_of_it, repeat=True)
scenario("message-bury", ingest, send_malformed, proof=one_dead_letter, repeat=True)


# ---------------------------------------------------------------------- functions as source

SHIPPED = sources.read("def shipped(): return 1")


async def ship(actor: Actor) -> None:
    await ActionStore(actor.database).put(SHIPPED, by="chaos", signer="chaos", signature="0" * 64)


async def revoke_action(actor: Actor) -> None:
    await ActionStore(actor.database).revoke(SHIPPED.key, by="chaos")


async def forget_actions(actor: Actor) -> None:
    await ActionStore(actor.database).forget([SHIPPED.key], utcnow() + LATER)


async def is_shipped(actor: Actor) -> None:
    found = await ActionStore(actor.database).get(SHIPPED.key)
    assert (found["code"], len(found["signatures"])) == (SHIPPED.code, 1)


async def action_is_revoked(actor: Actor) -> None:
    assert (await ActionStore(actor.database).get(SHIPPED.key))["revoked"]["by"] == "chaos"


async def action_is_gone(actor: Actor) -> None:
    with suppress(NotFound):
        raise AssertionError(await ActionStore(actor.database).get(SHIPPED.key))


# ---------------------------------------------------------------------- audit, counts and retention

LATER = timedelta(days=1)  # everything is older than that ago


scenario("ship", ship, proof=is_shipped, repeat=True)
scenario("ship-revoke", revoke_action, ship, proof=action_is_revoked, repeat=True)
scenario("ship-forget", forget_actions, ship, proof=action_is_gone, repeat=True)


async def act_audited(actor: Actor) -> None:
    async with actor.events.action("test.act", "chaos"):
        await actor.controls.pause("job", NAME, by="chaos")


async def act_is_told(actor: Actor) -> None:
    """An action without its line cannot exist."""
    if (await actor.controls.read()).pauses:
        assert (await actor.events.page({"name": "test.act"})).total >= 1


async def count_states(actor: Actor) -> None:
    now = utcnow()
    await actor.events.count(now, 20, {"pending": 1})
    await actor.events.count(now, 20, {"pending": 2})


async def states_are_counted(actor: Actor) -> None:
    now = utcnow()
    (newest, *_) = (await actor.events.history(now - LATER, now)).rows
    assert newest["total"] == 2


def retention(actor: Actor) -> Retention:
    return Retention(actor.queue.store, actor.queue.outbox)


async def retire(actor: Actor) -> None:
    await retention(actor).retire(utcnow() + LATER, 10)


async def is_retired(actor: Actor) -> None:
    assert await actor.database.collection(QUEUE).find_one({}) is None
    assert await actor.database.collection(JOURNAL).find_one({}) is not None


async def nothing_is_left(actor: Actor) -> None:
    """Neither the decoy nor its log; what the checker judges was made afterwards."""
    for table in (JOURNAL, "sys.log"):
        assert await actor.database.collection(table).find_one({"decoy": True}) is None


async def decoy(actor: Actor) -> None:
    """An old job with a line of log, which no client has ever asked for."""
    old = ObjectId()
    row = {"_id": old, "decoy": True, "journaled_at": utcnow() - LATER, "enqueued": {"parent_id": None}}
    await actor.database.collection(JOURNAL).insert_one(row)
    line = {"job": old, "seq": 1, "decoy": True, "created": utcnow() - LATER}
    await actor.database.collection("sys.log").insert_one(line)


async def forget_decoy(actor: Actor) -> None:
    before = utcnow() - timedelta(hours=1)
    ids = await retention(actor).forgettable(before, 10)
    await actor.logs.forget(ids)
    await retention(actor).forget(ids, before)


async def forget_the_rest(actor: Actor) -> None:
    await actor.events.forget(utcnow() + LATER, 10)
    await actor.events.forget_counts(utcnow() + timedelta(days=8), 10)
    await actor.registry.forget(utcnow() + LATER)
    await actor.controls.forget_stops(utcnow() + LATER)
    await actor.users.forget_tokens()


async def the_rest_is_gone(actor: Actor) -> None:
    assert (await actor.events.page({"name": "test.act"})).total == 0


scenario("audited", act_audited, proof=act_is_told, repeat=True)
scenario("count-states", count_states, proof=states_are_counted, repeat=True)
scenario("retire", retire, finished("failed", attempts=1), proof=is_retired, repeat=True)
scenario("forget-jobs", forget_decoy, decoy, proof=nothing_is_left, repeat=True)
scenario(
    "forget-the-rest",
    forget_the_rest,
    after(
        act_audited,
        lambda actor: actor.controls.resume("job", NAME),
        lambda actor: actor.controls.stop("gone", by="ann"),
    ),
    proof=the_rest_is_gone,
    repeat=True,
)
