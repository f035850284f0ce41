"""`core4 worker`: one worker in this process, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from dataclasses import replace

from pymongo.errors import PyMongoError

from core4.brokers import require
from core4.config import DEBUG, Settings
from core4.database import Database
from core4.errors import ConfigError, JobInvalid, Unauthenticated, Unavailable
from core4.service import hide_memory, run_loop, stop_on_signals
from core4.worker import functions
from core4.worker.backend import Refused
from core4.worker.daemon import Worker
from core4.worker.direct import Direct
from core4.worker.handle import Launcher

log = logging.getLogger(__name__)

CONNECT_EVERY = 1.0  # seconds between two tries to reach the database


def run(settings: Settings) -> int:
    """Run a worker in the foreground; the exit code is 1 if it failed. Main thread only.

    Raises: ConfigError on a system that cannot keep job processes together, or for a broker that is not
    installed.
    """
    if sys.platform != "linux":
        raise ConfigError(f"a worker needs Linux (subreapers, parent death signals); this is {sys.platform}")
    if settings.broker_url:
        require(settings.broker_url)
    functions.require(settings)
    if settings.worker_debug:
        settings = replace(settings, namespaces=(DEBUG,))
    # First of all: it must be forked from a process without threads and connections.
    launcher = Launcher.spawn(settings)
    # Jobs run as the same user: they must not read the database's password out of this process.
    hide_memory()
    try:
        return run_loop(_serve(settings, launcher))
    finally:
        launcher.close()


async def _serve(settings: Settings, launcher: Launcher) -> int:
    halt = asyncio.Event()
    stop = stop_on_signals(halt.set)
    try:
        if settings.manager is not None:
            await _serve_remote(settings, launcher, stop, halt)
        else:
            await _serve_direct(settings, launcher, stop, halt)
    except (Refused, Unauthenticated, JobInvalid) as refused:
        log.critical("worker.refused", extra={"error": refused.detail})
        return 1
    except Exception:
        log.critical("worker.ended_by_error", exc_info=True)
        return 1
    return 0


async def _serve_direct(
    settings: Settings, launcher: Launcher, stop: asyncio.Event, halt: asyncio.Event
) -> None:
    database = await _connect(settings, stop)
    if database is None:
        return
    try:
        await _run(Worker(Direct(database, settings), settings, launcher), stop, halt)
    finally:
        await database.close()


async def _serve_remote(
    settings: Settings, launcher: Launcher, stop: asyncio.Event, halt: asyncio.Event
) -> None:
    from core4.worker.remote import Remote  # its HTTP client takes as long to load as all the rest

    async with Remote(settings) as remote:
        while not stop.is_set():
            try:
                settings = await remote.terms(settings)
                break
            except Unavailable as error:
                log.warning("manager.unreachable", extra={"error": error.detail})
                await asyncio.sleep(CONNECT_EVERY)
        await _run(Worker(remote, settings, launcher), stop, halt)


async def _run(worker: Worker, stop: asyncio.Event, halt: asyncio.Event) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, worker.retire)
    await worker.run(stop, halt)


async def _connect(settings: Settings, stop: asyncio.Event) -> Database | None:
    """The database as soon as it answers; None if the worker is stopped before."""
    assert settings.mongo_url is not None
    while not stop.is_set():
        try:
            name = f"core4 worker {settings.worker_name}@{socket.gethostname()}"
            return await Database.connect(settings.mongo_url, settings.mongo_database, app_name=name)
        except PyMongoError as error:
            log.warning("database.unreachable", extra={"error": str(error)[:200]})
            await asyncio.sleep(CONNECT_EVERY)
    return None
