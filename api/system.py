"""Handlers that tell what runs here: page, probes, version and workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from pymongo.errors import PyMongoError

from core4.api.envelope import PRODUCT, VERSION, reply
from core4.api.keys import CONTROLS, DATABASE, QUEUE, SETTINGS, USER, WORKERS
from core4.controls import Controls
from core4.database import Document
from core4.errors import Unavailable
from core4.filters import WORKER_FIELDS, compile_filter
from core4.registry import described

Args = dict[str, Any]

_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Few and small: kept in memory, so that no address reaches the file system.
FILES = {
    path.relative_to(_STATIC).as_posix(): (path.read_bytes(), _TYPES[path.suffix])
    for path in _STATIC.rglob("*")
    if path.suffix in _TYPES
}

ANSWER = 2.0  # seconds that the database has to answer a probe


async def home(request: web.Request, args: Args) -> web.Response:
    """GET /: a page for people."""
    return file_response("index.html")


async def static(request: web.Request, args: Args) -> web.Response:
    """GET /static/<name>: what the pages need."""
    name = request.match_info["name"]
    if name not in FILES:
        raise web.HTTPNotFound
    return file_response(name)


def file_response(name: str) -> web.Response:
    """One of our files. What lies in a folder is named after its version, so that it never changes."""
    body, kind = FILES[name]
    cache = "public, max-age=31536000, immutable" if "/" in name else "no-cache"
    return web.Response(body=body, content_type=kind, charset="utf-8", headers={"Cache-Control": cache})


async def alive(request: web.Request, args: Args) -> web.Response:
    """GET /livez: this process answers."""
    return reply(request, "alive")


async def ready(request: web.Request, args: Args) -> web.Response:
    """GET /readyz: this process can do its work."""
    try:
        async with asyncio.timeout(ANSWER):
            await request.app[DATABASE].ping()
    except (TimeoutError, PyMongoError):
        raise Unavailable from None
    return reply(request, "ready")


async def show_version(request: web.Request, args: Args) -> web.Response:
    """GET /version."""
    return reply(request, {"product": PRODUCT, "version": VERSION})


async def workers(request: web.Request, args: Args) -> web.Response:
    """GET worker: the workers, newest first, with the jobs among theirs that the user may read."""
    where = compile_filter(args["filter"], WORKER_FIELDS, args=False).where
    rows = await request.app[WORKERS].list(where=dict(where))
    held = await request.app[QUEUE].store.held_by([row["_id"] for row in rows])
    controls = await request.app[CONTROLS].read()
    found = [_worker(request, row, held.get(row["_id"], ()), controls) for row in rows]
    return reply(request, [row for row in found if args["status"] in (None, row["status"])])


def _worker(request: web.Request, row: Document, running: Sequence[Document], controls: Controls) -> Document:
    may = request[USER].may
    current = [job["_id"] for job in running if may.may_read(job["name"])]
    row = described(row, running, request.app[SETTINGS].dead_after)
    paused, stop = controls.of_worker(row["name"]), controls.stop_of([row["_id"]])
    return {
        **row,
        "current": current,
        "jobs": [name for name in row["jobs"] if may.may_read(name)],
        "paused": vars(paused) if paused else None,
        "halt": vars(stop) if stop else None,
    }
