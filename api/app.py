"""The API process: what it is made of, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiohttp import web
from pymongo.errors import PyMongoError

from core4 import __version__, identifiers
from core4.actions import ActionStore
from core4.api.browsers import add_headers, origins
from core4.api.connections import Connection, cut_stalled, heard
from core4.api.errors import problems
from core4.api.hub import Hub
from core4.api.keys import (
    ACTIONS,
    CATALOGUE,
    CLOSING,
    CONTROLS,
    DATABASE,
    EVENTS,
    FEED,
    HUB,
    LOGS,
    METRICS,
    OPENAPI,
    QUEUE,
    REQUESTS,
    RETURNS,
    SCHEDULES,
    SEATS,
    SERVED,
    SETTINGS,
    SIGN_INS,
    TURNS,
    USERS,
    WORKERS,
)
from core4.api.metrics import Metrics, counted
from core4.api.openapi import describe
from core4.api.routes import add_routes
from core4.api.throttle import Seats, SignIns, Throttle, Turns
from core4.api.workers import add_worker_routes
from core4.attendance import Attendance, Contact
from core4.catalogue import CATALOGUE as CATALOGUE_COLLECTION
from core4.catalogue import RememberedCatalogue
from core4.changes import ChangeFeed
from core4.config import Settings
from core4.controls import CONTROL, ControlStore
from core4.database import Database
from core4.errors import ConfigError
from core4.events import EventStore
from core4.logs import LOG, LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.remembered import Remembered
from core4.returns import RETURN, Returns
from core4.schedules import ScheduleStore
from core4.service import hide_memory, ready, run_loop, stop_on_signals
from core4.store import JOURNAL
from core4.store import QUEUE as QUEUE_COLLECTION
from core4.users import UserStore

log = logging.getLogger(__name__)

# Requests are not logged one by one; aiohttp asks the logger before it makes a line.
_silent = logging.getLogger("aiohttp.access")
_silent.setLevel(logging.WARNING)

BACKLOG = 4096  # connections that may wait to be accepted: followers all come back at once
IDLE = 75.0  # seconds that a connection is kept between two requests
GLANCE = 1.0  # seconds for which a worker that was up counts as one: it decides on a warning only
LARGE = 4  # lists and documents of one user that are made and sent at a time
SHUTDOWN = 2.0  # seconds that open requests get to end


def create_app(settings: Settings, database: Database) -> web.Application:
    """The application on a database that is connected; the caller closes that."""
    app = web.Application(middlewares=[heard, counted, problems, origins], client_max_size=settings.max_body)

    app[SETTINGS] = settings
    app[DATABASE] = database
    app[QUEUE] = JobQueue(database, settings)
    app[LOGS] = LogStore(database)
    app[SCHEDULES] = ScheduleStore(database)
    app[WORKERS] = registry = WorkerRegistry(database)
    app[SERVED] = Remembered(lambda kind: registry.serves(*kind), lambda: GLANCE)
    app[CONTROLS] = ControlStore(database)
    app[ACTIONS] = ActionStore(database)
    app[USERS] = UserStore(database, settings)
    app[EVENTS] = EventStore(database)
    app[RETURNS] = Returns(database)
    app[SIGN_INS] = SignIns()
    app[SEATS] = Seats(settings.streams, settings.streams_per_user)
    app[TURNS] = Turns(LARGE)
    if settings.requests_per_user is not None:
        app[REQUESTS] = Throttle(settings.requests_per_user, 1.0)
    app[OPENAPI] = describe
    app[METRICS] = Metrics()
    watched = [QUEUE_COLLECTION, JOURNAL, LOG, CONTROL, RETURN, CATALOGUE_COLLECTION]
    app[FEED] = feed = ChangeFeed(database, watched)
    app[CATALOGUE] = RememberedCatalogue(database, feed)
    app[CLOSING] = asyncio.Event()
    app[HUB] = Hub(feed, app[QUEUE], app[LOGS], buffer=settings.sse_buffer)

    add_worker_routes(app)  # before those that take any word in their place
    add_routes(app)

    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(_indexes)
    app.cleanup_ctx.append(_users)
    app.cleanup_ctx.append(_hub)
    if settings.worker_secret is not None:
        app.cleanup_ctx.append(_attend)
    app.on_shutdown.append(_cut_streams)
    return app


async def _indexes(app: web.Application) -> AsyncIterator[None]:
    for store in (app[QUEUE].store, app[LOGS], app[WORKERS], app[CONTROLS], app[USERS], app[ACTIONS]):
        await store.prepare()
    yield


async def _users(app: web.Application) -> AsyncIterator[None]:
    yield
    app[USERS].close()


async def _hub(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[HUB].run(), name="hub")
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _attend(app: web.Application) -> AsyncIterator[None]:
    """Do what workers over HTTP cannot: they may be all that there are."""
    attendance = Attendance(
        app[DATABASE],
        app[SETTINGS],
        app[QUEUE],
        contact=Contact(),
        name=lambda: f"api@{socket.gethostname()}",
        woken=lambda: None,  # workers hear of it through the feed
        live=lambda: app[FEED].live,
    )
    app[FEED].listen(attendance.hear)
    parts = (*attendance.parts(), attendance.keep_contact())
    tasks = [asyncio.create_task(part, name="attendance") for part in parts]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cut_streams(app: web.Application) -> None:
    # No `close`: it would say that the jobs have ended. Followers come back where they stopped.
    app[HUB].cut()
    app[CLOSING].set()


@asynccontextmanager
async def listen(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app` within the block, which gets the port.

    Raises: OSError if the address cannot be used.
    """
    # With cancellation a follower who leaves is noticed at once, not at the next write.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN)
    await runner.setup()
    try:
        loop, manager = asyncio.get_running_loop(), runner.server
        assert manager is not None

        def connected() -> Connection:
            # Bodies are small: what a compressed one becomes is not worth finding out.
            return Connection(
                manager, loop=loop, access_log=_silent, auto_decompress=False, keepalive_timeout=IDLE
            )

        server = await loop.create_server(connected, host, port, backlog=BACKLOG)
        watch = asyncio.create_task(cut_stalled(manager))
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            watch.cancel()
            server.close()
    finally:
        await runner.cleanup()


def main(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT.

    Raises: SystemExit 1 with a message on stderr if it cannot start; ConfigError without a database.
    """
    if not settings.mongo_url:
        raise ConfigError("CORE4_MONGO_URL is not set: name a database, or start everything with `core4 up`")
    hide_memory()
    _allow_files()
    try:
        run_loop(_serve(settings, settings.mongo_url))
    except PyMongoError as error:
        # What follows the bracket are the driver's insides.
        sys.exit(f"core4 api: the database does not answer: {str(error).partition(' (configured')[0][:200]}")
    except OSError as error:
        sys.exit(f"core4 api: {_why(error, settings)}")


def _allow_files() -> None:
    """As many open files as the system grants: followers are many, and the usual soft limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS grants less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(settings: Settings, url: str) -> None:
    identifiers.bind({"daemon": f"api@{socket.gethostname()}"})
    database = await Database.connect(url, settings.mongo_database, app_name="core4-api")
    try:
        stop = stop_on_signals()
        async with listen(create_app(settings, database), settings.host, settings.port) as port:
            ready(log, host=settings.host, port=port)
            events, name = EventStore(database), f"api@{socket.gethostname()}"
            await events.tell("api.start", name, pid=os.getpid(), port=port, version=__version__)
            await stop.wait()
            log.info("stopping")
            await events.tell("api.stop", name, pid=os.getpid(), port=port)
    finally:
        await database.close()


def _why(error: OSError, settings: Settings) -> str:
    address = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"address {address} is in use by another program; choose another with CORE4_PORT or --port"
    return f"cannot listen on {address}: {error.strerror or error}"
