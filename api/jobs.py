"""Handlers of `/job`: enqueue, look up, follow, kill, restart and remove jobs."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TypeVar

from aiohttp import web
from bson import ObjectId

from core4.api.envelope import page_reply, reply
from core4.api.hub import REREAD
from core4.api.keys import (
    ACTIONS,
    CATALOGUE,
    CONTROLS,
    HUB,
    LOGS,
    QUEUE,
    REQUEST_ID,
    SEATS,
    SERVED,
    SETTINGS,
    USER,
    WORKERS,
)
from core4.api.streams import follow_job, job_headers
from core4.bookmarks import behind, bookmark, total_order, unreadable
from core4.database import Page
from core4.errors import BadArguments, BadRequest, Forbidden, JobNotFound, KeyReused, UnknownJob
from core4.filters import (
    CATALOGUE_FIELDS,
    JOB_FIELDS,
    LOG_FIELDS,
    compile_filter,
    compile_search,
    compile_sort,
    matches,
)
from core4.functions import job_name
from core4.jobs import ROW_FIELDS, Job, JobOrder, canonical, derived_id, utcnow, view
from core4.options import OPTIONS
from core4.orders import make_order
from core4.permissions import Rights
from core4.results import has_ended
from core4.states import WAITING, State
from core4.waits import heard

T = TypeVar("T")
Args = dict[str, Any]
Document = Mapping[str, Any]

UNAUTHORIZED = "UnauthorizedJob"
IDEMPOTENCY_KEY = "Idempotency-Key"
# What a row or document tells of a job beside its name and arguments.
_TELLING = ("last_error", "result", "sources", "history", "doc", "request_id")
_CATALOGUE_ROW = (
    *("_id", "author", "created_at", "updated_at", "doc", "schedule", "tag"),
    *("namespace", "kind", "schema", "options", "unique"),
)
_SHOWN = 20  # prerequisites that a blocked job's document names
_LOG_ORDER = {"_id", "created", "epoch", "seq"}
_LOG_DIGITS = 18  # of a number that the database can hold


# ---------------------------------------------------------------------- enqueue


async def enqueue(request: web.Request, args: Args) -> web.StreamResponse:
    """POST job: a new job, followed unless `follow` is false."""
    if args["follow"]:
        request.app[SEATS].check(request[USER].name)  # before there is a job that nobody was told of
    try:
        job, replayed = await enqueue_one(request, args, idempotency_key(request))
    except UnknownJob:  # here, and not for each of a batch: the whole catalogue is looked through
        raise await unknown(request, args["qual_name"]) from None
    if args["follow"]:
        return await follow_job(request, job.id)
    flash = await unserved(request, job.name, job.namespace)
    headers = job_headers(job.id) | ({"Idempotent-Replayed": "true"} if replayed else {})
    return reply(request, str(job.id), flash=flash, headers=headers)


async def enqueue_one(request: web.Request, args: Args, key: str | None) -> tuple[Job, bool]:
    """The job that `args` ask for, and whether an earlier request under this key has made it.

    Raises: Forbidden, UnknownJob, KeyReused, and what `make_order` and `JobQueue.enqueue` raise.
    """
    order, began = await order_of(request, args, keyed=key is not None), utcnow()
    # The id is ours: should the reply of the database get lost, it can be asked for.
    job_id = derived_id("api", request[USER].name.lower(), key) if key else ObjectId()
    job = await whole(request.app[QUEUE].enqueue(order, job_id=job_id, once=key is not None))
    if key is not None and job.document.get("request_hash") != order.request_hash:
        raise KeyReused(f"the Idempotency-Key belongs to another request: it made job [{job.id}]")
    # A client may repeat the request's id, too: then it is an older job by its time.
    return job, job.document["request_id"] != order.request_id or job.document["enqueued"]["at"] < began


async def order_of(request: web.Request, args: Args, *, keyed: bool = False) -> JobOrder:
    """What `args` ask for, as the queue takes it.

    Raises: Forbidden, UnknownJob, and what `make_order` raises.
    """
    user, name = request[USER], args["qual_name"]
    if not user.may.may_execute(name):
        raise Forbidden(f"user [{user.name}] has no right to execute job [{name}]")
    entry = await request.app[CATALOGUE].get(name)
    if entry is None:
        raise UnknownJob(name)
    waits = await _dependencies(request, args.get("dependencies") or ())
    return _order(request, entry, args, waits, keyed=keyed)


async def unknown(request: web.Request, name: str) -> UnknownJob:
    """What is told of a name that is not there: which of those that one may enqueue are like it."""
    return UnknownJob(name, await request.app[CATALOGUE].similar(name, request[USER].may.may_execute))


def idempotency_key(request: web.Request) -> str | None:
    """The key under which a client may send the same request again: it makes one job.

    It holds as long as its job is in the queue or the journal.
    """
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise BadRequest(f"{IDEMPOTENCY_KEY} has 1 to 255 printable ASCII characters")
    return key


async def _dependencies(request: web.Request, ids: Sequence[Any]) -> list[ObjectId]:
    """The jobs that are to complete before; one that the user may not read is none.

    Raises: BadArguments.
    """
    found, errors = [], []
    for index, text in enumerate(ids):
        valid = isinstance(text, str) and len(text) == 24 and ObjectId.is_valid(text)
        stored = await request.app[QUEUE].store.document(ObjectId(text)) if valid else None
        if stored is not None and request[USER].may.may_read(stored[0]["name"]):
            found.append(ObjectId(text))
        else:
            errors.append(
                {"pointer": f"/dependencies/{index}", "message": f"no job has the id {text!r:.100}"}
            )
    if errors:
        raise BadArguments(errors)
    return found


def _order(
    request: web.Request, entry: Document, args: Args, waits: Sequence[ObjectId], *, keyed: bool
) -> JobOrder:
    return make_order(
        entry,
        args["args"],
        args_cap=request.app[SETTINGS].args_cap,
        options={name: args[name] for name in OPTIONS if name in args},
        namespace=args.get("namespace"),
        username=request[USER].name,
        hostname=socket.gethostname(),
        request_id=request[REQUEST_ID],
        request_hash=_request_hash(args) if keyed else None,
        dependencies=waits,
    )


def _request_hash(args: Args) -> str:
    """What two requests under one key must share; whether they follow the job is no part of it."""
    wanted = {name: value for name, value in args.items() if name not in ("follow", "key")}
    return hashlib.sha256(canonical(wanted).encode()).hexdigest()


async def unserved(request: web.Request, name: str, namespace: str) -> list[str]:
    """A warning if no worker would run such a job now."""
    if await request.app[SERVED].get((name, namespace)):
        return []
    return [
        f"no worker is up that runs [{name}] in namespace [{namespace}]: the job waits until one is started"
    ]


# ---------------------------------------------------------------------- listings


async def list_queue(request: web.Request, args: Args) -> web.Response:
    """GET job, GET or POST job/queue: jobs in the queue."""
    return await _list(request, args, journal=False)


async def list_journal(request: web.Request, args: Args) -> web.Response:
    """GET job/journal: finished and removed jobs."""
    return await _list(request, args, journal=True)


async def _list(request: web.Request, args: Args, *, journal: bool) -> web.Response:
    rights = request[USER].may
    where, private = selection(args)
    order, order_private = compile_sort(args["sort"], JOB_FIELDS)
    if not rights.cop and (private or order_private):
        # Who asks for names or arguments gets only jobs he may read: else he could count the others.
        await limit_to(request, where, rights.may_read)
    order = total_order(order)
    page = await request.app[QUEUE].store.page(
        where,
        behind=behind(args["cursor"], order, JOB_FIELDS) if args["cursor"] else None,
        sort=order,
        page=args["page"],
        per_page=args["per_page"],
        journal=journal,
        fields=_fields(order),
        args_room=request.app[SETTINGS].page_args,
        counted=args["cursor"] is None,
    )
    now = datetime.now(UTC)
    rows = [_row(document, rights, journal=journal, now=now) for document in page.rows]
    following = bookmark(page.rows[-1], order) if page.more else None
    return page_reply(request, page, rows, flash=_warnings(page, rows), next=following)


def _fields(order: Sequence[tuple[str, int]]) -> list[str]:
    """What is read of a row: what it shows, and what it is sorted by."""
    shown = {name.partition(".")[0] for name in ROW_FIELDS}
    return [*ROW_FIELDS, *(path for path, _ in order if path.partition(".")[0] not in shown)]


def _warnings(page: Page, rows: Sequence[Document]) -> list[str]:
    found = []
    if page.at_least:
        found.append(f"more than {page.total} jobs match, they are not counted: [next] leads to all of them")
    if left_out := sum("omitted" in row for row in rows):
        text = f"the arguments of {left_out} jobs are left out: ask for fewer rows, or for a job itself"
        found.append(text)
    return found


def selection(args: Args) -> tuple[dict[str, dict[str, Any]], bool]:
    """What `filter` and `search` mean to the database, and whether they look at what is private.

    Raises: BadRequest.
    """
    query = compile_filter(args["filter"], JOB_FIELDS)
    where = {path: dict(term) for path, term in query.where.items()}
    if args["search"]:
        where.setdefault("name", {}).update({"$regex": compile_search(args["search"]), "$options": "i"})
    return where, query.private or bool(args["search"])


async def limit_to(
    request: web.Request, where: dict[str, dict[str, Any]], allowed: Callable[[str], bool]
) -> None:
    """Narrow `where` to the names that are `allowed`, those of functions among them."""
    known = [entry["_id"] for entry in await request.app[CATALOGUE].all()]
    known += [job_name(method) for method in await request.app[ACTIONS].methods()]
    names = [name for name in known if allowed(name)]
    term = where.setdefault("name", {})
    asked = term.get("$in")
    term["$in"] = names if asked is None else [name for name in names if name in asked]


def _row(document: Document, rights: Rights, *, journal: bool, now: datetime) -> dict[str, Any]:
    row = view(document, journal=journal, now=now)
    return row if rights.may_read(document["name"]) else masked(row)


def masked(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only those may see who may read the job."""
    hidden = {name: None for name in _TELLING if name in row}
    row.pop("omitted", None)
    prog = {**row["prog"], "message": None}
    return {**row, **hidden, "qual_name": UNAUTHORIZED, "args": None, "prog": prog}


async def count(request: web.Request, args: Args) -> web.Response:
    """GET job/count: jobs in the queue per state, and in the journal."""
    queue = request.app[QUEUE]
    counts: dict[str, int] = {**dict.fromkeys(State, 0), **await queue.store.counts()}
    return reply(request, {**counts, "journal": await queue.store.journaled()})


async def list_catalogue(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/list: what the user may enqueue."""
    query = compile_filter(args["filter"], CATALOGUE_FIELDS, args=False)
    order, _ = compile_sort(args["sort"], CATALOGUE_FIELDS)
    if args["search"]:
        compile_search(args["search"])
    # As in core4, a filter on the name beats the search.
    search = None if "_id" in query.where else args["search"]
    page = await request.app[CATALOGUE].page(
        allowed=request[USER].may.may_execute,
        where=lambda entry: matches(query.where, entry),
        search=search or None,
        sort=order or [("_id", 1)],
        page=args["page"],
        per_page=args["per_page"],
    )
    served = [name for worker in await request.app[WORKERS].up() for name in worker.get("jobs", ())]
    rows = [
        {**{key: entry.get(key) for key in _CATALOGUE_ROW}, "workers": served.count(entry["_id"])}
        for entry in page.rows
    ]
    return page_reply(request, page, rows)


# ---------------------------------------------------------------------- one job


async def detail(request: web.Request, args: Args) -> web.Response:
    """GET job/<_id>, GET job/detail/<_id>: all that is stored of a job."""
    _, document, journal = await _find(request, "r")
    row = view(document, journal=journal, now=datetime.now(UTC))
    if document["state"] in WAITING and not journal:
        controls = await request.app[CONTROLS].read()
        held = controls.of_job(document["name"], document["namespace"], document.get("worker"))
        row["paused"] = vars(held) if held else None
    if document["state"] == State.BLOCKED and not journal:
        row["waits_for"] = await _waits_for(request, document.get("open_deps") or ())
    return reply(request, row)


async def _waits_for(request: web.Request, ids: Sequence[ObjectId]) -> list[dict[str, Any]]:
    """The first of the jobs that a blocked one waits for."""
    rows = []
    for job_id in ids[:_SHOWN]:
        found = await request.app[QUEUE].store.document(job_id)
        if found is not None:
            name, state = found[0]["name"], found[0]["state"]
            shown = name if request[USER].may.may_read(name) else UNAUTHORIZED
            rows.append({"_id": job_id, "qual_name": shown, "state": state})
    return rows


async def missing_id(request: web.Request, args: Args) -> web.Response:
    """GET job/detail without an id."""
    raise BadRequest("Missing argument _id")


async def follow(request: web.Request, args: Args) -> web.StreamResponse:
    """GET job/follow/<_id>: states and log of a job as they come."""
    job_id = await _readable(request)
    return await follow_job(request, job_id, last_event_id=args["last_event_id"])


async def log_lines(request: web.Request, args: Args) -> web.StreamResponse:
    """GET job/log/<_id>: a page of the job's log, by number or cursor, or with `follow` its stream."""
    job_id = await _readable(request)
    if args["follow"]:
        return await follow_job(request, job_id, states=False, last_event_id=args["last_event_id"])
    descending, per_page = _log_descending(args["sort"]), args["per_page"]
    query = compile_filter(args["filter"], LOG_FIELDS, args=False)
    # Without an index on lines they are filtered here and not in the database.
    keep = (lambda line: matches(query.where, line)) if query.where else None
    logs = request.app[LOGS]
    if args["cursor"] is None:
        page = await logs.page(job_id, page=args["page"], per_page=per_page, descending=descending, keep=keep)
        return page_reply(request, page, page.rows)
    after = _log_cursor(args["cursor"], descending=descending)
    rows = await logs.tail(job_id, after, limit=per_page + 1, keep=keep)
    page = Page(rows[:per_page], 0, 0, per_page, counted=False)
    following = str(page.rows[-1]["seq"]) if len(rows) > per_page else None
    return page_reply(request, page, page.rows, next=following)


def _log_cursor(text: str, *, descending: bool) -> int:
    """The number of the last line that somebody has read.

    Raises: BadRequest.
    """
    if descending:
        raise BadRequest("parameter [cursor] of a log goes with ascending lines only")
    if not text:
        return 0
    if len(text) > _LOG_DIGITS or not (text.isascii() and text.isdigit()):
        raise unreadable()
    return int(text)


def _log_descending(sort: list[Any]) -> bool:
    match sort:
        case []:
            return False
        case [[str(field), int(direction)]] if field in _LOG_ORDER and direction in (1, -1):
            return direction == -1
    raise BadRequest(f"parameter [sort] of a log expected [[field, 1 or -1]] with {sorted(_LOG_ORDER)}")


async def kill(request: web.Request, args: Args) -> web.Response:
    """PUT job/kill/<_id>: end a job; waits a moment for the outcome."""
    job_id, _, _ = await _find(request, "x")
    if args["chain"]:
        return await _kill_chain(request, job_id)
    job, changed = await whole(request.app[QUEUE].kill(job_id, by=request[USER].name))
    document: Document = job.document
    if job.state is State.RUNNING:
        document = await wait_for(request, job_id, _kill_wait(request)) or document
    return _changed(request, document, changed=changed)


async def _kill_chain(request: web.Request, job_id: ObjectId) -> web.Response:
    user, queue = request[USER], request.app[QUEUE]
    for job in await queue.open_chain(job_id):
        if not user.may.may_execute(job.name):
            raise Forbidden(f"user [{user.name}] has no right to execute job [{job.id}] of the chain")
    told = await whole(queue.kill_chain(job_id, by=user.name))
    rows = [{"_id": job.id, "state": job.state, "changed": changed} for job, changed in told]
    own = next((row for row in rows if row["_id"] == job_id), None)
    if own is None:  # it has ended before
        own = {"_id": job_id, "state": (await queue.store.get(job_id)).state, "changed": False}
    return reply(request, True, job=own, jobs=rows)


async def remove(request: web.Request, args: Args) -> web.Response:
    """PUT job/remove/<_id>: move a job to the journal."""
    job_id, _, _ = await _find(request, "x")
    job = await whole(request.app[QUEUE].remove(job_id, by=request[USER].name))
    return _changed(request, job.document, changed=True)


async def restart(request: web.Request, args: Args) -> web.StreamResponse:
    """PUT job/restart/<_id>: run a job again, followed unless `follow` is false."""
    job_id, _, _ = await _find(request, "x")
    if args["follow"]:
        request.app[SEATS].check(request[USER].name)
    child_id = await whole(
        request.app[QUEUE].restart(job_id, by=request[USER].name, hostname=socket.gethostname())
    )
    # While a kill is under way the new job is made when the old one has ended.
    await wait_for(request, child_id, _kill_wait(request), ended=False)
    if args["follow"]:
        return await follow_job(request, child_id)
    return reply(request, str(child_id), headers=job_headers(child_id))


async def unknown_action(request: web.Request, args: Args) -> web.Response:
    """Whatever else is asked of jobs."""
    action = request.match_info["action"]
    raise web.HTTPMethodNotAllowed(
        request.method, ["GET", "POST", "PUT"], text=f"unknown action {request.method} [{action[:100]}]"
    )


def _changed(request: web.Request, document: Document, *, changed: bool) -> web.Response:
    job = {"_id": document["_id"], "state": document["state"], "changed": changed}
    return reply(request, True, job=job)


# ---------------------------------------------------------------------- inside


async def _find(request: web.Request, mode: str) -> tuple[ObjectId, Document, bool]:
    """The job that the path names, if the user may read (`r`) or execute (`x`) it.

    Raises: JobNotFound, Forbidden.
    """
    return await find(request, request.match_info["_id"], mode)


async def _readable(request: web.Request) -> ObjectId:
    """The id of a job that the user may read. Raises: as `find`."""
    job_id, _, _ = await find(request, request.match_info["_id"], "r", together=True)
    return job_id


async def find(
    request: web.Request, text: str, mode: str, *, together: bool = False
) -> tuple[ObjectId, Document, bool]:
    """The job of the id that `text` may be, if the user may read (`r`) or execute (`x`) it.

    `together`: an answer that others wait for already will do; followers come in crowds.

    Raises: JobNotFound, Forbidden.
    """
    if len(text) != 24 or not ObjectId.is_valid(text):
        raise JobNotFound(text[:100])
    job_id = ObjectId(text)
    look = request.app[HUB].find if together else request.app[QUEUE].store.document
    found = await look(job_id)
    if found is None:
        raise JobNotFound(text)
    document, journal = found
    user = request[USER]
    allowed = user.may.may_execute if mode == "x" else user.may.may_read
    if not allowed(document["name"]):
        verb = "execute" if mode == "x" else "read"
        raise Forbidden(f"user [{user.name}] has no right to {verb} job [{text}]")
    return job_id, document, journal


def _kill_wait(request: web.Request) -> float:
    return request.app[SETTINGS].kill_wait


async def wait_for(
    request: web.Request, job_id: ObjectId, seconds: float, *, ended: bool = True
) -> Document | None:
    """The document once it exists and, if so wished, has ended; what there is after `seconds`."""
    deadline = monotonic() + seconds
    with request.app[HUB].hints(job_id) as hint:
        while True:
            hint.clear()
            found = await request.app[QUEUE].store.document(job_id)
            if found is not None and (not ended or has_ended(found[0])):
                return found[0]
            left = deadline - monotonic()
            if left <= 0:
                return found[0] if found else None
            await heard(hint, min(left, REREAD))


_unfinished: set[asyncio.Task[Any]] = set()


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, even if the client hangs up in the middle of it."""
    task = asyncio.ensure_future(work)
    _unfinished.add(task)
    task.add_done_callback(_unfinished.discard)
    return await asyncio.shield(task)
