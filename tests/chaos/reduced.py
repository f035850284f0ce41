"""Chaos within one process: many actors on one real database, and a fault at every tenth write.

An actor is what a process is in production: it dies at a write, loses replies, its writes land late, and it
freezes until the others have declared it dead and goes on as if nothing had been. Hundreds of such faults
take seconds, so that a fault planted in the engine is met within a few runs.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from bson import ObjectId
from pymongo.errors import AutoReconnect, PyMongoError

from core4 import faults
from core4.database import Database
from core4.errors import Core4Error, Unavailable
from core4.faults import Faults, Hit
from core4.jobs import Job, utcnow
from core4.states import FINAL
from core4.worker.scheduler import Scheduler
from tests.chaos.checker import Verdict, Violation, check, fire_id
from tests.chaos.client import NAME, Actor, fast_settings
from tests.chaos.evidence import History, opened
from tests.chaos.recovery import bury_others, gathered, recover

T = TypeVar("T")

WORKERS, CLIENTS, SCHEDULERS = 3, 3, 2
SCHEDULE, TICKS = "chaos/every-second", 40
FAULTS = ("die before", "die after", "lose", "late", "freeze")
STALLS = (0.0, 0.05, 0.7, 1.5)  # seconds until a late write lands, or a frozen client wakes
KINDS = ("complete",) * 6 + ("failed",) * 2 + ("deferred",)


class Died(BaseException):
    """The process is gone."""


@dataclass
class Weather(Faults):
    """Draws what happens to each write of one actor."""

    dice: random.Random = field(default_factory=random.Random)
    rate: float = 0.1
    counts: Counter[str] = field(default_factory=Counter)
    freeze: Callable[[], Awaitable[None]] | None = None
    stall: Callable[[], Awaitable[None]] | None = None  # of an insert

    async def perform(self, hit: Hit, write: Callable[[], Awaitable[T]]) -> T:
        # What comes seldom is hit more often: a crash between two writes of a move, not only at a start.
        rate = self.rate * {"cas": 1, "insert": 4}.get(hit.function, 2)
        if self.dice.random() >= rate:
            return await write()
        # An insert that lands late finds that its job has long been asked for again, and done.
        fault = self.dice.choice((*FAULTS, *("late",) * 4) if hit.function == "insert" else FAULTS)
        self.counts[fault] += 1
        if fault == "die before":
            raise Died
        if fault == "late":
            self._later(write, self.stall if hit.function == "insert" else None)
            raise AutoReconnect("late on purpose")
        if fault == "freeze" and self.freeze is not None:
            await self.freeze()
        result = await write()
        if fault == "die after":
            raise Died
        if fault == "lose":
            raise AutoReconnect("lost on purpose")
        return result

    def _later(self, write: Callable[[], Awaitable[T]], stall: Callable[[], Awaitable[None]] | None) -> None:
        async def land() -> None:
            await (stall() if stall else asyncio.sleep(self.dice.choice(STALLS)))
            await asyncio.gather(write(), return_exceptions=True)

        task = asyncio.create_task(land())
        self._late.add(task)
        task.add_done_callback(self._late.discard)


class World:
    """One run: its database, its actors, its evidence."""

    def __init__(self, url: str, home: Path, jobs: int, seed: int, rate: float) -> None:
        self.url, self.home, self.jobs, self.rate = url, home, jobs, rate
        self.name = f"test_{uuid.uuid4().hex[:16]}"
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.weathers: list[Weather] = []
        self.ids: list[ObjectId] = []
        self.waiting = self.jobs
        self.failing = {f"k{number}" for number in range(0, jobs, 7)}
        self.done = asyncio.Event()
        self.ticks = 0  # seconds that have passed for the schedulers

    async def run(self) -> Verdict:
        """All of it, to the verdict; the database is dropped."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.database = await Database.connect(self.url, self.name)
        self.settings = fast_settings(self.url, self.name, self.home)
        try:
            with opened(self.home / "history") as history:
                self.history = history
                return await self._run(history)
        finally:
            await self.database.drop()
            await self.database.close()

    async def _run(self, history: History) -> Verdict:
        healer = Actor(self.database, self.settings, history, self.home / "ledger")
        await healer.prepare()
        begin = await self._make_schedule(healer)
        workers = [asyncio.create_task(self._again(self._work)) for _ in range(WORKERS)]
        schedulers = [asyncio.create_task(self._again(self._schedule)) for _ in range(SCHEDULERS)]
        clients = [asyncio.create_task(self._again(self._ask)) for _ in range(CLIENTS)]
        await asyncio.gather(*clients)
        self.done.set()
        await asyncio.gather(*workers, *schedulers)
        for weather in self.weathers:
            await weather.landed()
            self.counts.update(weather.counts)
        await bury_others(healer)
        await healer.register()
        stuck: list[Violation] = []
        try:
            await self._scheduler(healer).step()
            await recover(healer)
        except AssertionError as error:
            stuck.append(Violation("C7", None, str(error)[:500]))
        instants = (begin + timedelta(seconds=n) for n in range(1, self.ticks + 1))
        fires = frozenset(fire_id(SCHEDULE, instant) for instant in instants)
        verdict = check(
            await gathered(
                self.database, self.home / "history", self.home / "ledger", pauses=True, fires=fires
            )
        )
        verdict.violations += stuck
        verdict.figures |= self.counts
        return verdict

    # ------------------------------------------------------------------ processes that die

    async def _again(self, life: Callable[[Actor], Awaitable[None]]) -> None:
        """One process after the other, until one comes to its natural end."""
        while True:
            weather = Weather(dice=random.Random(self.dice.random()), rate=self.rate)
            self.weathers.append(weather)
            with faults.armed(weather):
                actor = Actor(self.database, self.settings, self.history, self.home / "ledger")
            weather.stall = self._stall
            weather.freeze = lambda actor=actor: self._freeze(actor)
            try:
                await life(actor)
                return
            except Died:
                self.counts["died"] += 1
            except AssertionError:  # the engine's own: a process that ends with a traceback
                self.counts["failed"] += 1

    async def _stall(self) -> None:
        """Until some more jobs are done, however fast the machine is: the insert finds its own among them."""
        journal = self.database.collection("sys.journal")
        wanted = await journal.count_documents({}) + self.dice.choice((0, 2, 10, 30))
        while not self.done.is_set() and await journal.count_documents({}) < wanted:
            await asyncio.sleep(0.05)

    async def _freeze(self, actor: Actor, job: Job | None = None) -> None:
        """Stand still until others have taken what this actor holds; for a `job`, until one runs it."""
        workers, queue = self.database.collection("sys.worker"), self.database.collection("sys.queue")
        buried = await workers.update_one({"_id": actor.owner.id}, {"$set": {"state": "dead"}})
        if not buried.matched_count:
            return await asyncio.sleep(self.dice.choice(STALLS))  # a client: it holds nothing
        where = {"_id": job.id, "fence": job.fence} if job else {"lease.owner": actor.owner.id}
        for _ in range(150):
            await asyncio.sleep(0.01)
            if self.done.is_set() or not await queue.find_one(where, {"_id": 1}):
                return None
        return None

    # ------------------------------------------------------------------ a worker

    async def _work(self, actor: Actor) -> None:
        await _insist(actor.register)
        dice = random.Random(self.dice.random())
        while not self.done.is_set():
            try:
                if not await actor.registry.beat(actor.owner, running=0):
                    actor = self._reborn(actor)
                    await _insist(actor.register)
                jobs = await actor.claim(2)
                for job in await actor.queue.store.running(actor.owner.id):
                    if job.id not in {each.id for each in jobs}:
                        await actor.release(job)
                await self._execute_all(actor, jobs, dice)
                await actor.force_due()
                await actor.upkeep()
            except (PyMongoError, Unavailable):
                continue
            await asyncio.sleep(0.002)

    def _reborn(self, actor: Actor) -> Actor:
        """The same process as another owner: it has been declared dead."""
        other = Actor(self.database, self.settings, self.history, self.home / "ledger")
        for name in ("queue", "registry", "logs"):
            setattr(other, name, getattr(actor, name))
        return other

    async def _execute_all(self, actor: Actor, jobs: Sequence[Job], dice: random.Random) -> None:
        tasks = [asyncio.create_task(self._execute(actor, job, dice)) for job in jobs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # they die with their process

    async def _execute(self, actor: Actor, job: Job, dice: random.Random) -> None:
        started = await actor.start(job)
        if started is None:
            return
        for _ in range(2):
            await asyncio.sleep(dice.random() * 0.01)
            if dice.random() < self.rate / 3:
                await self._freeze(actor, started)
                await asyncio.sleep(0.02)  # and that one knows that it has it
            await actor.progress(started)
        held = [each for each in await actor.queue.store.running(actor.owner.id) if each.id == job.id]
        killed = bool(held) and held[0].killed_at is not None
        kind = "killed" if killed and dice.random() < 0.7 else dice.choice(KINDS)
        await actor.finish(started, "failed" if job.args["key"] in self.failing else kind)

    # ------------------------------------------------------------------ a scheduler

    async def _make_schedule(self, actor: Actor) -> datetime:
        """A schedule of every second of a time that only `_schedule` lets pass; when it begins."""
        self.begin = utcnow().replace(microsecond=0)
        await actor.catalogue.publish([{"_id": NAME, "namespace": "DEFAULT"}])
        actor.schedules.clock = self._clock
        fields = {"qual_name": NAME, "expression": "* * * * * *", "args": {"key": "fire"}}
        await actor.schedules.set(SCHEDULE, {**fields, "missed": "all", "limit": 1000}, by="chaos")
        return self.begin

    async def _clock(self) -> datetime:
        return self.begin + timedelta(seconds=self.ticks)

    def _scheduler(self, actor: Actor) -> Scheduler:
        actor.schedules.clock = self._clock
        return Scheduler(actor.schedules, actor.queue, actor.catalogue, self._clock)

    async def _schedule(self, actor: Actor) -> None:
        """One of those that fire; each lets a second pass and does what is due then."""
        scheduler = self._scheduler(actor)
        while not self.done.is_set() and self.ticks < TICKS:
            self.ticks += 1
            try:
                await scheduler.step()
            except (PyMongoError, Unavailable):
                continue
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ a client, and its API

    async def _ask(self, actor: Actor) -> None:
        dice = random.Random(self.dice.random())
        while self.waiting > 0:
            self.waiting -= 1
            key = f"k{self.waiting}"
            if not await self._enqueue(actor, key, dice):
                continue
            for _ in range(dice.choice((0, 1, 2, 3, 4))):
                await asyncio.sleep(dice.random() * 0.03)
                await self._press(actor, dice)
        await self._finish_up()

    async def _enqueue(self, actor: Actor, key: str, dice: random.Random) -> bool:
        """Half of the clients ask again until they are answered, under an id that is their own."""
        once, keep = dice.random() < 0.7, dice.random() < 0.5
        attempts = 3 if key in self.failing else dice.choice((1, 3))
        for _ in range(5 if once else 1):
            try:
                job = await actor.enqueue(key, once=once, keep_stopped=keep, attempts=attempts)
            except (Core4Error, PyMongoError):
                continue
            self.ids.append(job.id)
            return True
        return False

    async def _press(self, actor: Actor, dice: random.Random) -> None:
        """Ask something of a job; two of three times a restart of one that has ended."""
        journal = self.database.collection("sys.journal")
        done = await journal.find({}, {"_id": 1}).sort("_id", -1).limit(10).to_list(None)
        if done and dice.random() < 0.66:
            await actor.restart(dice.choice(done)["_id"])
        else:
            press = dice.choice((actor.kill, actor.kill, actor.restart, actor.remove))
            await press(dice.choice(self.ids[-8:]))

    async def _finish_up(self) -> None:
        """Let the workers go on for a while: the last jobs are to be in danger, too."""
        queue = self.database.collection("sys.queue")
        for _ in range(200):
            open_jobs = {"state": {"$nin": [state.value for state in FINAL]}}
            if not await queue.find_one(open_jobs, {"_id": 1}):
                return
            await asyncio.sleep(0.02)


async def _insist(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            return await step()
        except PyMongoError:
            continue


async def reduced(url: str, home: Path, *, jobs: int = 60, seed: int = 0, rate: float = 0.1) -> Verdict:
    """One run of chaos within this process."""
    return await World(url, home, jobs, seed, rate).run()
