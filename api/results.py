"""Handlers of results: look at one as often as you like, or pull it, once.

A job is named by its own id or by that of the request that made it. Words and behaviour are those of
easyjobs: Queued, Running, Failed, Completed; a pull waits a moment, and what was pulled is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from bson import ObjectId

from core4.api.envelope import page_reply, reply
from core4.api.jobs import find, limit_to, wait_for, whole
from core4.api.keys import QUEUE, SEATS, USER
from core4.database import Page
from core4.errors import Conflict, JobNotFound, ResultGone
from core4.results import FIELDS, Status, gone, has_ended, result_of
from core4.states import IDLE, State

Args = dict[str, Any]

_STATES: Mapping[str, Sequence[str]] = {
    Status.QUEUED: sorted(IDLE),
    Status.RUNNING: [State.RUNNING],
}


async def view_result(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/view/result: how far a job is, and its result once there is one; repeatable."""
    job_id, document = await _find(request, args, "r")
    document = await _ended(request, job_id, document, args["timeout"])
    if document.get("consumed") is not None:
        raise ResultGone(gone(document), job_id=str(job_id))
    return _answer(request, document)


async def pull_result(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/pull/result: wait for a job's end, hand its result out and remove it."""
    job_id, document = await _find(request, args, "x")
    document = await _ended(request, job_id, document, args["timeout"])
    if has_ended(document):
        # Not taken back if the client hangs up in just this moment: a pull is at most once.
        taken = request.app[QUEUE].consume(job_id, by=request[USER].name)
        document = (await whole(taken)).document
    return _answer(request, document)


async def list_results(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/view/results: the results that nobody has pulled."""
    where = await _where(request, args)
    page = await request.app[QUEUE].store.results(
        where, page=args["page"], per_page=args["per_page"], fields=FIELDS
    )
    return _page(request, page)


async def list_queued(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/view/queued: the jobs that wait, whatever for."""
    return await _list_open(request, args, _STATES[Status.QUEUED])


async def list_running(request: web.Request, args: Args) -> web.Response:
    """GET or POST job/view/running: the jobs that run, or those of another open `status`."""
    return await _list_open(request, args, _STATES.get(args["status"], [args["status"]]))


async def _list_open(request: web.Request, args: Args, states: Sequence[str]) -> web.Response:
    where = {**await _where(request, args), "state": {"$in": list(states)}}
    if State.RUNNING not in states:
        where["removed_at"] = None
    page = await request.app[QUEUE].store.page(
        where, page=args["page"], per_page=args["per_page"], fields=FIELDS
    )
    return _page(request, page)


async def _where(request: web.Request, args: Args) -> dict[str, Any]:
    """What is asked for, of the jobs that the user may read."""
    where: dict[str, dict[str, Any]] = {
        name: {"$in": [args[name]]} for name in ("namespace", "name") if name in args
    }
    if not request[USER].may.cop:
        await limit_to(request, where, request[USER].may.may_read)
    return where


def _page(request: web.Request, page: Page) -> web.Response:
    return page_reply(request, page, [result_of(document) for document in page.rows])


async def _find(request: web.Request, args: Args, mode: str) -> tuple[ObjectId, Mapping[str, Any]]:
    """The job that is asked for, if the user may read (`r`) or execute (`x`) it.

    Raises: JobNotFound, Forbidden; Conflict for a request that has made several jobs.
    """
    text = args.get("job_id")
    if text is None:  # an empty one is an id, and of no job
        text = await _of_request(request, args["request_id"])
    job_id, document, _ = await find(request, text, mode)
    return job_id, document


async def _of_request(request: web.Request, request_id: str) -> str:
    # Jobs that the user may not read are none: he could learn of them, or be kept from his own.
    found = await request.app[QUEUE].store.of_request(request_id, request[USER].may.may_read)
    if not found:
        raise JobNotFound(request_id[:100], f"request [{request_id:.100}] has made no job")
    if len(found) > 1:
        raise Conflict(f"request [{request_id:.100}] has made several jobs: ask for each by its job_id")
    return str(found[0])


async def _ended(
    request: web.Request, job_id: ObjectId, document: Mapping[str, Any], seconds: float
) -> Mapping[str, Any]:
    if has_ended(document) or not seconds:
        return document
    with request.app[SEATS].taken(request[USER].name, job_id=str(job_id)):
        found = await wait_for(request, job_id, seconds)
    if found is None:  # it was deleted meanwhile
        raise JobNotFound(job_id)
    return found


def _answer(request: web.Request, document: Mapping[str, Any]) -> web.Response:
    found = result_of(document, traceback=True)
    return reply(request, found, status=200 if has_ended(document) else 202)
