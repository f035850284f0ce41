"""The memory that the host of inline jobs shares with its worker: whose step it takes, and its last words.

The host writes, the worker reads: it sees that a loop stands still, and in whose code, even if that holds
Python's lock. Loads nothing but the interpreter.
"""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

_SIZE = mmap.PAGESIZE
_STEPS, _JOB = 0, 1  # words of eight bytes
_TRACE_LIMIT = 64 * 1024


class Look(NamedTuple):
    """The beginnings and ends of steps so far, and the number of the job that takes one, 0 for none."""

    steps: int
    job: int


class Page:
    """One page in a file without a name, and behind it room for a traceback."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> Page:
        """A new one; its `fd` is for the other side."""
        fd = os.memfd_create("core4-inline", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def begin(self, job: int) -> None:
        """A step of this job begins, or one of nobody's (0)."""
        self._words[_JOB] = job
        self._words[_STEPS] += 1

    def end(self) -> None:
        """The step is done."""
        self._words[_STEPS] += 1
        self._words[_JOB] = 0

    def look(self) -> Look:
        """Where the host is."""
        return Look(self._words[_STEPS], self._words[_JOB])

    def trace_here(self) -> int:
        """The file to which the host's traceback is to be written; its position is behind the page."""
        os.lseek(self.fd, _SIZE, os.SEEK_SET)
        return self.fd

    def trace(self) -> str:
        """What has been written there."""
        return os.pread(self.fd, _TRACE_LIMIT, _SIZE).decode("utf-8", "backslashreplace")

    def close(self) -> None:
        """Give it back."""
        self._words.release()
        self._map.close()
        os.close(self.fd)
