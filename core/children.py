"""Jobs that a running job asks for: it has no credentials, so they are enqueued in its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from bson import ObjectId

from core4.catalogue import Catalogue
from core4.errors import BadArguments, Conflict, JobExists, JobInvalid, JobNotFound, TooLarge, UnknownJob
from core4.jobs import Job, canonical, derived_id
from core4.orders import make_order
from core4.queues import JobQueue
from core4.results import result_of
from core4.states import State

MOST_DEEP = 50  # jobs that wait for one another


async def enqueue_child(
    queue: JobQueue,
    catalogue: Catalogue,
    parent: Job,
    name: str,
    args: Mapping[str, Any],
    number: int,
    *,
    args_cap: int,
    hostname: str,
) -> dict[str, Any]:
    """Enqueue the child that `parent` asks for, for the `number`-th time with this name and arguments.

    The same number gives the same job, so that it may be repeated, by the next attempt of the parent, too.

    Returns: ``{"enqueued": id}``, or ``{"refused": {reason, detail}}``.
    """
    child_id = derived_id(parent.id, "child", kind_of(name, args), number)
    who = {"args_cap": args_cap, "hostname": hostname}
    child = await _enqueued(queue, catalogue, parent, name, args, child_id, **who)
    return {"enqueued": str(child.id)} if isinstance(child, Job) else child


async def call_child(
    queue: JobQueue,
    catalogue: Catalogue,
    parent: Job,
    name: str,
    args: Mapping[str, Any],
    number: int,
    *,
    args_cap: int,
    hostname: str,
) -> dict[str, Any]:
    """Enqueue the job that the present attempt of `parent` calls, by its `number`-th question.

    The same number in the same attempt gives the same job. That is in the chain of its caller, which
    consumes its result, and stands in line where the caller does: what jobs wait for must not stand behind
    others that are going to wait.

    Returns: ``{"called": id}``, or ``{"refused": {reason, detail}}``.
    """
    depth = parent.document.get("depth", 0) + 1
    if depth > MOST_DEEP:
        detail = f"{MOST_DEEP} jobs wait for one another already: does one call itself?"
        return {"refused": {"reason": "too_deep", "detail": detail}}
    child_id = derived_id(parent.id, "call", parent.fence, number)
    waited = {
        "chain_id": parent.document.get("chain_id") or parent.id,
        "consumed_by": parent.id,
        "fence": parent.fence,
        "place": parent.rank,
        "depth": depth,
    }
    who = {"args_cap": args_cap, "hostname": hostname}
    child = await _enqueued(queue, catalogue, parent, name, args, child_id, **who, **waited)
    return {"called": str(child.id)} if isinstance(child, Job) else child


async def _enqueued(
    queue: JobQueue,
    catalogue: Catalogue,
    parent: Job,
    name: str,
    args: Mapping[str, Any],
    child_id: ObjectId,
    **more: Any,
) -> Job | dict[str, Any]:
    """The job of this id, or a refusal."""
    try:
        entry = await catalogue.get(name)
        if entry is None:
            raise UnknownJob(name)
        order = make_order(
            entry,
            args,
            username=parent.username,
            request_id=parent.document.get("request_id"),
            parent_id=parent.id,
            **more,
        )
        return await queue.enqueue(order, job_id=child_id, once=True)
    except (BadArguments, JobExists, JobInvalid, TooLarge, UnknownJob) as refused:
        return {"refused": {"reason": refused.code, "detail": refused.detail}}


async def ended_children(queue: JobQueue, ids: Sequence[ObjectId]) -> dict[ObjectId, dict[str, Any]]:
    """What callers are told of those of these jobs that have ended.

    Returns: by id ``{"returned": value}``, or ``{"raised": facts}`` as `core4.errors.CallFailed` has them.
    """
    return {job_id: outcome_of(job_id, job) for job_id, job in (await queue.store.ended(ids)).items()}


def outcome_of(job_id: ObjectId, job: Job | None) -> dict[str, Any]:
    """What a caller is told of one that has ended, or of which (None) nobody knows any more."""
    if job is None:
        gone = {"name": "the job", "state": "gone", "error_cat": None, "message": "nobody knows it any more"}
        return {"raised": {"job_id": str(job_id), **gone}}
    if job.state is State.COMPLETE:
        return {"returned": job.document.get("result")}
    error = result_of(job.document)["error"]
    told = {"state": error["state"], "error_cat": error["category"], "message": error["message"]}
    return {"raised": {"job_id": str(job_id), "name": job.name, **told}}


async def kill_child(queue: JobQueue, parent: Job, child_id: ObjectId) -> None:
    """End a job that `parent` has called and does not wait for any more."""
    with suppress(Conflict, JobNotFound):  # it has just ended
        await queue.kill(child_id, by=f"job {parent.id}")


def kind_of(name: str, args: Mapping[str, Any]) -> str:
    """What two requests share that only their number tells apart."""
    try:
        return canonical([name, dict(args)])
    except (ValueError, RecursionError):
        return name  # it is refused anyway
