"""Tasks of the application that a worker is in: coroutine functions on its loop, plain ones in forks of it.

Both speak the same frames as all jobs (`core4.worker.process`), so the worker makes no difference. What is
the application's own is not guarded against it: a coroutine that does not let the loop go on stops the
application, and one that cannot be cancelled is left to itself. A plain function runs in a copy of the
application's process with nothing open but its own pipes, and can be killed like any other job.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from core4.attempts import Runnable
from core4.decorated import Task, entries
from core4.discovery import file_of
from core4.worker import inline, keeper, process, protocol
from core4.worker.handle import Exit, Files, JobProcess, LauncherDied, attended
from core4.worker.protocol import Message

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a task has to end when it was cancelled


class LoopJob:
    """One task on this loop, with the methods of `core4.worker.handle.JobProcess`."""

    keeper = None

    def __init__(
        self, channel: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: asyncio.Task[None]
    ) -> None:
        self.pid = os.getpid()
        self.channel, self._to_job = channel
        self.stdout, self.stderr = _nothing(), _nothing()
        self._body = body
        self._asked = False
        self._end: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        body.add_done_callback(lambda _: self._set_end(Exit(0, None, 0)))

    def _set_end(self, end: Exit) -> None:
        if not self._end.done():
            self._end.set_result(end)

    def give(self, message: Message) -> None:
        """Give the task its order, or an answer; nobody waits until it has taken that."""
        self._to_job.write(protocol.encode(message))

    async def send(self, message: Message) -> None:
        """The same, until what is on its way is little enough."""
        try:
            self.give(message)
            await self._to_job.drain()
        except ConnectionError:
            return  # it has ended; that is reported by `wait`

    def terminate(self) -> None:
        """Cancel the task."""
        if not self._asked and not self._to_job.is_closing():
            self._asked = True
            self._to_job.write(protocol.encode({"cancel": True}))

    def kill(self) -> None:
        """Cancel it, and wait no longer than a while: nothing else ends it but the application."""
        self.terminate()
        if not self._end.done():
            asyncio.get_running_loop().call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if not self._end.done():
            log.error("local.not_ended")
            why = "it did not end when it was cancelled, and goes on in the application"
            self._set_end(Exit(None, None, 0, why=why, category="TIMEOUT"))

    async def wait(self) -> Exit | None:
        """Wait until it has ended."""
        return await asyncio.shield(self._end)

    def close(self) -> None:
        """Give its socket back. A task that still runs is cancelled."""
        self.terminate()
        self._to_job.close()


class Local:
    """The tasks of one application, and where they run."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, Runnable] = {}
        self._numbers = 0
        self._bodies: set[asyncio.Task[None]] = set()
        self._end_overhearing: Callable[[], None] = lambda: None
        self.added = asyncio.Event()

    def add(self, task: Task[..., Any]) -> None:
        """Take all tasks of a function.

        Raises: JobInvalid.
        """
        for entry in entries(task, here=True):
            found = {**entry, "file": file_of(task), "target": task.__module__, "fresh": False}
            self.entries[entry["_id"]] = found
            self._functions[entry["_id"]] = task
        self.added.set()

    @property
    def namespaces(self) -> set[str]:
        """Those that the tasks are in."""
        return {str(entry["namespace"]) for entry in self.entries.values()}

    def open(self) -> None:
        """What tasks print and log on this loop goes to their logs from now on."""
        self._end_overhearing = inline.overhear()

    def close(self) -> None:
        """No more of that."""
        self._end_overhearing()

    async def start(self, entry: Mapping[str, Any]) -> LoopJob | JobProcess:
        """A place for a job of this entry, which waits there for its order.

        Raises: LauncherDied, OSError.
        """
        function = self._functions[entry["_id"]]
        if entry["runs"] == "inline":
            return await self._start_here(function)
        return await _start_fork(lambda: process.run(locate=lambda _: function))

    async def _start_here(self, function: Runnable) -> LoopJob:
        ours, theirs = socket.socketpair()
        try:
            channel = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._numbers += 1
        body = asyncio.create_task(inline.attend(self._numbers, theirs, lambda _: function))
        self._bodies.add(body)
        body.add_done_callback(self._bodies.discard)
        body.add_done_callback(lambda _: theirs.close())  # if it was cancelled before its first step
        return LoopJob(channel, body)


async def _start_fork(run: Callable[[], None]) -> JobProcess:
    files = Files.make()
    try:
        pid = _fork(files, run)
    except BaseException:
        files.close_mine()
        raise
    finally:
        files.close_theirs()
    _reap(pid)
    try:
        return await attended(files)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise LauncherDied("the fork of the application does not answer") from None


def _fork(files: Files, run: Callable[[], None]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or it would be printed twice
    with warnings.catch_warnings():
        # Of an application that has threads, from 3.12 on: none of them is needed in the fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _become_keeper(files, run)
    return pid


def _become_keeper(files: Files, run: Callable[[], None]) -> NoReturn:
    try:
        gc.freeze()  # what is collected might close a file by its number, which is another one now
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        channel, out, err, control = files.theirs
        keeper.keep(socket.socket(fileno=control), (channel, out, err), lambda: _become_job(run))
    finally:
        os._exit(1)


def _become_job(run: Callable[[], None]) -> None:
    sys.stdout = sys.stderr = None  # they may be anything: made anew
    process.prepare_streams()
    run()


def _reap(pid: int) -> None:
    """Collect the keeper when it has ended."""
    loop, fd = asyncio.get_running_loop(), os.pidfd_open(pid)

    def collect() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return  # the application collects its children itself

    loop.add_reader(fd, collect)


def _nothing() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_eof()
    return reader
