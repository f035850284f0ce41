"""Handlers that tell what runs here: page, probes, version and workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web
from pymongo.errors import PyMongoError

from core4.api.envelope import PRODUCT, VERSION, reply
from core4.api.keys import CONTROLS, DATABASE, USER, WORKERS
from core4.errors import Unavailable

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
    may = request[USER].may
    rows = await request.app[WORKERS].list()
    controls = await request.app[CONTROLS].read()
    for row in rows:
        held = controls.of_worker(row["name"])
        row["paused"] = vars(held) if held else None
        row["jobs"] = [name for name in row.get("jobs", ()) if may.may_read(name)]
    return reply(request, rows)
