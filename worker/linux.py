"""What the kernel does for us that Python does not offer: prctl, and the tree of processes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SET_DEATH_SIGNAL, _SET_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which is this one's parent, ends; at once if it has."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, however it was detached."""
    _prctl(_SET_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No set-uid program below this process: what changes its user could not be killed any more."""
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)


@dataclass(frozen=True)
class Process:
    """One living process; with its start time (in clock ticks) a pid is unmistakable."""

    pid: int
    parent: int
    start: int


def threads() -> int:
    """Number of threads of this process, those that Python does not know included."""
    return len(os.listdir("/proc/self/task"))


def open_files() -> frozenset[int]:
    """The file descriptors of this process."""
    return frozenset(fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd))


def descendants(root: int) -> list[Process]:
    """All living processes below `root`."""
    return _below(root, _families())


def crowds(roots: Iterable[int]) -> dict[int, int]:
    """How many living processes there are below each of `roots`; those of the machine are read once."""
    families = _families()
    return {root: len(_below(root, families)) for root in roots}


def _families() -> Mapping[int, list[Process]]:
    """All living processes by their parent."""
    families: dict[int, list[Process]] = {}
    for process in _processes().values():
        families.setdefault(process.parent, []).append(process)
    return families


def _below(root: int, families: Mapping[int, list[Process]]) -> list[Process]:
    found: list[Process] = []
    waiting = [root]
    while waiting:
        children = families.get(waiting.pop(), [])
        found += children
        waiting += [child.pid for child in children]
    return found


def send_signal(processes: Iterable[Process], number: int) -> None:
    """Send a signal to each that still lives; a pid that was given to another process is left alone."""
    for process in processes:
        try:
            _send(process, number)
        except (ProcessLookupError, PermissionError):
            continue


def _send(process: Process, number: int) -> None:
    try:
        handle = os.pidfd_open(process.pid)
    except OSError as error:
        if isinstance(error, ProcessLookupError):
            raise
        os.kill(process.pid, number)  # a kernel without pidfds
        return
    try:
        now = _read(process.pid)
        if now is not None and now.start == process.start:
            signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def _processes() -> Mapping[int, Process]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := _read(int(name))) is not None:
            found[process.pid] = process
    return found


def _read(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()  # the name before it may hold anything
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[1]), int(fields[19]))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the one that listed them
        return False
    return True
