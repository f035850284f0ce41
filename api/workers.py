"""The door for workers that have no database: they claim, renew, log, report and finish over HTTP.

Each operation is one call of the very store that a worker with a database calls, so leases and fences are
the same. A worker signs in with a proof that it knows the shared secret (`core4.handshake`), and has from
then on a token of its own: it may write the jobs that it holds itself, and no other. Requests are JSON;
answers with job documents are BSON, because JSON has no ids and times.

Not in the description for clients: both ends are of one release.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import UnionType
from typing import Any

import bson
from aiohttp import web
from bson import ObjectId
from marshmallow import Schema, ValidationError, fields, validate

from core4 import handshake, identifiers
from core4.api import arguments
from core4.api.addresses import client_address, neighbourhood
from core4.api.entries import accepted
from core4.api.envelope import reply
from core4.api.keys import (
    ACTIONS,
    BASE,
    CATALOGUE,
    CLOSING,
    CONTROLS,
    DATABASE,
    EVENTS,
    FEED,
    LOGS,
    QUEUE,
    SCHEDULES,
    SETTINGS,
    SIGN_INS,
    USERS,
    WORKERS,
)
from core4.changes import Change
from core4.children import call_child, enqueue_child, kill_child, outcome_of
from core4.context import result_problem
from core4.controls import CONTROL
from core4.database import Document
from core4.errors import BadRequest, Forbidden, JobNotFound, LeaseLost, TooLarge, Unauthenticated
from core4.filters import storable
from core4.functions import NAMESPACE as FUNCTIONS
from core4.functions import RESULTS
from core4.jobs import NAMESPACE, Job, Kind, Owner, seq_fence
from core4.logs import LEVELS, SOURCES, Line
from core4.registry import LIVING
from core4.retries import Outcome
from core4.schedules import publish_declared
from core4.schemas import AnyText, Arguments, Bool, Dict, Int, List, NoArguments, Number, Text
from core4.store import QUEUE as QUEUE_COLLECTION

BSON = "application/bson"
MIB = 1024 * 1024
_ESCAPED = 6  # bytes that one may take in JSON
_LONGEST_WAIT = 60.0
_LONGEST_DELAY = 31 * 86400.0  # seconds
_YEAR_10000 = 253_402_300_800  # the first second that is no time any more
_INT32 = validate.Range(0, 2**31 - 1)
_INT64 = validate.Range(0, 2**63 - 1)

WORKER = web.RequestKey("worker", dict[str, Any])
Args = dict[str, Any]
Handler = Callable[[web.Request, Args], Awaitable[Any]]


def _must(field: type[fields.Field[Any]], **options: Any) -> fields.Field[Any]:
    return field(required=True, error_messages={"required": "Missing argument"}, **options)


class _Id(Text):
    def read(self, value: Any) -> Any:
        text = super().read(value)
        if not ObjectId.is_valid(text):
            raise ValueError
        return ObjectId(text)


def _namespaces(names: list[Any]) -> None:
    if not all(isinstance(name, str) and NAMESPACE.fullmatch(name) for name in names):
        raise ValidationError("parameter [namespaces] expected names of A-Z a-z 0-9 _ -")


def _names(names: list[Any]) -> None:
    if not all(isinstance(name, str) and len(name) <= 500 and storable(name) for name in names):
        raise ValidationError("a list of names is expected")


def _rooms(rooms: dict[str, Any]) -> None:
    _names(list(rooms))
    if not all(type(room) is int and 0 <= room < 2**31 for room in rooms.values()):
        raise ValidationError("numbers of jobs from 0 to 2,147,483,647 are expected")


def _texts(values: list[Any] | None) -> None:
    if not all(isinstance(value, str) for value in values or ()):
        raise ValidationError("a list of texts is expected")


class KindWords(Arguments):
    """How it was started, see `core4.jobs.Kind`."""

    type = _must(Text, validate=validate.OneOf(["inprocess", "subprocess", "tmux"]))
    nr = Int(load_default=None, allow_none=True, validate=validate.Range(1, 1_000_000))
    timeout = Number(load_default=None, allow_none=True)
    debug = Bool(load_default=False)
    launch = Text(load_default=None, allow_none=True, validate=validate.Length(1, 200))


class LoginWords(Arguments):
    """What a worker says of itself; `proof` covers the rest."""

    challenge = _must(Text)
    owner = _must(Text, validate=validate.Regexp(r"[0-9a-f]{32}\Z", error="parameter [owner] is no id"))
    name = _must(Text, validate=validate.Length(1, 400))
    hostname = _must(Text, validate=validate.Length(1, 255))
    pid = _must(Int, validate=_INT32)
    kind = _must(Dict)
    namespaces = _must(List, validate=_namespaces)
    token = _must(Text, validate=validate.Regexp(r"[0-9a-f]{64}\Z", error="parameter [token] is no hash"))
    proof = _must(Text)


class Registration(Arguments):
    """What a worker can do."""

    slots = _must(Int, validate=validate.Range(1, 10_000))
    jobs = _must(List, validate=_names)
    version = _must(Text, validate=validate.Length(1, 50))


class Entries(Arguments):
    """What it can run, as `core4.discovery` describes it."""

    entries = _must(List)


class Names(Arguments):
    """The jobs that it runs, and what is wrong with those of its files that it cannot use."""

    jobs = _must(List, validate=_names)
    broken = List(
        load_default=list, validate=[_names, validate.Length(max=100, error="at most 100 are expected")]
    )


class Beat(Arguments):
    """How it is."""

    running = _must(Int, validate=_INT32)
    draining = _must(Bool)
    gate = Text(load_default=None, allow_none=True)
    paused = _must(Bool)


class Wait(Arguments):
    """How long to wait for news, in seconds."""

    seconds = _must(Number, validate=validate.Range(0, _LONGEST_WAIT))


class Claim(Arguments):
    """What it has room for."""

    limit = _must(Int, validate=validate.Range(1, 1000))
    rooms = _must(Dict, validate=_rooms)
    forced = _must(Bool)
    awaited = _must(Bool)


class Held(Arguments):
    """A job that it holds."""

    job_id = _must(_Id)
    lease_id = _must(Text)


class Release(Held):
    """Why it gives a job back."""

    reason = _must(AnyText)
    delay = _must(Number, validate=validate.Range(0, _LONGEST_DELAY))
    evicted = _must(Int, validate=_INT32)


class Start(Held):
    """The process of the job."""

    pid = _must(Int, validate=_INT32)


class Progress(Held):
    """How far it is."""

    value = _must(Number)
    message = _must(AnyText)


class FlagWords(Held):
    """What is noted of it."""

    what = _must(Text, validate=validate.OneOf(["zombie", "wall"]))
    reason = _must(AnyText)


class Finish(Held):
    """How the attempt ended."""

    kind = _must(Text, validate=validate.OneOf(["complete", "failed", "deferred", "killed"]))
    result = fields.Raw(load_default=None, allow_none=True)
    exception = AnyText(load_default=None, allow_none=True)
    traceback = List(load_default=None, allow_none=True, validate=_texts)
    error_cat = Text(
        load_default=None, allow_none=True, validate=validate.OneOf(["ERROR", "TIMEOUT", "CRASH"])
    )
    log_seq = _must(Int, validate=_INT64)


class Lines(Held):
    """Lines of its log."""

    hostname = _must(Text)
    lines = _must(List)


class Child(Held):
    """What the job asks for."""

    name = _must(Text)
    args = _must(Dict)
    number = _must(Int, validate=_INT64)
    hostname = _must(Text)


class Called(Held):
    """A job that the job has called."""

    called = _must(_Id)


class Ids(Arguments):
    """Jobs that some of its jobs have called."""

    ids = _must(List)


# ---------------------------------------------------------------------- who is calling


async def challenge(request: web.Request, args: Args) -> web.Response:
    """What a worker has to answer, and what it has to know of this manager."""
    settings = request.app[SETTINGS]
    terms = {name: getattr(settings, name) for name in ("heartbeat", "dead_after", "result_cap", "args_cap")}
    return reply(request, {"challenge": handshake.make_challenge(_secret(request)), "terms": terms})


async def login(request: web.Request, args: Args) -> web.Response:
    """Let a worker in that proves that it knows the secret.

    Raises: Unauthenticated for a wrong proof, a challenge that is not ours, expired or used, or the id of
    another worker; TooManyRequests for too many of them; Forbidden for one that wants functions where there
    are none.
    """
    secret = _secret(request)
    address = neighbourhood(client_address(request))
    # Each address has guesses of its own. Names of users come in small letters, so that this one is nobody's.
    sign_ins, key = request.app[SIGN_INS], (f"WORKER {address}", address)
    sign_ins.take(*key)
    proof, word = args.pop("proof"), args["challenge"]
    if not handshake.is_fresh(secret, word):
        raise Unauthenticated("the challenge is not ours, or has expired: ask for another one")
    said = {name: value for name, value in args.items() if name != "challenge"}
    if not handshake.same(proof, handshake.worker_proof(secret, word, said)):
        shown = f"{args['name'][:100]} {args['hostname'][:100]}"
        if sign_ins.is_news():
            await request.app[EVENTS].tell("worker.refused", shown, remote=client_address(request))
        raise Unauthenticated("the worker does not know the secret of this manager (CORE4_WORKER_SECRET)")
    sign_ins.give_back(*key)
    if FUNCTIONS in args["namespaces"]:
        _require_functions(request)
    if not await request.app[USERS].use_once(word, handshake.CHALLENGE_LIFE):
        raise Unauthenticated("the challenge was used before: ask for another one")
    kind = Kind(**arguments.checked(KindWords, args["kind"]))
    owner = Owner(args["owner"], args["name"], args["hostname"], args["pid"], kind)
    registry = request.app[WORKERS]
    if not await registry.admit(owner, namespaces=args["namespaces"], token=args["token"]):
        raise Unauthenticated("another worker has this id")
    return reply(request, {"proof": handshake.manager_proof(secret, word, said)})


def _secret(request: web.Request) -> str:
    secret = request.app[SETTINGS].worker_secret
    if secret is None:
        raise Forbidden("this manager lets in no workers over HTTP: set CORE4_WORKER_SECRET on both sides")
    return secret


async def _worker(request: web.Request, *, ended: bool) -> Document:
    """The document of the worker whose token this is; of one that has left or is dead only with `ended`.

    Raises: Unauthenticated.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    found = await request.app[WORKERS].by_token(token.strip()) if scheme.lower() == "bearer" else None
    if found is None:
        raise Unauthenticated("the token of this worker is unknown")
    if not ended and found["state"] not in LIVING:
        raise Unauthenticated(f"this worker is {found['state']}: its token has ended with it")
    return found


async def _held(request: web.Request, args: Args, *, done: bool = False) -> Job:
    """The job that is meant, if this worker holds it under the lease that it names.

    With `done` also one whose attempt it has ended itself: it asks again because an answer was lost.

    Raises: LeaseLost.
    """
    job_id, lease_id, worker = args.pop("job_id"), args.pop("lease_id"), request[WORKER]
    try:
        job = await request.app[QUEUE].store.get(job_id)
    except JobNotFound:
        raise LeaseLost(job_id, lease_id) from None
    if job.lease is not None and job.held_by(lease_id) and job.lease.owner == worker["_id"]:
        return job
    if done and job.lease is None and _ended_by(job, lease_id, worker["name"]):
        return job
    raise LeaseLost(job_id, lease_id)


def _ended_by(job: Job, lease_id: str, worker: str) -> bool:
    lines = (line for line in job.document.get("history", ()) if line.get("lease") == lease_id)
    return job.written_by(lease_id) and all(line["worker"] == worker for line in lines)


# ---------------------------------------------------------------------- the worker itself


async def register(request: web.Request, args: Args) -> None:
    """Say what it can do."""
    worker = request[WORKER]
    owner = _owner(worker)
    await request.app[WORKERS].register(owner, namespaces=worker["namespaces"], **args)
    await request.app[EVENTS].tell_of(owner, "start", namespaces=worker["namespaces"], over="http")


async def publish(request: web.Request, args: Args) -> None:
    """Store what it can run, in its own namespaces.

    Raises: BadRequest for what is not its own to publish, or is no entry.
    """
    namespaces, catalogue = request[WORKER]["namespaces"], request.app[CATALOGUE]
    entries = await accepted(args["entries"], namespaces, catalogue, request.app[SCHEDULES])
    await catalogue.publish(entries)
    await publish_declared(request.app[SCHEDULES], catalogue, entries, namespaces=namespaces)


async def serve(request: web.Request, args: Args) -> None:
    """Say anew what it runs."""
    await request.app[WORKERS].serve(_owner(request[WORKER]), args["jobs"], broken=args["broken"])


async def beat(request: web.Request, args: Args) -> bool:
    """Renew; false if it has been declared dead."""
    return await request.app[WORKERS].beat(_owner(request[WORKER]), **args)


async def leave(request: web.Request, args: Args) -> None:
    """It ends by itself."""
    owner = _owner(request[WORKER])
    await request.app[WORKERS].leave(owner)
    await request.app[EVENTS].tell_of(owner, "stop")


async def controls(request: web.Request, args: Args) -> Document:
    """What operators hold back, and the time."""
    found = await request.app[CONTROLS].read()
    now = await request.app[DATABASE].server_time()
    return {"now": now, **asdict(found)}


async def wait(request: web.Request, args: Args) -> list[str]:
    """What there is news of: `work` to claim, a job to `look` after, `control`; nothing after some seconds.

    A claim of its own follows: a claim that waits might be answered when the worker has given up its leases.
    """
    namespaces = set(request[WORKER]["namespaces"])
    news: set[str] = set()
    heard, closing = asyncio.Event(), request.app[CLOSING]

    def hear(change: Change) -> None:
        found = _concerns(change, namespaces)
        if found:
            news.update(found)
            heard.set()

    unlisten = request.app[FEED].listen(hear)
    waits = [asyncio.create_task(event.wait()) for event in (heard, closing)]
    try:
        await asyncio.wait(waits, timeout=args["seconds"], return_when=asyncio.FIRST_COMPLETED)
    finally:
        unlisten()
        for each in waits:
            each.cancel()
    return sorted(news)


def _concerns(change: Change, namespaces: set[str]) -> set[str]:
    if change.kind == "resync":
        return {"work", "look", "control"}
    if change.collection == CONTROL:
        return {"control"}
    if change.collection != QUEUE_COLLECTION:
        return set()
    seen = change.fields
    found = {"look"} if seen.get("killed_at") is not None else set()
    theirs = seen.get("namespace") is None or seen["namespace"] in namespaces  # an update has none
    return found | ({"work"} if theirs and (seen.get("due") or seen.get("held") == "worker") else set())


# ---------------------------------------------------------------------- its jobs


async def claim(request: web.Request, args: Args) -> list[Document]:
    """Due jobs of its namespaces, from now on its own."""
    worker, held_back = request[WORKER], await request.app[CONTROLS].read()
    if worker["state"] != "up" or held_back.of_worker(worker["name"]):
        return []
    jobs = await request.app[QUEUE].claims.claim(
        _owner(worker), namespaces=worker["namespaces"], controls=held_back, **args
    )
    return [dict(job.document) for job in jobs]


async def running(request: web.Request, args: Args) -> list[Document]:
    """All that it holds."""
    return [dict(job.document) for job in await request.app[QUEUE].store.running(request[WORKER]["_id"])]


async def release(request: web.Request, args: Args) -> Document:
    """Put a job back in line, uncharged."""
    job = await _held(request, args, done=True)
    return _document(job if job.lease is None else await request.app[QUEUE].release(job, **args))


async def start(request: web.Request, args: Args) -> Document:
    """The attempt begins."""
    return _document(await request.app[QUEUE].start(await _held(request, args), **args))


async def action(request: web.Request, args: Args) -> Document | None:
    """The function that a job of its calls: the source, its submitter's signature, whether it was revoked."""
    job = await _function_held(request, args)
    return await request.app[ACTIONS].granted(job.document["function"])


async def dependencies(request: web.Request, args: Args) -> Document:
    """The results of the jobs before a function that it holds."""
    job = await _function_held(request, args)
    return await request.app[QUEUE].store.results_before(job, most=RESULTS)


async def _function_held(request: web.Request, args: Args) -> Job:
    """The function's job that is meant, if this worker holds it.

    Raises: LeaseLost; Forbidden if this manager has to do with no functions; BadRequest for another job.
    """
    job = await _held(request, args)
    _require_functions(request)
    if job.document.get("function") is None:
        raise BadRequest(f"job [{job.id}] is none of a function")
    return job


def _require_functions(request: web.Request) -> None:
    if not request.app[SETTINGS].functions:
        raise Forbidden(
            "this manager has no functions run as source: its operator has not set CORE4_FUNCTIONS"
        )


async def progress(request: web.Request, args: Args) -> None:
    """How far it is."""
    await request.app[QUEUE].progress(await _held(request, args), **args)


async def flag(request: web.Request, args: Args) -> Document:
    """It runs, or is silent, too long."""
    job = await _held(request, args)
    return _document(await request.app[QUEUE].flag(job, args["what"], reason=args["reason"]))


async def finish(request: web.Request, args: Args) -> Document:
    """How the attempt ended."""
    job, log_seq = await _held(request, args, done=True), args.pop("log_seq")
    if job.lease is None:
        # Who has written it may have died before it was settled, and perhaps nobody here sweeps.
        await request.app[QUEUE].outbox.try_settle(job)
        return _document(job)
    if log_seq and seq_fence(log_seq) != job.fence:
        raise BadRequest("parameter [log_seq] is no line of this attempt")
    if problem := result_problem(args["result"], request.app[SETTINGS].result_cap):
        raise TooLarge(problem)
    return _document(await request.app[QUEUE].finish(job, Outcome(**args), log_seq=log_seq))


async def append(request: web.Request, args: Args) -> None:
    """Lines of its log; those of an attempt that it has just ended may still come."""
    job = await _held(request, args, done=True)
    lines = [_line(row, job.fence) for row in args["lines"]]
    if any(line.seq <= before.seq for before, line in pairwise(lines)):
        raise BadRequest("the numbers of lines grow")
    await request.app[LOGS].append(job, args["hostname"], lines)


def _line(row: Any, fence: int) -> Line:
    """One line of an attempt, as whoever reads the log expects it. Raises: BadRequest."""
    if not isinstance(row, list) or len(row) != len(dataclasses.fields(Line)):
        raise BadRequest("a line is a list of number, time, level, text, source and exception")
    seq, epoch, level, message, source, exception = row
    if not _is_number(seq, int) or seq_fence(seq) != fence:
        raise BadRequest("the number of a line is none of this attempt")
    if not _is_number(epoch, int | float) or not 0 <= epoch < _YEAR_10000:
        raise BadRequest("the time of a line is none")
    if not all(isinstance(text, str) for text in (level, message, source)):
        raise BadRequest("level, text and source of a line are texts")
    if level not in LEVELS or source not in SOURCES:
        raise BadRequest("a line has a level or source that there is not")
    if exception is not None and not _is_exception(exception):
        raise BadRequest("the exception of a line is an object with a text and a list of texts")
    return Line(seq, epoch, level, message, source, exception)


def _is_number(value: Any, kind: type[Any] | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_exception(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("info", ""), str):
        return False
    text = value.get("text", [])
    return isinstance(text, list) and all(isinstance(each, str) for each in text)


async def enqueue(request: web.Request, args: Args) -> Document:
    """A job that a job of its asks for."""
    job, cap = await _held(request, args), request.app[SETTINGS].args_cap
    return await enqueue_child(request.app[QUEUE], request.app[CATALOGUE], job, args_cap=cap, **args)


async def call(request: web.Request, args: Args) -> Document:
    """A job that a job of its waits for."""
    job, cap = await _held(request, args), request.app[SETTINGS].args_cap
    return await call_child(request.app[QUEUE], request.app[CATALOGUE], job, args_cap=cap, **args)


async def ended(request: web.Request, args: Args) -> Document:
    """How jobs ended that its jobs wait for; nothing of any other job."""
    store = request.app[QUEUE].store
    held = {job.id for job in await store.running(request[WORKER]["_id"])}
    found = await store.ended([ObjectId(text) for text in args["ids"] if ObjectId.is_valid(text)])
    return {
        str(job_id): outcome_of(job_id, job)
        for job_id, job in found.items()
        if job is None or job.document["enqueued"].get("parent_id") in held
    }


async def kill(request: web.Request, args: Args) -> None:
    """End a job that a job of its has called."""
    job, child_id = await _held(request, args), args["called"]
    found = await request.app[QUEUE].store.document(child_id)
    if found is not None and found[0]["enqueued"].get("parent_id") != job.id:
        raise LeaseLost(child_id, None)  # it is not its own
    await kill_child(request.app[QUEUE], job, child_id)


def _owner(worker: Document) -> Owner:
    return Owner(worker["_id"], worker["name"], worker["hostname"], worker["pid"])


def _document(job: Job) -> Document:
    return dict(job.document)


# ---------------------------------------------------------------------- addresses


@dataclass(frozen=True)
class Operation:
    """One address below `worker/`; `ended` if it is also for a worker that has left or is dead."""

    handler: Handler
    takes: type[Schema] = NoArguments
    ended: bool = False


OPERATIONS: Mapping[str, Operation] = {
    "register": Operation(register, Registration),
    "publish": Operation(publish, Entries),
    "serve": Operation(serve, Names),
    "beat": Operation(beat, Beat, ended=True),
    "leave": Operation(leave, ended=True),
    "controls": Operation(controls),
    "wait": Operation(wait, Wait),
    "claim": Operation(claim, Claim),
    "running": Operation(running, ended=True),
    "release": Operation(release, Release, ended=True),
    "start": Operation(start, Start),
    "action": Operation(action, Held),
    "dependencies": Operation(dependencies, Held),
    "progress": Operation(progress, Progress),
    "flag": Operation(flag, FlagWords),
    "finish": Operation(finish, Finish, ended=True),
    "log": Operation(append, Lines, ended=True),
    "enqueue": Operation(enqueue, Child),
    "call": Operation(call, Child),
    "ended": Operation(ended, Ids),
    "kill": Operation(kill, Called),
}


def add_worker_routes(app: web.Application) -> None:
    """Register all of them."""
    for handler, takes in ((challenge, NoArguments), (login, LoginWords)):
        app.router.add_post(f"{BASE}/worker/{handler.__name__}", _open(handler, takes))
    for name, operation in OPERATIONS.items():
        app.router.add_post(f"{BASE}/worker/{name}", _endpoint(operation))


def _open(handler: Handler, takes: type[Schema]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        response: web.Response = await handler(request, await arguments.parse(takes, request))
        return response

    return endpoint


def _endpoint(operation: Operation) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        request[WORKER] = await _worker(request, ended=operation.ended)
        identifiers.bind({"worker": request[WORKER]["name"]})
        settings = request.app[SETTINGS]
        # A worker may send more than a client: results, lines of logs, all that it publishes.
        most = _ESCAPED * max(settings.result_cap, settings.args_cap, MIB) + MIB
        args = await arguments.parse(operation.takes, request.clone(client_max_size=most))
        data = await operation.handler(request, args)
        return web.Response(body=bson.encode({"data": data}), content_type=BSON)

    return endpoint
