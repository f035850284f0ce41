"""`make bench`: medians of what users wait for, and their ratio to a bare loop in the same, interleaved run.

Bare means: the same number of durable writes (or one indexed read) with pymongo alone, or an aiohttp handler
that only answers. Everything runs on this machine, against the installed `core4 up`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from bson import ObjectId
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection

from core4 import jobs
from core4.client import Client, EventParser
from core4.config import Settings
from core4.database import Database
from core4.embedded import ServerState, running
from core4.jobs import JobOrder, Owner, utcnow
from core4.queues import JobQueue
from core4.states import State
from core4.store import JOURNAL, QUEUE
from tests.helpers import ADMIN, FAST, ROOT, Command, Stack, eventually, free_port, running_stack

JOURNALED, BACKLOG = 10_000, 1_000
NOBODY = "BENCH"  # a namespace that no worker serves: what is enqueued there stays
DURABLE = WriteConcern(w="majority", j=True)

Document = dict[str, Any]
Operation = Callable[[], None]


@dataclass
class Probe:
    """One thing to measure: an operation, how often per repetition, against which bare ones."""

    name: str
    operation: Operation
    times: int
    against: tuple[str, ...] = ()
    before: Operation = lambda: None
    seconds: list[float] = field(default_factory=list)

    def repeat(self) -> None:
        """One repetition."""
        for _ in range(self.times):
            self.before()
            start = time.perf_counter()
            self.operation()
            self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        """Seconds of one operation."""
        return statistics.median(self.seconds)


class Bench:
    """The running system with its bare counterparts, and the operations to time."""

    def __init__(self, stack: Stack, server: ServerState, bare_url: str, loop: asyncio.Runner) -> None:
        self.stack, self.loop, self.bare_url = stack, loop, bare_url
        self.n = 0
        self.session = requests.Session()
        self.session.auth = ADMIN
        self.session.trust_env = False
        self.client = Client(stack.url, ADMIN)
        self.mongo: MongoClient[Document] = MongoClient(server.url)
        self.database = loop.run(Database.connect(server.url, "bench"))
        self.queue = JobQueue(self.database, Settings.load(environ={}))
        self.owner = Owner(id="bench", worker="bench@here", hostname="here", pid=os.getpid())

    def close(self) -> None:
        """Give all connections back."""
        self.loop.run(self.database.close())
        self.mongo.close()
        self.client.close()
        self.session.close()

    def fill(self) -> None:
        """The documents that are there before anything is measured."""
        now = utcnow()
        finished = [_document(n) for n in range(JOURNALED)]
        for document in finished:
            document.update(state=State.COMPLETE.value, started_at=now, finished_at=now, runtime=0.1)
            del document["due"]
        self.mongo["core4"][JOURNAL].insert_many(finished)
        self.loop.run(self.queue.store.prepare())
        self.mongo["bench"][QUEUE].insert_many([_document(n) for n in range(BACKLOG + 1_000)])
        self.bare.insert_many([{"_id": n, "state": "new", "n": n} for n in range(BACKLOG)])

    @property
    def bare(self) -> Collection[Document]:
        """A collection for the bare loops; every write is acknowledged when it is durable, as ours are."""
        return self.mongo["bare"].get_collection("bare", write_concern=DURABLE)

    # ------------------------------------------------------------------ ours

    def enqueue(self) -> None:
        """POST job, not followed."""
        self.n += 1
        body = {"qual_name": "tests.jobs.Noop", "args": {"n": self.n}, "namespace": NOBODY, "follow": False}
        self._ok(self.session.post(f"{self.stack.api}/job", json=body, timeout=60))

    def claim(self) -> None:
        """One claim out of a backlog."""
        (job,) = self.loop.run(self.queue.claims.claim(self.owner, namespaces=["DEFAULT"]))
        assert job.state is State.RUNNING

    def noop(self) -> None:
        """POST job to `close`: enqueued, claimed, forked, run, recorded, journaled, delivered."""
        self._follow("tests.jobs.Noop", "close")

    def first_line(self) -> None:
        """POST job to the first line that the job wrote."""
        self._follow("tests.jobs.Line", "log")

    def queue_page(self) -> None:
        """GET job: a page of the queue."""
        self._ok(self.session.get(f"{self.stack.api}/job", timeout=60))

    def journal_page(self) -> None:
        """GET job/journal: the newest page of 10,000."""
        sort = {"sort": '[["_id", -1]]'}
        self._ok(self.session.get(f"{self.stack.api}/job/journal", params=sort, timeout=60))

    def idle(self) -> None:
        """Wait until no job runs."""
        eventually(lambda: not self.client.count()["running"], 60, what="an idle system")

    def _follow(self, name: str, until: str) -> None:
        """Enqueue and read the stream of the answer up to the first event of this kind."""
        self.n += 1
        parser, body = EventParser(), {"qual_name": name, "args": {"n": self.n}}
        url = f"{self.stack.api}/job"
        with self.session.post(url, json=body, stream=True, timeout=60) as answer:
            assert answer.status_code == 200, answer.text
            for chunk in answer.iter_content(None):
                if any(event.event == until for event in parser.feed(chunk)):
                    return
        raise AssertionError(f"no {until} event")

    def _ok(self, answer: requests.Response) -> None:
        assert answer.status_code == 200, answer.text

    # ------------------------------------------------------------------ bare

    def bare_http(self) -> None:
        """A request that is only answered."""
        self._ok(self.session.post(self.bare_url, json={"n": 1}, timeout=60))

    def bare_insert(self) -> None:
        """One durable insert."""
        self.bare.insert_one({"_id": ObjectId(), "state": "new"})

    def bare_update(self) -> None:
        """One durable, guarded update."""
        self.n += 1
        key = {"_id": self.n % BACKLOG}
        assert self.bare.update_one(key, {"$set": {"n": self.n + BACKLOG}}).matched_count == 1

    def bare_life(self) -> None:
        """The writes of one job's life: insert, claim, start, finish, copy, delete."""
        key = {"_id": ObjectId()}
        self.bare.insert_one({**key, "state": "new"})
        for state in ("claimed", "started", "finished"):
            self.bare.update_one(key, {"$set": {"state": state}})
        self.mongo["bare"].get_collection("copy", write_concern=DURABLE).insert_one(dict(key))
        self.bare.delete_one(key)

    def bare_page(self) -> None:
        """Ten of the newest documents, by `_id`."""
        assert len(list(self.mongo["core4"][JOURNAL].find().sort("_id", -1).limit(10))) == 10

    def probes(self) -> list[Probe]:
        """All that is measured, bare ones first."""
        return [
            Probe("bare: aiohttp handler", self.bare_http, 20),
            Probe("bare: insert", self.bare_insert, 20),
            Probe("bare: guarded update", self.bare_update, 20),
            Probe("bare: six writes of a job's life", self.bare_life, 10),
            Probe("bare: newest ten of the journal", self.bare_page, 5),
            Probe("enqueue over HTTP", self.enqueue, 20, ("bare: aiohttp handler", "bare: insert")),
            Probe("claim", self.claim, 20, ("bare: guarded update",)),
            Probe(
                "no-op job end to end, in a process",
                self.noop,
                3,
                ("bare: six writes of a job's life",),
                self.idle,
            ),
            Probe("POST to the first line, idle", self.first_line, 3, ("bare: aiohttp handler",), self.idle),
            Probe("GET job, 10,000 in the journal", self.queue_page, 10, ("bare: aiohttp handler",)),
            Probe(
                "GET job/journal, newest of 10,000",
                self.journal_page,
                5,
                ("bare: aiohttp handler", "bare: newest ten of the journal"),
            ),
        ]


def _document(n: int) -> Document:
    order = JobOrder(name="tests.jobs.Noop", args={"n": n}, username="bench", unique=False)
    return jobs.new_document(order, ObjectId(), utcnow())


@contextmanager
def _running() -> Iterator[Bench]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
        # The settings as a user has them, not those of the tests: an empty variable counts as not set.
        # But for the gate: this is to load all cores, and not to find the worker waiting for them.
        usual = {**dict.fromkeys(FAST, ""), "CORE4_MAX_CPU": "100"}
        system = stack.enter_context(running_stack(home, ROOT / "tests/jobs/bench.py", port=None, **usual))
        server = running(home)
        assert server is not None
        port = free_port()
        url = f"http://127.0.0.1:{port}/"
        stack.enter_context(Command([sys.executable, "-m", "tests.bench.bare", str(port)], cwd=ROOT))
        eventually(lambda: _answers(url), 30, what="the bare server answers")
        bench = Bench(system, server, url, stack.enter_context(asyncio.Runner()))
        stack.callback(bench.close)
        yield bench


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def _rows(probes: list[Probe]) -> list[Document]:
    by_name = {probe.name: probe for probe in probes}
    return [
        {
            "name": probe.name,
            "median_ms": round(probe.median * 1000, 3),
            "p95_ms": round(statistics.quantiles(probe.seconds, n=20)[-1] * 1000, 3),
            "operations": len(probe.seconds),
            "ratios": {name: round(probe.median / by_name[name].median, 2) for name in probe.against},
        }
        for probe in probes
    ]


def _print(rows: list[Document], repetitions: int) -> None:
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"\nmedians of {repetitions} interleaved repetitions, {machine}")
    print(f"{'':40}{'median':>12}{'p95':>12}   times as long as")
    for row in rows:
        ratios = ", ".join(
            f"{ratio:.1f} x {name.removeprefix('bare: ')}" for name, ratio in row["ratios"].items()
        )
        print(f"{row['name']:40}{row['median_ms']:>9.2f} ms{row['p95_ms']:>9.2f} ms   {ratios}".rstrip())


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="at least 5 (default: 7)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    repetitions = max(options.repetitions, 5)
    with _running() as bench:
        bench.fill()
        probes = bench.probes()
        for number in range(repetitions):
            print(f"repetition {number + 1} of {repetitions}", flush=True)
            for probe in probes:
                probe.repeat()
        server = bench.mongo.admin.command("buildInfo").get("version")
    rows = _rows(probes)
    _print(rows, repetitions)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"python": platform.python_version(), "cores": os.cpu_count(), "server": server, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
