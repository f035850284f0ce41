"""A pool of workers on this machine: as many as there is work for, and another for each that ends badly.

Any number of pools may work on one database. Each looks after the workers that carry its own marks, and
keeps its own limits; the numbers of the workers come from `WorkerRegistry`, which gives each once. Workers
over HTTP are a pool of a fixed number: without a database nobody sees here what they do, only that they run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

from pymongo.errors import PyMongoError

from core4.config import Settings, without_settings
from core4.controls import ControlStore
from core4.database import Database, Document
from core4.errors import Unavailable
from core4.functions import SERVES
from core4.queues import JobQueue
from core4.registry import LIVING, LOADING, WorkerRegistry
from core4.service import ready, spawn, stop_on_signals
from core4.waits import heard

log = logging.getLogger(__name__)

CONNECT_EVERY = 1.0  # seconds between two tries to reach the database
PAUSES = (1.0, 30.0)  # seconds until a worker that died is replaced: the least, the most
MARGIN = 5.0  # seconds granted beyond what a worker has promised to need
WORKER = (sys.executable, "-P", "-m", "core4", "worker")


@dataclass(frozen=True)
class Size:
    """How many workers: at least, at most. The same twice is a fixed number."""

    minimum: int = 1
    maximum: int = 10

    def wanted(self, jobs: int, slots: int) -> int:
        """Workers for so many jobs, queued and running, of `slots` each."""
        return min(max(ceil(jobs / slots), self.minimum), self.maximum)


class Place(Protocol):
    """Where workers run. Each has the mark with which it was started (`Settings.worker_launch`)."""

    def launches(self) -> list[str]:
        """The marks of all that run."""

    def start(self, launch: str) -> None:
        """Start one more."""

    def ended(self) -> dict[str, str]:
        """Those that have ended since the last call: how, or an empty text if they ended as they should."""

    def signal(self, launch: str, number: int) -> None:
        """Send a signal to one; nothing happens if it has ended."""


class Children:
    """Workers as children of this process, which are killed when it ends. Main thread only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def launches(self) -> list[str]:
        return list(self._processes)

    def start(self, launch: str) -> None:
        self._processes[launch] = spawn(
            WORKER, env=environ_of(self._settings, launch), stdin=subprocess.DEVNULL
        )

    def ended(self) -> dict[str, str]:
        codes = {launch: process.poll() for launch, process in self._processes.items()}
        gone = {launch: how(code) for launch, code in codes.items() if code is not None}
        for launch in gone:
            del self._processes[launch]
        return gone

    def signal(self, launch: str, number: int) -> None:
        if process := self._processes.get(launch):
            process.send_signal(number)  # which does nothing to one that was seen to have ended


def environ_of(settings: Settings, launch: str | None = None) -> dict[str, str]:
    """The environment of a pool, or with a mark of one worker of it: its settings, and no others."""
    own = replace(settings, slots=settings.slots or 1)
    if launch is not None:
        own = replace(own, worker_type="subprocess", worker_launch=launch)
    return without_settings(os.environ) | own.to_environ()


def how(code: int) -> str:
    """How a process ended that should not have; empty if it should."""
    if code == 0:
        return ""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


@dataclass
class Member:
    """One worker of the pool."""

    started: float  # monotonic
    up: bool = False  # was seen at work
    leaving: bool = False
    silent: str = ""  # why it was killed by us


class Pool:
    """Keeps a pool at its size; `run` it once.

    Args:
        database: None if the workers have none; then the size has to be a fixed number.
        size: a fixed number shrinks with each worker that an operator ends; between two limits it follows
            the work.
        place: where the workers are.
    """

    def __init__(self, database: Database | None, settings: Settings, size: Size, place: Place) -> None:
        self.size = size
        self._settings, self._place = settings, place
        self._slots = settings.slots or 1
        self._database = database
        if database is not None:
            self._queue = JobQueue(database, settings)
            self._registry, self._controls = WorkerRegistry(database), ControlStore(database)
        self._members: dict[str, Member] = {}
        self._deaths = 0  # of workers that never got ready, one after the other
        self._again_at = 0.0  # monotonic; nothing is started before
        self._contact: tuple[float, float] | None = None  # since when, and until when, without a gap

    async def run(self, stop: asyncio.Event, halt: asyncio.Event) -> None:
        """Keep the pool until `stop`; then end all workers, which is hurried by `halt`."""
        self._members = {launch: Member(time.monotonic()) for launch in self._place.launches()}
        ready(log, minimum=self.size.minimum, maximum=self.size.maximum)
        while not stop.is_set():
            try:
                await self.step()
            except (PyMongoError, Unavailable) as error:
                self._contact = None
                log.warning("pool.database_trouble", extra={"error": str(error)[:200]})
            await heard(stop, self._settings.poll)
        await self._end_all(halt)

    async def step(self) -> None:
        """One look: bury and replace the dead, then grow, or shrink by one."""
        await self._bury_ended()
        if self._database is None:
            self._fill(self.size.minimum)
            return
        rows = await self._rows()
        self._note_contact()
        self._look_after(rows)
        await self._resize(rows)

    # ------------------------------------------------------------------ health

    async def _bury_ended(self) -> None:
        for launch, why in self._place.ended().items():
            # One that is not known ended while this supervisor was not there.
            member = self._members.pop(launch, Member(time.monotonic(), up=True))
            if why or member.silent:
                self._note_death(member, why)
                await self._condemn(launch, member.silent or f"its process ended: {why}")
            elif not member.leaving and self.size.minimum == self.size.maximum:
                # Somebody has ended it: another one in its place would be against his will.
                self.size = Size(self.size.minimum - 1, self.size.maximum - 1)

    async def _condemn(self, launch: str, why: str) -> None:
        if self._database is None:
            return  # its manager finds out
        for row in await self._registry.list(where={"launch": launch, "state": {"$in": LIVING}}):
            await self._registry.condemn(row["_id"], why)

    def _note_death(self, member: Member, why: str) -> None:
        lasted = time.monotonic() - member.started > PAUSES[1]
        self._deaths = 0 if member.up or lasted else self._deaths + 1
        pause = min(PAUSES[0] * 2 ** max(self._deaths - 1, 0), PAUSES[1])
        self._again_at = time.monotonic() + pause
        log.error("pool.worker_died", extra={"how": why, "silent": member.silent, "next_in": pause})

    async def _rows(self) -> dict[str, Document]:
        """What the members say of themselves: of each its newest document."""
        where = {"launch": {"$in": list(self._members)}}
        rows = await self._registry.list(limit=10_000, where=where)
        return {row["launch"]: row for row in reversed(rows)}

    def _note_contact(self) -> None:
        """The database has answered; whoever was frozen itself cannot say that others are."""
        now, patience = time.monotonic(), self._settings.dead_after
        since, until = self._contact or (now, now)
        self._contact = (since if now - until < patience / 2 else now, now)

    def _look_after(self, rows: Mapping[str, Document]) -> None:
        assert self._contact is not None
        now, patience = time.monotonic(), self._settings.dead_after
        for launch, member in self._members.items():
            row = rows.get(launch)
            member.up = member.up or (row is not None and row["state"] != "new")
            if now - self._contact[0] < patience:
                continue
            if row is not None and row["state"] != "new":
                # One that was declared dead gets the same time again, to come back as another.
                if row["beat_age"] > (patience if row["state"] in LIVING else 2 * patience):
                    self._kill(launch, member, f"no sign of life for {row['beat_age']:.0f} s")
            elif now - member.started > max(patience, LOADING):
                self._kill(launch, member, f"not ready after {now - member.started:.0f} s")

    def _kill(self, launch: str, member: Member, why: str) -> None:
        member.silent = why
        log.error("pool.worker_killed", extra={"launch": launch, "reason": why})
        self._place.signal(launch, signal.SIGKILL)

    # ------------------------------------------------------------------ size

    async def _resize(self, rows: Mapping[str, Document]) -> None:
        rows = {launch: row for launch, row in rows.items() if row["state"] in LIVING}
        held = await self._queue.store.held_by([row["_id"] for row in rows.values()])
        busy = sum(map(len, held.values()))
        wanted = self.size.wanted(await self._queued(rows.values()) + busy, self._slots)
        staying = [launch for launch, member in self._members.items() if not member.leaving]
        if self._fill(wanted):
            return
        # One that still starts is no reason for another to go: there must be somebody meanwhile.
        up = [launch for launch in staying if launch in rows and rows[launch]["state"] == "up"]
        if len(up) > wanted:
            idle = [launch for launch in up if rows[launch]["_id"] not in held]
            for launch in idle[-1:]:
                self._members[launch].leaving = True
                self._place.signal(launch, signal.SIGUSR1)
                log.info("pool.shrinks", extra={"workers": len(staying) - 1})

    def _fill(self, wanted: int) -> bool:
        """Start what is missing; True if something was."""
        missing = wanted - sum(not member.leaving for member in self._members.values())
        if missing <= 0 or time.monotonic() < self._again_at:
            return False
        for _ in range(missing):
            self._start()
        return True

    async def _queued(self, rows: Collection[Document]) -> int:
        """Jobs in line that these workers run; not more of them than all workers could take."""
        if self.size.minimum == self.size.maximum:
            return 0
        controls = await self._controls.read()
        if controls.everything:
            return 0
        names = {name for row in rows for name in row["jobs"]}
        namespaces = sorted({name for row in rows for name in row["namespaces"]})
        where: Document = {"due": True, "namespace": {"$in": controls.opened(namespaces)}}
        if SERVES not in names:  # else there are jobs whose names are nobody's
            where["name"] = {"$in": sorted(names)}
        return len(await self._queue.store.ids(where, limit=self.size.maximum * self._slots))

    def _start(self) -> None:
        launch = uuid.uuid4().hex
        self._place.start(launch)
        self._members[launch] = Member(time.monotonic())
        log.info("pool.grows", extra={"workers": len(self._members), "launch": launch})

    # ------------------------------------------------------------------ end

    async def _end_all(self, halt: asyncio.Event) -> None:
        self._signal_all(signal.SIGTERM)
        patience = self._settings.drain + self._settings.grace + MARGIN
        deadline = time.monotonic() + patience
        while self._place.launches() and time.monotonic() < deadline:
            self._place.ended()
            if await heard(halt, 0.1):
                halt.clear()
                self._signal_all(signal.SIGTERM)  # a second one hurries them
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for launch in self._place.launches():
            self._place.signal(launch, number)


Follow = Callable[[Pool, asyncio.Event, asyncio.Event], Coroutine[Any, Any, None]]


def supervise(settings: Settings, size: Size, place: Place, follow: Follow | None = None) -> int:
    """Keep a pool in the foreground until SIGTERM or SIGINT; returns the exit code. Main thread only.

    `follow` runs beside the pool and may change its size, or set the events that stop it and hurry that.
    """
    return asyncio.run(_supervise(settings, size, place, follow))


async def _supervise(settings: Settings, size: Size, place: Place, follow: Follow | None) -> int:
    halt = asyncio.Event()
    stop = stop_on_signals(halt.set)
    if settings.manager is not None:
        await Pool(None, settings, size, place).run(stop, halt)
        return 0
    assert settings.mongo_url is not None
    while not stop.is_set():
        try:
            database = await Database.connect(
                settings.mongo_url, settings.mongo_database, app_name="core4 pool"
            )
        except PyMongoError as error:
            log.warning("database.unreachable", extra={"error": str(error)[:200]})
            await heard(stop, CONNECT_EVERY)
            continue
        pool = Pool(database, settings, size, place)
        beside = asyncio.create_task(follow(pool, stop, halt)) if follow else None
        if beside:
            beside.add_done_callback(lambda _: stop.set())  # nobody could tell it to end any more
        try:
            await pool.run(stop, halt)
        finally:
            if beside:
                beside.cancel()
            await database.close()
    return 0
