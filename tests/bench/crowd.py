"""A crowd of workers on one database: what a job costs, and what the others do meanwhile.

Each of them is a task of this process: its own owner and `sys.worker` document, claims, starts and finishes
through the real `JobQueue`, the real `Lookout`, the real chores (`Attendance`). Not there are launchers and
job processes (a job sleeps), controls, schedules and the API; and all share one change stream, which
would be one `getMore` a second for each.

All settings of time are longer by a factor that grows with the crowd, so that the embedded server can bear
it; what a claim and word of it take (`core4.changes.WAVE`) is not. With `--herd off` all look at all that
they are told of, and each reads all the living: as up to four workers, and up to forty, always do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from bson import ObjectId
from pymongo import monitoring

from core4 import attendance, changes
from core4.attendance import TROUBLE, Attendance, Contact
from core4.changes import QUIET, Change, ChangeFeed, Lookout
from core4.claims import stir
from core4.config import Settings
from core4.controls import CONTROL
from core4.database import AWAIT, Database
from core4.jobs import Job, JobOrder, Kind, Owner
from core4.queues import JobQueue
from core4.registry import WORKER, WorkerRegistry
from core4.retries import Outcome
from core4.store import QUEUE
from core4.worker.prospects import Prospects
from tests.bench.server import server

Document = dict[str, Any]
T = TypeVar("T")
NAME, NAMESPACE = "bench.Sleep", "CROWD"
SLOTS = 4
ALL_LOOK = 25.0  # workers that the server has looking in a second
LIMITS = changes.FEW, attendance.CROWD
EVERYBODY = 10**9  # a crowd that is none yet
STARTERS = 4  # workers that register at the same time
PATIENT = 60.0  # seconds that the driver waits for a busy server before it takes it for dead
PATIENCE = 900.0  # seconds for any one step


class Tally(monitoring.CommandListener):
    """Counts what the driver sends; it is told of it in many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        shared = event.command.get("collection") == "$cmd.aggregate"  # the stream
        with self._lock:
            self._counts["stream" if shared else event.command_name] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        cursor = event.reply.get("cursor", {})
        rows = cursor.get("firstBatch", cursor.get("nextBatch", ()))
        lost = event.command_name == "update" and not event.reply.get("n")
        with self._lock:
            self._counts["living"] += len(rows) if cursor.get("ns", "").endswith(WORKER) else 0
            self._counts["lost"] += lost

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        with self._lock:
            self._counts["failed"] += 1

    def counts(self) -> Counter[str]:
        """A copy of what there is so far; `commands` without the shared stream's."""
        with self._lock:
            counts = Counter(self._counts)
        told = {"living", "lost", "failed", "stream"}
        counts["commands"] = sum(number for name, number in counts.items() if name not in told)
        return counts


class Member:
    """One worker of the crowd; `hall` is what they share."""

    def __init__(self, hall: Hall, number: int) -> None:
        self.hall = hall
        self.owner = Owner(
            uuid.uuid4().hex, f"crowd{number}@bench", "bench", os.getpid(), Kind(nr=number + 1)
        )
        self.queue = JobQueue(hall.database, hall.settings)
        self.lookout = Lookout(self._is_live, hall.settings.poll)
        self.contact = Contact()
        self.chores = Attendance(
            hall.database,
            hall.settings,
            self.queue,
            contact=self.contact,
            name=lambda: self.owner.worker,
            woken=self.look_again,
            live=self._is_live,
        )
        self.running: set[asyncio.Task[None]] = set()
        self.prospects = Prospects(QUIET * hall.settings.poll)

    def _is_live(self) -> bool:
        return self.hall.feed.live

    def look_again(self) -> None:
        self.prospects.doubt()
        self.lookout.hint()

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        return [self.beat(), self.claim_jobs(), *self.chores.parts()]

    def hear(self, change: Change) -> None:
        self.chores.hear(change)
        if change.collection in (QUEUE, ""):
            pinned = stir(self.lookout, change, self.owner, [NAMESPACE], self.chores.crowd)
            self.prospects.hear(change, pinned=pinned)

    async def beat(self) -> None:
        while True:
            sent = time.monotonic()
            await self.hall.insist(lambda: self.hall.registry.beat(self.owner, running=len(self.running)))
            self.contact.note(sent, gap=False)
            await asyncio.sleep(self.hall.settings.heartbeat)

    async def claim_jobs(self) -> None:
        """As `core4.worker.daemon.Worker` does."""
        while True:
            self.lookout.looking()
            self.prospects.more = True
            if free := SLOTS - len(self.running):
                await self._look(free)
            await self.lookout.wait()

    async def _look(self, free: int) -> None:
        look = self.prospects.look((), untold=self.lookout.quiet or not self._is_live())
        assert look is not None  # no name is full
        self.hall.looking += 1
        claimed = await self.hall.insist(
            lambda: self.queue.claims.claim(
                self.owner,
                namespaces=[NAMESPACE],
                limit=free,
                pinned=look.pinned,
                arrived=look.arrived,
            )
        )
        self.hall.looking -= 1
        self.prospects.seen(claimed, (), all_kinds=True)
        self.hall.looks["looks"] += 1
        self.hall.looks["empty"] += not claimed
        for job in claimed:
            task = asyncio.create_task(self._run(job))
            self.running.add(task)
            task.add_done_callback(self._ended)
        if claimed and claimed.more:
            self.lookout.hint()
        elif not claimed.more:
            self.lookout.quiet = True

    async def _run(self, job: Job) -> None:
        started = await self.hall.insist(lambda: self.queue.start(job, pid=os.getpid()))
        self.hall.ran[job.id] += 1
        await asyncio.sleep(self.hall.length)
        await self.hall.insist(lambda: self.queue.finish(started, Outcome.complete(None), log_seq=0))
        self.hall.done.add(job.id)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.hall.failures += [error] if not task.cancelled() and (error := task.exception()) else []
        if self.prospects.more:
            self.lookout.hint()


class Hall:
    """A database, its crowd, and what is measured there."""

    def __init__(self, database: Database, settings: Settings, tally: Tally, length: float) -> None:
        self.database, self.settings, self.tally, self.length = database, settings, tally, length
        self.queue, self.registry = JobQueue(database, settings), WorkerRegistry(database)
        self.feed = ChangeFeed(database, [QUEUE, CONTROL])
        self.members: list[Member] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.ran: Counter[ObjectId] = Counter()  # how often each job has run
        self.done: set[ObjectId] = set()
        self.looks: Counter[str] = Counter()
        self.looking = 0  # looks under way
        self.failures: list[BaseException] = []

    async def begin(self, workers: int) -> None:
        """All are registered, know how many they are, and have had their first look."""
        await self.queue.store.prepare()
        await self.registry.prepare()
        self.members = [Member(self, number) for number in range(workers)]
        gate = asyncio.Semaphore(STARTERS)

        async def register(member: Member) -> None:
            async with gate:
                await self.insist(
                    lambda: self.registry.register(
                        member.owner, slots=SLOTS, namespaces=[NAMESPACE], jobs=[NAME], version="bench"
                    )
                )

        await asyncio.gather(*map(register, self.members))
        print(f"  {workers} are registered", flush=True)
        rows = await self.registry.living()
        self.tasks = [asyncio.create_task(self.feed.run())]
        for member in self.members:
            member.chores._note_living(rows)  # read once for all: they would do so at their first look
            self.feed.listen(member.hear)
            self.tasks += [asyncio.create_task(part) for part in member.parts()]
            await asyncio.sleep(0)
        await self.settled()

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(2 * AWAIT)  # the thread that reads the stream ends with its answer
        await self.database.drop()
        await self.database.close()

    async def insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeat what the database has not answered, as a worker does."""
        while True:
            try:
                return await step()
            except TROUBLE:
                self.looks["trouble"] += 1
                await asyncio.sleep(0.5)

    async def settled(self) -> None:
        """Until nobody looks for what he was told of."""
        async with asyncio.timeout(PATIENCE):
            while self.looking or any(each.lookout._hinted or each.lookout._heard for each in self.members):
                await asyncio.sleep(0.1)
                self.check()

    def check(self) -> None:
        """Raises what a worker has failed with."""
        self.failures += [error for task in self.tasks if task.done() and (error := task.exception())]
        if self.failures:
            raise self.failures[0]

    async def idle(self, seconds: float) -> Document:
        """Commands, and documents of workers, a second that all ask for while there is nothing to do."""
        before = self.tally.counts()
        await asyncio.sleep(seconds)
        counts = self.tally.counts() - before
        self.check()
        return {"commands": counts["commands"] / seconds, "living": counts["living"] / seconds}

    async def work(self, jobs: int, rate: float) -> Document:
        """Enqueue so many at so many a second, and what that made everybody do until all is quiet again."""
        before, looks, began = self.tally.counts(), Counter(self.looks), time.monotonic()
        ids = []
        for number in range(jobs):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            order = JobOrder(
                name=NAME, args={"n": number}, namespace=NAMESPACE, username="bench", unique=False
            )
            ids.append((await self.queue.enqueue(order)).id)
        async with asyncio.timeout(PATIENCE):
            while not self.done.issuperset(ids):
                await asyncio.sleep(0.1)
                self.check()
        await self.settled()
        took = time.monotonic() - began
        counts = self.tally.counts() - before
        rows = await self.queue.store.journal.find({"_id": {"$in": ids}}).to_list(None)
        waited = sorted((row["started_at"] - row["enqueued"]["at"]).total_seconds() for row in rows)
        once = all(
            row["state"] == "complete" and row["trial"] == 1 and self.ran[row["_id"]] == 1 for row in rows
        )
        return {
            "jobs": jobs,
            "seconds": took,
            "commands": counts["commands"],
            "kinds": {name: number for name, number in counts.items() if number},
            "looks": (self.looks["looks"] - looks["looks"]) / jobs,
            "empty": (self.looks["empty"] - looks["empty"]) / jobs,
            "lost": counts["lost"] / jobs,
            "p50_s": statistics.median(waited),
            "p95_s": waited[int(len(waited) * 0.95)],
            "max_s": waited[-1],
            "trouble": self.looks["trouble"] - looks["trouble"],
            "once": once and len(rows) == jobs,
        }


async def measure(url: str, tally: Tally, workers: int, herd: bool, options: argparse.Namespace) -> Document:
    """One crowd; with or without herd control."""
    changes.FEW, attendance.CROWD = LIMITS if herd else (EVERYBODY, EVERYBODY)
    slow = max(1.0, workers / options.bearable)
    settings = Settings.load(
        environ={},
        heartbeat=5 * slow,
        rescue_every=5 * slow,
        dead_after=30 * slow,
        poll=min(slow, 60.0),
        count_every=min(20 * slow, 3600.0),
    )
    # Without, each job makes all of them look: they shall have done so before the next comes.
    rate = options.rate or (2.0 if herd else min(2.0, ALL_LOOK / workers))
    jobs = options.jobs or max(5, round(30 * rate))
    database = await Database.connect(url, f"crowd_{uuid.uuid4().hex[:8]}", timeout=PATIENT)
    hall = Hall(database, settings, tally, options.length)
    try:
        began = time.monotonic()
        await hall.begin(workers)
        up = time.monotonic()
        print(f"{workers} workers, herd {herd}: up in {up - began:.0f} s", flush=True)
        found = await hall.work(jobs, rate)
        print(f"  {jobs} jobs in {found['seconds']:.0f} s: {found['commands']} commands", flush=True)
        idle: Document = {}
        if options.idle:
            # All begin with a pause of the same length.
            await asyncio.sleep(max(0.0, up + 6.25 * slow - time.monotonic()))
            idle = await hall.idle(options.idle)
    finally:
        await hall.end()
    return {
        "workers": workers,
        "herd": herd,
        "slower": slow,
        "rate": rate,
        **found,
        "per_job": found["commands"] / jobs,
        "idle": idle["commands"] / workers * slow if idle else math.nan,
        "living": idle["living"] * slow if idle else math.nan,
    }


def table(rows: Sequence[Document]) -> str:
    """The rows as text."""
    lines = [
        "workers herd  jobs  commands/job  looks  empty   lost   p50 s   p95 s   max s  once  idle/s  docs/s"
    ]
    for row in rows:
        lines.append(
            f"{row['workers']:7} {'on' if row['herd'] else 'off':4}{row['jobs']:6}{row['per_job']:14.1f}"
            f"{row['looks']:7.1f}{row['empty']:7.1f}{row['lost']:7.1f}{row['p50_s']:8.2f}{row['p95_s']:8.2f}"
            f"{row['max_s']:8.2f}  {'yes' if row['once'] else 'NO':4}{row['idle']:8.2f}"
            f"{row['living']:8.0f}"
        )
    lines.append(
        "commands/job: all that were made meanwhile; looks, empty, lost: per job\n"
        "idle/s: commands of one worker without its change stream, docs/s: of living workers, read by all;\n"
        "both as if at the default settings"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.crowd", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--herd", choices=["on", "off"], nargs="+", default=["on", "off"])
    parser.add_argument("--jobs", type=int, help="default: as many as come in 30 s, 5 at least")
    parser.add_argument("--rate", type=float, help="jobs a second (default: 2; less where all look)")
    parser.add_argument("--length", type=float, default=0.2, help="seconds that a job takes (default: 0.2)")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds without a job; 0: none")
    parser.add_argument(
        "--bearable",
        type=float,
        default=25.0,
        help="workers that the server can bear at the default settings",
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    tally = Tally()
    monitoring.register(tally)
    rows = []
    with ExitStack() as stack:
        url, facts = server(stack)
        for workers in options.workers:
            for herd in options.herd:
                rows.append(asyncio.run(measure(url, tally, workers, herd == "on", options)))
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"\n{facts['server']}; {facts['cores']} cores, load {facts['load']:.0f} at the start")
    print(table(rows))


if __name__ == "__main__":
    main()
