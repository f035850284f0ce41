"""What a job writes: bytes become lines, lines get numbers, numbers go to the log store in batches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from core4 import jobs
from core4.attendance import TROUBLE
from core4.config import Settings
from core4.jobs import Job
from core4.logs import Line
from core4.waits import heard
from core4.worker.protocol import TEXT_LIMIT

log = logging.getLogger(__name__)

FULL_LINES, FULL_BYTES = 100, 64 * 1024  # a batch of this size is stored at once
MOST_LINES, MOST_BYTES = 1000, 1024 * 1024  # that may wait in memory
CHUNK_BYTES = 256 * 1024  # in one stored chunk, of MOST_LINES at most
GATHER = 0.02  # seconds; so a short job's first and last lines are one write
GOES_ON, CUT = " [line goes on]", " [... cut]"

_AROUND_LINE, _AROUND_TEXT = 64, 16  # bytes that a line and a text of its traceback take beside their letters
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0  # seconds between two tries to store a batch


class Splitter:
    """Cuts what a job prints into lines of text."""

    def __init__(self, limit: int = TEXT_LIMIT) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes; one that is too long comes in pieces."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        found: list[str] = []
        for line in lines:
            found += self._pieces(line)
        while len(self._rest) > self._limit:
            found.append(self._piece(self._rest) + GOES_ON)
        return found

    def end(self) -> list[str]:
        """The last line, if it was not terminated."""
        rest, self._rest = self._rest, bytearray()
        return [readable(rest)] if rest else []

    def _pieces(self, line: bytearray) -> list[str]:
        pieces = []
        while len(line) > self._limit:
            pieces.append(self._piece(line) + GOES_ON)
        return [*pieces, readable(line.removesuffix(b"\r"))]

    def _piece(self, line: bytearray) -> str:
        """Take the longest allowed beginning off `line`, in front of a character, not inside of it."""
        end = self._limit
        while end > self._limit - 4 and line[end] & 0xC0 == 0x80:
            end -= 1
        piece = readable(line[:end])
        del line[:end]
        return piece


def readable(data: bytes | bytearray) -> str:
    """Bytes as text that can be stored: what is not UTF-8, and NUL, is escaped."""
    return data.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


class Lines(Protocol):
    """Where lines are stored."""

    async def append(self, job: Job, hostname: str, lines: Sequence[Line]) -> None:
        """Store some; repeating it stores nothing twice."""


class JobLog:
    """The log of one attempt. `write` numbers and keeps lines, `run` stores them, `close` ends both."""

    def __init__(self, store: Lines, job: Job, hostname: str, settings: Settings) -> None:
        self._store, self._job, self._hostname = store, job, hostname
        self._flush_every, self._left = settings.log_flush, settings.log_cap
        self._cap = settings.log_cap
        self._seq = jobs.first_seq(job.fence) - 1
        self._waiting: deque[Line] = deque()
        self._bytes = 0
        self._any, self._full, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._room.set()
        self._closing = False

    @property
    def last_seq(self) -> int:
        """Number of the last line."""
        return self._seq

    def write(
        self,
        level: str,
        message: str,
        *,
        source: str = "log",
        epoch: float | None = None,
        exception: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a line of the worker's own: it is never cut off by the cap."""
        text = message.replace("\0", "\\x00")
        if len(text) > TEXT_LIMIT:
            text = text[:TEXT_LIMIT] + CUT
        self._seq += 1
        line = Line(self._seq, time.time() if epoch is None else epoch, level, text, source, exception)
        self._waiting.append(line)
        self._bytes += _size(text, exception)
        self._any.set()
        if len(self._waiting) >= FULL_LINES or self._bytes >= FULL_BYTES:
            self._full.set()
        if self._is_crowded():
            self._room.clear()

    def _is_crowded(self) -> bool:
        return len(self._waiting) >= MOST_LINES or self._bytes >= MOST_BYTES

    @property
    def cut(self) -> bool:
        """True if the cap is reached: nothing more of the job is kept."""
        return self._left <= 0

    def write_output(self, level: str, message: str, **more: Any) -> None:
        """Add a line of the job; behind the cap all but a marker is dropped."""
        if self.cut:
            return
        # A line without text takes its room, too: who prints nothing but line feeds must reach the cap.
        self._left -= _size(message, more.get("exception"))
        self.write(level, message, **more)
        if self._left <= 0:
            self.write(
                "WARNING",
                f"output cut: more than {self._cap} bytes, with what each line takes; the rest is not kept",
            )

    async def room(self) -> None:
        """Wait until the store keeps up: whoever reads a job's output stops reading meanwhile."""
        await self._room.wait()

    async def run(self) -> None:
        """Store lines until closed: soon after a silence, then every `log_flush` seconds."""
        stored_at = float("-inf")
        while True:
            await self._any.wait()
            pause = max(stored_at + self._flush_every - time.monotonic(), GATHER)
            if not self._closing:
                await heard(self._full, pause)
            stored_at = time.monotonic()
            while self._waiting:
                await self._store_batch(self._take())
            if self._closing:
                return
            self._any.clear()
            self._full.clear()

    async def close(self, writer: asyncio.Task[None], patience: float) -> None:
        """Wait up to `patience` seconds until all lines are stored; what is not by then is lost."""
        self._closing = True
        self._any.set()
        self._full.set()
        _, pending = await asyncio.wait({writer}, timeout=patience)
        if pending:
            writer.cancel()
            log.warning("job.log_lost", extra={"job_id": str(self._job.id), "lines": len(self._waiting)})

    def _take(self) -> list[Line]:
        batch: list[Line] = []
        size = 0
        while self._waiting and len(batch) < MOST_LINES and size < CHUNK_BYTES:
            line = self._waiting.popleft()
            batch.append(line)
            size += _size(line.message, line.exception)
        self._bytes -= size
        return batch

    async def _store_batch(self, batch: list[Line]) -> None:
        """Store one batch, however often it takes: the store knows a repeated one by its first number."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._store.append(self._job, self._hostname, batch)
            except TROUBLE as error:
                log.warning("job.log_delayed", extra={"job_id": str(self._job.id), "error": str(error)[:200]})
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)
            except Exception:
                # One batch that cannot be stored must not hold up the job.
                log.exception("job.log_refused", extra={"job_id": str(self._job.id)})
                break
            else:
                break
        if not self._is_crowded():
            self._room.set()


def _size(message: str, exception: Mapping[str, Any] | None) -> int:
    """About the bytes that a line takes, here and in the database: its texts, and what is around each."""
    size = len(message) + _AROUND_LINE
    if exception is not None:
        size += len(exception["info"]) + sum(len(text) + _AROUND_TEXT for text in exception["text"])
    return size
