"""The job process: runs one attempt and reports it through its channel.

Forked by the keeper with the job's module already imported, or, for modules that start threads on import,
a fresh interpreter (``python -m core4.worker.process``). It has no credentials and no database: everything
it has to say goes through file descriptor 3 as frames.

in:   {"job": {id, name, args, attempt, options}, "entry": {target, module, qualname}, "result_limit": bytes},
      for the file of a task with {"script": path, "token": text}: all that it says carries that token;
      with "function" its source, which is run behind closed doors, see core4.worker.shipped;
      and for each question {"answer": number} with "enqueued": id, "returned": value, "raised": {...} or
      "refused": {reason, detail}
out:  {"log": {...}}, {"progress": {...}}, {"enqueue": {name, args}, "number": number}, {"call": the same}
      and {"drop": number}, of a call, any number of times, then one of
      {"complete": {"result": ...}}, {"failed": {"message", "traceback"}}, {"deferred": {"message"}}
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO

from core4 import discovery
from core4.attempts import Runnable, perform
from core4.context import Ended, JobContext, safe_repr
from core4.questions import Questions
from core4.worker import protocol, script
from core4.worker.keeper import CHANNEL
from core4.worker.protocol import TEXT_LIMIT, Message

Locate = Callable[[Mapping[str, Any]], Runnable]  # from an entry to what is to be called

SUPPRESSED = 1000  # records of libraries below INFO that are held back for the case of a failure
_LEVELS = ((50, "CRITICAL"), (40, "ERROR"), (30, "WARNING"), (20, "INFO"))


class Channel:
    """The way to the worker. A forked child of the job has none: it would mix its frames into the job's."""

    def __init__(self, fd: int) -> None:
        self._socket: socket.socket | None = socket.socket(fileno=fd)
        self.token: str | None = None  # of this one job, for all that is sent
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self.questions = Questions(self._ask)
        os.register_at_fork(after_in_child=self._detach)

    @property
    def attached(self) -> bool:
        """True in the job process itself."""
        return self._socket is not None

    def receive(self) -> Message | None:
        """The order of the worker, None if it is gone."""
        return protocol.receive(self._socket) if self._socket else None

    def send(self, message: Message) -> None:
        """Send a frame, waiting for the worker to take it. Does nothing in a forked child."""
        data = protocol.encode(message if self.token is None else {**message, "token": self.token})
        with self._lock:
            if self._socket is not None:
                self._socket.sendall(data)

    def _ask(self, message: Message) -> None:
        self.send(message)
        with self._lock:
            if self._reader is None and self._socket is not None:
                # Only jobs that ask have a thread; it ends with the process.
                self._reader = threading.Thread(target=self._read, name="core4-answers", daemon=True)
                self._reader.start()

    def _read(self) -> None:
        with suppress(OSError, protocol.ProtocolError):
            while (message := self.receive()) is not None:
                self.questions.take(message)
        self.questions.close()

    def _detach(self) -> None:
        self._lock = threading.Lock()
        self.questions = Questions(self.send)
        self.questions.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Records:
    """The records of one job on their way to its log, through `send`.

    What libraries say below INFO is held back, and told once if it comes to the worst: the last of it goes
    ahead of a CRITICAL record, or of the job's failure. `own` are the loggers of the job itself.
    """

    def __init__(self, send: Callable[[Message], None], own: Collection[str]) -> None:
        self._send = send
        self.own = own
        self._held: deque[Message] = deque(maxlen=SUPPRESSED)

    def take(self, record: logging.LogRecord) -> None:
        """Send a record, or hold it back."""
        if record.levelno < logging.INFO and not self.says_itself(record):
            self._held.append({"log": _packed(record)})
            return
        if record.levelno >= logging.CRITICAL:
            self.tell_held()
        self._send({"log": _packed(record)})

    def tell_held(self) -> None:
        """Send what was held back, once."""
        while self._held:
            self._send(self._held.popleft())

    def says_itself(self, record: logging.LogRecord) -> bool:
        """True if the record is the job's own and no library's."""
        return any(record.name == name or record.name.startswith(name + ".") for name in self.own)


class ChannelHandler(logging.Handler):
    """Sends the records of the job to its worker; those of the job's forked children go to standard error."""

    def __init__(self, channel: Channel, own: Collection[str]) -> None:
        super().__init__()
        self._channel = channel
        self.records = Records(channel.send, own)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._channel.attached:
                self.records.take(record)
            elif record.levelno >= logging.INFO or self.records.says_itself(record):
                print(f"{record.levelname} {record.getMessage()}", file=sys.stderr)
        except Exception:
            self.handleError(record)


def run(fd: int = CHANNEL, locate: Locate = discovery.locate) -> None:
    """Run the job that the worker orders on `fd`; returns when all is reported."""
    os.set_inheritable(fd, False)  # programs that the job starts have no part in it
    channel = Channel(fd)
    order = channel.receive()
    if order is None:
        return
    channel.token = order.get("token")
    sys.excepthook = sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    reseed()
    ended = _attempt(channel, order, locate)
    if ended.kind == "failed":
        _tell_held()
    _flush()
    if channel.attached:
        channel.send(report_of(ended))
    elif ended.kind == "failed":  # a forked child that came back out of `execute`
        print("".join(ended.traceback) or ended.message, file=sys.stderr)


def _attempt(channel: Channel, order: Message, locate: Locate) -> Ended:
    name = order["job"]["name"]
    take_over_logging(ChannelHandler(channel, hear_all_of(name)))
    if "function" in order:
        return _call_shipped(channel, order)

    def run_body(found: Runnable) -> Ended:
        # Once more: the import may have set up a logging of its own.
        take_over_logging(ChannelHandler(channel, hear_all_of(name, found)))
        context = context_of(order, channel.send, lambda: channel.questions)
        return perform(found, context, result_limit=order["result_limit"])

    try:
        if "script" in order:
            return script.attempt(order["script"], run_body)
        found = locate(order["entry"])
    except BaseException as error:
        return Ended.failed(error, discovery.users_frames(error.__traceback__))
    return run_body(found)


def _call_shipped(channel: Channel, order: Message) -> Ended:
    from core4.worker import shipped  # only for those that need its doors

    try:
        function, args = shipped.made(order)
    except BaseException as error:
        return Ended.failed(error, shipped.own_frames(error.__traceback__))
    context = replace(context_of(order, channel.send, lambda: channel.questions), args=args)
    return perform(function, context, result_limit=order["result_limit"])


def context_of(
    order: Message, send: Callable[[Message], None], questions: Callable[[], Questions]
) -> JobContext:
    """The context of the job that the worker orders; what it asks for goes through `questions`."""
    job = order["job"]

    def report(value: float, message: str) -> None:
        send({"progress": {"value": value, "message": message[:TEXT_LIMIT]}})

    return JobContext(
        job["id"],
        job["name"],
        job["args"],
        job["attempt"],
        job["options"],
        report,
        lambda name, args: questions().enqueue(name, args).result(),
        lambda name, args: questions().call(name, args),
    )


def report_of(ended: Ended) -> Message:
    """The frame that tells how an attempt ended."""
    if ended.kind == "complete":
        return {"complete": {"result": ended.result}}
    return {ended.kind: {"message": ended.message, "traceback": list(ended.traceback)}}


def take_over_logging(handler: logging.Handler) -> None:
    """All records of this process go to `handler`, which decides what matters."""
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG)
    logging.disable(logging.NOTSET)


def hear_all_of(name: str, found: Runnable | None = None) -> set[str]:
    """The loggers through which the job of this name speaks itself, from now on without a level."""
    own = {
        str(each) for each in (name, getattr(found, "qual_name", name), getattr(found, "__module__", name))
    }
    for each in own:
        logging.getLogger(each).setLevel(logging.DEBUG)
    return own


def _tell_held() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ChannelHandler):
            handler.records.tell_held()


def _packed(record: logging.LogRecord) -> Message:
    level = next((name for number, name in _LEVELS if record.levelno >= number), "DEBUG")
    packed: Message = {
        "epoch": record.created,
        "level": level,
        "message": record.getMessage()[: TEXT_LIMIT + 1],  # one more, so that the worker sees that it is cut
    }
    if record.exc_info and record.exc_info[1] is not None:
        text = traceback.format_exception(*record.exc_info)
        packed["exception"] = {
            "info": safe_repr(record.exc_info[1]),
            "text": [line[:TEXT_LIMIT] for line in text[-200:]],
        }
    return packed


def prepare_streams() -> None:
    """Print line by line, so that output is seen while the job runs; and no text fails to be printed.

    Done once at the start of an interpreter: a stream made for a file cannot be changed any more when its
    descriptor has become a pipe.
    """
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None or not hasattr(stream, "reconfigure"):
            stream = os.fdopen(fd, "w", closefd=False)
            setattr(sys, name, stream)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _flush() -> None:
    streams: tuple[TextIO | None, ...] = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            continue  # closed by the job


def reseed() -> None:
    """No two jobs draw the same numbers, although they are copies of one process."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def main() -> None:
    """Entry of a fresh interpreter; the keeper has prepared everything but Python itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    discovery.see_working_folder()
    code = 70
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


if __name__ == "__main__":
    main()
