"""Handler of `/job/batch`: many jobs from one request, each with its own outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from bson.errors import BSONError
from pymongo.errors import DocumentTooLarge, PyMongoError

from core4.api.arguments import checked
from core4.api.envelope import reply
from core4.api.errors import known_error
from core4.api.jobs import enqueue_one, unserved
from core4.api.keys import REQUEST_ID
from core4.errors import BadRequest, Core4Error, Unavailable
from core4.schemas import BatchJob

log = logging.getLogger(__name__)

Args = dict[str, Any]

TOGETHER = 20  # jobs that are stored at the same time
WARNINGS = 5  # kinds of jobs that are looked at for a worker


async def enqueue_many(request: web.Request, args: Args) -> web.Response:
    """POST job/batch: up to 1,000 new jobs; what has become of each."""
    outcomes: list[Args] = []
    served: dict[tuple[str, str], None] = {}
    trouble: Unavailable | None = None
    for some in _groups(args["jobs"]):
        if trouble is not None:
            # The rest would wait for the same answer, one by one.
            outcomes += [_refused(trouble)] * len(some)
            continue
        found = await asyncio.gather(*(_try(request, given, served) for given in some))
        outcomes += [each if isinstance(each, dict) else _refused(each) for each in found]
        trouble = next((each for each in found if isinstance(each, Unavailable)), None)
    flash = [text for kind in list(served)[:WARNINGS] for text in await unserved(request, *kind)]
    return reply(request, outcomes, flash=flash)


def _groups(jobs: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(jobs), TOGETHER):
        yield jobs[start : start + TOGETHER]


async def _try(request: web.Request, given: Any, served: dict[tuple[str, str], None]) -> Args | Core4Error:
    """One outcome, or why there is none."""
    try:
        if not isinstance(given, dict):
            raise BadRequest("a job is an object with qual_name and args")
        args = checked(BatchJob, given)
        job, replayed = await enqueue_one(request, args, args.get("key"))
    except Core4Error as error:
        return error
    except (BSONError, DocumentTooLarge, PyMongoError) as error:
        return known_error(error) or _mistake(request, error)
    except Exception as error:  # of one job: the others are told what has become of them
        return _mistake(request, error)
    served[job.name, job.namespace] = None
    return {"outcome": "replayed" if replayed else "enqueued", "_id": job.id}


def _mistake(request: web.Request, error: Exception) -> Core4Error:
    log.error("request.failed", exc_info=error, extra={"path": request.rel_url.raw_path[:200]})
    return Core4Error(f"internal error, see the log of the API for request {request[REQUEST_ID]}")


def _refused(error: Core4Error) -> Args:
    told = {"outcome": "refused", "status": error.status, "code": error.code, "detail": error.detail}
    return {**error.facts, **told}
