"""``python -m tests.bench.api``: the API beside bare aiohttp servers that do the least of the same.

Product and floor take turns in one run. Rates depend on the machine, ratios much less; the seconds of CPU per
request are the steadiest of all where other work goes on beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests
from pymongo import MongoClient

from core4.api.keys import BASE
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.embedded import EmbeddedServer
from core4.jobs import Job, JobOrder, Owner
from core4.logs import Line, LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.users import UserStore
from tests.bench.sockets import ask, listening, request
from tests.helpers import ADMIN, ROOT, Command, eventually, free_port, program

FIRST = 50  # followers before memory is measured: what they make the process load is no memory of the others
CLIENTS = 2_000
CONNECTIONS = 32
EVENTS = 50
JOB = "bench.Job"
AUTH = {"Authorization": "Basic " + b64encode(":".join(ADMIN).encode()).decode()}

Document = dict[str, Any]
Values = dict[str, float]


class Server:
    """A server process, and what it uses."""

    def __init__(self, pid: int, port: int) -> None:
        self.port = port
        self._process = psutil.Process(pid)

    @property
    def cpu(self) -> float:
        """Seconds of CPU since its start."""
        times = self._process.cpu_times()
        return times.user + times.system

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self._process.memory_info().rss)


class Bench:
    """The API and the bare server on one database, and the probes."""

    def __init__(
        self, loop: asyncio.Runner, database: Database, api: Server, bare: Server, library: Server
    ) -> None:
        self.loop, self.database, self.api, self.bare, self.library = loop, database, api, bare, library
        self.clients = CLIENTS  # that follow
        self.queue, self.logs = JobQueue(database, Settings()), LogStore(database)
        self.owner = Owner("bench", "bench@here", "here", os.getpid())
        self.n = 0

    # ------------------------------------------------------------------ requests

    def answered(self) -> Values:
        """GET with authentication and without the database, over 32 connections."""
        bare = self._load(self.bare, 4_000, request("GET", "/", {}))
        ours = self._load(self.api, 4_000, request("GET", f"{BASE}/profile", AUTH))
        return _beside("get", ours, bare)

    def enqueued(self) -> Values:
        """POST job over one connection and over eight, and 100 of them in one request."""
        values: Values = {}
        for connections in (1, 8):
            bare = self._load(self.bare, 300, self._insert, connections)
            ours = self._load(self.api, 300, self._post, connections)
            values |= _beside(f"post_c{connections}", ours, bare)
        bare = self._load(self.bare, 10, self._insert_many, 1)
        ours = self._load(self.api, 10, self._batch, 1)
        values |= _beside("batch", ours, bare)
        values["batch_to_single"] = ours["rate"] * 100 / values["post_c1"]
        values["batch_to_single.bare"] = bare["rate"] * 100 / values["post_c1.bare"]
        return values

    def _load(
        self, server: Server, total: int, make: bytes | Callable[[int], bytes], connections: int = CONNECTIONS
    ) -> Values:
        before = server.cpu
        maker = make if callable(make) else lambda _: make
        seconds, took = ask(server.port, connections, total, maker)
        return {
            "rate": total / seconds,
            "p50_ms": statistics.median(took) * 1000,
            "cpu_us": (server.cpu - before) / total * 1e6,
        }

    def _body(self) -> Document:
        self.n += 1
        return {"qual_name": JOB, "args": {"n": self.n}, "follow": False}

    def _post(self, _: int) -> bytes:
        return request("POST", f"{BASE}/job", AUTH, json.dumps(self._body()).encode())

    def _batch(self, _: int) -> bytes:
        return request("POST", f"{BASE}/job/batch", AUTH, self._hundred())

    def _hundred(self) -> bytes:
        jobs = [{name: value for name, value in self._body().items() if name != "follow"} for _ in range(100)]
        return json.dumps({"jobs": jobs}).encode()

    def _insert(self, _: int) -> bytes:
        return request("POST", "/insert", {}, json.dumps(self._body()).encode())

    def _insert_many(self, _: int) -> bytes:
        return request("POST", "/insert_many", {}, self._hundred())

    # ------------------------------------------------------------------ streams

    def followed(self) -> Values:
        """Followers of one job: their memory, one line to all, and fifty."""
        values = _beside("sse", self._followed(), self._listened())
        values["sse.kb.library"] = self._library_kb()
        values["sse.kb.to_library"] = values["sse.kb"] / values["sse.kb.library"]
        return values

    def _library_kb(self) -> float:
        """Memory of who listens to aiohttp-sse."""
        wire = request("GET", "/library_events", {})
        with listening(self.library.port, wire, FIRST):
            pass
        before = self.library.memory
        with listening(self.library.port, wire, self.clients) as clients:
            clients.drain(0.5)
            return (self.library.memory - before) / self.clients / 1024

    def _listened(self) -> Values:
        wire = request("GET", "/events", {})
        with listening(self.bare.port, wire, FIRST):
            pass
        before = self.bare.memory
        with listening(self.bare.port, wire, self.clients) as clients:
            values = {"connect_s": clients.connect_seconds}
            clients.drain(0.5)
            values["kb"] = (self.bare.memory - before) / self.clients / 1024

            def publish(events: int) -> float:
                cpu, start = self.bare.cpu, time.perf_counter()
                with socket.create_connection(("127.0.0.1", self.bare.port)) as asking:
                    asking.sendall(request("GET", f"/publish?events={events}", {}))
                    clients.wait_for(b"event: log\n", events)
                    seconds = time.perf_counter() - start
                    asking.recv(4096)
                values["cpu_us"] = (self.bare.cpu - cpu) / self.clients / events * 1e6
                return seconds

            values["one_ms"] = statistics.median(publish(1) for _ in range(5)) * 1000
            values["rate"] = self.clients * EVENTS / publish(EVENTS)
        return values

    def _followed(self) -> Values:
        job = self._running()
        wire = request("GET", f"{BASE}/job/follow/{job.id}", {**AUTH, "Accept": "text/event-stream"})
        with listening(self.api.port, wire, FIRST) as first:
            first.wait_for(b"event: state\n", 2)
        before = self.api.memory
        with listening(self.api.port, wire, self.clients) as clients:
            values = {"connect_s": clients.connect_seconds}
            clients.wait_for(b"event: state\n", 2)
            clients.drain(0.5)
            values["kb"] = (self.api.memory - before) / self.clients / 1024
            seq = job.fence << 32

            def append(chunks: int, lines: int) -> float:
                nonlocal seq
                cpu, start = self.api.cpu, time.perf_counter()
                for _ in range(chunks):
                    numbers = range(seq + 1, seq + lines + 1)
                    some = [Line(n, time.time(), "INFO", f"line {n} {'x' * 80}") for n in numbers]
                    seq += lines
                    self.loop.run(self.logs.append(job, "here", some))
                clients.wait_for(b"event: log\n", chunks * lines)
                values["cpu_us"] = (self.api.cpu - cpu) / self.clients / chunks / lines * 1e6
                return time.perf_counter() - start

            values["one_ms"] = statistics.median(append(1, 1) for _ in range(5)) * 1000
            values["chunk_rate"] = self.clients * EVENTS / append(1, EVENTS)
            values["rate"] = self.clients * EVENTS / append(EVENTS, 1)
            cpu = self.api.cpu
            time.sleep(5)
            values["idle_cpu"] = (self.api.cpu - cpu) / 5
        return values

    def _running(self) -> Job:
        self.n += 1
        order = JobOrder(name=JOB, args={"n": self.n}, username="bench", namespace="SSE")

        async def start() -> Job:
            await self.queue.enqueue(order)
            (job,) = await self.queue.claims.claim(self.owner, namespaces=["SSE"])
            return await self.queue.start(job, pid=1)

        return self.loop.run(start())


def _beside(name: str, ours: Values, bare: Values) -> Values:
    """The figures of both, and what ours is of the bare one's."""
    rate = "rate"
    values = {name: ours[rate], f"{name}.bare": bare[rate], f"{name}.ratio": ours[rate] / bare[rate]}
    for key in sorted((set(ours) | set(bare)) - {rate}):
        if key in ours:
            values[f"{name}.{key}"] = ours[key]
        if key in bare:
            values[f"{name}.{key}.bare"] = bare[key]
        if key in ours and key in bare and bare[key] > 0:
            values[f"{name}.{key}.ratio"] = ours[key] / bare[key]
    return values


@contextmanager
def _running() -> Iterator[tuple[Bench, str]]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
        url = os.environ.get("CORE4_MONGO_URL") or stack.enter_context(EmbeddedServer(home)).url
        loop = stack.enter_context(asyncio.Runner())
        name = f"bench_api_{os.getpid()}"
        database = loop.run(Database.connect(url, name))
        stack.callback(lambda: loop.run(database.close()))
        stack.callback(lambda: loop.run(database.drop()))
        loop.run(_prepare(database))
        settings = {"CORE4_MONGO_URL": url, "CORE4_MONGO_DATABASE": name, "CORE4_HOME": str(home)}
        limits = {"CORE4_STREAMS_PER_USER": "100000", "CORE4_STREAMS": "100000"}
        port = free_port()
        api = stack.enter_context(
            Command([program("core4"), "api"], {**settings, **limits, "CORE4_PORT": str(port)})
        )
        bare, library = stack.enter_context(_bare(url)), stack.enter_context(_bare(url))
        api.wait_for("ready")
        bench = Bench(loop, database, Server(api.process.pid, port), bare, library)
        info = MongoClient[Document](url).admin.command("buildInfo")
        yield bench, str(info.get("secantusVersion") or info.get("version"))


@contextmanager
def _bare(url: str) -> Iterator[Server]:
    port = free_port()
    with Command([sys.executable, "-m", "tests.bench.bare", str(port), url], cwd=ROOT) as command:
        eventually(lambda: _answers(port), 30, what="the bare server answers")
        yield Server(command.process.pid, port)


async def _prepare(database: Database) -> None:
    for store in (JobQueue(database, Settings()).store, LogStore(database), WorkerRegistry(database)):
        await store.prepare()
    users = UserStore(database, Settings())
    await users.add(*ADMIN, allow=["cop"])
    users.close()
    entry = {"namespace": "DEFAULT", "kind": "class", "schema": {"type": "object"}, "options": {}}
    await Catalogue(database).publish([{"_id": JOB, **entry, "unique": False}])
    owner = Owner("bench", "bench@here", "here", os.getpid())
    await WorkerRegistry(database).register(owner, slots=1, namespaces=["DEFAULT"], jobs=[JOB], version="1")


def _answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.api", description=__doc__)
    parser.add_argument("probes", nargs="*", help="answered, enqueued, followed (default: all)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--followers", type=int, default=CLIENTS, help=f"of one job (default: {CLIENTS})")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found: dict[str, list[float]] = {}
    with _running() as (bench, server):
        bench.clients = options.followers
        for _ in range(options.repetitions):
            for name in options.probes or ("answered", "enqueued", "followed"):
                for key, value in getattr(bench, name)().items():
                    found.setdefault(key, []).append(value)
    print(f"server {server}, Python {platform.python_version()}, {os.cpu_count()} cores")
    for key, values in found.items():
        spread = f"{min(values):.3f} - {max(values):.3f}"
        print(f"{key:28}{statistics.median(values):>12.3f}   {spread}   n={len(values)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"server": server, "values": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
