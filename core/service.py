"""What every daemon shares: its log, its signals, and that it never outlives the one who started it.

Run as ``python -m core4.service PARENT COMMAND...`` it becomes COMMAND, bound to the life of PARENT.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from core4 import identifiers

if TYPE_CHECKING:
    import asyncio

READY = "ready"  # the event that each daemon logs once it does its work
YOUNG = 20_000  # objects that are made before Python looks for cycles among them

T = TypeVar("T")

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^\s/@]*(?::[^\s@]*)?@", re.IGNORECASE)


def setup_logging(level: str = "INFO", form: str = "auto", stream: IO[str] | None = None) -> None:
    """Log to `stream` (stderr): one line per event, as text or as JSON (`form`).

    With ``auto`` it is text for people at a terminal and JSON for whatever collects it.
    """
    handler = logging.StreamHandler(stream)
    text = form == "text" or (form == "auto" and handler.stream.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # What requests have done is told by our own events.
    for noisy in ("aiohttp.access", "pymongo", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def ready(log: logging.Logger, **fields: Any) -> None:
    """Say that this process does its work from now on."""
    log.info(READY, extra=fields)


class TextFormatter(logging.Formatter):
    """``time level logger event name=value ...``; line breaks and credentials do not get through."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        event = _one_line(record.getMessage())
        line = f"{_timestamp(record)} {record.levelname:<7} {record.name} {event}{fields}"
        trace = self._trace(record)
        return masked(line + (f"\n{trace}" if trace else ""))

    def _trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(TextFormatter):
    """One JSON object per line, with the event, its fields and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if trace := self._trace(record):
            entry["traceback"] = trace
        return masked(json.dumps(entry, default=str, ensure_ascii=False))


def _timestamp(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """Whom it is about, then what it says; a handler is called by whoever logs, so that is still known."""
    said = {name: value for name, value in vars(record).items() if name not in _PLAIN}
    return {**identifiers.bound(), **said}


def _word(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[^\s\"'=]+", text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def masked(line: str) -> str:
    """`line` without the credentials of any URL in it."""
    return _CREDENTIALS.sub(r"\g<scheme>***@", line) if "://" in line else line


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run what a daemon does, to its end, on an event loop of its own."""
    import uvloop

    # What is imported by now stays: it was looked through whenever a batch of documents was read.
    gc.freeze()
    gc.set_threshold(YOUNG)
    return uvloop.run(main)


def stop_on_signals(again: Callable[[], None] | None = None) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; every later one calls `again`.

    Needs a running loop, in the main thread.
    """
    import asyncio

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
        elif again:
            again()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, as a child that is killed when this process ends.

    Args:
        options: those of `subprocess.Popen`.

    Raises:
        RuntimeError: not called in the main thread; the kernel takes the end of the starting
            thread for the end of the parent.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children that die with their parent are started in its main thread")
    # -P: a file in the working folder must not stand in for a module of the standard library.
    binder = [sys.executable, "-P", "-m", "core4.service", str(os.getpid())]
    return subprocess.Popen([*binder, *command], start_new_session=True, **options)


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ask `process` to stop, and kill it after `patience` seconds."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail_of(path: Path, size: int = 2000) -> str:
    """The end of a log file, for an error message; empty if there is none."""
    try:
        return path.read_bytes()[-size:].decode(errors="replace").strip()
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Become the command of `arguments`, bound to the life of the parent they name."""
    parent, command = int(arguments[0]), list(arguments[1:])
    if sys.platform != "linux":
        return _watch(parent, command)
    _die_with_parent()
    if os.getppid() == parent:
        os.execvp(command[0], command)
    return 1  # the parent ended before the kernel was told


def hide_memory() -> None:
    """Processes of the same user, as jobs are, can read neither memory nor environment of this one.

    Without effect where the kernel does not offer it.
    """
    if sys.platform == "linux":
        set_dumpable = 4
        _prctl(set_dumpable, 0)


def _die_with_parent() -> None:
    # Here and not between fork and exec in the parent, where its threads may hold any lock.
    set_death_signal = 1
    _prctl(set_death_signal, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _watch(parent: int, command: Sequence[str]) -> int:
    """The same where the kernel does not help: stay in between and look."""
    child = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    while os.getppid() == parent:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    child.kill()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
