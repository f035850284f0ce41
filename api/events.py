"""Handlers of `/event` and `/queue/history`: who did what, and how many jobs were in which state when."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

from aiohttp import web

from core4.api.envelope import page_reply
from core4.api.jobs import whole
from core4.api.keys import EVENTS, USER
from core4.errors import BadRequest, Forbidden
from core4.filters import EVENT_FIELDS, compile_filter, compile_sort
from core4.jobs import utcnow

T = TypeVar("T")
Args = dict[str, Any]

HISTORY = timedelta(days=7)  # before now, unless a start is named


async def list_events(request: web.Request, args: Args) -> web.Response:
    """GET event: who did what, newest first. For administrators."""
    user = request[USER]
    if not user.may.cop:
        raise Forbidden(f"user [{user.name}] has no right to read the audit")
    query = compile_filter(args["filter"], EVENT_FIELDS, args=False)
    order, _ = compile_sort(args["sort"], {"created": EVENT_FIELDS["created"]})
    page = await request.app[EVENTS].page(
        query.where,
        descending=not order or order[0][1] == -1,
        page=args["page"],
        per_page=args["per_page"],
    )
    return page_reply(request, page, page.rows)


async def history(request: web.Request, args: Args) -> web.Response:
    """GET queue/history: the state counts of a span, per bucket of time those with the highest total."""
    end = args["end_date"] or utcnow()
    start = args["start_date"] or end - HISTORY
    if end < start:
        raise BadRequest("parameter [endDate] is before [startDate]")
    page = await request.app[EVENTS].history(
        start, end, descending=args["sort"] == -1, page=args["page"], per_page=args["per_page"]
    )
    return page_reply(request, page, page.rows)


async def audited(request: web.Request, name: str, work: Callable[[], Awaitable[T]], **data: Any) -> T:
    """Do `work` for the user who asks for it, and have a line of it whatever happens meanwhile."""

    async def act() -> T:
        async with request.app[EVENTS].action(name, request[USER].name, **data):
            return await work()

    return await whole(act())
