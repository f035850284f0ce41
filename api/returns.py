"""Handlers of return queues: look at what is in one, pull records out, empty it.

A user sees and takes the records of jobs that he may execute; those of others stay where they are.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from aiohttp import web
from bson import ObjectId

from core4.api.envelope import reply
from core4.api.hub import REREAD
from core4.api.jobs import limit_to, whole
from core4.api.keys import HUB, RETURNS, SEATS, SETTINGS, USER
from core4.errors import BadRequest
from core4.options import QUEUE_NAME
from core4.waits import heard

Args = dict[str, Any]
MOST = 10_000  # records that are counted


async def show(request: web.Request, args: Args) -> web.Response:
    """GET return/<queue>: the first records of a queue and how many there are; nothing is taken."""
    queue, where = _queue(request), await _own(request)
    rows = await request.app[RETURNS].peek(queue, args["limit"], where)
    return reply(request, rows, waiting=await request.app[RETURNS].waiting(queue, MOST, where))


async def pull(request: web.Request, args: Args) -> web.Response:
    """POST return/pull/<queue>: take records out, once there are `least` of them; 202 if that takes too long.

    The same request with the same `token` gets the same records again, if there were any.
    """
    queue, where, by = _queue(request), await _own(request), request[USER].name
    returns, token = request.app[RETURNS], args.get("token")
    found = await returns.taken(queue, by=by, token=token) if token else []
    if not found and await _filled(request, queue, where, args):
        room = request.app[SETTINGS].page_args
        taking = returns.take(
            queue, args["size"], by=by, token=token or str(ObjectId()), where=where, room=room
        )
        # To its end, even if the client hangs up: what is taken is there for its token.
        found = await whole(taking)
    return reply(request, found, status=200 if found else 202)


async def reset(request: web.Request, args: Args) -> web.Response:
    """PUT return/reset/<queue>: empty a queue; how many records were in it."""
    queue, where = _queue(request), await _own(request)
    return reply(request, await request.app[RETURNS].reset(queue, by=request[USER].name, where=where))


def _queue(request: web.Request) -> str:
    queue = request.match_info["queue"]
    if not QUEUE_NAME.fullmatch(queue):
        raise BadRequest("the name of a return queue has 1 to 100 of A-Z a-z 0-9 _ . : -")
    return queue


async def _own(request: web.Request) -> dict[str, Any]:
    where: dict[str, dict[str, Any]] = {}
    if not request[USER].may.cop:
        await limit_to(request, where, request[USER].may.may_execute)
    return where


async def _filled(request: web.Request, queue: str, where: dict[str, Any], args: Args) -> bool:
    """Wait until enough is there, but no longer than the request may."""
    deadline = monotonic() + args["timeout"]

    async def is_filled() -> bool:
        return bool(await request.app[RETURNS].waiting(queue, args["least"], where) >= args["least"])

    if await is_filled():
        return True
    if not args["timeout"]:
        return False
    with request.app[SEATS].taken(request[USER].name), request.app[HUB].hints(queue) as hint:
        while True:
            hint.clear()
            if await is_filled():
                return True
            left = deadline - monotonic()
            if left <= 0:
                return False
            await heard(hint, min(left, REREAD))
