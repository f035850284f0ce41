"""Chaos: real processes are killed and paused, the network fails, and the checker judges what is left.

Usage: ``python -m tests.chaos.run --jobs 2000 --seed 7``. Prints its seed and its figures; ends with 1 if a
promise was broken, and with 2 if the run was too kind to say anything.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from core4 import faults
from core4.config import Settings
from core4.database import Database
from core4.embedded import EmbeddedServer
from core4.users import UserStore
from tests.chaos.checker import Verdict, check
from tests.chaos.evidence import Follower, History, write_dump
from tests.chaos.http import Api, Client, Reader
from tests.chaos.proxy import Proxy
from tests.chaos.recovery import dumped, gathered
from tests.helpers import FAST, ROOT, Command, free_port, marked, program

WORKERS, APIS, CLIENTS, SLOTS = 3, 2, 12, 4
KILL_EVERY, DATABASE_EVERY, PAUSE_EVERY = 2.0, 20.0, 9.0
CALM_BELOW = 40  # open jobs; the last ones end in peace
STORM, CALM = 3.0, 7.0  # seconds with and without network faults
PAUSE = 5.0  # seconds: past the death limit of the test timings
HEALED = 150.0  # seconds until everything must be final: 3 s death limit, 3 crashes, and a slow machine
LEAST = {"holders killed": 30, "rescues": 10, "refused writes": 10, "reset inside a write": 10}
# Timings in which a frozen worker is buried while it sleeps.
TIMINGS = {**FAST, "CORE4_SLOTS": str(SLOTS), "CORE4_KILL_WAIT": "1"}


@dataclass
class Part:
    """One process of the stack, started again whenever it is gone."""

    name: str
    args: Sequence[str]
    environ: dict[str, str]
    marks: list[str] = field(default_factory=list)
    command: Command | None = None
    paused_until: float | None = None
    output: list[str] = field(default_factory=list)

    def ensure(self) -> None:
        """Start it unless it runs."""
        if self.command is not None and self.command.process.poll() is None:
            return
        self.forget()
        self.command = Command([program("core4"), *self.args], self.environ, cwd=ROOT).start()
        self.marks.append(self.command.mark)

    def forget(self) -> None:
        """Keep what it has written."""
        if self.command is not None:
            self.command.wait()
            self.output.append(self.command.output[-20_000:])
            if self.command.process.stdout:
                self.command.process.stdout.close()

    @property
    def pid(self) -> int:
        assert self.command is not None
        return self.command.process.pid

    def signal(self, number: int) -> None:
        assert self.command is not None
        self.command.process.send_signal(number)


class Chaos:
    """One run in a folder of its own."""

    def __init__(self, home: Path, jobs: int, seed: int, plant: str = "") -> None:
        self.home, self.jobs, self.seed = home, jobs, seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.history = History(home / "history")
        self.ledger, self.refusals = home / "ledger", home / "refusals"
        self.server = EmbeddedServer(home / "home")
        self.server.start()
        self.proxy = Proxy(self._port(), seed)
        self.proxy.start()
        self.parts = self._parts(plant)
        self.open = jobs

    def _port(self) -> int:
        return int(self.server.url.partition("//127.0.0.1:")[2].partition("/")[0])

    def _parts(self, plant: str) -> list[Part]:
        spec = f"count {self.refusals}" + (f"; plant {plant}" if plant else "")
        environ = {
            **TIMINGS,
            "CORE4_MONGO_URL": self.server.url.replace(f":{self._port()}/", f":{self.proxy.port}/"),
            "CORE4_HOME": str(self.home / "home"),
            faults.VARIABLE: spec,
            faults.PERMIT: "1",
            "PYTHONPATH": str(ROOT),
        }
        parts = []
        for number in range(WORKERS):
            args = ["worker", "--name", f"chaos{number}", str(ROOT / "tests/chaos/jobs.py")]
            parts.append(Part(f"worker{number}", args, environ))
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
            asyncio.run(self._add_user())
            self._start()
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
            assert part.command is not None
            part.command.wait_for("ready")

    def _clients(self) -> tuple[list[Client], list[Reader]]:
        keys = iter(range(self.jobs))
        lock, readers = threading.Lock(), list[Reader]()

        def next_key() -> int | None:
            with lock:
                return next(keys, None)

        clients = [
            Client(number, self.apis, self.history, str(self.ledger), self.seed, next_key, readers)
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
        while any(client.is_alive() for client in clients) or self.open > CALM_BELOW:
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
                part.signal(signal.SIGCONT)
                part.paused_until = None

    def _kill_one(self) -> None:
        # Mostly workers: a dead API costs the clients a second, a dead worker is what this is about.
        awake = [part for part in self.parts if part.paused_until is None]
        victim = self.random.choices(awake, [3 if part.name[0] == "w" else 1 for part in awake])[0]
        self.counts["holders killed"] += asyncio.run(self._holds(victim.pid))
        victim.signal(signal.SIGKILL)
        self.counts[f"killed {victim.name[:-1]}"] += 1

    async def _holds(self, pid: int) -> bool:
        """True if this process is a worker that holds a lease. Counts what is open on the way."""
        database = await Database.connect(self.server.url, "core4")
        workers = await database.collection("sys.worker").find({"pid": pid}).to_list(None)
        ids = [worker["_id"] for worker in workers]
        held = await database.collection("sys.queue").find({"lease.owner": {"$in": ids}}).to_list(None)
        open_jobs = {"state": {"$in": ["pending", "running", "failed", "deferred"]}}
        self.open = await database.collection("sys.queue").count_documents(open_jobs)
        await database.close()
        return bool(held)

    def _kill_database(self) -> None:
        state = psutil.Process(os.getpid()).children(recursive=True)
        for process in state:
            try:
                if any("secantusd" in word or "mongod" in word for word in process.cmdline()):
                    process.kill()
            except psutil.Error:
                continue
        self.server.stop()
        self.server.start()
        self.proxy.target = self._port()
        self.counts["killed database"] += 1

    def _pause_one(self, now: float) -> None:
        workers = [part for part in self.parts if part.name.startswith("worker") and not part.paused_until]
        # One at a time: somebody has to be there to declare it dead.
        if len(workers) == WORKERS:
            victim = self.random.choice(workers)
            victim.signal(signal.SIGSTOP)
            victim.paused_until = now + PAUSE
            self.counts["paused"] += 1

    # ------------------------------------------------------------------ the end

    def _heal(self, clients: Sequence[Client], readers: Sequence[Reader]) -> None:
        self.proxy.calm = True
        self._wake(0, all_of_them=True)
        for client in clients:
            client.join()
            if client.failure:
                raise client.failure
        for part in self.parts:
            part.ensure()
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
            if not await queue.find_one({"state": states}) and not await queue.find_one({"settle": True}):
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
        write_dump(self.home / "dump", await dumped(database))
        evidence = await gathered(
            database,
            self.home / "history",
            self.ledger,
            followers=[Follower(reader.job, tuple(reader.events)) for reader in readers],
            pauses=True,
            crashed_database=True,
            alive=alive,
        )
        await database.close()
        verdict = check(evidence)
        refused = self.refusals.read_text().count("\n") if self.refusals.exists() else 0
        counts = {**self.counts, **self.proxy.counts, "refused writes": refused}
        verdict.figures |= {name: counts[name] for name in sorted(counts)}
        return verdict

    def _end(self) -> None:
        self.proxy.calm = True
        for part in self.parts:
            if part.command is not None:
                part.command.kill_everything()
                part.forget()
            (self.home / f"{part.name}.log").write_text("\n----- killed -----\n".join(part.output))
        self.proxy.stop()
        self.server.stop()
        self.history.close()


def too_kind(verdict: Verdict) -> list[str]:
    """What the run did not hit often enough to say anything."""
    return [
        f"only {verdict.figures.get(name, 0)} {name}, at least {least} wanted"
        for name, least in LEAST.items()
        if verdict.figures.get(name, 0) < least
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, help="folder for what the run leaves behind")
    parser.add_argument("--plant", default="", help="a fault to plant, package.module:function")
    parser.add_argument("--any-figures", action="store_true", help="do not ask for the least figures")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    home = args.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    print(f"chaos: {args.jobs} jobs, seed {seed}, in {home}", flush=True)
    begin = time.monotonic()
    verdict = Chaos(home, args.jobs, seed, args.plant).run()
    verdict.figures["seconds"] = int(time.monotonic() - begin)
    print(verdict)
    if not verdict.ok:
        return 1
    kind = [] if args.any_figures else too_kind(verdict)
    print("\n".join(kind) or "chaos: ok")
    return 2 if kind else 0


if __name__ == "__main__":
    sys.exit(main())
