"""The host of inline jobs: one process with one event loop on which many of them run.

Forked by a keeper like a job process, with the modules of all jobs imported; without credentials and
database. Each job has a socket of its own to the worker and says there what a job process says on its
channel (see `core4.worker.process`), and ``{"output": {"source", "text"}}`` for what it prints.

On file descriptor 3 the worker sends ``{"page": true}`` with the file of the shared page, then
``{"start": number}`` with the socket of a job, again and again; the host answers ``{"ready": true}`` once
and ``{"ended": number}`` when nothing of a job is left. On its socket a job gets its order, the answers to
its questions, and ``{"cancel": true}``.

The host judges nobody. It writes on the shared page whose step is being taken, the worker reads it.
"""

from __future__ import annotations

import array
import asyncio
import faulthandler
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any, TextIO

from core4 import discovery
from core4.attempts import perform_async
from core4.context import Ended
from core4.errors import UsageError
from core4.questions import Questions
from core4.worker import process, protocol
from core4.worker.keeper import CHANNEL
from core4.worker.page import Page
from core4.worker.protocol import TEXT_LIMIT, Message

TICK = 0.25  # seconds; a loop that is idle makes steps, too, so that standing still means blocked
THREADS = 64  # of `asyncio.to_thread`, for all jobs together
_FILES = 4  # read at once, at most
_UNSENT = 1024 * 1024  # bytes behind which progress, which is only the latest word, is not sent
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.0  # seconds between two rounds of cancelling what a job has left

_JOB: ContextVar[Job | None] = ContextVar("core4.inline", default=None)


def run() -> None:
    """Be the host until the worker is gone; for the keeper to call in a new process."""
    os.set_inheritable(CHANNEL, False)
    link = socket.socket(fileno=CHANNEL)
    received = _Received(link)
    while not (first := received.next()):
        pass
    page = Page(first[0][1])
    faulthandler.enable(page.trace_here(), all_threads=False)
    faulthandler.register(signal.SIGUSR1, page.fd, all_threads=False)
    os.register_at_fork(after_in_child=_leave_job)
    process.reseed()
    process.take_over_logging(_Handler())
    _route_streams()
    with asyncio.Runner() as runner:
        _note_steps(page)
        runner.run(_Host(link, received).serve())


def overhear() -> Callable[[], None]:
    """In an application's process: what is printed and logged in a job's code goes to its log.

    Returns what ends that.
    """
    before, handler = (sys.stdout, sys.stderr), _Overhear()
    ours = _Stream("stdout", sys.stdout), _Stream("stderr", sys.stderr)
    sys.stdout, sys.stderr = ours
    logging.getLogger().addHandler(handler)

    def end() -> None:
        logging.getLogger().removeHandler(handler)
        if (sys.stdout, sys.stderr) == ours:  # else somebody has put theirs above
            sys.stdout, sys.stderr = before

    return end


def _leave_job() -> None:
    _JOB.set(None)


def _route_streams() -> None:
    """Let what is printed find its job; handlers that the jobs' modules have made on import, too."""
    streams = {sys.stdout: _Stream("stdout", sys.stdout), sys.stderr: _Stream("stderr", sys.stderr)}
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                handler.setStream(streams[handler.stream])
    sys.stdout, sys.stderr = streams[sys.stdout], streams[sys.stderr]


class Job:
    """One job on the loop: what it says, and the tasks that are its own."""

    def __init__(self, number: int, writer: asyncio.StreamWriter, log_limit: int) -> None:
        self.number = number
        self.tasks: set[asyncio.Task[Any]] = set()
        self.records = process.Records(self._log, ())
        self._writer = writer
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._host = os.getpid()
        self._left = log_limit  # characters; the worker counts more, and so cuts before this does
        self._lines = {"stdout": "", "stderr": ""}  # the last ones, not ended yet
        self._printing = threading.Lock()
        self.questions = Questions(self.send)
        self._ended = False

    def send(self, message: Message) -> None:
        """Send a frame; never waits, from any thread."""
        if "progress" in message and self._writer.transport.get_write_buffer_size() > _UNSENT:
            return
        data = protocol.encode(message)
        if threading.get_ident() == self._thread:
            self._write(data)
        else:
            self._loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        forked = os.getpid() != self._host  # a child of the job has no voice here
        if not self._ended and not forked and not self._writer.is_closing():
            self._writer.write(data)

    def enqueue(self, name: str, args: Mapping[str, Any]) -> str:
        """Enqueue a job and wait for its id; not on the loop itself.

        Raises: UsageError on the loop; EnqueueRefused.
        """
        if threading.get_ident() == self._thread:
            raise UsageError(
                "this would stop the loop for all jobs on it: use `await self.enqueue_async(...)`"
            )
        return self.questions.enqueue(name, args).result()

    def _log(self, message: Message) -> None:
        """Send a record of the job, within its limit."""
        record = message["log"]
        exception = record.get("exception", {"info": "", "text": []})
        if self._has_room(len(record["message"]) + sum(map(len, (exception["info"], *exception["text"])))):
            self.send(message)

    def print(self, source: str, text: str) -> None:
        """Send the lines that `text` completes, within the job's limit."""
        with self._printing:
            whole, newline, rest = (self._lines[source] + text).rpartition("\n")
            if len(rest) > TEXT_LIMIT:
                whole, newline, rest = whole + newline + rest, "", ""
            self._lines[source] = rest
            self._say(source, whole + newline)

    def _say(self, source: str, text: str) -> None:
        for begin in range(0, len(text), TEXT_LIMIT):
            piece = text[begin : begin + TEXT_LIMIT]
            if self._has_room(len(piece)):
                self.send({"output": {"source": source, "text": piece}})

    def _has_room(self, size: int) -> bool:
        if self._left <= 0:
            return False
        self._left -= size
        return True

    def flush(self) -> None:
        """Send lines that were not ended."""
        with self._printing:
            for source, rest in self._lines.items():
                self._say(source, rest)
                self._lines[source] = ""

    async def close(self) -> None:
        """Send what is left and hang up."""
        self._ended = True
        self.questions.close()
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # the worker has hung up itself


class _Host:
    def __init__(self, link: socket.socket, received: _Received) -> None:
        self._link, self._received = link, received
        self._attending: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(_make_task)  # type: ignore[arg-type]  # it is not asked for futures
        loop.set_exception_handler(_say_whose_error)
        loop.set_default_executor(ThreadPoolExecutor(THREADS))
        # Ctrl-C is for the worker; a job that sends the signal to itself must not end the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._link.setblocking(False)
        loop.add_reader(self._link, self._obey)
        self._say({"ready": True})
        while True:
            await asyncio.sleep(TICK)

    def _obey(self) -> None:
        for message, fd in self._received.next():
            task = asyncio.create_task(self._attend(message["start"], socket.socket(fileno=fd)))
            self._attending.add(task)
            task.add_done_callback(self._attending.discard)

    def _say(self, message: Message) -> None:
        # A few bytes that the worker reads at once: it does not have to wait.
        self._link.sendall(protocol.encode(message))

    async def _attend(self, number: int, sock: socket.socket) -> None:
        await attend(number, sock)
        self._say({"ended": number})


async def attend(number: int, sock: socket.socket, locate: process.Locate = discovery.locate) -> None:
    """One job on this loop, from its order, which comes over `sock`, to its end."""
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        await _attend(number, reader, writer, locate)
    finally:
        writer.close()  # an application that ends may cancel this


async def _attend(
    number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, locate: process.Locate
) -> None:
    order = await protocol.read(reader)
    job = Job(number, writer, order["log_limit"] if order else 0)
    if order is not None:
        main = _begin(job, order, locate)
        listener = asyncio.create_task(_listen(reader, job, main))
        await asyncio.wait({main})
        ended = _ended(main)
        if ended.kind == "failed":
            job.records.tell_held()
        job.flush()
        job.send(process.report_of(ended))
        await _end_rest(job)
        job.flush()
        listener.cancel()
    await job.close()


def _begin(job: Job, order: Message, locate: process.Locate) -> asyncio.Task[Ended]:
    context = copy_context()
    context.run(_JOB.set, job)
    return asyncio.create_task(_attempt(job, order, locate), context=context)


async def _attempt(job: Job, order: Message, locate: process.Locate) -> Ended:
    try:
        found = locate(order["entry"])
    except Exception as error:
        return Ended.failed(error, discovery.users_frames(error.__traceback__))
    job.records.own = process.hear_all_of(order["job"]["name"], found)
    context = process.context_of(order, job.send, lambda: job.questions)
    context = replace(context, enqueue=job.enqueue)
    return await perform_async(found, context, result_limit=order["result_limit"])


def _ended(main: asyncio.Task[Ended]) -> Ended:
    try:
        return main.result()
    except BaseException as error:  # cancelled before its first step
        return Ended.failed(error, None)


async def _listen(reader: asyncio.StreamReader, job: Job, main: asyncio.Task[Ended]) -> None:
    """What the worker says while the job runs; that it hangs up means cancel, too."""
    while (message := await protocol.read(reader)) is not None and "cancel" not in message:
        job.questions.take(message)
    job.questions.close()
    main.cancel()


async def _end_rest(job: Job) -> None:
    """Cancel the tasks that a job has left, until none is left; who refuses has the worker to deal with."""
    pause = _FIRST_PAUSE
    while left := set(job.tasks):
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=pause)
        pause = min(pause * 2, _LAST_PAUSE)


class _Task(asyncio.Task[Any]):
    """A task that knows whose it is."""

    job: Job | None = None


def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **more: Any) -> _Task:
    task = _Task(coro, loop=loop, **more)
    context = more.get("context")
    job = task.job = context.get(_JOB) if context is not None else _JOB.get()
    if job is not None:
        job.tasks.add(task)
        task.add_done_callback(job.tasks.discard)
    return task


def _say_whose_error(loop: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
    """Asyncio's complaint about a task becomes the log of its job: it may come in any job's step."""
    job = getattr(what.get("task") or what.get("future"), "job", None)
    token = _JOB.set(job or _JOB.get())
    try:
        loop.default_exception_handler(what)
    finally:
        _JOB.reset(token)


def _note_steps(page: Page) -> None:
    """Have every step of the loop noted on the page.

    All that a loop does is the run of a handle: steps of tasks, callbacks, timers, readers. There is no
    public place to look at them all; this process is ours alone.
    """
    handles: Any = asyncio.Handle
    run_handle = handles._run
    host = os.getpid()

    def run_noted(handle: Any) -> None:
        if os.getpid() != host:
            os._exit(1)  # a forked child of a job that came back to the loop, which is not its own
        job = handle._context.get(_JOB)
        page.begin(job.number if job else 0)
        try:
            run_handle(handle)
        except (SystemExit, KeyboardInterrupt) as error:
            # A task has it as its exception, too; the loop goes on for the others.
            logging.getLogger(__name__).error("a task ended by %r", error)
        finally:
            page.end()

    handles._run = run_noted


class _Received:
    """What comes over the link: messages, each with a file."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._decoder = protocol.Decoder()
        self._files: deque[int] = deque()

    def next(self) -> list[tuple[Message, int]]:
        """What has come; ends the process if the worker is gone."""
        files = array.array("i")
        space = socket.CMSG_SPACE(_FILES * files.itemsize)
        try:
            data, extra, _, _ = self._link.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return []
        for level, kind, content in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                files.frombytes(content[: len(content) - len(content) % files.itemsize])
        self._files.extend(files)
        if not data:
            os._exit(0)
        return [(message, self._files.popleft()) for message in self._decoder.feed(data)]


class _Handler(logging.Handler):
    """Records become the log of the job whose code this is; others go to the worker's own."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            job = _JOB.get()
            if job is not None:
                job.records.take(record)
            elif record.levelno >= logging.INFO:
                print(f"{record.levelname} {record.getMessage()}", file=sys.__stderr__)
        except Exception:
            self.handleError(record)


class _Overhear(_Handler):
    """The same beside an application's own handlers: what belongs to no job is theirs alone.

    If there are none, warnings go to standard error, as they would without this one.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if _JOB.get() is not None:
            super().emit(record)
        elif (last := logging.lastResort) and record.levelno >= last.level and self._is_alone(record.name):
            last.handle(record)

    def _is_alone(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(each is not self for each in logger.handlers):
                return False
            logger = logger.parent  # all of them propagate, or the record had not come here
        return True


class _Stream(io.TextIOBase):
    """Standard output or error: what a job prints becomes its log."""

    def __init__(self, source: str, below: TextIO) -> None:
        self._source, self._below = source, below
        self.buffer = _Bytes(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def write(self, text: str) -> int:
        job = _JOB.get()
        if job is None:
            return self._below.write(text)
        job.print(self._source, text)
        return len(text)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._below.flush()

    def fileno(self) -> int:
        """The descriptor below, which all jobs share: what is written there goes to the worker's own log."""
        return self._below.fileno()

    def close(self) -> None:
        """Stays open: it is not one job's to close."""


class _Bytes(io.RawIOBase):
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)

    def writable(self) -> bool:
        return True
