"""The least an HTTP server can do, as a process of its own: answer, insert, send events to who listens.

Run as ``python -m tests.bench.bare PORT [MONGO_URL]``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from contextlib import suppress
from typing import Any, Never

from aiohttp import web
from aiohttp_sse import sse_response
from bson import ObjectId
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import WriteConcern

from core4.jobs import JobOrder, new_document, utcnow
from core4.store import INDEXES, QUEUE

BACKLOG = 4096
_listening: set[web.StreamResponse] = set()
TABLE: web.AppKey[Any] = web.AppKey("TABLE", object)
_numbers = itertools.count()
# So that the database has as much to do as for a job of ours.
_JOB = new_document(JobOrder(name="bench.Job", args={}, username="bench", unique=False), ObjectId(), utcnow())


async def answer(request: web.Request) -> web.Response:
    """Whatever is sent, an envelope of the usual size."""
    await request.read()
    return web.json_response({"_id": "0" * 24, "code": 200, "message": "OK", "data": "0" * 24})


def _job(args: Any) -> dict[str, Any]:
    return {**_JOB, "_id": ObjectId(), "args": args, "rank": _JOB["rank"] + next(_numbers)}


async def insert(request: web.Request) -> web.Response:
    """Store a job with the arguments in the body, durably."""
    job = _job(json.loads(await request.read())["args"])
    await request.app[TABLE].insert_one(job)
    return web.json_response({"_id": "0" * 24, "code": 200, "message": "OK", "data": str(job["_id"])})


async def insert_many(request: web.Request) -> web.Response:
    """The same for several."""
    jobs = [_job(each["args"]) for each in json.loads(await request.read())["jobs"]]
    await request.app[TABLE].insert_many(jobs, ordered=False)
    ids = [str(job["_id"]) for job in jobs]
    return web.json_response({"_id": "0" * 24, "code": 200, "message": "OK", "data": ids})


async def events(request: web.Request) -> web.StreamResponse:
    """A stream that hears what is published."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    _listening.add(response)
    try:
        await asyncio.Future()
    finally:
        _listening.discard(response)
    return response


async def library_events(request: web.Request) -> Never:
    """The same as aiohttp-sse's readme has it: its response, and a queue for each who listens."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    async with sse_response(request) as response:
        while True:
            await response.send(await queue.get(), event="log")


async def publish(request: web.Request) -> web.Response:
    """So many events, one after the other, each encoded once and written to all."""
    for n in range(int(request.query["events"])):
        data = json.dumps({"seq": n, "message": f"line {n} {'x' * 300}"})
        frame = f"id: 1.{n}\nevent: log\ndata: {data}\n\n".encode()
        for response in tuple(_listening):
            with suppress(ConnectionResetError):  # it has left
                await response.write(frame)
    return web.json_response({})


def main() -> None:
    """Serve on the port of the first argument until killed."""
    app = web.Application()

    async def connect(app: web.Application) -> None:
        client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(sys.argv[2])
        app[TABLE] = client["bare"].get_collection("bare", write_concern=WriteConcern(w="majority", j=True))
        await app[TABLE].create_indexes(list(INDEXES[QUEUE]))

    if len(sys.argv) > 2:
        app.on_startup.append(connect)
    app.router.add_post("/insert", insert)
    app.router.add_post("/insert_many", insert_many)
    app.router.add_get("/events", events)
    app.router.add_get("/library_events", library_events)
    app.router.add_get("/publish", publish)
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
        access_log=None,
        backlog=BACKLOG,
        shutdown_timeout=0.2,
    )


if __name__ == "__main__":
    main()
