"""The launcher: imports the job modules once and forks a keeper, and with it a job, on demand.

A small single-threaded process beside the worker, started before the worker has any thread or connection:
what is forked from it is fast and holds no credentials. Imports neither asyncio nor a driver.

``python -m core4.worker.launcher FD`` where FD is a Unix stream socket to the worker.

in:   {"op": "load", "targets": [...], "fresh": [...]}   import them; those in `fresh` in a probe only
      {"op": "start", "fresh": bool, "inline": bool} with four file descriptors: channel, stdout, stderr,
      control
out:  {"loading": target} and {"target": {...}} for each, then {"loaded": n}; nothing for a start, whose
      keeper speaks for itself. The end of the socket ends the launcher; running jobs go on.
"""

from __future__ import annotations

import array
import gc
import os
import select
import signal
import socket
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from core4 import discovery
from core4.discovery import Found, Problem
from core4.worker import keeper, linux, process, protocol
from core4.worker.protocol import Message

IMPORT_TIMEOUT = 60.0  # seconds that the import of one target may take
_FILES = 4  # that come with a start
_PAUSE = 100  # milliseconds between two looks at strays that do not die


class Launcher:
    """Serves one worker through `link` until that ends."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._decoder = protocol.Decoder()
        self._received: deque[int] = deque()
        self._keepers: set[int] = set()
        self._strays = False
        self._wakeup = keeper.Wakeup()

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            ready = dict(poll.poll(_PAUSE if self._strays else None))
            self._wakeup.clear()
            self._reap()
            if self._link.fileno() not in ready:
                continue
            for message in self._receive():
                self._obey(message)

    def _receive(self) -> list[Message]:
        space = socket.CMSG_SPACE(_FILES * array.array("i").itemsize)
        data, extra, _, _ = self._link.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                files = array.array("i")
                files.frombytes(content[: len(content) - len(content) % files.itemsize])
                self._received.extend(files)
        if not data:
            os._exit(0)  # the worker is gone; the keepers see that themselves
        return self._decoder.feed(data)

    def _obey(self, message: Message) -> None:
        if message["op"] == "load":
            self._load(message["targets"], set(message["fresh"]))
        else:
            self._start(_host if message["inline"] else _execute if message["fresh"] else process.run)

    def _send(self, message: Message) -> None:
        self._link.sendall(protocol.encode(message))

    # ------------------------------------------------------------------ loading

    def _load(self, targets: list[str], fresh: set[str]) -> None:
        for target in targets:
            self._send({"loading": target})
            report = self._probe(target)
            if target in fresh:
                report.setdefault("why", "its import ended or disturbed the launcher")
            if report["entries"] and not report.get("why"):
                self._import(target)
            self._send({"target": report})
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection in a job touches, and so copies, its pages
        self._send({"loaded": len(targets)})

    def _import(self, target: str) -> None:
        discovery.load([target])
        if linux.threads() > 1:
            # A fork is not safe any more; the worker starts another launcher and loads this one fresh.
            os._exit(1)

    def _probe(self, target: str) -> Message:
        """Import a target in a child first: it may crash, hang or start threads."""
        read, write = os.pipe()
        launcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _report_import(target, launcher, write)
        os.close(write)
        try:
            report, in_time = self._read_report(read)
        finally:
            os.close(read)
        status = self._end_probe(pid)
        if report is not None:
            return report
        return _failed(target, _how(status) if in_time else f"the import took over {IMPORT_TIMEOUT:g} s")

    def _read_report(self, source: int) -> tuple[Message | None, bool]:
        """What a probe says, and whether it ended in time. Ends with the worker, as everything here."""
        decoder = protocol.Decoder()
        deadline = time.monotonic() + IMPORT_TIMEOUT
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self._link, select.POLLRDHUP)
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(left * 1000))
            if self._link.fileno() in ready:
                os._exit(0)
            if source in ready:
                data = os.read(source, 1 << 20)
                if not data:
                    return None, True
                for report in decoder.feed(data):
                    return report, True
        return None, False

    def _end_probe(self, pid: int) -> int:
        linux.send_signal([one for one in linux.descendants(os.getpid()) if one.pid == pid], signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._reap()
        self._kill_strays()
        return os.waitstatus_to_exitcode(status)

    # ------------------------------------------------------------------ jobs

    def _start(self, run: Callable[[], None]) -> None:
        if len(self._received) < _FILES:
            raise protocol.ProtocolError("a start came without its files")
        channel, out, err, control = (self._received.popleft() for _ in range(_FILES))
        try:
            pid = os.fork()
        except OSError as error:
            with socket.socket(fileno=control) as said:
                said.sendall(protocol.encode({"error": f"fork: {error.strerror}"}))
            pid = -1
        else:
            if pid == 0:
                self._become_keeper((channel, out, err), control, run)
            os.close(control)
            self._keepers.add(pid)
        # At once: a later job must not hold the pipes of this one open.
        for fd in (channel, out, err):
            os.close(fd)

    def _become_keeper(self, files: tuple[int, int, int], control: int, run: Callable[[], None]) -> NoReturn:
        try:
            self._link.close()
            while self._received:  # files of jobs that are not started yet
                os.close(self._received.popleft())
            keeper.keep(socket.socket(fileno=control), files, run)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        """Collect keepers; one that did not end by itself has left its job's processes to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._strays = False
                return
            if pid == 0:
                break
            if pid in self._keepers and status != 0:
                self._strays = True
            self._keepers.discard(pid)
        if self._strays:
            self._kill_strays()

    def _kill_strays(self) -> None:
        """Kill every descendant that no keeper answers for."""
        mine = linux.descendants(os.getpid())
        kept = {one.pid for pid in self._keepers for one in linux.descendants(pid)} | self._keepers
        strays = [one for one in mine if one.pid not in kept]
        linux.send_signal(strays, signal.SIGKILL)
        self._strays = bool(strays)


def _host() -> None:
    """Become the host of inline jobs."""
    from core4.worker import inline  # asyncio is for the host alone

    inline.run()


def _execute() -> None:
    """Become a fresh interpreter that imports the job by itself."""
    os.set_inheritable(keeper.CHANNEL, True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "core4.worker.process"])


def _report_import(target: str, launcher: int, write: int) -> NoReturn:
    """In the probe: import the target, send what became of it, end."""
    try:
        linux.die_with(launcher)
        keeper.reset_signals()
        os.set_inheritable(write, False)
        known, files = set(sys.modules), linux.open_files()
        found = discovery.load([target])
        report = {
            "target": target,
            "entries": found.entries,
            "problems": [_packed(problem) for problem in found.problems],
            "files": _files_to_watch(target, known, found),
        }
        if why := _why_fresh(files):
            report["why"] = why
        with os.fdopen(write, "wb") as out:
            out.write(protocol.encode(report))
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(0)


def _why_fresh(files: frozenset[int]) -> str | None:
    """Why jobs of what was just imported cannot be forked from it, None if they can."""
    if linux.threads() > 1:
        return "its import starts threads"
    if linux.descendants(os.getpid()):
        return "its import starts processes"
    if linux.open_files() - files:
        return "its import opens files or connections"
    return None


def _files_to_watch(target: str, known: set[str], found: Found) -> list[str]:
    """The user's files behind a target: a change of one of them is a reason to load it again."""
    files = {target} if discovery.is_file(target) else set(_candidates(target))
    for name in sys.modules.keys() - known - {"__mp_main__"}:  # another name of the launcher itself
        files |= _sources(sys.modules[name])
    for problem in found.problems:
        files |= {line.split('"')[1] for line in problem.traceback if line.lstrip().startswith('File "')}
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return sorted(file for file in files if not file.startswith((*libraries, "<")))


def _sources(module: ModuleType) -> set[str]:
    file = getattr(module, "__file__", None)
    # A package's folder changes when a module is added to it.
    folders: Any = getattr(module, "__path__", ())
    return {str(path) for path in (file, *folders) if path}


def _candidates(target: str) -> list[str]:
    """Where a module may be or may appear."""
    path = Path(*target.split("."))
    roots = [Path(root) for root in sys.path if Path(root).is_dir()]
    return [str(root / one) for root in roots for one in (path.with_suffix(".py"), path)]


def _failed(target: str, error: str) -> Message:
    files = [target] if discovery.is_file(target) else _candidates(target)
    return {"target": target, "entries": [], "problems": [_packed(Problem(target, error))], "files": files}


def _how(code: int) -> str:
    if code < 0:
        return f"the import died with signal {-code} ({signal.Signals(-code).name})"
    return f"the import ended the process with exit code {code}"


def _packed(problem: Problem) -> Message:
    return {"target": problem.target, "error": problem.error, "traceback": list(problem.traceback)}


def main() -> None:
    """Run the launcher on the socket whose number is the first argument."""
    # Its end is the end of its worker's socket and nothing else: a Ctrl-C in the terminal and a TERM
    # for all processes of a service are the worker's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # the first three must be there, see keeper
        pass
    os.close(spare)
    process.prepare_streams()
    linux.adopt_orphans()
    discovery.see_working_folder()
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    Launcher(link).serve()


if __name__ == "__main__":
    main()
