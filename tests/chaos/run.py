"""Chaos: real processes are killed and paused, the network fails, and the checker judges what is left.

Usage: ``python -m tests.chaos.run --jobs 2000 --seed 7``. Prints its seed and its figures; ends with 1 if a
promise was broken, and with 2 if the run was too kind to say anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from core4 import faults
from core4.config import Settings
from core4.database import Database
from core4.users import UserStore
from tests.chaos import chained
from tests.chaos.checker import Verdict, check
from tests.chaos.evidence import Follower, History, write_dump
from tests.chaos.fires import Fires
from tests.chaos.http import Api, Client, Plan, Reader
from tests.chaos.parts import Part, Server
from tests.chaos.post import Post
from tests.chaos.proxy import Proxy
from tests.chaos.recovery import dumped, gathered
from tests.helpers import FAST, ROOT, free_port, marked, quick_folder

WORKERS, APIS, CLIENTS, SLOTS = 3, 2, 12, 12
JOBS = (ROOT / "tests/chaos/jobs.py", ROOT / "tests/jobs/inline.py", ROOT / "tests/chaos/chained.py")
SCHEDULERS = 2  # of the workers
KILL_EVERY, DATABASE_EVERY, PAUSE_EVERY = 2.0, 20.0, 15.0
MOST_OPEN = 120  # jobs: the clients wait above it, so that they, too, are there for the whole of the run
CALM_BELOW = 40  # open jobs; the last ones end in peace
# Seconds with and without network faults. Each break makes a driver forget all its connections for half a
# second, so that in a storm hardly anything goes on: it has to be short to hit many different moments.
STORM, CALM = 2.0, 8.0
PAUSE = 5.0  # seconds: past the death limit of the test timings
HEALED = 150.0  # seconds until everything must be final: 3 s death limit, 3 crashes, and a slow machine
LEAST = {"holders killed": 30, "rescues": 10, "refused writes": 10, "reset inside a write": 10}
# Timings in which a frozen worker is buried while it sleeps. Looks, beats and log are as far apart as that
# allows: while streams break off all the time they are a good part of what the database is asked for.
TIMINGS = {
    **FAST,
    "CORE4_HEARTBEAT": "1",
    "CORE4_KILL_WAIT": "1",
    "CORE4_LOG_FLUSH": "0.5",
    "CORE4_POLL": "0.5",
    "CORE4_SLOTS": str(SLOTS),
}


class Chaos:
    """One run in a folder of its own."""

    def __init__(self, home: Path, jobs: int, seed: int, plant: str = "", messages: int = 0) -> None:
        self.home, self.jobs, self.seed = home, jobs, seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.history = History(home / "history")
        self.ledger, self.refusals = home / "ledger", home / "refusals"
        self.server = Server(home / "home")
        self.server.start()
        self.proxy = Proxy(self.server.port, seed)
        self.proxy.start()
        self.post = Post(home, messages, self.history, str(self.ledger)) if messages else None
        self.parts = self._parts(plant)
        self.fires = Fires(self.apis, str(self.ledger))
        self.open = 0
        self.plan = Plan()

    def _parts(self, plant: str) -> list[Part]:
        spec = f"count {self.refusals}" + (f"; plant {plant}" if plant else "")
        environ = {
            **TIMINGS,
            "CORE4_MONGO_URL": self.server.url.replace(f":{self.server.port}/", f":{self.proxy.port}/"),
            "CORE4_HOME": str(self.home / "home"),
            faults.VARIABLE: spec,
            faults.PERMIT: "1",
            "PYTHONPATH": str(ROOT),
            chained.LEDGER: str(self.ledger),
            **({"CORE4_BROKER_URL": self.post.url} if self.post else {}),
        }
        parts = []
        for number in range(WORKERS):
            args = ["worker", "--name", f"chaos{number}", *map(str, JOBS)]
            scheduler = {"CORE4_SCHEDULER": "true" if number < SCHEDULERS else "false"}
            parts.append(Part(f"worker{number}", args, {**environ, **scheduler}))
        self.apis = []
        for number in range(APIS):
            port = free_port()
            parts.append(Part(f"api{number}", ["api", "--port", str(port)], environ))
            self.apis.append(f"http://127.0.0.1:{port}")
        return parts

    # ------------------------------------------------------------------ the run

    def run(self) -> Verdict:
        """Everything, to the verdict."""
        try:
            if self.post:
                self.post.start()  # a broker needs longer than everything else
            asyncio.run(self._add_user())
            self._start()
            self.fires.begin()
            clients, readers = self._clients()
            self._rage(clients)
            self._heal(clients, readers)
            return asyncio.run(self._judge(readers))
        finally:
            self._end()

    async def _add_user(self) -> None:
        database = await Database.connect(self.server.url, "core4")
        users = UserStore(database, Settings.load(environ=FAST, home=self.home))
        await users.prepare()
        await users.add(*Api.AUTH, ["cop"])
        users.close()
        await database.close()

    def _start(self) -> None:
        for part in self.parts:
            part.ensure()
        for part in self.parts:
            part.wait()

    def _clients(self) -> tuple[list[Client], list[Reader]]:
        readers = list[Reader]()
        clients = [
            Client(number, self.apis, self.history, str(self.ledger), self.seed, self.plan, readers)
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        return clients, readers

    def _rage(self, clients: Sequence[Client]) -> None:
        """Kill, pause and disturb until everything is enqueued and most of it done."""
        begin = time.monotonic()
        next_kill, next_database, next_pause = begin + 1, begin + DATABASE_EVERY, begin + PAUSE_EVERY
        waiter = threading.Event()
        threads = [*clients, *([self.post] if self.post else [])]
        while any(thread.is_alive() for thread in threads) or self.open > CALM_BELOW:
            now = time.monotonic()
            self.proxy.calm = (now - begin) % (STORM + CALM) > STORM
            self._wake(now)
            if now >= next_kill:
                next_kill = now + KILL_EVERY
                self._kill_one()
            if now >= next_database:
                next_database = now + DATABASE_EVERY
                self._kill_database()
            if now >= next_pause:
                next_pause = now + PAUSE_EVERY
                self._pause_one(now)
            for part in self.parts:
                part.ensure()
            waiter.wait(0.1)

    def _wake(self, now: float, *, all_of_them: bool = False) -> None:
        for part in self.parts:
            if part.paused_until is not None and (all_of_them or now >= part.paused_until):
                part.wake()

    def _kill_one(self) -> None:
        # Mostly workers: a dead API costs the clients a second, a dead worker is what this is about.
        awake = [part for part in self.parts if part.paused_until is None]
        victim = self.random.choices(awake, [3 if part.kind == "worker" else 1 for part in awake])[0]
        self.counts["holders killed"] += asyncio.run(self._holds(victim.pid))
        victim.kill()
        self.counts[f"killed {victim.kind}"] += 1

    async def _holds(self, pid: int) -> bool:
        """True if this process is a worker that holds a lease. Counts what is open on the way."""
        database = await Database.connect(self.server.url, "core4")
        workers = await database.collection("sys.worker").find({"pid": pid}).to_list(None)
        ids = [worker["_id"] for worker in workers]
        held = await database.collection("sys.queue").find({"lease.owner": {"$in": ids}}).to_list(None)
        open_jobs = {"state": {"$in": ["pending", "running", "failed", "deferred", "blocked"]}}
        self.open = await database.collection("sys.queue").count_documents(open_jobs)
        tables = (database.collection("sys.queue"), database.collection("sys.journal"))
        if sum([await table.estimated_document_count() for table in tables]) >= self.jobs:
            self.plan.enough.set()
        (self.plan.room.set if self.open < MOST_OPEN or self.plan.enough.is_set() else self.plan.room.clear)()
        await database.close()
        return bool(held)

    def _kill_database(self) -> None:
        self.server.kill()
        self.proxy.target = self.server.port
        self.counts["killed database"] += 1

    def _pause_one(self, now: float) -> None:
        workers = [part for part in self.parts if part.kind == "worker" and not part.paused_until]
        # One at a time: somebody has to be there to declare it dead.
        if len(workers) == WORKERS:
            self.random.choice(workers).pause(now + PAUSE)
            self.counts["paused"] += 1

    # ------------------------------------------------------------------ the end

    def _heal(self, clients: Sequence[Client], readers: Sequence[Reader]) -> None:
        self.proxy.calm = True
        self._wake(0, all_of_them=True)
        for client in clients:
            client.join()
            if client.failure:
                raise client.failure
        if self.post:
            self.post.join()
            if self.post.failure:
                raise self.post.failure
        for part in self.parts:
            part.ensure()
        self.fires.end()
        drained = asyncio.run(self._drained())
        self.counts["seconds to drain"] = int(drained)
        for reader in readers:
            reader.join(30)
            if reader.failure:
                raise reader.failure

    async def _drained(self) -> float:
        """Wait until nothing is open; the checker says what is left if that does not come."""
        begin = time.monotonic()
        database = await Database.connect(self.server.url, "core4")
        queue = database.collection("sys.queue")
        states = {"$in": ["pending", "running", "failed", "deferred", "blocked"]}
        while time.monotonic() - begin < HEALED:
            idle = not await queue.find_one({"state": states}) and not await queue.find_one({"settle": True})
            if idle and (self.post is None or await self.post.taken_in(database)):
                break
            await asyncio.sleep(0.5)
        await database.close()
        return time.monotonic() - begin

    async def _judge(self, readers: Sequence[Reader]) -> Verdict:
        for part in self.parts:
            part.signal(signal.SIGTERM)
        for part in self.parts:
            part.forget()
        marks = {mark for part in self.parts for mark in part.marks}
        alive = frozenset(process.pid for mark in marks for process in marked(mark))
        database = await Database.connect(self.server.url, "core4")
        dump = await dumped(database)
        write_dump(self.home / "dump", dump)
        must, may = self.fires.ids(dump["schedule"])
        evidence = await gathered(
            database,
            self.home / "history",
            self.ledger,
            followers=[Follower(reader.job, tuple(reader.events)) for reader in readers],
            fires=must,
            may_fire=may,
            pauses=True,
            crashed_database=True,
            alive=alive,
            malformed=self.post.malformed if self.post else frozenset(),
            dead=await self.post.dead() if self.post else frozenset(),
        )
        await database.close()
        verdict = check(evidence)
        refused = self.refusals.read_text().count("\n") if self.refusals.exists() else 0
        counts = {**self.counts, **self.proxy.counts, "refused writes": refused}
        if self.post:
            counts |= {"messages": len(self.post.ids), "cut at the broker": self.post.cuts}
        verdict.figures |= {name: counts[name] for name in sorted(counts)}
        return verdict

    def _end(self) -> None:
        self.proxy.calm = True
        for part in self.parts:
            part.end(self.home)
        self.proxy.stop()
        if self.post:
            self.post.stop()
        self.server.stop()
        self.history.close()


def too_kind(verdict: Verdict, jobs: int) -> list[str]:
    """What the run did not hit often enough to say anything."""
    return [
        f"only {verdict.figures.get(name, 0)} {name}, at least {least} wanted"
        for name, least in {"jobs": jobs, **LEAST}.items()
        if verdict.figures.get(name, 0) < least
    ]


def _cpu_seconds() -> int:
    """What this process and its ended children have used; without the orphans of killed workers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return int(sum(each.ru_utime + each.ru_stime for each in used))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000, help="all that there are in the end, at least")
    parser.add_argument("--messages", type=int, default=None, help="through RabbitMQ; a tenth of the jobs")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, help="folder for what the run leaves behind")
    parser.add_argument("--json", type=Path, help="file to append the figures to, one line a run")
    parser.add_argument("--plant", default="", help="a fault to plant, package.module:function")
    parser.add_argument("--any-figures", action="store_true", help="do not ask for the least figures")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: nothing is left running
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    home = args.keep or Path(tempfile.mkdtemp(prefix="chaos-", dir=quick_folder()))
    home.mkdir(parents=True, exist_ok=True)
    print(f"chaos: {args.jobs} jobs, seed {seed}, in {home}", flush=True)
    begin = time.monotonic()
    messages = args.jobs // 10 if args.messages is None else args.messages
    verdict = Chaos(home, args.jobs, seed, args.plant, messages).run()
    verdict.figures |= {"seconds": int(time.monotonic() - begin), "cpu seconds": _cpu_seconds()}
    print(verdict)
    if args.json:
        record = {"seed": seed, "size": args.jobs, "passed": verdict.ok, **verdict.figures}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if not verdict.ok:
        return 1
    kind = [] if args.any_figures else too_kind(verdict, args.jobs)
    print("\n".join(kind) or "chaos: ok")
    return 2 if kind else 0


if __name__ == "__main__":
    sys.exit(main())
