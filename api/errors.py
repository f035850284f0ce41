"""Every error becomes one body here: core4's envelope and RFC 9457 in one object."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from math import ceil
from time import monotonic
from typing import Any

from aiohttp import web
from bson import ObjectId
from bson.errors import BSONError
from pymongo.errors import DocumentTooLarge, OperationFailure, PyMongoError

from core4 import identifiers
from core4.api.encoding import dumps
from core4.api.envelope import envelope
from core4.api.keys import BASE, REQUEST_ID, USER
from core4.database import GOING_DOWN
from core4.errors import BadRequest, Core4Error, TooLarge, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

PROBLEM = "application/problem+json"
RETRY = 2  # seconds after which a client should ask a database again that does not answer
_KEPT = ("Allow", "Retry-After")
REQUEST_HEADER = "X-Request-ID"
_QUIET = ("GET", "HEAD", "OPTIONS")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id and turn whatever is raised into a problem; nothing else does."""
    request[REQUEST_ID] = _request_id(request)
    began = monotonic()
    with identifiers.about(request_id=request[REQUEST_ID]):
        response = await _answered(request, handler)
        level = logging.DEBUG if _is_routine(request) else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "request.done", extra=_told(request, response.status, monotonic() - began))
        return response


def _is_routine(request: web.Request) -> bool:
    """Reading, and what workers over HTTP do all the time: told to who debugs."""
    return request.method in _QUIET or request.rel_url.raw_path.startswith(f"{BASE}/worker/")


def _request_id(request: web.BaseRequest) -> str:
    """As the client, or a proxy before us, calls it; else one of ours."""
    return identifiers.accepted(request.headers.get(REQUEST_HEADER)) or str(ObjectId())


def _told(request: web.Request, status: int, seconds: float) -> dict[str, Any]:
    # The path only: a query may hold a ticket.
    path = request.rel_url.raw_path[:200]
    user = request[USER].name if USER in request else None
    return {
        "method": request.method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
        "user": user,
    }


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        headers = {name: error.headers[name] for name in _KEPT if name in error.headers}
        return problem(request, error.status, _http_detail(error), headers=headers)
    except Core4Error as error:
        return _answer(request, error)
    except (
        *(BSONError, DocumentTooLarge, PyMongoError, web.RequestPayloadError),
        *(OverflowError, UnicodeError),
    ) as error:
        known = known_error(error)
        if known is None:
            return _unexpected(request, error)
        if isinstance(known, Unavailable):
            log.warning("database.unavailable", extra={"error": f"{type(error).__name__}: {error}"[:200]})
        return _answer(request, known)
    except Exception as error:
        return _unexpected(request, error)


def problem(
    request: web.BaseRequest,
    status: int,
    detail: str,
    *,
    code: str | None = None,
    kind: str | None = None,
    facts: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """The body of an error. `code` is its stable word, `kind` the name of its class."""
    phrase = HTTPStatus(status).phrase
    word = code or phrase.lower().replace(" ", "_").replace("-", "_")
    body = {
        **envelope(request.get(REQUEST_ID) or _request_id(request), status),
        "error": f"{kind}: {detail}" if kind else detail,
        "type": f"urn:core4:problem:{word}",
        "title": phrase,
        "status": status,
        "detail": detail,
        "instance": request.rel_url.raw_path,
    }
    body = {**body, **{name: fact for name, fact in (facts or {}).items() if name not in body}}
    return web.Response(status=status, text=dumps(body), content_type=PROBLEM, headers=headers)


def _answer(request: web.Request, error: Core4Error) -> web.Response:
    if error.status >= 500 and not isinstance(error, Unavailable):
        return _unexpected(request, error)
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = _challenge(request)
    if error.status in (429, 503):
        headers["Retry-After"] = str(ceil(error.facts.get("retry_after", RETRY)))
    kind = type(error).__name__
    return problem(
        request, error.status, error.detail, code=error.code, kind=kind, facts=error.facts, headers=headers
    )


def _challenge(request: web.Request) -> str:
    # A script in a browser shows its own form: a Basic challenge would open the browser's.
    if request.headers.get("Sec-Fetch-Dest") == "empty":
        return 'Bearer realm="core4"'
    return 'Basic realm="core4", charset="UTF-8", Bearer realm="core4"'


def _unexpected(request: web.Request, error: Exception) -> web.Response:
    request_id = request[REQUEST_ID]
    path = request.rel_url.raw_path[:200]
    log.error("request.failed", exc_info=error, extra={"path": path})
    return problem(request, 500, f"internal error, see the log of the API for request {request_id}")


def known_error(error: Exception) -> Core4Error | None:
    """What a library's error means; None if it is a mistake of ours."""
    if isinstance(error, web.RequestPayloadError):
        return BadRequest("the body does not arrive as its headers announce it")
    if isinstance(error, DocumentTooLarge):
        return TooLarge("too large to be stored")
    # Drivers raise the last two for numbers of more than 64 bits and for half characters.
    if isinstance(error, BSONError | OverflowError | UnicodeError):
        return BadRequest("a value cannot be stored")
    if isinstance(error, OperationFailure) and error.code not in GOING_DOWN:
        return None
    return Unavailable()


def _http_detail(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "the body is larger than accepted"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return (
            error.text if error.text and "[" in error.text else f"method [{error.method}] is not allowed here"
        )
    if isinstance(error, web.HTTPNotFound):
        return "nothing is found at this address"
    return error.text or error.reason
