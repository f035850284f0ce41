"""Handlers of `/schedule`: look schedules up, make and change them, pause, resume and trigger them.

A schedule belongs to a job: who may read that may read it, who may execute that may change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from aiohttp import web
from bson import ObjectId

from core4 import cron, schedules
from core4.api.envelope import page_reply, reply
from core4.api.events import audited
from core4.api.jobs import idempotency_key, unknown, unserved, whole
from core4.api.keys import CATALOGUE, CONTROLS, QUEUE, REQUEST_ID, SCHEDULES, SETTINGS, USER
from core4.api.streams import job_headers
from core4.catalogue import cut, matches
from core4.controls import Controls, Pause
from core4.errors import BadRequest, Conflict, Forbidden, NotFound
from core4.filters import SCHEDULE_FIELDS, compile_filter, compile_search, compile_sort
from core4.filters import matches as passes
from core4.orders import check_args
from core4.schedules import Schedule
from core4.timetable import FIELDS

Args = dict[str, Any]


async def list_schedules(request: web.Request, args: Args) -> web.Response:
    """GET or POST schedule: the schedules of jobs that the user may read, with what is next."""
    query = compile_filter(args["filter"], SCHEDULE_FIELDS, args=False)
    order, _ = compile_sort(args["sort"], SCHEDULE_FIELDS)
    search = args["search"]
    compile_search(search)
    now = await request.app[SCHEDULES].clock()
    readable = {one.name: one for one in await request.app[SCHEDULES].all() if _may_read(request, one)}
    # What is next is worked out for the rows that are shown only.
    controls = await request.app[CONTROLS].read()
    rows = [schedules.view(one, now, count=0, held=_held(controls, one)) for one in readable.values()]
    found = [row for row in rows if passes(query.where, row) and _is_searched(search, row)]
    page = cut(found, order or [("_id", 1)], args["page"], args["per_page"])
    count = args["count"]
    asked = [readable[row["_id"]] for row in page.rows]
    shown = [schedules.view(one, now, count=count, held=_held(controls, one)) for one in asked]
    return page_reply(request, page, shown)


def _is_searched(search: str, row: Mapping[str, Any]) -> bool:
    return not search or matches(search, row["_id"]) or matches(search, row["qual_name"])


async def preview(request: web.Request, args: Args) -> web.Response:
    """GET schedule/next: when an expression would fire; nothing is stored."""
    now = await request.app[SCHEDULES].clock()
    expression, zone = args["expression"], args["zone"]
    following = list(islice(cron.fires(expression, now, zone), args["count"]))
    return reply(request, {"expression": expression, "zone": zone, "next": following})


async def show(request: web.Request, args: Args) -> web.Response:
    """GET schedule/<name>: what is in force, what the code and the operator say, and what is next."""
    schedule = await _find(request, "r")
    return await _shown(request, schedule, count=args["count"])


async def change(request: web.Request, args: Args) -> web.Response:
    """PUT schedule/<name>: an operator's word on some fields, over the code's; or a new schedule."""
    name = request.match_info["name"]
    try:
        known = await _find(request, "x")
    except NotFound:
        known = None
    entry = await _checked_entry(request, known, args)
    fields = {key: value for key, value in args.items() if key in FIELDS}
    if known is not None and fields.get("qual_name") == known.qual_name:
        del fields["qual_name"]  # that is no change, so not the operator's word
    store, by = request.app[SCHEDULES], request[USER].name
    schedule = await audited(
        request, "schedule.change", lambda: store.set(name, fields, by=by), schedule=name, fields=fields
    )
    namespace = schedule.namespace or entry.get("namespace") or "DEFAULT"
    return await _shown(request, schedule, flash=await unserved(request, schedule.qual_name, namespace))


async def _checked_entry(request: web.Request, known: Schedule | None, args: Args) -> Mapping[str, Any]:
    """The catalogue's entry of the job, for which the arguments are good. Empty for one that is gone.

    Raises: BadRequest, Forbidden, UnknownJob, Conflict, BadArguments, TooLarge.
    """
    name = request.match_info["name"]
    qual_name = known.qual_name if known else args.get("qual_name")
    if qual_name is None:
        raise BadRequest(f"schedule [{name:.200}] is not known; a new one needs its qual_name")
    _require(request, qual_name, "x")
    entry = await request.app[CATALOGUE].get(qual_name)
    if known is None and name != qual_name and await request.app[CATALOGUE].get(name):
        # It would stand in the way of the schedule that this job's code may declare.
        raise Conflict(f"[{name}] is the name of another job: give the schedule another one")
    if known is not None and "args" not in args:
        return entry or {}
    if entry is None:
        raise await unknown(request, qual_name)
    check_args(entry, args.get("args", {}), request.app[SETTINGS].args_cap)
    return entry


async def pause(request: web.Request, args: Args) -> web.Response:
    """PUT schedule/pause/<name>: fire no more until resumed."""
    name, store, by = (await _find(request, "x")).name, request.app[SCHEDULES], request[USER].name
    changed = await audited(request, "schedule.pause", lambda: store.pause(name, by=by), schedule=name)
    return await _shown(request, changed)


async def resume(request: web.Request, args: Args) -> web.Response:
    """PUT schedule/resume/<name>: fire again, from now on."""
    name, store, by = (await _find(request, "x")).name, request.app[SCHEDULES], request[USER].name
    changed = await audited(request, "schedule.resume", lambda: store.resume(name, by=by), schedule=name)
    return await _shown(request, changed)


async def reset(request: web.Request, args: Args) -> web.Response:
    """PUT schedule/reset/<name>: take the operator's word back, on `fields` or on all."""
    name, store, by = (await _find(request, "x")).name, request.app[SCHEDULES], request[USER].name
    fields = args["fields"]
    changed = await audited(
        request, "schedule.reset", lambda: store.reset(name, fields, by=by), schedule=name, fields=fields
    )
    return await _shown(request, changed)


async def trigger(request: web.Request, args: Args) -> web.Response:
    """PUT schedule/trigger/<name>: one job now, whatever the schedule's state."""
    schedule = await _find(request, "x")
    user, key = request[USER].name, idempotency_key(request)
    # Not the request's id, which a client may send twice without meaning the same job.
    token = f"{user.lower()}:{key}" if key else str(ObjectId())
    queue, catalogue = request.app[QUEUE], request.app[CATALOGUE]
    job = await whole(
        schedules.trigger(schedule, queue, catalogue, token=token, by=user, request_id=request[REQUEST_ID])
    )
    flash = await unserved(request, job.name, job.document["namespace"])
    return reply(request, str(job.id), flash=flash, headers=job_headers(job.id))


async def delete(request: web.Request, args: Args) -> web.Response:
    """DELETE schedule/<name>: forget one that an operator made, or that the code has withdrawn."""
    name, store = (await _find(request, "x")).name, request.app[SCHEDULES]
    await audited(request, "schedule.delete", lambda: store.delete(name), schedule=name)
    return reply(request, True)


# ---------------------------------------------------------------------- inside


async def _find(request: web.Request, mode: str) -> Schedule:
    """The schedule that the path names, if the user may read (`r`) or execute (`x`) its job.

    Raises: NotFound, Forbidden.
    """
    schedule = await request.app[SCHEDULES].get(request.match_info["name"])
    _require(request, schedule.qual_name, mode)
    return schedule


def _may_read(request: web.Request, schedule: Schedule) -> bool:
    return request[USER].may.may_read(schedule.qual_name)


def _require(request: web.Request, qual_name: str, mode: str) -> None:
    user = request[USER]
    allowed = user.may.may_execute if mode == "x" else user.may.may_read
    if not allowed(qual_name):
        verb = "execute" if mode == "x" else "read"
        raise Forbidden(f"user [{user.name}] has no right to {verb} job [{qual_name:.200}]")


async def _shown(
    request: web.Request, schedule: Schedule, *, count: int = 5, flash: list[str] | None = None
) -> web.Response:
    now: datetime = await request.app[SCHEDULES].clock()
    held = _held(await request.app[CONTROLS].read(), schedule)
    return reply(request, schedules.view(schedule, now, count=count, held=held), flash=flash or ())


def _held(controls: Controls, schedule: Schedule) -> Pause | None:
    """What keeps the schedule from firing, other than its own pause; see `core4.worker.scheduler`."""
    return controls.everything or controls.of_name(schedule.qual_name)
