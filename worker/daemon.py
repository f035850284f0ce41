"""The worker: shows that it is alive, claims jobs and runs them, and looks after those of the dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bson import ObjectId

from core4 import identifiers, signatures
from core4.attendance import TROUBLE, Contact
from core4.changes import QUIET, Change, Lookout
from core4.claims import Claimed, stir
from core4.config import Settings
from core4.controls import CONTROL, Controls, Stop
from core4.discovery import Problem
from core4.errors import JobInvalid, LeaseLost
from core4.functions import SERVES
from core4.jobs import Job, Kind, Owner
from core4.service import ready
from core4.store import QUEUE
from core4.waits import heard
from core4.worker import functions, linux
from core4.worker.backend import Backend, OwnerLost
from core4.worker.executor import Execution, is_inline
from core4.worker.functions import Functions
from core4.worker.gate import Gate
from core4.worker.handle import Launcher, LauncherDied, Loaded, load_all
from core4.worker.host import Host, Hosts
from core4.worker.local import Local
from core4.worker.prospects import Prospects
from core4.worker.slots import Slots
from core4.worker.watch import Watch

log = logging.getLogger(__name__)

GATE_EVERY = 1.0  # seconds between two looks at the machine's load
IDLE_BEATS = 6  # heartbeats for each look at what this worker holds while it should hold nothing
RELOAD_EVERY = 1.0  # seconds between two looks at the job files
SHORT_GRACE = 2.0  # seconds between TERM and KILL when the worker has to go
BROKEN_MOST, BROKEN_TEXT = 20, 300  # files that others are told of as broken, and characters of each
LAST_WORDS = 5.0  # seconds for what is written at the very end
_REFUSALS = 10_000  # jobs whose refusals are counted
_LAST_DELAY = 60.0  # seconds until a job that was refused again and again is due again
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 5.0  # seconds between two tries of what the database did not answer


class Worker:
    """One worker; `run` it once.

    The launcher has to be spawned before: the worker closes it, and any that follows it.
    """

    def __init__(
        self, backend: Backend, settings: Settings, launcher: Launcher, local: Local | None = None
    ) -> None:
        self._local = local
        self._backend, self._settings, self._launcher = backend, settings, launcher
        self._hosts: Hosts  # made by `run`: what they say is about this worker
        self._controls = Controls()
        self.up = asyncio.Event()  # it is registered, and claims
        self._paused = False  # by its own process, see `pause`
        self._halted = asyncio.Event()
        self._functions = Functions(backend, settings)
        self._started_at: datetime | None = None  # by the database's clock
        self._hostname = socket.gethostname()
        self._work = Lookout(backend.is_live, settings.poll)
        self._look, self._launchable = asyncio.Event(), asyncio.Event()
        self._prospects = Prospects(QUIET * settings.poll)
        self._unsure = True  # the database may say that this worker holds jobs that it does not run
        self._slots = Slots(settings.slots or len(os.sched_getaffinity(0)) * 2, self._on_room)
        self._watch = Watch(backend, settings.poll)
        self._loaded = Loaded()
        self._gate = Gate(settings.max_cpu, settings.min_free_ram)
        self._identity: dict[str, Any] = {}  # of every line that is logged from here on
        self._owners: set[str] = set()  # all that this process has been
        self.owner = self._new_owner()
        self._left = settings.worker_jobs  # jobs that it may still begin; None for any
        self._patient = False  # what runs may end, however long it takes
        self._halt = asyncio.Event()  # of `run`: do not wait for what runs
        # Held by whoever changes or judges what this worker holds: a claim, a reconcile, a new owner.
        self._holding = asyncio.Lock()
        # By lease: the next attempt of a job may begin while it is stored how the last has ended.
        self._executions: dict[str, Execution] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._refusals: Counter[ObjectId] = Counter()
        self._foreign: set[str] = set()  # names that came up and are not known here: not claimed again
        self._returning: set[asyncio.Task[None]] = set()
        self._control = Lookout(backend.is_live, settings.heartbeat)
        self._rouse = asyncio.Event()
        self._closing = asyncio.Event()
        self._failure: asyncio.Future[None] | None = None
        self._registered: Owner | None = None  # of whom nobody has been told yet, nothing can be renewed
        self._renewed = time.monotonic()  # when the last renewal that succeeded was sent
        self._contact = Contact()
        self._chores = backend.chores(
            contact=self._contact,
            controls=lambda: self._controls,
            worker=lambda: self.owner.worker,
            woken=self._look_again,
            closing=self._closing,
        )

    async def run(self, stop: asyncio.Event, halt: asyncio.Event | None = None) -> None:
        """Work until `stop`, then let running jobs end for a while; at once when `halt` is set, too.

        Raises: whatever a part of the worker failed with; its jobs are given back before that.
        """
        identifiers.bind(self._identity)
        self._hosts = Hosts(self._settings)
        self._failure = asyncio.get_running_loop().create_future()
        self._halt = halt or self._halt
        unlisten = self._backend.listen(self._on_change)
        parts: list[asyncio.Task[None]] = []
        try:
            if not await self._begin(stop):
                return
            self._look_at_machine()
            claiming = self._part(self._claim_jobs())
            parts = [self._part(part) for part in self._side_parts()]
            self.up.set()
            ready(log, slots=self._slots.count, jobs=len(self._loaded.entries))
            await _first(stop.wait(), self._halted.wait(), self._failure)
            await self._drain(claiming, stop)
        finally:
            unlisten()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await self._leave()
            await self._hosts.close()
            self._functions.close()
            self._launcher.close()
        if self._failure.done():
            self._failure.result()

    def pause(self, paused: bool) -> None:
        """Claim nothing any more, or go on; what runs is not touched. For its own process, in its loop."""
        self._paused = paused
        self._rouse.set()
        self._work.hint()

    def retire(self) -> None:
        """Claim nothing more and end when all that runs has ended, however long that takes."""
        self._patient = True
        self._halted.set()

    def _side_parts(self) -> list[Coroutine[Any, Any, None]]:
        parts = [
            self._beat(),
            self._guard(),
            self._reconcile(),
            self._obey(),
            self._watch_machine(),
            self._backend.follow(),
            self._watch.run(),
            self._keep_launcher(),
        ]
        parts += self._chores.parts() if self._chores else []
        if self._functions.on:
            parts.append(self._functions.sweep())
        if self._local is not None:
            parts.append(self._take_local(self._local))
        return [*parts, self._reload()] if self._settings.reload else parts

    def _part(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a part of the worker; if it fails, the worker does."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_part_done)
        return task

    def _on_part_done(self, task: asyncio.Future[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("worker.failed", exc_info=error)
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    # ------------------------------------------------------------------ begin and end

    async def _begin(self, stop: asyncio.Event) -> bool:
        """Load, publish, register; False if the worker is stopped before."""
        beginning = asyncio.ensure_future(self._load_and_announce())
        await _first(stop.wait(), beginning)
        if not beginning.done():
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
            return False
        beginning.result()
        return True

    async def _load_and_announce(self) -> None:
        await self._insist(self._backend.prepare)
        await self._insist(lambda: self._empty_handed(self._note_start))
        self._adopt(*await load_all(self._launcher, self._settings, self._settings.jobs))
        if self._loaded.problems and not self._loaded.entries and not self._settings.reload:
            raise JobInvalid(f"no job can be loaded: {'; '.join(self._broken())}")
        await self._insist(lambda: self._empty_handed(self._publish))
        await self._insist(lambda: self._empty_handed(self._register))

    async def _empty_handed(self, step: Callable[[], Awaitable[None]]) -> None:
        """A step of an owner that holds nothing; another takes its place if it has been lost meanwhile."""
        try:
            await step()
        except OwnerLost:
            self.owner = self._new_owner()
            raise

    async def _note_start(self) -> None:
        # Before the job files are loaded: a halt that comes meanwhile is meant for this worker, too.
        self._started_at = self._started_at or await self._backend.server_time(self.owner)
        await self._backend.enlist(self.owner)
        await self._read_controls()

    async def _publish(self) -> None:
        await self._backend.publish(self.owner, list(self._loaded.entries.values()))

    async def _register(self) -> None:
        """Announce this owner; comes before its first claim."""
        owner, sent = self.owner, time.monotonic()
        await self._backend.register(
            owner,
            slots=self._slots.count,
            namespaces=self._namespaces,
            jobs=self._served(),
        )
        self._registered, self._renewed = owner, sent
        if self._loaded.problems:
            await self._serve()

    async def _insist(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat a step until the database has done it."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await step()
            except TROUBLE as error:
                log.warning("worker.database_trouble", extra={"error": str(error)[:200], "retry_in": pause})
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_PAUSE)

    async def _drain(self, claiming: asyncio.Task[None], stop: asyncio.Event) -> None:
        """Claim nothing more; give running jobs their time, then take them down."""
        self._closing.set()
        self._work.hint()
        log.info("worker.draining", extra={"running": len(self._executions)})
        await asyncio.wait({claiming}, timeout=LAST_WORDS)
        claiming.cancel()
        failed = self._failure is not None and self._failure.done()
        if self._tasks and not failed and self._patient:
            await _first(stop.wait(), self._halt.wait(), asyncio.wait(set(self._tasks)))
        if self._tasks and not failed:
            running = asyncio.wait(set(self._tasks))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain):
                    await _first(self._halt.wait(), running)
        for execution in self._executions.values():
            execution.stop(min(SHORT_GRACE, self._settings.grace))
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=SHORT_GRACE + 2 * LAST_WORDS)

    async def _leave(self) -> None:
        """Whatever still runs is ended without a word; what is still held goes back in line."""
        for execution in self._executions.values():
            execution.abandon()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=LAST_WORDS)
        try:
            async with asyncio.timeout(LAST_WORDS):
                await self._hand_back(self.owner, "the worker stops")
        except TROUBLE as error:
            # The others see that it is gone, only later.
            log.warning("worker.left_unsaid", extra={"error": str(error)[:200]})
        log.info("worker.ended")

    # ------------------------------------------------------------------ being alive

    def _new_owner(self) -> Owner:
        name = f"{self._settings.worker_name}@{self._hostname}"
        told = self._settings
        kind = Kind(
            told.worker_type, told.worker_nr, told.worker_timeout, told.worker_debug, told.worker_launch
        )
        owner = Owner(uuid.uuid4().hex, name, self._hostname, os.getpid(), kind)
        self._owners.add(owner.id)
        self._identity.update(worker=name, owner=owner.id)
        return owner

    async def _beat(self) -> None:
        """Renew what says that this worker lives, and with it all its leases."""
        beats = 0  # since a look has found that it holds nothing
        while True:
            owner, sent, known = self.owner, time.monotonic(), self.owner is self._registered
            try:
                async with asyncio.timeout(self._settings.heartbeat):
                    alive = await self._backend.beat(
                        owner,
                        running=len(self._executions),
                        draining=self._closing.is_set(),
                        gate=self._gate.reason,
                        paused=self._paused,
                    )
            except TROUBLE as error:
                self._contact.lost()
                log.warning("worker.beat_failed", extra={"error": str(error)[:200]})
                await asyncio.sleep(min(self._settings.heartbeat, 1.0))
                continue
            if not alive and known:
                await self._start_over(owner, "it was declared dead")
            elif not alive:
                log.debug("worker.not_registered_yet")
            elif owner is self.owner:
                self._note_contact(sent)
                beats = 0 if self._unsure else beats + 1
                if beats % IDLE_BEATS == 0:
                    self._look.set()
            await heard(self._rouse, self._settings.heartbeat)
            self._rouse.clear()

    def _note_contact(self, sent: float) -> None:
        # A worker that was frozen has seen nothing in between, although nothing failed.
        self._contact.note(sent, gap=sent - self._renewed > self._settings.dead_after / 2)
        self._renewed = sent

    async def _guard(self) -> None:
        """Give up everything by the own clock before anybody may declare this worker dead."""
        while True:
            left = self._time_left()
            if left > 0:
                await asyncio.sleep(left)
            else:
                await self._start_over(self.owner, "it could not renew its leases", hand_back=True)

    def _time_left(self) -> float:
        """Seconds for which nobody can have declared this worker dead."""
        return self._renewed + self._settings.dead_after * 5 / 6 - time.monotonic()

    async def _start_over(self, owner: Owner, why: str, *, hand_back: bool = False) -> None:
        """End all jobs of a lost owner without a word, then go on as a new one.

        With `hand_back` its jobs are put back in line, uncharged; else they are the rescuers'.
        """
        for execution in self._executions.values():
            execution.abandon()
        async with self._holding:
            if owner is not self.owner:
                return  # somebody else has noticed, too
            log.error("worker.leases_lost", extra={"reason": why, "running": len(self._executions)})
            for execution in self._executions.values():
                execution.abandon()
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            self.owner = self._new_owner()
            await self._insist(lambda: self._empty_handed(self._register))
            if hand_back:
                # Before anybody may call it a crash: the jobs are not to blame for a lost connection.
                await self._insist(lambda: self._hand_back(owner, why))
            self._contact.lost()

    async def _hand_back(self, owner: Owner, reason: str) -> None:
        """Put back in line what this owner still holds, then let it go."""
        for job in await self._backend.running(owner):
            log.info("job.released", extra={"job_id": str(job.id), "reason": reason, "delay": 0.0})
            with contextlib.suppress(LeaseLost):  # somebody else was faster
                await self._backend.release(job, reason=reason)
        await self._backend.leave(owner)

    async def _reconcile(self) -> None:
        """Compare what the database says this worker holds with what it runs."""
        while True:
            await self._look.wait()
            self._look.clear()
            try:
                async with self._holding:
                    await self._reconcile_once()
            except TROUBLE as error:
                log.warning("worker.reconcile_failed", extra={"error": str(error)[:200]})
                await asyncio.sleep(_FIRST_PAUSE)

    async def _reconcile_once(self) -> None:
        self._unsure = True
        held = {job.id: job for job in await self._backend.running(self.owner)}
        self._unsure = bool(held)
        for execution in self._executions.values():
            holder = held.get(execution.job.id)
            if holder is None or not holder.held_by(execution.lease_id):
                # Taken away; or its end has just been recorded, then there is nothing to give up.
                execution.abandon()
        for job in held.values():
            running = self._executions.get(job.lease.id) if job.lease else None
            if running is None:
                await self._give_back(job, "its worker does not run it", 0.0)
            elif job.killed_at is not None:
                running.kill()

    async def _obey(self) -> None:
        """Read what operators hold back whenever it may have changed; else about as often as it renews."""
        while True:
            self._control.looking()
            try:
                await self._read_controls()
            except TROUBLE as error:
                log.warning("worker.controls_unread", extra={"error": str(error)[:200]})
                self._control.expect(_FIRST_PAUSE)
            await self._control.wait()

    async def _read_controls(self) -> None:
        before, self._controls = self._controls, await self._backend.controls(self.owner)
        if self._started_at and self._controls.halts(self._started_at) and not self._halted.is_set():
            log.warning("worker.halted", extra={"halt": str(self._controls.halt)})
            self._halted.set()
        if told := self._controls.stop_of(self._owners):
            self._obey_stop(told)
        if before.pauses == self._controls.pauses:
            return
        log.info(
            "worker.controls", extra={"pauses": [f"{p.scope} {p.target}" for p in self._controls.pauses]}
        )
        if self._chores:
            await self._chores.obey(resumed=bool(set(before.pauses) - set(self._controls.pauses)))
        self._prospects.doubt_all()
        self._work.hint()

    def _obey_stop(self, told: Stop) -> None:
        if not self._halted.is_set():
            log.warning("worker.stopped", extra={"stop": str(told)})
        if told.hard:
            self._halt.set()
        self.retire()

    def _on_change(self, change: Change) -> None:
        if change.collection == CONTROL or change.kind == "resync":
            self._control.hint()
        if change.collection not in (QUEUE, ""):
            return
        self._watch.hear(change)
        if change.kind == "insert" and change.fields.get("due") and self._is_full(change.fields.get("name")):
            self._prospects.leave(change.fields["name"])
            return
        pinned = stir(self._work, change, self.owner, self._namespaces, self._crowd)
        self._prospects.hear(change, pinned=pinned)
        # What is being claimed may be flagged before it is known here.
        flagged = change.fields.get("killed_at") is not None and (
            self._holding.locked() or any(each.job.id == change.id for each in self._executions.values())
        )
        resync = change.kind == "resync" and (self._executions or self._holding.locked())
        if flagged or resync:
            self._look.set()

    def _crowd(self, namespace: str | None) -> int:
        return self._chores.crowd(namespace) if self._chores else 0

    # ------------------------------------------------------------------ claiming

    async def _claim_jobs(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            await self._launchable.wait()
            self._work.looking()
            try:
                async with self._holding:
                    claimed = await self._claim_some()
                pause = _FIRST_PAUSE
            except TROUBLE as error:
                self._prospects.doubt_all()
                self._unsure = True  # it may have been done
                log.warning("worker.claim_failed", extra={"error": str(error)[:200]})
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)
                continue
            if claimed and claimed.more:
                self._work.hint()
            elif not claimed.more:
                self._work.quiet = True
            await self._work.wait()

    def _on_room(self) -> None:
        """A slot may have become free: that matters to none if nobody waits."""
        if self._prospects.more:
            self._work.hint()

    def _look_again(self) -> None:
        """Something that was not looked at may be there now."""
        self._prospects.doubt()
        self._work.hint()

    def _is_full(self, name: object) -> bool:
        return isinstance(name, str) and self._slots.is_full(name)

    async def _claim_some(self) -> Claimed:
        self._prospects.more = True  # room that is made during this look may be for what it leaves
        free = self._slots.free
        free = free if self._left is None else min(free, self._left)
        if free <= 0 or not self._served() or self._closing.is_set():
            return Claimed()
        if self._paused or self._controls.of_worker(self.owner.worker):
            return Claimed()
        rooms = {**self._slots.rooms(), **dict.fromkeys(self._foreign, 0)}
        full = {name for name, room in rooms.items() if room <= 0}
        untold = self._work.quiet or not self._backend.is_live()  # it may not have heard of all there is
        look = self._prospects.look(full, untold=untold)
        if look is None:
            return Claimed()
        forced, awaited = self._gate.reason is not None, self._slots.lent >= self._settings.max_waiting
        controls = self._controls
        with self._slots.reserved(free):
            claimed = await self._backend.claim(
                self.owner,
                namespaces=self._namespaces,
                limit=free,
                rooms=rooms,
                forced=forced,
                awaited=awaited,
                pinned=look.pinned,
                arrived=look.arrived,
                controls=controls,
                begins=self._begins,
            )
            self._unsure = self._unsure or bool(claimed)
            self._prospects.seen(claimed, full, all_kinds=not (forced or awaited))
            for job in claimed:
                self._take(job, begun=job.id in claimed.begun)
        if self._chores and set(controls.pauses) - set(self._controls.pauses):
            # What was resumed during this claim may have been parked by it after all were put back in line.
            await self._chores.obey(resumed=True)
        return claimed

    async def _watch_machine(self) -> None:
        while True:
            await asyncio.sleep(GATE_EVERY)
            self._look_at_machine()
            await self._look_at_crowds()

    async def _look_at_crowds(self) -> None:
        """Find the jobs and hosts that make more and more processes; one look at all is for all of them."""
        parts: tuple[Execution | Host, ...] = (*self._executions.values(), *self._hosts.alive)
        keepers = {each.keeper: each for each in parts if each.keeper is not None}
        if not keepers:
            return
        for pid in keepers:
            # A job may have stopped its own: nobody would hear of its end.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for keeper, count in (await asyncio.to_thread(linux.crowds, list(keepers))).items():
            keepers[keeper].count(count)

    def _look_at_machine(self) -> None:
        """Open or close the gate; said once, however many jobs wait behind it."""
        if not self._gate.look():
            return
        if self._gate.reason is not None:
            log.warning("skipped job", extra={"reason": self._gate.reason, "starts": "jobs with force only"})
        else:
            log.info("worker.gate_open")
            self._look_again()

    def _take(self, job: Job, *, begun: bool) -> None:
        """Run a claimed job, or give it back."""
        entry = self._entry_of(job)
        reason = self._refusal(job, entry)
        if entry is None:
            self._foreign.add(job.name)
        if entry is None or reason:
            delay = self._delay(job.id) if reason != "max_parallel" else 0.0
            task = asyncio.create_task(self._give_back(job, reason or "unknown", delay))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            return
        self._refusals.pop(job.id, None)
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self.retire()  # the last one
        execution = Execution(
            job,
            entry,
            begun=begun,
            backend=self._backend,
            launcher=self._launcher,
            hosts=self._hosts,
            settings=self._settings,
            hostname=self._hostname,
            slots=self._slots,
            watch=self._watch,
            time_left=self._time_left,
            functions=self._functions,
            local=self._local if self._is_local(entry) else None,
        )
        self._slots.take(job)
        task = self._part(execution.run())
        self._executions[execution.lease_id] = execution
        self._tasks[task] = execution.lease_id
        task.add_done_callback(self._on_execution_done)

    def _begins(self, job: Job) -> int | None:
        """The process in which a job begins as soon as it is claimed; None if there is none yet."""
        entry = self._entry_of(job)
        if entry is None or not is_inline(job, entry) or self._refusal(job, entry):
            return None
        if job.crashes + 1 >= (job.max_crashes or self._settings.max_crashes):
            return None  # it would not be run again, so it must not have begun before its body can
        return os.getpid() if self._is_local(entry) else self._hosts.pid

    def _is_local(self, entry: Mapping[str, Any]) -> bool:
        known = self._local is not None and entry["_id"] in self._local.entries
        return known and entry["runs"] != "script"  # a file of its own is nobody's function

    def _on_execution_done(self, task: asyncio.Task[None]) -> None:
        execution = self._executions.pop(self._tasks.pop(task), None)
        if execution is not None:
            self._slots.leave(execution.job)

    def _entry_of(self, job: Job) -> Mapping[str, Any] | None:
        """What this worker knows of a job's code; None if it does not run it."""
        if job.document.get("function") is not None:
            return functions.ENTRY if self._functions.on else None
        return self._loaded.entries.get(job.name)

    def _served(self) -> list[str]:
        """What this worker says it runs."""
        return [*sorted(self._loaded.entries), *([SERVES] if self._functions.on else ())]

    @property
    def _namespaces(self) -> Sequence[str]:
        """Where it looks for jobs: an application's tasks have places of their own, too."""
        more = sorted(self._local.namespaces) if self._local is not None else []
        return tuple(dict.fromkeys((*functions.namespaces(self._settings), *more)))

    def _refusal(self, job: Job, entry: Mapping[str, Any] | None) -> str | None:
        """Why this worker does not run a job that it claimed."""
        if entry is None:
            return f"{self.owner.worker} does not know {job.name}"
        if entry is functions.ENTRY:
            return None  # its source is checked when it is prepared
        # Checked against the same one when it was enqueued; or its author's own, which are not checked.
        same = job.document.get("signature") == entry["signature"]
        errors = [] if same else signatures.check(entry["schema"], dict(job.args))
        if errors:
            first = f"{errors[0]['pointer']}: {errors[0]['message']}"
            return f"{self.owner.worker} has another signature of {job.name}: {first}"[:500]
        # Several of one name may come with one claim.
        return "max_parallel" if self._slots.is_full(job.name) else None

    def _delay(self, job_id: ObjectId) -> float:
        """Seconds until a refused job is due again: longer each time, somebody else may take it."""
        if len(self._refusals) > _REFUSALS:
            self._refusals.clear()
            self._foreign.clear()
        self._refusals[job_id] += 1
        return float(min(2.0 ** (self._refusals[job_id] - 1), _LAST_DELAY))

    async def _give_back(self, job: Job, reason: str, delay: float) -> None:
        log.info("job.released", extra={"job_id": str(job.id), "reason": reason, "delay": delay})
        try:
            await self._backend.release(job, reason=reason, delay=delay)
        except LeaseLost:
            return  # somebody else was faster
        except TROUBLE as error:
            # The next reconcile finds it again.
            log.warning("job.release_failed", extra={"job_id": str(job.id), "error": str(error)[:200]})

    # ------------------------------------------------------------------ launcher and job files

    def _adopt(self, launcher: Launcher, loaded: Loaded) -> None:
        """From now on jobs come from this launcher; what runs goes on."""
        if launcher is not self._launcher:
            self._launcher.close()
            self._hosts.retire()
        self._launcher, self._loaded = launcher, self._with_local(loaded)
        loaded = self._loaded
        self._foreign.clear()
        self._launchable.set()
        _complain(loaded.problems)
        for entry in loaded.entries.values():
            log.info("jobs.loaded", extra={"job": entry["_id"], "fresh": entry["fresh"]})
        if not loaded.entries and self._local is None:
            log.warning("jobs.none", extra={"targets": list(self._settings.jobs)})

    def _with_local(self, loaded: Loaded) -> Loaded:
        if self._local is None:
            return loaded
        return replace(loaded, entries={**loaded.entries, **self._local.entries})

    async def _take_local(self, local: Local) -> None:
        """Publish tasks that the application adds while this worker runs."""
        while True:
            await local.added.wait()
            local.added.clear()
            self._loaded = self._with_local(self._loaded)
            self._foreign.clear()
            await self._serve_anew()

    async def _serve_anew(self) -> None:
        await self._insist(self._publish)
        await self._insist(self._serve)
        self._look_again()

    async def _serve(self) -> None:
        await self._backend.serve(self.owner, self._served(), self._namespaces, self._broken())

    def _broken(self) -> list[str]:
        """What is wrong with the files that cannot be used, for whoever looks at this worker."""
        return [f"{each.target}: {each.error}"[:BROKEN_TEXT] for each in self._loaded.problems[:BROKEN_MOST]]

    async def _keep_launcher(self) -> None:
        """Start another launcher when this one ends; running jobs do not notice."""
        pause = _FIRST_PAUSE
        while True:
            launcher, since = self._launcher, time.monotonic()
            await launcher.dead.wait()
            if launcher is not self._launcher:
                continue  # swapped
            self._launchable.clear()
            log.error("launcher.died", extra={"pid": launcher.pid})
            pause = _FIRST_PAUSE if time.monotonic() - since > _LAST_DELAY else min(pause * 2, _LAST_DELAY)
            await asyncio.sleep(pause)
            await self._load_anew()

    async def _load_anew(self, *, changed: bool = False) -> None:
        """Load all job files in another launcher and go on with that.

        If they have `changed`, and jobs are missing as files are broken, with the one before: an author who
        saves in the middle of a word takes no job from whoever enqueues it.
        """
        try:
            launcher, loaded = await load_all(
                Launcher.spawn(self._settings), self._settings, self._settings.jobs
            )
        except (LauncherDied, OSError) as error:
            log.error("launcher.failed", extra={"error": str(error)})
            return
        missing = self._loaded.entries.keys() - self._with_local(loaded).entries.keys()
        if changed and missing and loaded.problems:
            launcher.close()
            self._loaded = replace(self._loaded, problems=loaded.problems)
            _complain(loaded.problems)
            log.warning("jobs.kept", extra={"jobs": sorted(missing)})
            await self._insist(self._serve)
            return
        self._adopt(launcher, loaded)
        await self._serve_anew()

    async def _reload(self) -> None:
        """Load the job files again when one of them changes."""
        seen = _stamps(self._loaded.files)
        while True:
            await asyncio.sleep(RELOAD_EVERY)
            if _stamps(self._loaded.files) != seen:
                log.info("jobs.changed")
                await self._load_anew(changed=True)
                seen = _stamps(self._loaded.files)


def _complain(problems: Iterable[Problem]) -> None:
    for problem in problems:
        # The exception carries the text, so that it is shown as a traceback is.
        shown = JobInvalid("".join(problem.traceback)) if problem.traceback else None
        log.error("jobs.broken", extra={"target": problem.target, "error": problem.error}, exc_info=shown)


def _stamps(files: Collection[str]) -> dict[str, tuple[int, int] | None]:
    """What tells that a file has changed; None for one that is not there."""
    stamps: dict[str, tuple[int, int] | None] = {}
    for file in files:
        try:
            status = Path(file).stat()
        except OSError:
            stamps[file] = None
        else:
            stamps[file] = status.st_mtime_ns, status.st_size
    return stamps


async def _first(*waits: Awaitable[Any]) -> None:
    """Wait until one of them is done; the others that are ours are given up."""
    tasks = {asyncio.ensure_future(wait) for wait in waits}
    ours = tasks - set(waits)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in ours:
            task.cancel()
