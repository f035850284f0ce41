"""Handler of `/job/bulk`: kill, restart or remove all jobs behind a filter."""

from __future__ import annotations

import socket
from typing import Any

from aiohttp import web

from core4.api.envelope import reply
from core4.api.jobs import limit_to, selection, whole
from core4.api.keys import QUEUE, USER
from core4.bulk import Place, Report, act_on_many
from core4.errors import BadRequest

Args = dict[str, Any]


async def bulk(request: web.Request, args: Args) -> web.Response:
    """POST job/bulk: kill, restart or remove the jobs behind a filter; with `dry_run` only told."""
    user = request[USER]
    where, _ = selection(args)
    if args["search"] and not args["search"].strip("*?"):
        raise BadRequest("parameter [search] is of wildcards only: jobs of all names are meant, leave it out")
    if bool(where) == args["all"]:
        raise BadRequest(
            "parameter [all] stands for no filter at all: give one of the two"
            if where
            else "without a filter all jobs are meant: say so with `all: true`"
        )
    if args["journal"] and args["action"] != "restart":
        raise BadRequest("parameter [journal]: jobs of the journal can only be restarted")
    if not user.may.cop:
        # What one may not act on is neither touched nor counted.
        await limit_to(request, where, user.may.may_execute)
    report = await whole(
        act_on_many(
            request.app[QUEUE],
            args["action"],
            where,
            Place.parse(args["after"]),
            limit=args["limit"],
            by=user.name,
            hostname=socket.gethostname(),
            journal=args["journal"],
            dry_run=args["dry_run"],
        )
    )
    return reply(request, _told(report, args))


def _told(report: Report, args: Args) -> dict[str, Any]:
    return {
        "action": args["action"],
        "dry_run": args["dry_run"],
        "matched": report.matched,
        "changed": report.count("changed"),
        "unchanged": report.count("unchanged"),
        "refused": report.count("refused"),
        "gone": report.count("gone"),
        "jobs": report.jobs,
        "more": None if report.more is None else str(report.more),
        "stopped": report.stopped,
    }
