"""A database server, an API and workers of their own for one measurement, and the processor time of each.

Processor time, as other work on the machine makes a wall time long and a processor time only a little longer.
What it makes of it is measured beside: a loop that is always the same, a hundredth of the time (`Pace`).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from bson import ObjectId
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.embedded import EmbeddedServer, running
from core4.jobs import JobOrder, Owner, utcnow
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.store import JOURNAL
from core4.users import UserStore
from tests.bench.server import version_of
from tests.helpers import ADMIN, ROOT, Command, free_port, program

Document = dict[str, Any]
JOBS = ROOT / "tests/jobs/bench.py"
AUTH = {"Authorization": "Basic " + b64encode(":".join(ADMIN).encode()).decode()}
SLOTS = 32  # of each worker
BULK = 1_000  # documents that are stored at once
LOOP = 40_000  # steps of the loop that says how fast the machine is just now: some milliseconds


def processor(pid: int) -> float:
    """Seconds of processor time of a process and of all that it has started, ended ones included."""
    total = 0.0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for each in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                total += sum(each.cpu_times()[:4])
    return total


class Pace(threading.Thread):
    """Runs a loop that is always the same now and then, and knows what processor time that takes."""

    def __init__(self, every: float = 0.5) -> None:
        super().__init__(daemon=True)
        self._every, self._ended = every, threading.Event()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._ended.is_set():
            start = time.thread_time()
            total = 0
            for number in range(LOOP):
                total += number & 7
            self.seconds.append(time.thread_time() - start)
            self._ended.wait(self._every)

    def end(self) -> float:
        """Median seconds of the loop."""
        self._ended.set()
        self.join()
        return statistics.median(self.seconds)


class Stand:
    """What runs, how to reach it, and what it has used."""

    def __init__(self, url: str, kind: str, loop: asyncio.Runner, pids: dict[str, list[int]]) -> None:
        self.kind, self.loop, self.pids = kind, loop, pids
        self.server: EmbeddedServer | None = None  # if it is not one that somebody named
        self.name = f"bench_{os.getpid()}"  # of the database
        self.database = loop.run(Database.connect(url, self.name))
        self.client: MongoClient[Document] = MongoClient(url)
        self.tables = self.client[self.name]
        self.queue = JobQueue(self.database, Settings())
        self.logs = LogStore(self.database)
        self.owner = Owner("bench", "bench@here", "here", 1)
        self.port = 0  # of the API
        self.environ: dict[str, str] = {}  # of API and workers

    def clock(self) -> dict[str, float]:
        """Seconds of processor time so far, by part."""
        return {part: sum(map(processor, pids)) for part, pids in self.pids.items()}

    def memory(self, part: str) -> int:
        """Resident bytes of the first process of a part."""
        return int(psutil.Process(self.pids[part][0]).memory_info().rss)

    def journaled(self) -> int:
        """Documents in the journal."""
        return self.tables[JOURNAL].estimated_document_count()

    def fill(self, entries: int) -> None:
        """Store that many ended jobs straight in the journal, each a second younger than the one before."""
        if not entries:
            return
        row = self._ended_job()
        start = utcnow() - timedelta(seconds=entries)
        for first in range(0, entries, BULK):
            numbers = range(first, min(first + BULK, entries))
            self.tables[JOURNAL].insert_many([_copy(row, number, start) for number in numbers], ordered=False)

    def _ended_job(self) -> Document:
        """The document of a job that has been through all of its life."""
        order = JobOrder(
            name="tests.jobs.Noop", args={"n": 0}, username="bench", unique=False, namespace="NOBODY"
        )

        async def live() -> ObjectId:
            await self.queue.enqueue(order)
            (job,) = await self.queue.claims.claim(self.owner, namespaces=["NOBODY"])
            job = await self.queue.start(job, pid=1)
            return (await self.queue.finish(job, Outcome.complete(None), log_seq=0)).id

        key = self.loop.run(live())
        row = self.tables[JOURNAL].find_one({"_id": key})
        assert row is not None
        return row


def _copy(row: Document, number: int, start: datetime) -> Document:
    at = start + timedelta(seconds=number)
    key = ObjectId(ObjectId.from_datetime(at).binary[:4] + os.urandom(8))
    own = {"_id": key, "args": {"n": number}, "journaled_at": at, "finished_at": at}
    return {**row, **own, "enqueued": {**row["enqueued"], "at": at}}


@contextmanager
def stand(
    workers: int = 1, *, embedded: Callable[[Path], EmbeddedServer] | None = None, **environ: str
) -> Iterator[Stand]:
    """A database with nothing in it, that many workers and one API process, until the block ends.

    On the server that `CORE4_MONGO_URL` names; else, or if one is asked for, on an embedded one.
    """
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
        loop = stack.enter_context(asyncio.Runner())
        url = os.environ.get("CORE4_MONGO_URL", "") if embedded is None else ""
        server = None if url else stack.enter_context((embedded or EmbeddedServer)(home / "data"))
        if server is not None:
            state = running(home / "data")
            assert state is not None
            url, kind, processes = server.url, server.kind, [state.pid]
        else:
            kind, processes = version_of(url), _listeners(url)
        pids: dict[str, list[int]] = {"db": processes, "worker": [], "api": []}
        found = Stand(url, kind, loop, pids)
        found.server = server
        stack.callback(found.client.close)
        stack.callback(lambda: loop.run(found.database.close()))
        if server is None:
            stack.callback(found.client.drop_database, found.name)
        loop.run(_prepare(found.database, known=not workers))
        found.port = free_port()
        own = {"CORE4_MONGO_URL": url, "CORE4_MONGO_DATABASE": found.name, "CORE4_HOME": str(home)}
        more = {"CORE4_MAX_CPU": "100", "CORE4_SLOTS": str(SLOTS), "CORE4_PORT": str(found.port)}
        found.environ = {**own, **more, **_MANY, **environ}
        worker = [program("core4"), "worker", str(JOBS)]
        commands = [("worker", Command(worker, found.environ, cwd=home)) for _ in range(workers)]
        commands.append(("api", Command([program("core4"), "api"], found.environ, cwd=home)))
        _start(stack, commands, pids)
        yield found


def _listeners(url: str) -> list[int]:
    """The processes of this machine that listen at the ports of a URL: their time is the database's."""
    ports = {port for _, port in parse_uri(url)["nodelist"]}
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return sorted(
        {each.pid for each in listening if each.laddr and each.laddr.port in ports and each.pid is not None}
    )


def _start(stack: ExitStack, commands: Sequence[tuple[str, Command]], pids: dict[str, list[int]]) -> None:
    for part, command in commands:
        pids[part].append(stack.enter_context(command).process.pid)
    for _, command in commands:
        command.wait_for("ready", 120)


_MANY = {"CORE4_STREAMS_PER_USER": "100000", "CORE4_STREAMS": "100000"}


async def _prepare(database: Database, *, known: bool) -> None:
    if known:  # else a worker tells of its jobs
        entry = {"namespace": "DEFAULT", "kind": "class", "schema": {"type": "object"}, "options": {}}
        await Catalogue(database).publish([{"_id": "tests.jobs.InlineNap", **entry, "unique": False}])
    for store in (JobQueue(database, Settings()).store, LogStore(database), WorkerRegistry(database)):
        await store.prepare()
    users = UserStore(database, Settings())
    await users.add(*ADMIN, allow=["cop"])
    users.close()
