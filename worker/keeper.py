"""The keeper: parent of one job process, and the end of everything that process leaves behind.

It is the subreaper of its job: whatever the job starts, double forks and new sessions included, becomes
the keeper's child at the latest when its own parent ends. When the job ends, or the worker does, the keeper
kills all of it before it says so. Forked by the launcher; single-threaded; knows nothing of jobs.

On the control socket the worker sends `TERM` or `KILL`; the keeper sends ``{"pid": ..., "keeper": ...}``
and at the end ``{"exit": code or null, "signal": number or null, "maxrss": KiB}``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import traceback
from collections.abc import Callable
from typing import NoReturn

from core4.worker import linux, protocol

TERM, KILL = b"T", b"K"

CHANNEL = 3  # the job's file descriptor for its frames
_MOST_FILES = 1 << 20

# What Python itself ignores at start.
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
_FIRST_PAUSE, _LAST_PAUSE = 20, 1000  # milliseconds between two rounds of killing


class Wakeup:
    """A readable file descriptor for SIGCHLD, so that one poll waits for everything."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def fileno(self) -> int:
        return self._read

    def clear(self) -> None:
        """Forget the signals so far."""
        try:
            while os.read(self._read, 512):
                pass
        except BlockingIOError:
            return


def keep(control: socket.socket, files: tuple[int, int, int], run: Callable[[], None]) -> NoReturn:
    """Fork the job process, which does `run`, and stay until nothing of it is left.

    `files` are the job's channel, standard output and standard error.
    """
    code = 1  # tells the launcher that processes of the job may be left
    try:
        os.setsid()
        for fd in linux.open_files() - {0, 1, 2, control.fileno(), *files}:
            os.close(fd)
        linux.adopt_orphans()
        wakeup = Wakeup()
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_job(keeper, files, run)
        for fd in files:
            os.close(fd)
        _Keeper(control, wakeup, pid).stay()
        code = 0
    finally:
        os._exit(code)


def _become_job(keeper: int, files: tuple[int, int, int], run: Callable[[], None]) -> NoReturn:
    code = 70  # the job's side itself failed
    try:
        linux.die_with(keeper)
        os.setsid()
        linux.forbid_new_privileges()
        channel, out, err = files
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(channel, CHANNEL)
        os.closerange(CHANNEL + 1, _MOST_FILES)
        reset_signals()
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def reset_signals() -> None:
    """The dispositions a fresh interpreter starts with."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP):
            continue
        try:
            signal.signal(number, signal.SIG_IGN if number in _IGNORED else signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # kept by the C library for itself
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class _Keeper:
    def __init__(self, control: socket.socket, wakeup: Wakeup, job: int) -> None:
        self._control, self._wakeup, self._job = control, wakeup, job
        self._end: protocol.Message | None = None
        self._killing = False
        self._worker_gone = False

    def stay(self) -> None:
        self._control.setblocking(False)
        self._say({"pid": self._job, "keeper": os.getpid()})
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        pause = _FIRST_PAUSE
        while self._reap():
            if self._killing:
                # Again and again: a process may have forked while the tree was read.
                linux.send_signal(linux.descendants(os.getpid()), signal.SIGKILL)
            ready = dict(poll.poll(pause if self._killing else None))
            pause = min(pause * 2, _LAST_PAUSE) if self._killing and not ready else _FIRST_PAUSE
            self._wakeup.clear()
            if self._control.fileno() in ready:
                self._listen()
                if self._worker_gone:
                    poll.unregister(self._control)
        self._say(self._end or {"exit": None, "signal": None, "maxrss": 0})

    def _reap(self) -> bool:
        """Collect who has ended; False when no child is left, and with it no descendant."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._job:
                code = os.waitstatus_to_exitcode(status)
                self._end = {
                    "exit": code if code >= 0 else None,
                    "signal": -code if code < 0 else None,
                    "maxrss": usage.ru_maxrss,
                }
                self._killing = True

    def _listen(self) -> None:
        try:
            orders = self._control.recv(64)
        except BlockingIOError:
            return
        except OSError:
            orders = b""
        if not orders:
            self._worker_gone = self._killing = True
        elif KILL in orders:
            self._killing = True
        elif TERM in orders:
            linux.send_signal(linux.descendants(os.getpid()), signal.SIGTERM)

    def _say(self, message: protocol.Message) -> None:
        try:
            self._control.sendall(protocol.encode(message))
        except OSError:
            return  # the worker is gone: nobody wants to know
