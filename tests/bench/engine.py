"""The engine against bare loops of the driver, forks and interpreters: goals 1, 2, 3, 5, 7, 8, 9, 10, 15.

A worker process of its own runs the jobs, as a user starts it; enqueue and claim are called here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from bson import ObjectId
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection

from core4 import jobs
from core4.api.keys import BASE
from core4.config import Settings
from core4.database import Database
from core4.events import EVENT, audit_of
from core4.jobs import Job, JobOrder, Owner, utcnow
from core4.queues import JobQueue
from core4.states import State
from core4.store import INDEXES, JOURNAL, QUEUE
from core4.users import UserStore
from core4.worker import protocol
from core4.worker.handle import Launcher
from tests.bench.probes import Figure, Goal, middle
from tests.bench.rivals import Rival
from tests.bench.stand import AUTH
from tests.helpers import ADMIN, FAST, ROOT, Command, free_port, program

Document = dict[str, Any]
DURABLE = WriteConcern(w="majority", j=True)
JOBS = ROOT / "tests/jobs/bench.py"
SLOTS = 32  # of the worker: as many inline jobs as it may take at once
CLAIMS, ENQUEUES = 20, 50  # per repetition
SHALLOW, BULK = 100, 1_000
QUIET = 40.0  # seconds for which an idle worker is looked at: its sweeps are 30 s apart
SETTLED = 10.0  # seconds after which a worker has looked at all that its last work, or its start, has stirred
PATIENCE = 300.0  # seconds for one drain


class Engine:
    """A database with a worker on it, and what is measured there."""

    def __init__(self, url: str, deep: int, drained: int, home: Path) -> None:
        self.url, self.deep, self.home = url, deep, home
        self.latencies = max(drained // 16, 5)
        self.name = f"bench_{uuid.uuid4().hex[:8]}"
        self.client: MongoClient[Document] = MongoClient(url)
        self.tables = self.client[self.name]
        self.numbers = count()
        self.owner = Owner("bench", "bench@here", "here", os.getpid())
        self.worker: Command
        self.database: Database
        self.queue: JobQueue
        self.launcher: Launcher
        self.entries: Mapping[str, Mapping[str, Any]]
        self.forks: subprocess.Popen[str]
        self.inline = Figure("inline job drained", self.drain("tests.jobs.InlineStamp", drained))
        self.process = Figure("process job drained", self.drain("tests.jobs.Stamp", drained // 4))
        self.idle = Figure("enqueue to body, inline, idle", self.latency("tests.jobs.InlineStamp"))

    async def begin(self, stack: AsyncExitStack) -> None:
        """Connect, make the documents that are there before anything is measured, start the worker."""
        settings = Settings.load(environ={})
        stack.callback(self.client.close)
        stack.callback(self.client.drop_database, self.name)
        self.launcher = Launcher.spawn(settings)
        stack.callback(self.launcher.close)
        self.database = await Database.connect(self.url, self.name)
        stack.push_async_callback(self.database.close)
        self.queue = JobQueue(self.database, settings)
        await self.queue.store.prepare()
        users = UserStore(self.database, settings)
        await users.add(*ADMIN, allow=["cop"])
        users.close()
        await self.database.ensure_indexes({"bare": INDEXES[QUEUE]})
        (loaded,) = await self.launcher.load([str(JOBS)])
        self.entries = {entry["_id"]: entry for entry in loaded.entries}
        for namespace, depth in (("SHALLOW", SHALLOW), ("DEEP", self.deep)):
            for start in range(0, depth, BULK):
                rows = [self.document(namespace) for _ in range(min(BULK, depth - start))]
                self.tables[QUEUE].insert_many(rows)
        self.worker = stack.enter_context(
            Command([program("core4"), "worker", str(JOBS)], self.environ(), cwd=self.home)
        )
        # In a thread: it reads the worker's output.
        await asyncio.to_thread(self.worker.wait_for, "ready", PATIENCE)
        forks = [sys.executable, "-m", "tests.bench.forks"]
        self.forks = stack.enter_context(
            subprocess.Popen(forks, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    def environ(self) -> dict[str, str]:
        """The settings as a user has them, not those of the tests; no gate, as this loads all cores."""
        own = {"CORE4_MONGO_URL": self.url, "CORE4_MONGO_DATABASE": self.name, "CORE4_HOME": str(self.home)}
        return {**dict.fromkeys(FAST, ""), "CORE4_MAX_CPU": "100", "CORE4_SLOTS": str(SLOTS), **own}

    @property
    def bare(self) -> Collection[Document]:
        """For the bare loops: the same documents under the same indexes, and writes as durable as ours."""
        return self.tables.get_collection("bare", write_concern=DURABLE)

    def order(self, name: str = "tests.jobs.Noop", namespace: str = "NOBODY") -> JobOrder:
        entry = self.entries[name]
        return JobOrder(
            name=name,
            args={"n": next(self.numbers)},
            username="bench",
            unique=False,
            namespace=namespace,
            options=entry["options"],
            signature=entry["signature"],
        )

    def document(self, namespace: str = "NOBODY", name: str = "tests.jobs.Noop") -> Document:
        return jobs.new_document(self.order(name, namespace), ObjectId(), utcnow())

    # ------------------------------------------------------------------ claims, 1 and 2

    async def bare_claims(self) -> Sequence[float]:
        """The best claim there is: one round trip where the server is good at that, else two bounded ones."""
        self.bare.delete_many({})
        self.bare.insert_many([self.document() for _ in range(SHALLOW)])
        return [_timed(self._bare_claim) for _ in range(CLAIMS)]

    def _bare_claim(self) -> ObjectId:
        line = {"due": True, "namespace": "NOBODY"}
        update = {"$set": {"state": "running", "lease": {"id": uuid.uuid4().hex}}, "$unset": {"due": 1}}
        if self.database.find_and_modify:
            found = self.bare.find_one_and_update(line, update, sort=[("rank", 1)])
            assert found is not None
            return found["_id"]  # type: ignore[no-any-return]
        (first,) = self.bare.find(line).sort("rank", 1).limit(1)
        key = {"_id": first["_id"], "state": "pending"}
        assert self.bare.update_one(key, update).modified_count == 1
        return first["_id"]  # type: ignore[no-any-return]

    def claims(self, namespace: str) -> Callable[[], Awaitable[Sequence[float]]]:
        async def measure() -> Sequence[float]:
            found, held = [], []
            for _ in range(CLAIMS):
                start = time.perf_counter()
                (job,) = await self.queue.claims.claim(self.owner, namespaces=[namespace])
                found.append(time.perf_counter() - start)
                held.append(job.id)
            # As deep as before.
            self.tables[QUEUE].delete_many({"_id": {"$in": held}})
            self.tables[QUEUE].insert_many([self.document(namespace) for _ in held])
            return found

        return measure

    # ------------------------------------------------------------------ enqueue, 3

    async def bare_inserts(self) -> Sequence[float]:
        rows = [self.document() for _ in range(ENQUEUES)]
        return [_timed(partial(self.bare.insert_one, row)) for row in rows]

    async def enqueues(self) -> Sequence[float]:
        found = []
        for order in [self.order() for _ in range(ENQUEUES)]:
            start = time.perf_counter()
            await self.queue.enqueue(order)
            found.append(time.perf_counter() - start)
        self.tables[QUEUE].delete_many({"namespace": "NOBODY"})
        return found

    async def bare_insert_many(self) -> Sequence[float]:
        """Seconds per document of a thousand in one call."""
        rows = [self.document() for _ in range(BULK)]
        return [_timed(partial(self.bare.insert_many, rows)) / BULK]

    async def enqueue_many(self) -> Sequence[float]:
        """Seconds per job of a thousand in one call, from order to answer."""
        orders = [self.order() for _ in range(BULK)]
        start = time.perf_counter()
        jobs = await self.queue.enqueue_many(orders)
        seconds = time.perf_counter() - start
        await self.database.landed()
        self.tables[QUEUE].delete_many({"_id": {"$in": [job.id for job in jobs if isinstance(job, Job)]}})
        return [seconds / BULK]

    # ------------------------------------------------------------------ drains, 5 and 9

    async def bare_drain(self) -> Sequence[float]:
        """Claim and finish, one after the other."""
        self.bare.delete_many({})
        self.bare.insert_many([self.document() for _ in range(SHALLOW)])
        return [_timed(self._bare_job) for _ in range(CLAIMS)]

    def _bare_job(self) -> None:
        key = {"_id": self._bare_claim(), "state": "running"}
        assert self.bare.update_one(key, {"$set": {"state": "complete"}}).modified_count == 1

    def drain(self, name: str, number: int) -> Callable[[], Awaitable[Sequence[float]]]:
        """Seconds per job, by the times at which they were in the journal: of the 20 to 95 % part."""

        async def measure() -> Sequence[float]:
            rows = [self.document("DEFAULT", name) for _ in range(number)]
            # Its line in the audit is the enqueuer's to write, which nobody is here.
            self.tables[EVENT].insert_many([line for row in rows for line in audit_of(row)])
            self.tables[QUEUE].insert_many(rows)
            return [middle(await self.journaled([row["_id"] for row in rows]))]

        return measure

    async def journaled(self, ids: list[ObjectId]) -> list[float]:
        """When each of these jobs was journaled, as soon as all are."""
        journal, deadline = self.tables[JOURNAL], time.monotonic() + PATIENCE
        rows: list[Document] = []
        while time.monotonic() < deadline:
            # The last one alone is looked for until it is there: to ask for all of them would be a load.
            if journal.find_one({"_id": ids[-1]}, {"_id": 1}):
                rows = list(journal.find({"_id": {"$in": ids}}, {"journaled_at": 1, "state": 1}))
            if len(rows) == len(ids):
                assert all(row["state"] == State.COMPLETE for row in rows), rows
                return [row["journaled_at"].timestamp() for row in rows]
            await asyncio.sleep(0.2)
        raise TimeoutError(f"{len(rows)} of {len(ids)} jobs are in the journal")

    # ------------------------------------------------------------------ latency, 7

    async def bare_latency(self) -> Sequence[float]:
        """What cannot be left out between an enqueue and the body: one insert and one claim.

        After the same pauses: who has slept is slower, three times on some machines.
        """

        def both() -> None:
            self.bare.insert_one(self.document())
            self._bare_claim()

        self.bare.delete_many({})
        found = []
        for _ in range(self.latencies):
            await _pause()
            found.append(_timed(both))
        return found

    def latency(self, name: str) -> Callable[[], Awaitable[Sequence[float]]]:
        """From the enqueue to the first line of the body, the worker being idle."""

        async def enqueue() -> ObjectId:
            return (await self.queue.enqueue(self.order(name, "DEFAULT"))).id

        return partial(self._to_bodies, enqueue)

    async def _to_bodies(self, enqueue: Callable[[], Awaitable[ObjectId]]) -> list[float]:
        found = []
        for _ in range(self.latencies):
            await _pause()
            start = time.time()
            job_id = await enqueue()
            await self.journaled([job_id])
            document = self.tables[JOURNAL].find_one({"_id": job_id})
            assert document is not None
            found.append(document["result"] - start)
        return found

    async def posted(self) -> Sequence[float]:
        """The same over HTTP: from a POST on an open connection. The API runs for this figure alone."""
        port, command = free_port(), [program("core4"), "api"]
        with ExitStack() as stack:
            api = stack.enter_context(Command(command, {**self.environ(), "CORE4_PORT": str(port)}))
            await asyncio.to_thread(api.wait_for, "ready", PATIENCE)
            link = stack.enter_context(closing(HTTPConnection("127.0.0.1", port)))
            await self._post(link)  # its password is checked, and the job is looked up
            return await self._to_bodies(partial(self._post, link))

    async def _post(self, link: HTTPConnection) -> ObjectId:
        wish = {"qual_name": "tests.jobs.InlineStamp", "args": {"n": next(self.numbers)}, "follow": False}
        link.request("POST", f"{BASE}/job", json.dumps(wish), {**AUTH, "Content-Type": "application/json"})
        answer = link.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 200, body
        return ObjectId(body["data"])

    # ------------------------------------------------------------------ processes, 9 and 10

    def _bare_process(self, kind: str) -> tuple[float, float]:
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        self.forks.stdin.write(kind + "\n")
        self.forks.stdin.flush()
        began, reaped = self.forks.stdout.readline().split()
        return float(began), float(reaped)

    def bare_process(self, kind: str) -> Callable[[], Awaitable[Sequence[float]]]:
        async def measure() -> Sequence[float]:
            return [self._bare_process(kind)[1] for _ in range(CLAIMS)]

        return measure

    def job_process(self, *, fresh: bool) -> Callable[[], Awaitable[Sequence[float]]]:
        """A job process as the worker has it, without the database: from the order to its last process."""

        async def measure() -> Sequence[float]:
            found = []
            for _ in range(CLAIMS):
                start = time.perf_counter()
                process = await self.launcher.take(fresh=fresh)
                process.give(_process_order(self.entries["tests.jobs.Noop"]))
                self.launcher.start_ahead(fresh=fresh)
                while (message := await protocol.read(process.channel)) is not None:
                    assert "failed" not in message, message
                await process.wait()
                found.append(time.perf_counter() - start)
                process.close()
            return found

        return measure

    # ------------------------------------------------------------------ facts without a floor, 8 and 15

    async def idle_calls(self) -> Document | None:
        """Database calls per second of a worker that has nothing to do; None if the server counts none."""
        await asyncio.sleep(SETTLED)
        before = self._calls()
        if before is None:
            return None
        await asyncio.sleep(QUIET)
        after = self._calls()
        assert after is not None
        counted = {kind: round((after[kind] - before[kind]) / QUIET, 2) for kind in before}
        return {"per_second": round(sum(counted.values()), 2), **counted}

    def _calls(self) -> dict[str, int] | None:
        counters = self.client.admin.command("serverStatus").get("opcounters")
        return {str(kind): int(number) for kind, number in counters.items()} if counters else None

    async def memory(self) -> Document:
        """Megabytes of the idle worker and of each process below it."""
        worker = psutil.Process(self.worker.process.pid)
        family = [worker, *worker.children(recursive=True)]
        rss = [round(each.memory_info().rss / 2**20, 1) for each in family]
        pss = [round(each.memory_full_info().pss / 2**20, 1) for each in family]
        return {"rss_mb": rss, "pss_mb": pss, "rss_all": round(sum(rss), 1), "pss_all": round(sum(pss), 1)}

    # ------------------------------------------------------------------ all of them

    def goals(self) -> list[Goal]:
        shallow = Figure(f"claim, {SHALLOW} waiting", self.claims("SHALLOW"))
        deep = Figure(f"claim, {self.deep:,} waiting", self.claims("DEEP"))
        claim = Figure("bare claim", self.bare_claims)
        insert = Figure("bare insert", self.bare_inserts)
        insert_many = Figure("bare insert_many of 1,000", self.bare_insert_many)
        fork = Figure("fork and wait", self.bare_process("fork"))
        python = Figure("python -c", self.bare_process("python"))
        latency = Figure("bare insert and claim", self.bare_latency)
        posted = Figure("POST to body, inline, idle", self.posted)
        bare = Figure("bare claim and update", self.bare_drain)
        fresh = Figure("job in a fresh interpreter", self.job_process(fresh=True))
        return [
            Goal("1", shallow, claim, 0.8),
            Goal("2", deep, shallow, 1.5, by="time"),
            Goal("3", Figure("enqueue", self.enqueues), insert, 0.85),
            Goal("3", Figure("enqueue, 1,000 together", self.enqueue_many), insert_many, 0.7),
            Goal("5", self.inline, bare, 2.0),
            Goal("7", self.idle, latency, 1.0, by="time", plus=0.003),
            # Twice the floor and 3 ms.
            Goal("7", posted, latency, 2.0, by="time", plus=0.0015),
            Goal("9", Figure("job in a warm process", self.job_process(fresh=False)), fork, 4.0, by="time"),
            Goal("9", self.process, fork, 4.0, by="time"),
            Goal("10", fresh, python, 2.0, by="time"),
        ]

    def peer_goals(self, rivals: Mapping[str, Rival]) -> list[Goal]:
        """The same figures beside what other job systems need for a job that does nothing."""
        process = Figure("enqueue to body, process, idle", self.latency("tests.jobs.Stamp"))
        drains = [
            ("procrastinate", self.inline, 1.0),
            ("celery", self.inline, None),
            ("rq", self.process, 1.5),
        ]
        latencies = [
            ("celery", self.idle, 1.0),
            ("procrastinate", self.idle, 1.5),
            ("rq", process, 1.0),
            ("celery", process, None),
        ]
        return [
            *(Goal("peer", own, rivals[name].drained, goal) for name, own, goal in drains if name in rivals),
            *(
                Goal("peer", own, rivals[name].idle, goal, by="time")
                for name, own, goal in latencies
                if name in rivals
            ),
        ]


async def _pause() -> None:
    await asyncio.sleep(random.uniform(0.03, 0.15))


def _timed(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def _process_order(entry: Mapping[str, Any]) -> Document:
    return {
        "job": {
            "id": str(ObjectId()),
            "name": "tests.jobs.Noop",
            "args": {"n": 1},
            "attempt": 1,
            "options": {},
        },
        "entry": {name: entry[name] for name in ("target", "module", "qualname")},
        "result_limit": 1 << 20,
        "log_limit": 1 << 20,
    }
