"""Handlers of `/function`: functions that are sent as source, their jobs, and what was sent.

Whoever sends one needs the right `code`, and that to execute jobs of the function's name; the source is
checked by its syntax tree here and is run by workers only, which check it again. In answers jobs have
myjobs' fields.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from aiohttp import web
from bson import ObjectId

from core4 import actions, functions, sources
from core4.api.encoding import dumps
from core4.api.envelope import page_reply, reply
from core4.api.events import audited
from core4.api.jobs import find, idempotency_key, unserved, wait_for, whole
from core4.api.keys import ACTIONS, EVENTS, LOGS, QUEUE, REQUEST_ID, SEATS, SETTINGS, USER
from core4.api.streams import job_headers
from core4.errors import BadRequest, Conflict, Forbidden, JobExists, JobNotFound, KeyReused
from core4.jobs import Job, canonical, derived_id, utcnow
from core4.options import DEBUG
from core4.results import has_ended
from core4.retention import Retention

Args = dict[str, Any]
Document = Mapping[str, Any]

ROOM = 4 * 1024 * 1024  # bytes of results in one answer; what is left is asked for again
TOGETHER = 20  # jobs that are looked up at the same time
PORTION = 200  # jobs that one reset deletes
_NAMESPACES = [functions.NAMESPACE, DEBUG]
_NEWEST = [("_id", -1)]


# ---------------------------------------------------------------------- schedule


async def schedule(request: web.Request, args: Args) -> web.Response:
    """POST function: call a function that comes as source; its job."""
    user = request[USER]
    _require_on(request)
    if not user.may.code:  # before anything is made of the source
        raise Forbidden(f"user [{user.name}] has no right to send functions as source; the right is `code`")
    source = sources.sent(args["code"])
    name = functions.job_name(source.method)
    _require(request, name, "x")
    dependencies = [(await find(request, text, "r"))[0] for text in args["dependencies"]]
    key = idempotency_key(request)
    order = functions.make_order(
        source,
        args["kwargs"],
        args_cap=request.app[SETTINGS].args_cap,
        by=user.name,
        signer=args["signer"],
        label=args["name"],
        category=args["category"],
        timeout=args["timeout"],
        dependencies=dependencies,
        die=args["die"],
        return_queues=args["return_queues"],
        hostname=socket.gethostname(),
        request_id=request[REQUEST_ID],
        request_hash=_request_hash(args) if key else None,
    )
    _, new = await request.app[ACTIONS].put(
        source,
        by=user.name,
        signer=args["signer"],
        signature=args["signature"],
        actorname=args["actorname"],
    )
    if new:
        about = {"action": source.key, "method": source.method, "signer": args["signer"]}
        await request.app[EVENTS].tell("function.new", user.name, key=f"function.{source.key}", **about)
    job_id = derived_id("function", user.name.lower(), key) if key else ObjectId()
    job = await _enqueued(request, order, job_id, once=key is not None)
    flash = await unserved(request, functions.SERVES, order.namespace)
    return reply(request, functions.record(job.document), flash=flash, headers=job_headers(job.id))


async def _enqueued(request: web.Request, order: Any, job_id: ObjectId, *, once: bool) -> Job:
    try:
        job = await whole(request.app[QUEUE].enqueue(order, job_id=job_id, once=once))
    except JobExists as taken:
        raise Conflict(
            f"a job named [{order.label}] has not ended yet: [{taken.job_id}]; a name is free again when its "
            "job has ended",
            job_id=str(taken.job_id),
        ) from None
    if once and job.document.get("request_hash") != order.request_hash:
        raise KeyReused(f"the Idempotency-Key belongs to another request: it made job [{job.id}]")
    return job


def _request_hash(args: Args) -> str:
    return hashlib.sha256(canonical(args).encode()).hexdigest()


def _require_on(request: web.Request) -> None:
    if not request.app[SETTINGS].functions:
        raise Forbidden("this API takes no functions as source: its operator has not set CORE4_FUNCTIONS")


def _require(request: web.Request, name: str, mode: str) -> None:
    user = request[USER]
    allowed = user.may.may_execute if mode == "x" else user.may.may_read
    if not allowed(name):
        verb = "execute" if mode == "x" else "read"
        raise Forbidden(f"user [{user.name}] has no right to {verb} job [{name}]")


# ---------------------------------------------------------------------- look and find


async def look(request: web.Request, args: Args) -> web.Response:
    """POST function/job: jobs in myjobs' fields, when all have ended or the time is up; as many as fit."""
    deadline = monotonic() + args["timeout"]
    rows: list[Args] = []
    room = ROOM
    for start in range(0, len(args["job_ids"]), TOGETHER):
        # Not all at once: together their results may be more than fits into memory.
        for job_id, document in await _some(request, args["job_ids"][start : start + TOGETHER]):
            row = functions.record(await _ended(request, job_id, document, deadline))
            room -= len(dumps([row["kwargs"], row["result"]])) + len(str(row["error"]))
            if rows and room < 0:
                return reply(request, rows)
            rows.append(row)
    return reply(request, rows)


async def _some(request: web.Request, ids: Sequence[str]) -> list[tuple[ObjectId, Document]]:
    """The jobs of these ids, each of which the user may read.

    Raises: JobNotFound, Forbidden.
    """
    found = await asyncio.gather(*(find(request, text, "r") for text in ids))
    return [(job_id, document) for job_id, document, _ in found]


async def _ended(request: web.Request, job_id: ObjectId, document: Document, deadline: float) -> Document:
    left = deadline - monotonic()
    if has_ended(document) or left <= 0:
        return document
    with request.app[SEATS].taken(request[USER].name, job_id=str(job_id)):
        return await wait_for(request, job_id, left) or document


async def find_jobs(request: web.Request, args: Args) -> web.Response:
    """POST function/find: ids of functions' jobs by name, category, state or method, newest first."""
    where: Args = {
        "namespace": {"$in": _NAMESPACES},
        "function": {"$exists": True},
        **functions.condition(args["state"]),
    }
    if args["name"]:
        where["label"] = args["name"]
    if args["category"] is not None:
        where["category"] = args["category"] or None
    await _limit_to(request, where, args["method"])
    if args["before"]:
        where["_id"] = {"$lt": _object_id(args["before"])}
    pages = [
        await request.app[QUEUE].store.page(
            where, sort=_NEWEST, per_page=args["limit"], journal=journal, fields=["_id"], counted=False
        )
        for journal in (False, True)
    ]
    ids = sorted({row["_id"] for page in pages for row in page.rows}, reverse=True)
    return reply(request, ids[: args["limit"]])


async def _limit_to(request: web.Request, where: Args, method: str) -> None:
    """Only jobs of this method, if one is named, and only those that the user may read."""
    may = request[USER].may
    if may.cop:
        if method:
            where["name"] = functions.job_name(method)
        return
    methods = [method] if method else await request.app[ACTIONS].methods()
    names = [functions.job_name(each) for each in methods]
    where["name"] = {"$in": [name for name in names if may.may_read(name)]}


def _object_id(text: str) -> ObjectId:
    if len(text) != 24 or not ObjectId.is_valid(text):
        raise BadRequest("parameter [before] expected an id of 24 hexadecimal digits")
    return ObjectId(text)


async def reset(request: web.Request, args: Args) -> web.Response:
    """PUT function/reset: end all jobs of functions and delete some of them; for administrators."""
    user = request[USER]
    if not user.may.cop:
        raise Forbidden(f"user [{user.name}] has no right to delete the jobs of functions")
    return reply(request, await audited(request, "function.reset", lambda: _reset(request)))


async def _reset(request: web.Request) -> Args:
    queue, where = request.app[QUEUE], {"namespace": {"$in": _NAMESPACES}, "function": {"$exists": True}}
    deadline = monotonic() + request.app[SETTINGS].kill_wait
    open_ids = await queue.store.ids(where, limit=PORTION)
    for job_id in open_ids:
        try:
            await queue.kill(job_id, by=request[USER].name)
        except (Conflict, JobNotFound):
            continue  # it has ended meanwhile
    for job_id in open_ids:
        await wait_for(request, job_id, max(deadline - monotonic(), 0.0))
    await queue.outbox.sweep()
    ids = await queue.store.ids(where, limit=PORTION, journal=True)
    await request.app[LOGS].forget(ids)
    deleted = await Retention(queue.store, queue.outbox).forget(ids, utcnow())
    left = await queue.store.count(where) + await queue.store.count(where, journal=True)
    gone = 0 if left else await _forget_actions(request)
    return {"killed": len(open_ids), "deleted": deleted, "actions": gone, "left": left}


async def _forget_actions(request: web.Request) -> int:
    store, now, gone = request.app[ACTIONS], utcnow(), 0
    while keys := await store.forgettable(now, PORTION):
        gone += await store.forget(keys, now)
    return gone


# ---------------------------------------------------------------------- actions


async def list_actions(request: web.Request, args: Args) -> web.Response:
    """GET function/action: the functions that were sent, newest first, without their source."""
    where: Args = {}
    if not request[USER].may.cop:
        may = request[USER].may
        names = await request.app[ACTIONS].methods()
        where["methodname"] = {"$in": [name for name in names if may.may_read(functions.job_name(name))]}
    page = await request.app[ACTIONS].page(where, page=args["page"], per_page=args["per_page"])
    return page_reply(request, page, [actions.view(each, code=False) for each in page.rows])


async def show_action(request: web.Request, args: Args) -> web.Response:
    """GET function/action/<key>: one of them with its source, and who has signed it."""
    return reply(request, actions.view(await _action(request, "r")))


async def revoke(request: web.Request, args: Args) -> web.Response:
    """PUT function/revoke/<key>: let it run no more; jobs that wait for it end in error."""
    key, by = (await _action(request, "x"))["_id"], request[USER].name
    store, reason = request.app[ACTIONS], args["reason"]
    changed = await audited(
        request,
        "function.revoke",
        lambda: store.revoke(key, by=by, reason=reason),
        action=key,
        reason=reason,
    )
    return reply(request, actions.view(changed))


async def _action(request: web.Request, mode: str) -> Document:
    """The action that the path names, if the user may read (`r`) or execute (`x`) its jobs.

    Raises: NotFound, Forbidden.
    """
    found = await request.app[ACTIONS].get(request.match_info["key"])
    _require(request, functions.job_name(found["methodname"]), mode)
    return found
