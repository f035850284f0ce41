"""The worker's side of the hosts on which inline jobs run: who is on one, and who is to blame for its end.

A host is a job process (see `core4.worker.inline`). It is ended when one of its jobs cannot be ended
otherwise or does not let the loop go on. Who did it, if that is known, is charged; all others are evicted:
they go back in line, uncharged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
import socket
import sysconfig
import time
from collections.abc import Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

from core4 import attempts
from core4.config import Settings
from core4.worker import inline, protocol
from core4.worker.handle import Exit, JobProcess, Launcher, LauncherDied, has_failed
from core4.worker.output import Splitter
from core4.worker.page import Page
from core4.worker.protocol import Message, ProtocolError

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds until the loop of a new host runs
LOOK_EVERY = 0.25  # seconds between two looks at the page
PATIENCE = 1.0  # seconds for a job that is to end at once without taking the host with it
TRACE_TIMEOUT = 1.0  # seconds for the traceback of a blocked loop
CLOSE_TIMEOUT = 5.0  # seconds for the hosts' processes to go
MOST_EVICTIONS = 3  # after which a job runs in a process of its own
_MOST_OUTPUT = 64 * 1024  # characters of what nobody's in a host prints
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Evicted:
    """The host of a job ended and the job is not to blame; `suspected` if nobody knows who is."""

    reason: str
    suspected: bool = False


_Channel = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_Place = tuple[int, _Channel]  # the number of a job to come, and the way to it


class InlineJob:
    """One job on a host; to its execution what a `JobProcess` is. Made by `Hosts.start`."""

    def __init__(self, host: Host, number: int, job_id: str, channel: _Channel) -> None:
        self.number, self.job_id, self.pid = number, job_id, host.pid
        self.keeper = None  # that of its host is not its own
        self.channel, self._to_job = channel
        self.stdout, self.stderr = _nothing(), _nothing()
        self.end: asyncio.Future[Exit | Evicted] = asyncio.get_running_loop().create_future()
        self.condemned = False
        self._host = host
        self._asked = False  # to end, and has had its grace when it has to

    def give(self, message: Message) -> None:
        """Give the job its order, or an answer; nobody waits until it has taken that."""
        self._to_job.write(protocol.encode(message))

    async def send(self, message: Message) -> None:
        """The same, until what is on its way is little enough."""
        try:
            self.give(message)
            await self._to_job.drain()
        except ConnectionError:
            return  # its host died; that is reported by `wait`

    def terminate(self) -> None:
        """Cancel the job."""
        self._cancel()
        self._asked = True

    def kill(self) -> None:
        """End the job, whatever it takes."""
        if self.end.done() or self.condemned:
            return
        self.condemned = True
        self._cancel()
        self._host.condemn(self, 0.0 if self._asked else PATIENCE)

    def _cancel(self) -> None:
        if not self._asked and not self._to_job.is_closing():
            self._to_job.write(protocol.encode({"cancel": True}))

    async def wait(self) -> Exit | Evicted | None:
        """Wait until nothing of the job is left."""
        return await asyncio.shield(self.end)

    def close(self) -> None:
        """Give its socket back. A job that still runs is ended."""
        self.kill()
        self._to_job.close()


class Host:
    """One host process with its jobs; `start` jobs on it while it is `usable`."""

    def __init__(self, process: JobProcess, launcher: Launcher, settings: Settings, context: Context) -> None:
        self._process, self.launcher, self._context = process, launcher, context
        self._block, self._most_processes = settings.inline_block, settings.max_processes
        self.pid, self.keeper = process.pid, process.keeper
        self.usable = True
        self.ended = asyncio.Event()
        self._retired = False
        self._page = Page.create()
        self._link = process.files_link()
        self._sending = asyncio.Lock()
        self._jobs: dict[int, InlineJob] = {}
        self._numbers = itertools.count(1)
        # Where the next job begins: opened when the last has ended, so that none waits after its claim.
        self._place: asyncio.Task[_Place] | None = None
        self._verdict: tuple[set[int], str, Exit | None] | None = None  # culprits, reason, their end
        self._ready = asyncio.Event()
        self._parts: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Wait until its loop runs.

        Raises: LauncherDied if it does not.
        """
        self._parts = [asyncio.create_task(part, context=self._context) for part in self._always()]
        try:
            await self._send({"page": True}, self._page.fd)
            async with asyncio.timeout(START_TIMEOUT):
                waits = {asyncio.create_task(one.wait()) for one in (self._ready, self.ended)}
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
        except (TimeoutError, OSError):
            self._end(set(), "it did not start")
        if not self.usable or self.ended.is_set():
            raise LauncherDied("the host of inline jobs ended before it began")
        self._parts.append(asyncio.create_task(self._judge(), context=self._context))
        self._context.run(log.info, "inline.host_started", extra={"pid": self.pid})

    def _always(self) -> list[Coroutine[Any, Any, None]]:
        outputs = [self._hear(self._process.stdout), self._hear(self._process.stderr)]
        return [self._listen(), self._stay(), *outputs]

    async def start(self, job_id: str) -> InlineJob:
        """A new job on it, which waits for its order.

        Raises: LauncherDied if the host has just ended; OSError if this process has no files left.
        """
        place, self._place = self._place, None
        if place is None or has_failed(place):
            place = self._open_place()
        number, channel = await place
        job = self._jobs[number] = InlineJob(self, number, job_id, channel)
        if self.ended.is_set():
            self._dismiss(job, Evicted("its inline host had just ended"))
        return job

    def _open_place(self) -> asyncio.Task[_Place]:
        return asyncio.create_task(self._opened(), context=self._context)

    async def _opened(self) -> _Place:
        ours, theirs = socket.socketpair()
        with theirs:
            channel, number = await asyncio.open_connection(sock=ours), next(self._numbers)
            try:
                await self._send({"start": number}, theirs.fileno())
            except BaseException as error:
                channel[1].close()
                if isinstance(error, OSError):
                    raise LauncherDied("the host of inline jobs has just ended") from error
                raise
        return number, channel

    async def _send(self, message: Message, fd: int) -> None:
        data = protocol.encode(message)
        loop = asyncio.get_running_loop()
        async with self._sending:
            while True:
                try:
                    # A few bytes: they are taken all or not at all.
                    socket.send_fds(self._link, [data], [fd])
                    return
                except BlockingIOError:
                    free = asyncio.Event()
                    loop.add_writer(self._link, free.set)
                    try:
                        async with asyncio.timeout(START_TIMEOUT):
                            await free.wait()
                    finally:
                        loop.remove_writer(self._link)

    def condemn(self, job: InlineJob, patience: float) -> None:
        """`job` has to end; if it has not after `patience` seconds, the host does."""
        if patience == 0 or all(one.condemned for one in self._jobs.values()):
            self._end_for_condemned(job)
        else:
            asyncio.get_running_loop().call_later(patience, self._end_for_condemned, job)

    def _end_for_condemned(self, job: InlineJob) -> None:
        if not job.end.done():
            condemned = {number for number, one in self._jobs.items() if one.condemned}
            self._end(condemned, f"inline host ended: job {job.job_id} did not end when it was told to")

    def count(self, processes: int) -> None:
        """There are so many of its processes: end it if they are more than all its jobs may have.

        Whose they are nobody knows; alone in a process the job that makes them is found.
        """
        most = self._most_processes * max(len(self._jobs), 1)
        if processes > most:
            self._end(set(), f"inline host ended: it had {processes} processes, {most} are allowed")

    def retire(self) -> None:
        """Take no more jobs, and go with the last one."""
        self.usable = False
        self._retired = True
        if not self._jobs:
            self._process.kill()

    def kill(self) -> None:
        """End it at once, with all that is on it."""
        self._end(set(), "the worker stops")

    def _end(self, culprits: set[int], reason: str, end: Exit | None = None) -> None:
        self.usable = False
        if self._verdict is None:
            self._verdict = culprits, reason, end
        self._process.kill()

    # ------------------------------------------------------------------ while it lives

    async def _listen(self) -> None:
        try:
            while (message := await protocol.read(self._process.channel)) is not None:
                if "ready" in message:
                    self._ready.set()
                elif (job := self._jobs.get(message["ended"])) is not None:
                    self._dismiss(job, Exit(0, None, 0))
        except (ProtocolError, KeyError, TypeError) as error:
            self._end(set(), f"inline host ended: what it said is no frame ({error!r:.200})")

    def _dismiss(self, job: InlineJob, end: Exit | Evicted) -> None:
        del self._jobs[job.number]
        job.end.set_result(end)
        if self._place is None and self.usable and not self._jobs:
            # With the host to itself: no child that another job has left there holds the way to this one.
            self._place = self._open_place()
        if self._retired and not self._jobs:
            self._process.kill()

    async def _hear(self, source: asyncio.StreamReader) -> None:
        """What a host prints that belongs to no job: C libraries, processes that jobs start."""
        left, splitter = _MOST_OUTPUT, Splitter()
        while data := await source.read(_MOST_OUTPUT):
            for line in splitter.feed(data) if left > 0 else ():
                left -= len(line)
                log.info("inline.output", extra={"pid": self.pid, "line": line})
            if left <= 0:
                splitter = Splitter()

    async def _judge(self) -> None:
        """End the host when its loop stands still for too long, by this process's own clock."""
        still, seen, looked = 0.0, self._page.look(), time.monotonic()
        while not self.ended.is_set():
            await asyncio.sleep(LOOK_EVERY)
            now, look = time.monotonic(), self._page.look()
            # What this process missed while it was stopped itself does not count.
            still = still + min(now - looked, 2 * LOOK_EVERY) if look.steps == seen.steps else 0.0
            seen, looked = look, now
            if still < self._block:
                continue
            trace = await self._trace()
            if look.job and look.job not in self._jobs:
                still = 0.0  # it has just ended
                continue
            self._end_blocked(look.job, trace)
            return

    def _end_blocked(self, number: int, trace: list[str]) -> None:
        job = self._jobs.get(number)
        where = f": it stood in {_place(trace)}" if trace else ""
        text = f"blocked: it kept the loop of all inline jobs for more than {self._block:g} seconds{where}"
        log.warning("inline.blocked", extra={"job_id": job.job_id if job else None, "pid": self.pid})
        if job is None:
            self._end(set(), "inline host ended: its loop was blocked, nobody knows by whom")
            return
        reason = f"inline host ended: job {job.job_id} blocked its loop"
        self._end({number}, reason, Exit(None, signal.SIGKILL, 0, why=text, category="TIMEOUT", trace=trace))

    async def _trace(self) -> list[str]:
        """Where the loop stands, innermost frame last; nothing if it does not say so in time."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline, text = time.monotonic() + TRACE_TIMEOUT, ""
        while time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            before, text = text, self._page.trace()
            if text and text == before:
                break
        return _frames(text)

    # ------------------------------------------------------------------ its end

    async def _stay(self) -> None:
        """Wait for the end of the process, and tell each job what that means for it."""
        exit_ = await self._process.wait()
        self.usable = False
        self.ended.set()
        culprits, reason, end = self._verdict or self._found_dead(exit_)
        log.log(
            logging.INFO if self._retired and not self._jobs else logging.WARNING,
            "inline.host_ended",
            extra={"pid": self.pid, "reason": reason, "evicted": len(self._jobs.keys() - culprits)},
        )
        for number, job in list(self._jobs.items()):
            if number in culprits:
                self._dismiss(job, end or exit_ or Exit(None, None, 0))
            else:
                self._dismiss(job, Evicted(reason, suspected=not culprits))
        self._close()

    def _found_dead(self, exit_: Exit | None) -> tuple[set[int], str, Exit | None]:
        """Who is to blame for an end that was not the worker's doing: whose step it was, if it was one."""
        how = exit_.described("the inline host") if exit_ else "the inline host and its keeper were lost"
        job = self._jobs.get(self._page.look().job)
        if job is None:
            return set(), how, None
        trace = _frames(self._page.trace())
        where = f", in {_place(trace)}" if trace else ""
        end = Exit(None, None, 0, why=f"{how} in a step of this job{where}", trace=trace)
        return {job.number}, f"{how} in a step of job {job.job_id}", end

    def _close(self) -> None:
        for part in self._parts:
            if part is not asyncio.current_task():
                part.cancel()
        if self._place is not None:
            self._place.cancel()
            self._place.add_done_callback(_hang_up)
        self._process.close()
        self._link.close()
        self._page.close()


class Hosts:
    """The hosts of a worker: one that takes jobs, and those of former launchers as long as jobs run there.

    Whatever a host logs is about whom the context was about in which this was made, not about the job
    that happened to be the first on it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._context = settings, copy_context()
        self._starting = asyncio.Lock()
        self._current: Host | None = None
        self._all: set[Host] = set()

    @property
    def alive(self) -> list[Host]:
        """Those whose process lives."""
        return [host for host in self._all if not host.ended.is_set()]

    @property
    def pid(self) -> int | None:
        """The process that takes the next job, if there is one."""
        return self._current.pid if self._current is not None and self._current.usable else None

    async def start(self, launcher: Launcher, job_id: str) -> InlineJob:
        """A job on a host that `launcher` has made; it waits for its order.

        Raises: LauncherDied; OSError if this process has no files left.
        """
        async with self._starting:
            host = self._current
            if host is None or not host.usable or host.launcher is not launcher:
                host = await self._begin(launcher)
        return await host.start(job_id)

    async def _begin(self, launcher: Launcher) -> Host:
        host = Host(await launcher.start(inline=True), launcher, self._settings, self._context)
        self._all = {*self.alive, host}
        await host.begin()
        self.retire()
        self._current = host
        return host

    def retire(self) -> None:
        """The next job gets a new host; the jobs on the present one go on."""
        if self._current is not None:
            self._current.retire()
            self._current = None

    async def close(self) -> None:
        """End all of them."""
        for host in self._all:
            host.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(*(host.ended.wait() for host in self._all))


def _frames(text: str) -> list[str]:
    """The user's part of what faulthandler writes, innermost frame last."""
    found: list[str] = []
    for file, line, function in _FRAME.findall(text):
        if file in (attempts.__file__, inline.__file__) or file.endswith("/asyncio/events.py"):
            break
        found.append(f'  File "{file}", line {line}, in {function}\n')
    return found[::-1]


def _place(trace: list[str]) -> str:
    """The innermost frame of the user's own code; of a library's if there is none."""
    own = [line for line in trace if not line.split('"')[1].startswith(_LIBRARIES)]
    return (own or trace)[-1].strip()


def _hang_up(place: asyncio.Task[_Place]) -> None:
    if not has_failed(place):
        _, (_, to_job) = place.result()
        to_job.close()


def _nothing() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_eof()
    return reader
