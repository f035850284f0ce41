"""Handler of `/job/batch`: many jobs from one request, each with its own outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from bson.errors import BSONError
from pymongo.errors import DocumentTooLarge, PyMongoError

from core4.api.arguments import checked
from core4.api.envelope import reply
from core4.api.errors import known_error
from core4.api.jobs import enqueue_one, order_of, unserved, whole
from core4.api.keys import QUEUE, REQUEST_ID
from core4.errors import BadRequest, Core4Error, Unavailable
from core4.jobs import Job, JobOrder
from core4.schemas import BatchJob

log = logging.getLogger(__name__)

Args = dict[str, Any]

ALONE = 20  # jobs with keys that are looked for and stored at the same time
TOGETHER = 100  # jobs that are checked and stored together; in between others are answered
WARNINGS = 5  # kinds of jobs that are looked at for a worker


@dataclass
class _Wish:
    """One of the jobs that are asked for, and what has become of it."""

    given: Any
    order: JobOrder | None = None  # if it goes with the others
    job: Job | None = None
    replayed: bool = False
    error: Core4Error | None = None


async def enqueue_many(request: web.Request, args: Args) -> web.Response:
    """POST job/batch: up to 1,000 new jobs; what has become of each."""
    wishes = [_Wish(given) for given in args["jobs"]]
    trouble: Core4Error | None = None
    for start in range(0, len(wishes), TOGETHER):
        some = wishes[start : start + TOGETHER]
        if trouble is None:
            await _enqueue(request, some)
            trouble = next((wish.error for wish in some if isinstance(wish.error, Unavailable)), None)
        else:
            # They would wait for the same answer.
            for wish in some:
                wish.error = trouble
    served = dict.fromkeys((wish.job.name, wish.job.namespace) for wish in wishes if wish.job is not None)
    flash = [text for kind in list(served)[:WARNINGS] for text in await unserved(request, *kind)]
    return reply(request, [_outcome(wish) for wish in wishes], flash=flash)


async def _enqueue(request: web.Request, wishes: Sequence[_Wish]) -> None:
    """See to some of them. Those with a key go alone: each may be there already."""
    for start in range(0, len(wishes), ALONE):
        await asyncio.gather(*(_begin(request, wish) for wish in wishes[start : start + ALONE]))
    together = [(wish, wish.order) for wish in wishes if wish.order is not None]
    if not together:
        return
    found = await whole(request.app[QUEUE].enqueue_many([order for _, order in together]))
    for (wish, _), job in zip(together, found, strict=True):
        if isinstance(job, Job):
            wish.job = job
        else:
            wish.error = _told(request, job)


async def _begin(request: web.Request, wish: _Wish) -> None:
    """Check one of them, so that it has its order, its job, or its error."""
    try:
        if not isinstance(wish.given, dict):
            raise BadRequest("a job is an object with qual_name and args")
        args = checked(BatchJob, wish.given)
        if "key" in args:
            wish.job, wish.replayed = await enqueue_one(request, args, args["key"])
        else:
            wish.order = await order_of(request, args)
    except Exception as error:  # of one job: the others are told what has become of them
        wish.error = _told(request, error)


def _told(request: web.Request, error: Exception) -> Core4Error:
    if isinstance(error, Core4Error):
        return error
    known = known_error(error) if isinstance(error, BSONError | DocumentTooLarge | PyMongoError) else None
    return known or _mistake(request, error)


def _mistake(request: web.Request, error: Exception) -> Core4Error:
    log.error("request.failed", exc_info=error, extra={"path": request.rel_url.raw_path[:200]})
    return Core4Error(f"internal error, see the log of the API for request {request[REQUEST_ID]}")


def _outcome(wish: _Wish) -> Args:
    if wish.job is not None:
        return {"outcome": "replayed" if wish.replayed else "enqueued", "_id": wish.job.id}
    error = wish.error
    assert error is not None
    told = {"outcome": "refused", "status": error.status, "code": error.code, "detail": error.detail}
    return {**error.facts, **told}
