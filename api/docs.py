"""Handlers of the API's own description: OpenAPI for programs, a page for people."""

from __future__ import annotations

import hashlib
from typing import Any

from aiohttp import web

from core4.api.encoding import dumps
from core4.api.envelope import JSON
from core4.api.keys import CATALOGUE, OPENAPI, USER, WORKERS
from core4.api.system import file_response

Args = dict[str, Any]

# Swagger UI draws with inline styles and small pictures in its style sheet; scripts are ours only.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: web.Request, args: Args) -> web.Response:
    """GET /docs: try the API in a browser."""
    response = file_response("docs.html")
    response.headers["Content-Security-Policy"] = _POLICY
    return response


async def description(request: web.Request, args: Args) -> web.Response:
    """GET openapi.json: the API as OpenAPI 3.1, with what the user may enqueue and a living worker runs."""
    may = request[USER].may
    served = {name for worker in await request.app[WORKERS].up() for name in worker.get("jobs", ())}
    entries = [
        entry
        for entry in await request.app[CATALOGUE].all()
        if entry["_id"] in served and may.may_execute(str(entry["_id"])) and not entry.get("hidden")
    ]
    text = dumps(request.app[OPENAPI](entries))
    tag = hashlib.sha256(text.encode()).hexdigest()[:32]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    known = request.if_none_match or ()
    if any(each.value == tag for each in known):
        return web.Response(status=304, headers=headers)
    return web.Response(text=text, content_type=JSON, headers=headers)
